#include "cuda/sm90/tensor_map.h"

namespace qwen_sparse::sm90 {
namespace {

// From the driver at run time, so that the module also loads where there is none.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cuda::check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
                "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("qwen_sparse: the driver has no cuTensorMapEncodeTiled; Hopper kernels need CUDA 12");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

}  // namespace

CUtensorMap tensor_map(const char* name, const Rows& rows, DType dtype, int64_t num_rows, int64_t num_heads,
                       int64_t head_dim, int box_rows, int box_panels) {
  constexpr cuuint32_t kPanel = 64;
  const cuuint64_t sizes[] = {kPanel, static_cast<cuuint64_t>(num_rows), static_cast<cuuint64_t>(head_dim) / kPanel,
                              static_cast<cuuint64_t>(num_heads)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(rows.row_stride) * 2, kPanel * 2,
                                static_cast<cuuint64_t>(rows.head_stride) * 2};
  const auto panels = static_cast<cuuint32_t>(box_panels > 0 ? box_panels : head_dim / kPanel);
  const cuuint32_t box[] = {kPanel, static_cast<cuuint32_t>(box_rows), panels, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      encoder()(&map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
                const_cast<void*>(rows.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  // A copy: the driver asks for an address that is a multiple of 64, and GCC (12, unoptimised) gives results to 16.
  if (status == CUDA_SUCCESS) return CUtensorMap{map};
  throw std::runtime_error(std::string("qwen_sparse: cuTensorMapEncodeTiled refuses ") + name + " (CUresult " +
                           std::to_string(status) + "): " + std::to_string(num_rows) + " rows of " +
                           std::to_string(num_heads) + " heads x " + std::to_string(head_dim) + ", row stride " +
                           std::to_string(rows.row_stride) + ", head stride " + std::to_string(rows.head_stride) +
                           " (elements)");
}

}  // namespace qwen_sparse::sm90
