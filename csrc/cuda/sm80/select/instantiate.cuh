// Included by instantiations/, each of which defines both launches for one type and head size.
#pragma once

#include "cuda/sm80/select/kernel.cuh"
#include "cuda/sm80/select/launch.h"

namespace qwen_sparse::sm80::select {

inline dim3 grid_of(const Args& args) {
  const int64_t ctas = args.p.shape.num_kv_heads * args.ctas_per_group * args.num_splits;
  return dim3(static_cast<unsigned>(ctas));
}

inline dim3 block_of(const Args& args) { return dim3(static_cast<unsigned>(args.heads_per_cta * 32)); }

template <typename T, int kHeadDim>
void launch_normalizers(const Args& args, cudaStream_t stream) {
  normalizer_kernel<T, kHeadDim><<<grid_of(args), block_of(args), 0, stream>>>(args);
  cuda::check(cudaGetLastError(), "select normalizers");
}

template <typename T, int kHeadDim>
void launch_scores(const Args& args, cudaStream_t stream) {
  score_kernel<T, kHeadDim><<<grid_of(args), block_of(args), 0, stream>>>(args);
  cuda::check(cudaGetLastError(), "select scores");
}

}  // namespace qwen_sparse::sm80::select

#define QWEN_SPARSE_INSTANTIATE_SELECT(T, kHeadDim)                                                          \
  template void qwen_sparse::sm80::select::launch_normalizers<qwen_sparse::cuda::T, kHeadDim>(const Args&,   \
                                                                                              cudaStream_t); \
  template void qwen_sparse::sm80::select::launch_scores<qwen_sparse::cuda::T, kHeadDim>(const Args&, cudaStream_t)
