// Fixed-width vectors for the kernels that are compiled once per instruction set.
//
// GCC/Clang vector extensions, so that one source serves every width; the few places that need an instruction by name
// use intrinsics. Everything has internal linkage: an inline function that the linker could merge with the copy of
// another instruction set would crash on older CPUs. For the same reason these files use no std:: templates.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef QWEN_SPARSE_X86
#include <immintrin.h>
#endif

#include "params.h"

#define QWEN_SPARSE_INLINE static inline __attribute__((always_inline, unused))
#define QWEN_SPARSE_UNROLL _Pragma("GCC unroll 16")

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

template <typename T>
QWEN_SPARSE_INLINE T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
QWEN_SPARSE_INLINE T max(T a, T b) {
  return a < b ? b : a;
}
// Rounds towards minus infinity; b > 0.
QWEN_SPARSE_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
QWEN_SPARSE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

template <typename Vec, typename T>
QWEN_SPARSE_INLINE Vec load_as(const T* p) {
  Vec v;
  memcpy(&v, p, sizeof(v));
  return v;
}
QWEN_SPARSE_INLINE VecF splat(float x) { return x - VecF{}; }  // x - 0 is x: folds to a broadcast

QWEN_SPARSE_INLINE VecF load(const float* p) { return load_as<VecF>(p); }
QWEN_SPARSE_INLINE void store(float* p, VecF v) { memcpy(p, &v, sizeof(v)); }

QWEN_SPARSE_INLINE VecF load(const bf16* p) { return (VecF)(__builtin_convertvector(load_as<VecH>(p), VecU) << 16); }
// Round to nearest even; a NaN stays a NaN.
QWEN_SPARSE_INLINE VecU bf16_bits(VecF v) {
  const VecU u = (VecU)v;
  const VecU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return v == v ? rounded : VecU{} + 0x7fc0;
}
QWEN_SPARSE_INLINE void store(bf16* p, VecF v) {
  const VecH h = __builtin_convertvector(bf16_bits(v), VecH);
  memcpy(p, &h, sizeof(h));
}

QWEN_SPARSE_INLINE VecF load(const fp16* p) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
  const VecU h = __builtin_convertvector(load_as<VecH>(p), VecU);
  VecU f = (VecU)((VecF)((h & 0x7fff) << 13) * 0x1p112f);  // rebias the exponent; exact, subnormals included
  f = (h & 0x7c00) == 0x7c00 ? (f | 0x7f800000) : f;
  return (VecF)(f | ((h & 0x8000) << 16));
#endif
}
QWEN_SPARSE_INLINE void store(fp16* p, VecF v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &h, sizeof(h));
#elif defined(__F16C__)
  const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &h, sizeof(h));
#else
  for (int i = 0; i < kLanes; ++i) {
    const _Float16 h = (_Float16)v[i];
    memcpy(p + i, &h, sizeof(h));
  }
#endif
}

// Not by __builtin_convertvector, which GCC 12 turns into byte-by-byte code in general registers.
QWEN_SPARSE_INLINE VecI load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtepi8_epi32(load_as<__m128i>(p));
#elif defined(__AVX2__)
  return (VecI)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  const VecI bytes = load_as<int32_t>(p) - VecI{};
  return bytes << VecI{24, 16, 8, 0} >> 24;
#endif
}
QWEN_SPARSE_INLINE VecF load(const int8_t* p) { return __builtin_convertvector(load_bytes(p), VecF); }

QWEN_SPARSE_INLINE VecF vmax(VecF a, VecF b) { return a > b ? a : b; }

QWEN_SPARSE_INLINE float reduce_max(VecF v) {
  float result = v[0];
  for (int i = 1; i < kLanes; ++i) result = max(result, v[i]);
  return result;
}
QWEN_SPARSE_INLINE float reduce_sum(VecF v) {
  float result = 0.0f;
  for (int i = 0; i < kLanes; ++i) result += v[i];
  return result;
}

// 2^x for -126 <= x <= 1 or so, relative error below 3e-7.
QWEN_SPARSE_INLINE VecF exp2_normal(VecF x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const VecF shifted = x + kRound;
  const VecF f = x - (shifted - kRound);  // [-0.5, 0.5]
  VecF p = splat(1.32647273e-03f);
  p = p * f + 9.67151299e-03f;
  p = p * f + 5.55073358e-02f;
  p = p * f + 2.40222424e-01f;
  p = p * f + 6.93147004e-01f;
  p = p * f + 1.0f;
  return (VecF)((VecU)p + ((VecU)shifted << 23));  // the integer goes to the exponent, kRound's own bits drop out
}
// 2^x for x <= 0 (and a little above); 0 below the normal range, so 2^-inf = 0.
QWEN_SPARSE_INLINE VecF exp2_nonpositive(VecF x) { return x < -126.0f ? VecF{} : exp2_normal(x); }
// The same with 2^-126 instead of 0 there, which no sum with a weight of 1 in it can tell apart.
QWEN_SPARSE_INLINE VecF exp2_clamped(VecF x) { return exp2_normal(vmax(splat(-126.0f), x)); }

// Transposes kLanes vectors in place: log2(kLanes) rounds of interleaving row i with row i + kLanes / 2.
template <typename Vec>
QWEN_SPARSE_INLINE Vec interleave_low(Vec a, Vec b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
template <typename Vec>
QWEN_SPARSE_INLINE Vec interleave_high(Vec a, Vec b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}
template <typename Vec>
QWEN_SPARSE_INLINE void transpose(Vec (&rows)[kLanes]) {
  Vec other[kLanes];
  QWEN_SPARSE_UNROLL
  for (int round = 1; round < kLanes; round *= 2) {
    QWEN_SPARSE_UNROLL
    for (int i = 0; i < kLanes / 2; ++i) {
      other[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2]);
      other[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2]);
    }
    QWEN_SPARSE_UNROLL
    for (int i = 0; i < kLanes; ++i) rows[i] = other[i];
  }
}

// The log-sum-exp of a row from its maximum in base 2 and its sum.
QWEN_SPARSE_INLINE float natural_lse(float m, float l) {
  return l > 0.0f ? (m + __builtin_log2f(l)) * kLn2 : (l == 0.0f ? -kInfinity : l);
}

// Calls body with a value of the C++ type of `dtype`.
template <typename Body>
QWEN_SPARSE_INLINE void dispatch_float(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(bf16{});
    case DType::kFloat16:
      return body(fp16{});
    case DType::kInt8:
      return;  // refused by the checks in api/
  }
}

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
