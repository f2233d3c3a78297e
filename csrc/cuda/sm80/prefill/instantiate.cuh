// Included by instantiations/, each of which defines `launch` for one type, head size and kind of tiles.
#pragma once

#include "cuda/sm80/prefill/kernel.cuh"
#include "cuda/sm80/prefill/launch.h"

namespace qwen_sparse::sm80::prefill {

template <typename T, int kHeadDim, typename Tiles>
void launch(const Args& args, cudaStream_t stream) {
  const auto kernel = attention_kernel<T, kHeadDim, Tiles>;
  constexpr int kBytes = sizeof(SharedMemory<kHeadDim, Tiles>);
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "prefill attention");
  const int64_t ctas = args.tiles.count * args.p.shape.num_heads;
  kernel<<<dim3(static_cast<unsigned>(ctas)), kThreads, kBytes, stream>>>(args);
  cuda::check(cudaGetLastError(), "prefill attention");
}

}  // namespace qwen_sparse::sm80::prefill
