// Scalar arithmetic of PTX: what translated instructions compute.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace ptxsim {
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using u128 = unsigned __int128;
using f32 = float;
using f64 = double;

template <class D, class S>
inline D bc(S s) {
  return __builtin_bit_cast(D, s);
}
template <class T>
constexpr u32 kBits = sizeof(T) * 8;
template <class T>
constexpr bool kSigned = T(-1) < 0;

// ---- integers
// Shifts clamp their amount.
template <class T>
inline T shl(T a, u32 n) {
  return n >= kBits<T> ? 0 : T(a << n);
}
template <class T>
inline T shr(T a, u32 n) {
  return n >= kBits<T> ? (a < 0 ? T(-1) : T(0)) : T(a >> n);
}
// Division by zero gives all ones, as GPUs do; PTX leaves it open.
template <class T>
inline T idiv(T a, T b) {
  if (b == 0) return T(-1);
  return kSigned<T> && b == T(-1) ? T(0 - std::make_unsigned_t<T>(a)) : T(a / b);
}
template <class T>
inline T irem(T a, T b) {
  if (b == 0) return a;
  return kSigned<T> && b == T(-1) ? T(0) : T(a % b);
}
inline u32 mulhi(u32 a, u32 b) { return u64(a) * b >> 32; }
inline s32 mulhi(s32 a, s32 b) { return s64(a) * b >> 32; }
inline u64 mulhi(u64 a, u64 b) { return u128(a) * b >> 64; }
inline s64 mulhi(s64 a, s64 b) { return (__int128)a * b >> 64; }
inline u16 mulhi(u16 a, u16 b) { return u32(a) * b >> 16; }
inline s16 mulhi(s16 a, s16 b) { return s32(a) * b >> 16; }
template <class T>
inline T mul24(T a, T b) {  // low 32 bits of the product of the low 24 bits
  return T(T(a << 8) >> 8) * T(T(b << 8) >> 8);
}
template <class D, class S>
inline D isat(S value) {
  __int128 x = value, low = kSigned<D> ? -((__int128)1 << (kBits<D> - 1)) : (__int128)0;
  __int128 high = ((__int128)1 << (kBits<D> - kSigned<D>)) - 1;
  return D(x < low ? low : x > high ? high : x);
}
inline s32 addsat(s32 a, s32 b) { return isat<s32>(s64(a) + b); }
inline s32 subsat(s32 a, s32 b) { return isat<s32>(s64(a) - b); }
inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (u32 i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
inline u32 prmt(u32 a, u32 b, u32 selector, int mode) {
  u64 bytes = u64(b) << 32 | a;
  u32 result = 0, s = selector & 3;
  for (u32 i = 0; i < 4; i++) {
    u32 index = 0;
    switch (mode) {
      case 0:
        index = selector >> 4 * i & 15;
        break;  // default; bit 3 replicates the sign
      case 1:
        index = s + i;
        break;  // f4e
      case 2:
        index = (s - i) & 7;
        break;  // b4e
      case 3:
        index = s;
        break;  // rc8
      case 4:
        index = i > s ? i : s;
        break;  // ecl
      case 5:
        index = i < s ? i : s;
        break;  // ecr
      case 6:
        index = (s & 1) * 2 + (i & 1);
        break;  // rc16
    }
    u8 byte = bytes >> 8 * (index & 7);
    if (mode == 0 && (index & 8)) byte = s8(byte) < 0 ? 0xff : 0;
    result |= u32(byte) << 8 * i;
  }
  return result;
}
template <class T>
inline T bfe(T a, u32 position, u32 length) {
  using U = std::make_unsigned_t<T>;
  position &= 255;
  length &= 255;
  if (length == 0) return 0;
  u32 sign_bit = position + length - 1 < kBits<T> ? position + length - 1 : kBits<T> - 1;
  U field = position >= kBits<T> ? 0 : U(a) >> position;
  field &= length >= kBits<T> ? U(-1) : (U(1) << length) - 1;
  if (kSigned<T> && (U(a) >> sign_bit & 1)) {
    u32 valid = position >= kBits<T> ? 0 : kBits<T> - position < length ? kBits<T> - position : length;
    field |= valid >= kBits<T> ? 0 : U(-1) << valid;
  }
  return T(field);
}
template <class T>
inline T bfi(T a, T b, u32 position, u32 length) {
  position &= 255;
  length &= 255;
  if (position >= kBits<T> || length == 0) return b;
  T mask = (length >= kBits<T> ? T(-1) : (T(1) << length) - 1) << position;
  return (b & ~mask) | (a << position & mask);
}
inline u32 bmsk(u32 position, u32 length, bool clamp) {
  if (!clamp) position &= 31, length &= 31;
  if (position >= 32) return 0;
  return (length >= 32 ? ~0u : (1u << length) - 1) << position;
}
inline u32 szext_bits(u32 length, bool clamp) { return clamp ? (length > 32 ? 32 : length) : length & 31; }
inline u32 shf(u32 a, u32 b, u32 amount, bool left, bool clamp) {
  amount = clamp ? (amount > 32 ? 32 : amount) : amount & 31;
  u64 pair = u64(b) << 32 | a;
  return left ? u32(amount == 32 ? a : pair << amount >> 32) : u32(pair >> amount);
}
inline u32 brev(u32 a) {
  u32 result = 0;
  for (int i = 0; i < 32; i++) result |= (a >> i & 1) << (31 - i);
  return result;
}
inline u64 brev(u64 a) { return u64(brev(u32(a))) << 32 | brev(u32(a >> 32)); }
inline u32 clz(u32 a) { return a ? __builtin_clz(a) : 32; }
inline u32 clz(u64 a) { return a ? __builtin_clzll(a) : 64; }
template <class T>
inline u32 bfind(T a, bool shift_amount) {
  using U = std::make_unsigned_t<T>;
  U bits = a < 0 ? ~U(a) : U(a);
  if (!bits) return ~0u;
  u32 position = 63 - __builtin_clzll(bits);
  return shift_amount ? kBits<T> - 1 - position : position;
}
inline u32 fns(u32 mask, u32 base, s32 offset) {  // position of the n-th set bit from base
  if (offset == 0) return mask >> base & 1 ? base : ~0u;
  s32 step = offset > 0 ? 1 : -1, left = offset > 0 ? offset : -offset;
  for (s32 position = base; position >= 0 && position < 32; position += step)
    if (mask >> position & 1 && --left == 0) return position;
  return ~0u;
}
inline s32 dp4a(u32 a, u32 b, s32 c, bool signed_a, bool signed_b) {
  for (int i = 0; i < 4; i++, a >>= 8, b >>= 8) {
    s32 x = signed_a ? s32(s8(a)) : s32(u8(a)), y = signed_b ? s32(s8(b)) : s32(u8(b));
    c += x * y;
  }
  return c;
}
inline s32 dp2a(u32 a, u32 b, s32 c, bool signed_a, bool signed_b, bool high) {
  b >>= high ? 16 : 0;
  for (int i = 0; i < 2; i++, a >>= 16, b >>= 8) {
    s32 x = signed_a ? s32(s16(a)) : s32(u16(a)), y = signed_b ? s32(s8(b)) : s32(u8(b));
    c += x * y;
  }
  return c;
}

// ---- floating point
enum Rnd { RN, RZ, RM, RP, RNA };
inline f32 ftz(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline u16 ftz_f16(u16 x) { return (x & 0x7c00) == 0 ? x & 0x8000 : x; }
inline u16 ftz_bf16(u16 x) { return (x & 0x7f80) == 0 ? x & 0x8000 : x; }
inline f32 sat01(f32 x) { return x > 0 ? (x < 1 ? x : 1.f) : 0.f; }
inline f64 sat01(f64 x) { return x > 0 ? (x < 1 ? x : 1.) : 0.; }
template <class T>
inline T fmin_(T a, T b) {
  if (a != a) return b;
  return b != b || a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
inline T fmax_(T a, T b) {
  if (a != a) return b;
  return b != b || a > b || (a == b && !std::signbit(a)) ? a : b;
}
template <class T>
inline T fminnan(T a, T b) {
  return a != a ? a : b != b ? b : fmin_(a, b);
}
template <class T>
inline T fmaxnan(T a, T b) {
  return a != a ? a : b != b ? b : fmax_(a, b);
}
inline f32 ex2(f32 x) { return std::exp2(x); }
inline f32 lg2(f32 x) { return std::log2(x); }
// operation: '+', '-', '*', '/', 'f' (fma), 's' (square root), 'r' (reciprocal)
f32 arith_rnd(char operation, Rnd, f32 a, f32 b = 0, f32 c = 0);
f64 arith_rnd(char operation, Rnd, f64 a, f64 b = 0, f64 c = 0);
// kind of the bits: 'i' s64, 'u' u64, 'd' f64
f32 conv_rnd(char kind, Rnd, u64 bits);
f64 conv_rnd64(char kind, Rnd, u64 bits);

// Rounds to odd: truncated, with the last bit set if anything was lost. A second rounding, to a format of at least two
// bits less, then gives what one rounding of the exact value would.
f32 f32_odd(f64 x);
template <class I, std::enable_if_t<std::is_integral_v<I>, int> = 0>
inline f32 f32_odd(I x) {
  __int128 value = x;
  u64 magnitude = value < 0 ? u64(-value) : u64(value);
  if (int extra = magnitude ? 40 - __builtin_clzll(magnitude) : 0; extra > 0) {  // bits beyond 24
    bool lost = magnitude & ((1ull << extra) - 1);
    magnitude = (magnitude >> extra | lost) << extra;
  }
  return value < 0 ? -f32(magnitude) : f32(magnitude);
}
f32 fma16(f32 a, f32 b, f32 c);  // of values with at most 11 bits; rounded to odd

inline f32 h2f(u16 h) { return _cvtsh_ss(h); }
inline u16 f2h(f32 f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
inline u16 f2h_rz(f32 f) { return _cvtss_sh(f, _MM_FROUND_TO_ZERO); }
inline f32 b2f(u16 h) { return bc<f32>(u32(h) << 16); }
inline u16 f2b(f32 f) {
  u32 x = bc<u32>(f);
  return f != f ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16;
}
inline u16 f2b_rz(f32 f) { return f != f ? 0x7fff : bc<u32>(f) >> 16; }
// .satfinite: infinities become the largest finite value; NaN stays.
inline u16 f16_finite(u16 h) { return (h & 0x7fff) == 0x7c00 ? h - 1 : h; }
inline u16 bf16_finite(u16 h) { return (h & 0x7fff) == 0x7f80 ? h - 1 : h; }
inline f32 tf32_finite(f32 f) { return std::isinf(f) ? std::copysign(bc<f32>(0x7f7fe000u), f) : f; }
inline f32 relu(f32 f) { return f > 0 || f != f ? f : 0.f; }
inline f64 relu(f64 f) { return f > 0 || f != f ? f : 0.; }
inline f32 tf32_rna(f32 f) { return std::isfinite(f) ? bc<f32>((bc<u32>(f) + 0x1000) & ~0x1fffu) : f; }
inline f32 tf32_rn(f32 f) {
  u32 x = bc<u32>(f);
  return std::isfinite(f) ? bc<f32>((x + 0xfff + (x >> 13 & 1)) & ~0x1fffu) : f;
}
u8 f2fp8(f32 f, bool e5m2);  // satfinite, round to nearest even
f32 fp82f(u8 v, bool e5m2);
template <class T>
inline f64 fround(T x, Rnd r) {
  return r == RN ? std::nearbyint(x) : r == RZ ? std::trunc(x) : r == RM ? std::floor(x) : std::ceil(x);
}
// Saturates; NaN gives the bits of `invalid`.
template <class I, class T>
inline I f2i(T x, Rnd r, u64 invalid) {
  if (x != x) return I(invalid);
  f64 value = fround(x, r);
  const f64 end = std::ldexp(1., kBits<I> - kSigned<I>), low = kSigned<I> ? -end : 0;
  using U = std::make_unsigned_t<I>;
  if (value >= end) return I(U(-1) >> kSigned<I>);
  if (value < low) return kSigned<I> ? I(U(1) << (kBits<I> - 1)) : 0;
  return I(value);
}
template <class F>
inline u32 map2(F f, u32 a, u32 b = 0, u32 c = 0) {  // on both halves of packed 16-bit pairs
  return u32(f(u16(a), u16(b), u16(c))) | u32(f(u16(a >> 16), u16(b >> 16), u16(c >> 16))) << 16;
}
}  // namespace ptxsim
