// Merges the splits of a decode call: out = sum of 2^lse_i out_i / sum of 2^lse_i.
//
// Grid: one CTA per (sequence, row, head). Warps take every fourth split, channels lie across a warp's lanes; the four
// sums are added in order, so results do not depend on timing.
#include "cuda/common/attention.h"
#include "cuda/common/ptx.h"
#include "cuda/sm80/decode/launch.h"

namespace qwen_sparse::sm80::decode {
namespace {

namespace ptx = cuda::ptx;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Args args) {
  constexpr int kChannels = kHeadDim / 32;  // of a lane
  using Channels = std::conditional_t<kChannels == 4, float4, float2>;
  __shared__ float sums[kNumWarps][kHeadDim];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t output = blockIdx.x;
  const float* lse = args.partial_lse + output * args.num_splits;

  float highest = -INFINITY;
  for (int split = lane; split < args.num_splits; split += 32) highest = fmaxf(highest, lse[split]);
  for (int i = 1; i < 32; i *= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, i));
  const float base = highest == -INFINITY ? 0.0f : highest;
  float sum = 0.0f;
  for (int split = lane; split < args.num_splits; split += 32) sum += ptx::exp2(lse[split] - base);
  for (int i = 1; i < 32; i *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);

  const float* partial = args.partial_out + output * args.num_splits * kHeadDim + lane * kChannels;
  float out[kChannels] = {};
#pragma unroll 4
  for (int split = warp; split < args.num_splits; split += kNumWarps) {
    if (lse[split] == -INFINITY) continue;  // its result was not set
    const float weight = ptx::exp2(lse[split] - base);
    const Channels x = *reinterpret_cast<const Channels*>(partial + int64_t{split} * kHeadDim);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) out[i] += weight * reinterpret_cast<const float*>(&x)[i];
  }
#pragma unroll
  for (int i = 0; i < kChannels; ++i) sums[warp][lane * kChannels + i] = out[i];
  __syncthreads();
  if (threadIdx.x < kHeadDim) {
    const int d = threadIdx.x;
    const float total = sums[0][d] + sums[1][d] + sums[2][d] + sums[3][d];
    static_cast<T*>(args.p.out)[output * kHeadDim + d] = cuda::from_float<T>(sum == 0.0f ? 0.0f : total / sum);
  }
  if (threadIdx.x == 0) args.p.lse[output] = sum == 0.0f ? -INFINITY : cuda::kLn2 * (highest + log2f(sum));
}

}  // namespace

void combine(const Args& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.p.batch * args.p.shape.seqlen_q * args.p.shape.num_heads));
  cuda::dispatch_float16_bits(args.p.dtype, [&](auto type) {
    using T = decltype(type);
    args.p.shape.head_dim == 64 ? combine_kernel<T, 64><<<grid, kThreads, 0, stream>>>(args)
                                : combine_kernel<T, 128><<<grid, kThreads, 0, stream>>>(args);
  });
  cuda::check(cudaGetLastError(), "decode attention");
}

}  // namespace qwen_sparse::sm80::decode
