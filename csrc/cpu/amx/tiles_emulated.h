// Tile operations in plain vector code, with the bits of the unit, for CPUs without it. What tdpbf16ps does, by the
// instruction's reference and by comparison with the unit:
//
//  - even and odd elements are summed apart, from zero, in ascending order, by fused multiply-adds;
//  - even + odd is rounded, then added to the accumulator and rounded;
//  - every step rounds to nearest even, reads denormals as zeros and writes zeros for them, whatever the control
//    register says.
//
// Slow: for tests.
#pragma once

#include "cpu/isa/vec.h"

#ifndef __FMA__
#error "the emulation of tiles needs fused multiply-adds"
#endif

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

struct TileRegister {
  alignas(64) std::byte rows[kTileRows][kRowBytes];
};
thread_local TileRegister tile_registers[8];

class TileScope {
 public:
  TileScope() { memset(tile_registers, 0, sizeof(tile_registers)); }
  ~TileScope() { memset(tile_registers, 0xff, sizeof(tile_registers)); }  // NaN for whoever uses them afterwards
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

__attribute__((noinline, unused)) void emulate_dot_bf16(TileRegister& c, const TileRegister& a, const TileRegister& b) {
  constexpr int kPairs = 16;
  using Half = __m256;  // 8 of a row's 16 numbers
  constexpr int kHalves = 2;
  Half even_b[kPairs][kHalves], odd_b[kPairs][kHalves];
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  for (int i = 0; i < kPairs; ++i) {
    for (int h = 0; h < kHalves; ++h) {
      const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(b.rows[i]) + h);
      even_b[i][h] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
      odd_b[i][h] = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
    }
  }
  for (int m = 0; m < kTileRows; ++m) {
    Half even[kHalves] = {}, odd[kHalves] = {};
    for (int i = 0; i < kPairs; ++i) {
      uint32_t pair;
      memcpy(&pair, a.rows[m] + 4 * i, 4);
      const Half even_a = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(pair << 16)));
      const Half odd_a = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(pair & 0xffff0000)));
      for (int h = 0; h < kHalves; ++h) {
        even[h] = _mm256_fmadd_ps(even_a, even_b[i][h], even[h]);
        odd[h] = _mm256_fmadd_ps(odd_a, odd_b[i][h], odd[h]);
      }
    }
    for (int h = 0; h < kHalves; ++h) {
      float* sums = reinterpret_cast<float*>(c.rows[m]) + 8 * h;
      _mm256_store_ps(sums, _mm256_add_ps(_mm256_load_ps(sums), _mm256_add_ps(even[h], odd[h])));
    }
  }
}

template <int kTile>
QWEN_SPARSE_INLINE void zero_tile() {
  memset(&tile_registers[kTile], 0, kTileBytes);
}

template <int kTile>
QWEN_SPARSE_INLINE void load_tile(const void* p, int64_t stride = kRowBytes) {
  for (int64_t row = 0; row < kTileRows; ++row) {
    memcpy(tile_registers[kTile].rows[row], static_cast<const std::byte*>(p) + row * stride, kRowBytes);
  }
}

template <int kTile>
QWEN_SPARSE_INLINE void load_tile_streaming(const void* p) {
  load_tile<kTile>(p);
}

template <int kTile>
QWEN_SPARSE_INLINE void store_tile(void* p, int64_t stride = kRowBytes) {
  for (int64_t row = 0; row < kTileRows; ++row) {
    memcpy(static_cast<std::byte*>(p) + row * stride, tile_registers[kTile].rows[row], kRowBytes);
  }
}

template <int kC, int kA, int kB>
QWEN_SPARSE_INLINE void dot_bf16() {
  constexpr unsigned kNearestWithoutDenormals = 0x9fc0;  // all exceptions masked, FTZ and DAZ
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kNearestWithoutDenormals);
  emulate_dot_bf16(tile_registers[kC], tile_registers[kA], tile_registers[kB]);
  _mm_setcsr(before);
}

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
