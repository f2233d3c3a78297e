// A stand-in for libcudart and libcuda: tensor maps and the driver's entry points.
#include <cstdio>
#include <cstring>

#include "cudart.hpp"
#include "tensormap.hpp"

using namespace ptxsim;

extern "C" {
CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  auto bad = [](const char* why) {
    report_launch(std::string("cuTensorMapEncodeTiled: ") + why);
    return CUDA_ERROR_INVALID_VALUE;
  };
  if (rank < 1 || rank > 5) return bad("the rank must be 1 to 5");
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle > CU_TENSOR_MAP_SWIZZLE_128B ||
      type > CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return bad("this interleave, swizzle atom, type or NaN fill is not supported by ptxsim");
  if ((u64)out & 63) return bad("the tensor map must be 64-byte aligned");
  if ((u64)address & 15) return bad("the global address must be 16-byte aligned");
  TensorMap m{};
  m.magic = TensorMap::MAGIC;
  m.dtype = type;
  m.rank = rank;
  m.swizzle = swizzle;
  m.oob = fill;
  m.addr = (u64)address;
  for (u32 d = 0; d < rank; d++) {
    if (!dims[d] || dims[d] > 1ull << 32) return bad("a global dimension must be 1 to 2^32");
    if (!box[d] || box[d] > 256) return bad("a box dimension must be 1 to 256");
    if (!element_strides[d] || element_strides[d] > 8) return bad("an element stride must be 1 to 8");
    if (d && (strides[d - 1] % 16 || strides[d - 1] >= 1ull << 40))
      return bad("global strides must be multiples of 16 bytes, less than 2^40");
    m.dim[d] = dims[d];
    m.box[d] = box[d];
    m.estride[d] = element_strides[d];
    if (d) m.stride[d - 1] = strides[d - 1];
  }
  u32 row = box[0] * m.elem_bytes();
  if (row % 16) return bad("the inner box dimension must be a multiple of 16 bytes");
  if (swizzle && row > 16u << swizzle) return bad("the inner box dimension is larger than the swizzle span");
  memset(out, 0, sizeof *out);
  memcpy(out, &m, sizeof m);
  return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = strcmp(name, "cuTensorMapEncodeTiled") ? nullptr : (void*)&cuTensorMapEncodeTiled;
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : fail(cudaErrorSymbolNotFound);
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, result);
}
}
