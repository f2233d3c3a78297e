// Scores to weights of the softmax, in integer arithmetic as far as possible.
//
// Near tile instructions a core executes floating-point vector instructions at half rate, integer ones at full rate. So
// a weight 2^x takes one multiply-add, whose result is a fixed-point number in the low bits of a float32; the rest
// works on 32 lanes of 16 bits:
//
//   y = round(512 x) + kBias       saturated to 16 bits: 7 bits of exponent, 9 of the fraction f
//   z = y - 512 (1 + f - 2^f)      64 values of the correction, looked up with the upper 6 bits of f
//   w = z >> 2                     the bits of a bf16: 2^(x - 15)
//
// The factor 2^-15 leaves room for weights above 1: x counts from a maximum that may be old by up to 15 binades. It is
// common to weights and sums and cancels in the output. Below x = -111 a weight is 0. The error is 0.6 % at most and
// 0.18 % root mean square, where rounding an exact weight to bf16 makes 0.39 and 0.17 %; a row's sum is that of the
// rounded weights.
#pragma once

#include "cpu/amx/tiles.h"
#include "cpu/isa/vec.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

// One row of a tile, whatever the width of the CPU's vectors.
typedef float RowF __attribute__((vector_size(64), may_alias));
typedef int32_t RowI __attribute__((vector_size(64), may_alias));
typedef uint32_t RowU __attribute__((vector_size(64), may_alias));
typedef uint16_t RowH __attribute__((vector_size(32), may_alias));
constexpr int kRowLanes = 16;

constexpr float kStepsPerBinade = 512.0f;
constexpr float kBias = 112.0f * 512 + 2;  // y of x = 0; + 2 rounds what the last shift drops
constexpr int kBinadesAbove = 15;
constexpr float kMagic = 8388608.0f;  // 2^23: a sum with it is an integer in the low bits
constexpr int32_t kMagicBits = 0x4b000000;

QWEN_SPARSE_INLINE RowF load_row(const std::byte* p) { return *reinterpret_cast<const RowF*>(p); }
QWEN_SPARSE_INLINE RowF load_row(const float* p) { return *reinterpret_cast<const RowF*>(p); }
QWEN_SPARSE_INLINE void store_row(float* p, RowF x) { *reinterpret_cast<RowF*>(p) = x; }
QWEN_SPARSE_INLINE void store_row(std::byte* p, RowF x) { *reinterpret_cast<RowF*>(p) = x; }
QWEN_SPARSE_INLINE RowF splat_row(float x) { return x - RowF{}; }

QWEN_SPARSE_INLINE float sum_of_row(RowF x) {
  float sums[kRowLanes];
  memcpy(sums, &x, sizeof(sums));
  for (int width = kRowLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

// 512 (1 + f - 2^f) for the middles f of 64 equal parts of [0, 1); at even bytes' places in a lookup by 16-bit lanes.
alignas(64) constexpr uint8_t kCorrections[64] = {0,  3,  5,  8,  10, 12, 14, 16, 18, 20, 22, 24, 25, 27, 28, 30,
                                                  31, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 42, 43, 43, 43, 44,
                                                  44, 44, 44, 44, 44, 44, 43, 43, 42, 42, 41, 40, 39, 38, 37, 36,
                                                  35, 33, 32, 30, 28, 27, 25, 23, 21, 18, 16, 14, 11, 8,  5,  2};

// Where a row's keys may lie among the positions of a tile's keys: lower < position <= upper.
struct RowBounds {
  int16_t lower, upper;
};

// What weigh() leaves out or adds.
enum class Weighing {
  kAll,     // all keys count
  kMasked,  // only keys within the bounds
  kExact,   // the same, and scores may lie more than 16,384 binades below the maximum. Without this such a score
            // wraps around and gives a weight of 2 or so, which asks for a new maximum and so comes here
};

// The weights of 32 keys of one row, whose scores lie in two tiles, rounded to bf16 in the order of the keys; their
// sums are added to `sum`, in any lane. `base` is kMagic + kBias - 512 times the maximum in use.
template <Weighing kMode>
QWEN_SPARSE_INLINE RowF weigh(const std::byte* scores, std::byte* weights, RowF scale, RowF base,
                              const int16_t* positions, RowBounds bounds, RowF sum) {
  constexpr bool kMasked = kMode != Weighing::kAll;
#ifdef __AVX512VBMI__
  const auto fixed_point = [&](const std::byte* p) {
    const __m512 shifted = _mm512_fmadd_ps((__m512)load_row(p), (__m512)scale, (__m512)base);
    __m512i bits = _mm512_castps_si512(shifted);
    if constexpr (kMode == Weighing::kExact) bits = _mm512_max_epi32(bits, _mm512_setzero_si512());
    return _mm512_sub_epi32(bits, _mm512_set1_epi32(kMagicBits));
  };
  const __m512i y = _mm512_packus_epi32(fixed_point(scores), fixed_point(scores + kTileBytes));
  const __m512i correction =
      _mm512_maskz_permutexvar_epi8(0x5555555555555555, _mm512_srli_epi16(y, 3), _mm512_load_si512(kCorrections));
  __m512i w = _mm512_srli_epi16(_mm512_subs_epu16(y, correction), 2);
  w = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), w);  // packing alternates the tiles
  if constexpr (kMasked) {
    const __m512i position = _mm512_loadu_si512(positions);
    const __mmask32 kept = _mm512_cmpgt_epi16_mask(position, _mm512_set1_epi16(bounds.lower)) &
                           _mm512_cmple_epi16_mask(position, _mm512_set1_epi16(bounds.upper));
    w = _mm512_maskz_mov_epi16(kept, w);
  }
  _mm512_store_si512(weights, w);
  return (RowF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi16(0x3f80));
#else
  for (int n = 0; n < 32; ++n) {
    const int key = n ^ 1;  // vdpbf16ps adds the upper one of a pair first
    float x;
    memcpy(&x, scores + key / kRowLanes * kTileBytes + key % kRowLanes * sizeof(x), sizeof(x));
    const float shifted = __builtin_fmaf(x, scale[0], base[0]);
    int32_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    if (kMode == Weighing::kExact) bits = max(bits, 0);
    const int32_t fixed_point = static_cast<int32_t>(static_cast<uint32_t>(bits) - static_cast<uint32_t>(kMagicBits));
    const int32_t y = max(0, min(65535, fixed_point));
    uint16_t w = static_cast<uint16_t>(max(0, y - kCorrections[y >> 3 & 63]) >> 2);
    if (kMasked && (positions[key] <= bounds.lower || positions[key] > bounds.upper)) w = 0;
    memcpy(weights + key * sizeof(w), &w, sizeof(w));
    const uint32_t wide = static_cast<uint32_t>(w) << 16;
    float weight;
    memcpy(&weight, &wide, sizeof(weight));
    if (wide >= 0x00800000) sum[key / 2] += weight;  // it reads denormals as zeros
  }
  return sum;
#endif
}

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
