// Rotations: cos and sin of position x frequency, reduced and evaluated in double as cpu/isa/trig.h does.
//
// Consumer cards have few double units, so a kernel evaluates each (row, channel pair) once, into shared memory, and
// all heads read it there.
#pragma once

#include <cstdint>

namespace qwen_sparse::cuda {

constexpr int kMaxHalfDim = 64;  // head_dim is at most 128

// |x| up to about 1e8; absolute error about 1e-15 plus that of x itself.
__device__ __forceinline__ void sincos(double x, double* sin_out, double* cos_out) {
  constexpr double kRound = 6755399441055744.0;               // 1.5 * 2^52
  constexpr double kHalfPiHigh = 1.57079632673412561417e+00;  // first 33 bits of pi / 2
  constexpr double kHalfPiLow = 6.07710050650619224932e-11;
  const double shifted = fma(x, 0.63661977236758134308, kRound);
  const int quadrant = __double2loint(shifted);
  const double n = shifted - kRound;
  const double r = fma(-n, kHalfPiLow, fma(-n, kHalfPiHigh, x));  // [-pi/4, pi/4]
  const double r2 = r * r;
  double s = fma(-7.6471637318198164759e-13, r2, 1.6059043836821614599e-10);  // Taylor, to r^15 and r^16
  s = fma(s, r2, -2.5052108385441718775e-08);
  s = fma(s, r2, 2.7557319223985890653e-06);
  s = fma(s, r2, -1.9841269841269841270e-04);
  s = fma(s, r2, 8.3333333333333333333e-03);
  s = fma(s, r2, -1.6666666666666666667e-01);
  s = fma(s * r2, r, r);
  double c = fma(4.7794773323873852974e-14, r2, -1.1470745597729724714e-11);
  c = fma(c, r2, 2.0876756987868098979e-09);
  c = fma(c, r2, -2.7557319223985890653e-07);
  c = fma(c, r2, 2.4801587301587301587e-05);
  c = fma(c, r2, -1.3888888888888888889e-03);
  c = fma(c, r2, 4.1666666666666666667e-02);
  c = fma(c, r2, -0.5);
  c = fma(c, r2, 1.0);
  const bool odd = (quadrant & 1) != 0;
  const double sine = odd ? c : s;
  const double cosine = odd ? s : c;
  *sin_out = (quadrant & 2) != 0 ? -sine : sine;
  *cos_out = ((quadrant + 1) & 2) != 0 ? -cosine : cosine;
}

// (cos, sin) of position * frequency, times factor.
__device__ __forceinline__ double2 cos_sin(int64_t position, double frequency, double factor) {
  double s, c;
  sincos(static_cast<double>(position) * frequency, &s, &c);
  return make_double2(c * factor, s * factor);
}

// (cos, sin) in single precision, absolute error about 1e-7: the angle is reduced in double, in turns, the rest is not.
// `turns`: of one position, frequency / (2 pi).
__device__ __forceinline__ float2 cos_sin_of_turns(double position, double turns) {
  const double angle = position * turns;
  float s, c;
  sincospif(2.0f * static_cast<float>(angle - rint(angle)), &s, &c);
  return make_float2(c, s);
}

}  // namespace qwen_sparse::cuda
