// The key bias that an int8 cache leaves out, q . R_j b for each key j, as one more matrix product of a tile.
//
// Let b' be the bias rotated to the middle of the tile, half a position before key 32. With c pairing with c +
// head_dim/2,
//   q . R_t b' = sum over c of  A_c cos(t w_c) + B_c sin(t w_c),  A_c = q_c b'_c + q_c' b'_c',  B_c = q_c' b'_c - q_c
//   b'_c'
// and for -t the second sum changes its sign. So the keys at distances t = 1/2, 3/2, ... after the middle and those
// before it share two products with 32 columns, a constant right operand, and no more work than one with 64.
//
// b is as large as 900, its product with q as 10^4, and the score must be exact to 10^-2: both operands are split into
// high and low bfloat16 parts. Both parts of the 8 rows are one left operand, so all four products take two mma.
#pragma once

#include "cuda/common/ptx.h"
#include "cuda/common/rotation.h"
#include "cuda/sm80/decode/config.h"

namespace qwen_sparse::sm80::decode {

namespace ptx = cuda::ptx;

constexpr double kTurnsPerRadian = 0.15915494309189533577;

// Operands are in the order of int8 keys: lane 4g + t holds elements 4t to 4t + 3 of each 16, two registers of a row or
// column g.
template <typename T, int kHeadDim>
class KeyBias {
  static constexpr int kHalf = kHeadDim / 2;
  static constexpr int kHalfSteps = kHalf / 16;

 public:
  using Tables = BiasTables<kHeadDim>;

  // `scale`: of the scores.
  __device__ KeyBias(const RotatedBias& bias, int64_t kv_head, float scale, Tables& tables)
      : tables_(tables), inv_freq_(bias.inv_freq) {
    // the upper threads: the lower ones look up pages at the same time
    channel_ = static_cast<int>(threadIdx.x) - (kThreads - kHalf);
    if (channel_ < 0) return;
    turns_ = inv_freq_[channel_] * kTurnsPerRadian;
    const float factor = static_cast<float>(bias.attention_factor) * scale;
    first_ = bias.data[kv_head * kHeadDim + channel_] * factor;
    second_ = bias.data[kv_head * kHeadDim + kHalf + channel_] * factor;
  }

  // The constant right operand.
  __device__ void make_operand() {
    for (int i = threadIdx.x; i < kHalfSteps * 4 * 32; i += kThreads) {
      const int lane = i % 32, columns = i / 32 % 4, step = i / 128;
      const double distance = columns * 8 + lane / 4 + 0.5;
      float2 rotation[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        rotation[j] = cuda::cos_sin_of_turns(distance, inv_freq_[step * 16 + lane % 4 * 4 + j] * kTurnsPerRadian);
      }
      uint4 x;
      cuda::split(rotation[0].x, rotation[1].x, x.x, x.z);
      cuda::split(rotation[2].x, rotation[3].x, x.y, x.w);
      tables_.operand[step][columns][lane] = x;
      cuda::split(rotation[0].y, rotation[1].y, x.x, x.z);
      cuda::split(rotation[2].y, rotation[3].y, x.y, x.w);
      tables_.operand[kHalfSteps + step][columns][lane] = x;
    }
  }

  // Rotates the bias to the middle of the tile whose first key has the rotation `position`.
  __device__ void turn(int32_t position) {
    if (channel_ < 0) return;
    const float2 rotation = cuda::cos_sin_of_turns(position + (kTileKeys - 1) * 0.5, turns_);
    tables_.turned[channel_] = first_ * rotation.x - second_ * rotation.y;
    tables_.turned[kHalf + channel_] = second_ * rotation.x + first_ * rotation.y;
  }

  // The left operand of the turned bias, for 16 channel pairs of a row tile: high parts in rows 0 to 7, low in 8 to 15.
  template <typename Rows>
  __device__ void make_rows(int step, Rows& rows) const {
    const int lane = threadIdx.x % 32;
    const int channel = step * 16 + lane % 4 * 4;
    const float4 b0 = *reinterpret_cast<const float4*>(tables_.turned + channel);
    const float4 b1 = *reinterpret_cast<const float4*>(tables_.turned + kHalf + channel);
    const uint8_t* q = rows.q[lane / 4];
    const uint2 bits0 = *reinterpret_cast<const uint2*>(q + channel * 2);
    const uint2 bits1 = *reinterpret_cast<const uint2*>(q + (kHalf + channel) * 2);
    uint32_t x[2][4];  // of a pair of channels: even and odd sum, high and low part
    const auto combine = [](uint32_t pair0, uint32_t pair1, float b0x, float b0y, float b1x, float b1y,
                            uint32_t(&x)[4]) {
      const float2 q0 = cuda::unpack<T>(pair0), q1 = cuda::unpack<T>(pair1);
      cuda::split(q0.x * b0x + q1.x * b1x, q0.y * b0y + q1.y * b1y, x[0], x[1]);
      cuda::split(q1.x * b0x - q0.x * b1x, q1.y * b0y - q0.y * b1y, x[2], x[3]);
    };
    combine(bits0.x, bits1.x, b0.x, b0.y, b1.x, b1.y, x[0]);
    combine(bits0.y, bits1.y, b0.z, b0.w, b1.z, b1.w, x[1]);
    rows.bias.operand[step][lane] = make_uint4(x[0][0], x[0][1], x[1][0], x[1][1]);
    rows.bias.operand[kHalfSteps + step][lane] = make_uint4(x[0][2], x[0][3], x[1][2], x[1][3]);
  }

  // The scores of the bias at distances 2t and 2t + 1 of 8: of the keys after the middle and of those before it.
  template <typename Rows>
  __device__ void multiply(const Rows& rows, int columns, float (&scores)[2][2]) const {
    const int lane = threadIdx.x % 32;
    float sums[2][4] = {};
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const uint4 left = rows.bias.operand[step][lane], right = tables_.operand[step][columns][lane];
      const uint32_t a[4] = {left.x, left.y, left.z, left.w};
      ptx::mma<cuda::BFloat16>(sums[step / kHalfSteps], a, right.x, right.y);
      ptx::mma<cuda::BFloat16>(sums[step / kHalfSteps], a, right.z, right.w);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float even = sums[0][e] + sums[0][2 + e], odd = sums[1][e] + sums[1][2 + e];
      scores[0][e] = even + odd;
      scores[1][e] = even - odd;
    }
  }

 private:
  Tables& tables_;
  const double* inv_freq_;
  int channel_;           // that this thread turns, with its partner; negative: none
  double turns_;          // of the channel, for one position
  float first_, second_;  // its bias
};

// In place of KeyBias.
struct NoBias {
  __device__ NoBias(const RotatedBias&, int64_t, float, Nothing&) {}
};

}  // namespace qwen_sparse::sm80::decode
