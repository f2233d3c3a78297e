// What a warp computes over pages of int8 keys and values: 8 rows, 16 keys of a tile at a time.
//
// Both products have operands of more bits than an mma takes, in two parts. Rows 0 to 7 of its left operand are the
// high parts of the 8 rows, rows 8 to 15 the low parts: one mma multiplies both, and a lane holds both sums.
//
//   Q K^T   in integers. A row of Q is 16-bit fixed point, 256 high + low, in a power of two of its own; keys go to the
//           mma as they lie in memory. The key's scale meets the finished score.
//   P V     weights times the values' scales, in two bfloat16 parts, which keep 16 bits: float16 could not hold them,
//           and rounded to bfloat16 once, a row that attends one key has up to 1.9 times PyTorch's error, since the
//           scale is rounded as well as the result. The parts' results are added in the end. ldmatrix gives a lane
//           channels 2g and 2g + 1 of two keys; one product takes the even and one the odd channels.
#pragma once

#include "cuda/sm80/decode/tile.cuh"

namespace qwen_sparse::sm80::decode {

template <typename T, int kHeadDim, bool kHasBias>
class Int8Pages {
  using Shared = SharedMemory<int8_t, kHeadDim, kHasBias>;
  static constexpr int kRowBytes = Shared::kRowBytes;

 public:
  static constexpr int kLaneRows = 1;

  __device__ explicit Int8Pages(const Args& args)
      : high_bytes_(0x43004300u | (args.num_rows < 0)),
        k_row_(threadIdx.x / 16 % 2, threadIdx.x / 8 % 2),
        v_row_(threadIdx.x / 8 % 2, threadIdx.x / 16 % 2) {}

