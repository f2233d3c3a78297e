// Included by instantiations/, each of which defines both launches for one type and head size.
#pragma once

#include "cuda/sm80/select_groups/kernel.cuh"
#include "cuda/sm80/select_groups/launch.h"

namespace qwen_sparse::sm80::select_groups {

inline dim3 grid_of(const Args& args) {
  return dim3(static_cast<unsigned>(args.p.shape.num_kv_heads * args.num_splits * args.ctas_per_kv_head));
}

template <typename T, int kHeadDim>
void launch_normalizers(const Args& args, cudaStream_t stream) {
  normalizer_kernel<T, kHeadDim><<<grid_of(args), kWarps * 32, 0, stream>>>(args);
  cuda::check(cudaGetLastError(), "select_groups normalizers");
}

template <typename T, int kHeadDim>
void launch_shares(const Args& args, cudaStream_t stream) {
  share_kernel<T, kHeadDim><<<grid_of(args), kWarps * 32, 0, stream>>>(args);
  cuda::check(cudaGetLastError(), "select_groups shares");
}

}  // namespace qwen_sparse::sm80::select_groups

#define QWEN_SPARSE_INSTANTIATE_SELECT_GROUPS(T, kHeadDim)                                                          \
  template void qwen_sparse::sm80::select_groups::launch_normalizers<qwen_sparse::cuda::T, kHeadDim>(const Args&,   \
                                                                                                     cudaStream_t); \
  template void qwen_sparse::sm80::select_groups::launch_shares<qwen_sparse::cuda::T, kHeadDim>(const Args&,        \
                                                                                                cudaStream_t)
