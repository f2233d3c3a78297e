// Included by instantiations/, each of which defines `launch_splits` for one type, head size and cache.
#pragma once

#include "cuda/sm80/decode/kernel.cuh"
#include "cuda/sm80/decode/launch.h"

namespace qwen_sparse::sm80::decode {

template <typename T, typename C, int kHeadDim, bool kHasBias>
void launch_splits(const Args& args, cudaStream_t stream) {
  const auto kernel = decode_kernel<T, C, kHeadDim, kHasBias>;
  const int bytes = SharedMemory<C, kHeadDim, kHasBias>::bytes(args.row_tiles);
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "decode attention");
  const int64_t ctas = args.p.batch * args.row_blocks * args.num_splits * args.p.shape.num_kv_heads;
  kernel<<<dim3(static_cast<unsigned>(ctas)), kThreads, bytes, stream>>>(args);
  cuda::check(cudaGetLastError(), "decode attention");
}

}  // namespace qwen_sparse::sm80::decode