  // `scale`: of the scores. Channels are exact from 2^-7 of the row's largest (bfloat16) or 2^-4 (float16); the others
  // are off by at most 2^-15 of it. A row with a NaN or an infinity gets a NaN for its unit.
  __device__ void load(const typename Shared::Rows& rows, float scale) {
    const int lane = threadIdx.x % 32;
    const uint8_t* row = rows.q[lane / 4] + lane % 4 * 8;
    const auto four = [&](int i) {  // channels 4t to 4t + 3 of 16
      const uint2 bits = *reinterpret_cast<const uint2*>(row + i * 32);
      const float2 low = cuda::unpack<T>(bits.x), high = cuda::unpack<T>(bits.y);
      return make_float4(low.x, low.y, high.x, high.y);
    };
    float largest = 0.0f, nan = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const float4 x = four(i);
      largest = fmaxf(fmaxf(fmaxf(largest, fabsf(x.x)), fmaxf(fabsf(x.y), fabsf(x.z))), fabsf(x.w));
      nan += 0.0f * x.x + 0.0f * x.y + 0.0f * x.z + 0.0f * x.w;
    }
#pragma unroll
    for (int i = 1; i < 4; i *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, i));
      nan += __shfl_xor_sync(0xffffffffu, nan, i);
    }
    // rounded up to a power of two, and so small that nothing is lost for rows of zeros
    constexpr float kLargest = 127 * 256 + 127;
    const float unit = __uint_as_float((__float_as_uint(fmaxf(largest / kLargest, 1e-30f)) + 0x7fffffu) & 0x7f800000u);
    const float inverse = 1.0f / unit;
    row_scale_ = (unit + nan) * scale;
    // 1.5 * 2^23 makes the last bits of a float those of a rounded integer; 128 makes the low byte's sign carry.
    const auto digits = [&](float x) { return __float_as_uint(fmaf(x, inverse, 12582912.0f + 128.0f)); };
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const float4 x = four(i);
      const uint32_t first = __byte_perm(digits(x.x), digits(x.y), 0x5410);
      const uint32_t second = __byte_perm(digits(x.z), digits(x.w), 0x5410);
      q_[i / 2][i % 2 * 2] = __byte_perm(first, second, 0x7531);
      q_[i / 2][i % 2 * 2 + 1] = __byte_perm(first, second, 0x6420) ^ 0x80808080u;
    }
  }

  // `mask` (scores): scores of keys not attended become -infinity.
  template <typename Bias, typename Mask>
  __device__ void attend(const Shared& shared, int stage, int part, const typename Shared::Rows& rows, const Bias& bias,
                         const Mask& mask, LaneRows<kLaneRows>& softmax) {
    float s[2][2];
    multiply_qk(shared.stages[stage].k, part, s);
    float scales[2][2];
    load_scales(shared.k_scale[stage], part, scales);
    if constexpr (kHasBias) {
      float biases[2][2];
      bias.multiply(rows, part, biases);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[i / 2][i % 2] = fmaf(s[i / 2][i % 2] * scales[i / 2][i % 2], row_scale_, biases[i / 2][i % 2]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i / 2][i % 2] *= scales[i / 2][i % 2] * row_scale_;
    }
    mask(s);
    float shrink[kLaneRows];
    if (softmax.update(s, shrink)) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[d][i] *= shrink[0];
      }
    }
    load_scales(shared.v_scale[stage], part, scales);
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i / 2][i % 2] *= scales[i / 2][i % 2];
    multiply_pv(shared.stages[stage].v, part, s);
  }

  // The unnormalised results.
  __device__ void store(float (&out)[Shared::kTileRows][kHeadDim + 8]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; d += 2) {  // even and odd channels of 16
      const float *x = out_[d], *y = out_[d + 1];
      *reinterpret_cast<float4*>(out[lane / 4] + d * 8 + lane % 4 * 4) =
          make_float4(x[0] + x[2], y[0] + y[2], x[1] + x[3], y[1] + y[3]);
    }
  }

 private:
  // Of the keys of the lane's scores.
  __device__ static void load_scales(const float (&tile)[kTileKeys], int part, float (&scales)[2][2]) {
    const int t = threadIdx.x % 4;
    const float2 after = *reinterpret_cast<const float2*>(tile + key_offset(part, 0, 2 * t));
    const float2 before = *reinterpret_cast<const float2*>(tile + key_offset(part, 1, 2 * t + 1));
    scales[0][0] = after.x;
    scales[0][1] = after.y;
    scales[1][0] = before.y;
    scales[1][1] = before.x;
  }

  // Sums stay below 128 * 128 * 32639 < 2^30.
  __device__ void multiply_qk(const uint8_t* tile, int part, float (&s)[2][2]) const {
    int32_t sums[2][4] = {};
    const uint32_t address = k_row_.in(tile, part);
#pragma unroll
    for (int step = 0; step < kHeadDim / 32; ++step) {
      uint32_t k[4];  // [2 groups of keys][2 pieces]
      ptx::load_matrices(address ^ (step << 5), 0, k);
      ptx::mma_int8(sums[0], q_[step], k[0], k[1]);
      ptx::mma_int8(sums[1], q_[step], k[2], k[3]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) s[n][e] = static_cast<float>(sums[n][e] * 256 + sums[n][2 + e]);
    }
  }

  // Bytes 0 and 2 of x as bfloat16, exactly and without conversion instructions, which run at a quarter of the rate of
  // others: 0x4300 | m is 128 + m for m up to 127; bit 7, worth -128, falls into the exponent and makes 256 of 128.
  __device__ uint32_t widen(uint32_t x) const {
    const uint32_t bits[2] = {(x & 0x007f007fu) | high_bytes_, (x & 0x00800080u) | high_bytes_};
    __nv_bfloat162 pairs[2];
    memcpy(pairs, bits, sizeof(pairs));
    const __nv_bfloat162 difference = __hsub2(pairs[0], pairs[1]);
    uint32_t result;
    memcpy(&result, &difference, sizeof(result));
    return result;
  }

  __device__ void multiply_pv(const uint8_t* tile, int part, const float (&s)[2][2]) {
    uint32_t weights[4];
    cuda::split(s[0][0], s[0][1], weights[0], weights[1]);
    cuda::split(s[1][0], s[1][1], weights[2], weights[3]);
    const uint32_t address = v_row_.in(tile, part);
#pragma unroll
    for (int piece = 0; piece < kHeadDim / 16; piece += 2) {
      uint32_t v[4];  // [2 pieces][2 groups of keys]
      ptx::load_matrices_transposed(address ^ (piece << 4), 0, v);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float(*out)[4] = out_ + 2 * (piece + i);
        ptx::mma<cuda::BFloat16>(out[0], weights, widen(v[2 * i]), widen(v[2 * i + 1]));
        ptx::mma<cuda::BFloat16>(out[1], weights, widen(v[2 * i] >> 8), widen(v[2 * i + 1] >> 8));
      }
    }
  }

  // 0x43004300. If ptxas knew the constant, it would need a second instruction for each use: one takes one constant.
  const uint32_t high_bytes_;
  MatrixRow<kRowBytes> k_row_, v_row_;
  float row_scale_;
  uint32_t q_[kHeadDim / 32][4];
  float out_[kHeadDim / 8][4] = {};
};

}  // namespace qwen_sparse::sm80::decode
