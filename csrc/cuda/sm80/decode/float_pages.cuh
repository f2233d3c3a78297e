// What a warp computes over pages of 16-bit keys and values: 16 rows, 16 keys of a tile at a time.
#pragma once

#include "cuda/sm80/decode/tile.cuh"

namespace qwen_sparse::sm80::decode {

template <typename T, int kHeadDim>
class FloatPages {
  using Shared = SharedMemory<T, kHeadDim, false>;
  static constexpr int kRowBytes = Shared::kRowBytes;
  static constexpr int kSteps = kHeadDim / 16;

 public:
  static constexpr int kLaneRows = 2;

  __device__ explicit FloatPages(const Args&)
      : k_row_(threadIdx.x / 16 % 2, threadIdx.x / 8 % 2), v_row_(threadIdx.x / 8 % 2, threadIdx.x / 16 % 2) {}

  // `scale`: of the scores.
  __device__ void load(const typename Shared::Rows& rows, float scale) {
    const int lane = threadIdx.x % 32;
    scale_ = scale;
    const uint8_t *upper = rows.q[lane / 4] + lane % 4 * 4, *lower = rows.q[lane / 4 + 8] + lane % 4 * 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      q_[step][0] = *reinterpret_cast<const uint32_t*>(upper + step * 32);
      q_[step][1] = *reinterpret_cast<const uint32_t*>(lower + step * 32);
      q_[step][2] = *reinterpret_cast<const uint32_t*>(upper + step * 32 + 16);
      q_[step][3] = *reinterpret_cast<const uint32_t*>(lower + step * 32 + 16);
    }
  }

  // `mask` (scores): scores of keys not attended become -infinity.
  template <typename Bias, typename Mask>
  __device__ void attend(const Shared& shared, int stage, int part, const typename Shared::Rows&, const Bias&,
                         const Mask& mask, LaneRows<kLaneRows>& softmax) {
    float s[2][4] = {};
    const uint32_t keys = k_row_.in(shared.stages[stage].k, part);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t k[4];  // [2 groups of keys][2 pieces]
      ptx::load_matrices(keys ^ (step << 5), 0, k);
      ptx::mma<T>(s[0], q_[step], k[0], k[1]);
      ptx::mma<T>(s[1], q_[step], k[2], k[3]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= scale_;
    }
    mask(s);
    float shrink[kLaneRows];
    if (softmax.update(s, shrink)) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[d][i] *= shrink[i / 2];
      }
    }
    uint32_t weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = cuda::pack<T>(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
    const uint32_t values = v_row_.in(shared.stages[stage].v, part);
#pragma unroll
    for (int piece = 0; piece < kHeadDim / 8; piece += 2) {
      uint32_t v[4];  // [2 pieces][2 groups of keys]
      ptx::load_matrices_transposed(values ^ (piece << 4), 0, v);
      ptx::mma<T>(out_[piece], weights, v[0], v[1]);
      ptx::mma<T>(out_[piece + 1], weights, v[2], v[3]);
    }
  }

  // The unnormalised results.
  __device__ void store(float (&out)[Shared::kTileRows][kHeadDim + 8]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        *reinterpret_cast<float2*>(out[half * 8 + lane / 4] + d * 8 + lane % 4 * 2) =
            make_float2(out_[d][2 * half], out_[d][2 * half + 1]);
      }
    }
  }

 private:
  MatrixRow<kRowBytes> k_row_, v_row_;
  float scale_;
  uint32_t q_[kSteps][4];
  float out_[kHeadDim / 8][4] = {};
};

}  // namespace qwen_sparse::sm80::decode
