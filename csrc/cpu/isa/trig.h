// Rotations: cos and sin of position x frequency, reduced and evaluated in double, and RoPE itself.
#pragma once

#include "cpu/isa/vec.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int kDoubleLanes = kLanes / 2;
constexpr int64_t kMaxHalfDim = 64;  // head_dim is at most 128

typedef double VecD __attribute__((vector_size(kDoubleLanes * 8)));
typedef int64_t VecL __attribute__((vector_size(kDoubleLanes * 8)));

// |x| up to about 1e8; absolute error about 1e-15 plus that of x itself.
QWEN_SPARSE_INLINE void sincos(VecD x, VecD* sin_out, VecD* cos_out) {
  constexpr double kRound = 6755399441055744.0;               // 1.5 * 2^52
  constexpr double kHalfPiHigh = 1.57079632673412561417e+00;  // first 33 bits of pi / 2, so that products are exact
  constexpr double kHalfPiLow = 6.07710050650619224932e-11;
  const VecD shifted = x * 0.63661977236758134308 + kRound;
  const VecL quadrant = (VecL)shifted;
  const VecD n = shifted - kRound;
  const VecD r = (x - n * kHalfPiHigh) - n * kHalfPiLow;  // [-pi/4, pi/4]
  const VecD r2 = r * r;
  VecD s = VecD{} - 7.6471637318198164759e-13;  // Taylor, to r^15 and r^16
  s = s * r2 + 1.6059043836821614599e-10;
  s = s * r2 - 2.5052108385441718775e-08;
  s = s * r2 + 2.7557319223985890653e-06;
  s = s * r2 - 1.9841269841269841270e-04;
  s = s * r2 + 8.3333333333333333333e-03;
  s = s * r2 - 1.6666666666666666667e-01;
  s = s * r2 * r + r;
  VecD c = VecD{} + 4.7794773323873852974e-14;
  c = c * r2 - 1.1470745597729724714e-11;
  c = c * r2 + 2.0876756987868098979e-09;
  c = c * r2 - 2.7557319223985890653e-07;
  c = c * r2 + 2.4801587301587301587e-05;
  c = c * r2 - 1.3888888888888888889e-03;
  c = c * r2 + 4.1666666666666666667e-02;
  c = c * r2 - 0.5;
  c = c * r2 + 1.0;
  const VecL odd = (quadrant & 1) != 0;
  const VecD sine = odd ? c : s;
  const VecD cosine = odd ? s : c;
  *sin_out = (quadrant & 2) != 0 ? -sine : sine;
  *cos_out = ((quadrant + 1) & 2) != 0 ? -cosine : cosine;
}

// cos and sin of position * inv_freq[c], times factor, for the head_dim / 2 channel pairs.
template <typename T>
struct Rotation {
  T cos[kMaxHalfDim];
  T sin[kMaxHalfDim];

  Rotation() = default;
  Rotation(int64_t position, const double* inv_freq, int64_t half_dim, double factor) {
    for (int64_t i = 0; i < half_dim; i += kDoubleLanes) {
      VecD s, c;
      sincos(load_as<VecD>(inv_freq + i) * static_cast<double>(position), &s, &c);
      for (int lane = 0; lane < kDoubleLanes; ++lane) {
        cos[i + lane] = static_cast<T>(c[lane] * factor);
        sin[i + lane] = static_cast<T>(s[lane] * factor);
      }
    }
  }
};

// Half-split RoPE of one head: channel c pairs with channel c + head_dim / 2.
template <typename In, typename Out>
QWEN_SPARSE_INLINE void rotate_row(const In* x, int64_t head_dim, const Rotation<float>& rotation, Out* out) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const VecF first = load(x + i), second = load(x + half + i);
    const VecF cos = load(rotation.cos + i), sin = load(rotation.sin + i);
    store(out + i, first * cos - second * sin);
    store(out + half + i, second * cos + first * sin);
  }
}

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
