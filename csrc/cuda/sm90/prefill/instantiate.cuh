// Included by instantiations/, each of which defines `launch` for one type, head size and kind of tiles.
#pragma once

#include "cuda/sm90/prefill/kernel.cuh"
#include "cuda/sm90/prefill/launch.h"

namespace qwen_sparse::sm90::prefill {

template <typename T, int kHeadDim, typename Tiles>
void launch(const Args& args, int ctas, cudaStream_t stream) {
  const auto kernel = attention_kernel<T, kHeadDim, Tiles>;
  constexpr int kBytes = sizeof(SharedMemory<kHeadDim, Tiles>);
  static_assert(kBytes <= kMaxSharedBytes, "what descriptions, cursor and barriers take was left beside the tiles");
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "prefill attention");
  kernel<<<dim3(static_cast<unsigned>(ctas)), kThreads, kBytes, stream>>>(args);
  cuda::check(cudaGetLastError(), "prefill attention");
}

}  // namespace qwen_sparse::sm90::prefill
