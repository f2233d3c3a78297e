// Directed rounding and 8-bit float formats. Compiled with -frounding-math.
#include <cfenv>
#include <cmath>

#include "core.hpp"

namespace ptxsim {
static u8 encode_fp8(f32 f, bool e5m2) {
  // Magnitudes are monotone in the 7-bit code, so rounding is a search over the code values.
  u8 sign = std::signbit(f) ? 0x80 : 0;
  if (f != f) return e5m2 ? 0x7f : 0x7f;
  f32 x = std::fabs(f);
  u8 top = e5m2 ? 0x7b : 0x7e;  // largest finite code: 57344 / 448
  u8 lo = 0, hi = top;
  if (x >= fp82f(top, e5m2)) return sign | top;
  while (hi - lo > 1) {
    u8 m = (lo + hi) / 2;
    (fp82f(m, e5m2) <= x ? lo : hi) = m;
  }
  f32 a = x - fp82f(lo, e5m2), b = fp82f(hi, e5m2) - x;
  return sign | (a < b || (a == b && !(lo & 1)) ? lo : hi);
}
u8 f2fp8(f32 f, bool e5m2) { return encode_fp8(f, e5m2); }
f32 fp82f(u8 v, bool e5m2) {
  if (e5m2) return h2f(u16(v) << 8);
  u32 e = v >> 3 & 15, m = v & 7;
  f32 x = e ? std::ldexp(1 + m / 8.f, (int)e - 7) : std::ldexp(m / 8.f, -6);
  if ((v & 0x7f) == 0x7f) x = NAN;
  return v & 0x80 ? -x : x;
}
template <class T>
static T arith(char op, Rnd r, T a, T b, T c) {
  static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD, FE_TONEAREST};
  volatile T x = a, y = b, z = c, out;
  std::fesetround(modes[r]);
  switch (op) {
    case '+':
      out = x + y;
      break;
    case '-':
      out = x - y;
      break;
    case '*':
      out = x * y;
      break;
    case '/':
      out = x / y;
      break;
    case 'f':
      out = std::fma((T)x, (T)y, (T)z);
      break;
    case 's':
      out = std::sqrt((T)x);
      break;
    default:
      out = T(1) / x;
      break;
  }
  std::fesetround(FE_TONEAREST);
  return out;
}
f32 arith_rnd(char op, Rnd r, f32 a, f32 b, f32 c) { return arith<f32>(op, r, a, b, c); }
f64 arith_rnd(char op, Rnd r, f64 a, f64 b, f64 c) { return arith<f64>(op, r, a, b, c); }
static bool is_odd(f64 x) { return bc<u64>(x) & 1; }
static f64 toward(f64 x, bool up) { return std::nextafter(x, up ? INFINITY : -INFINITY); }
f32 f32_odd(f64 x) {
  if (x != x) return (f32)x;
  f32 zero = conv_rnd('d', RZ, bc<u64>(x));
  return zero == x ? zero : bc<f32>(bc<u32>(zero) | 1);
}
f32 fma16(f32 a, f32 b, f32 c) {
  f64 product = (f64)a * (f64)b, x = product, y = c;  // exact: 22 bits
  f64 sum = x + y;
  if (!std::isfinite(sum)) return (f32)sum;
  f64 part = sum - x, lost = (x - (sum - part)) + (y - part);  // exact error of the sum
  if (lost != 0 && !is_odd(sum)) sum = toward(sum, lost > 0);
  return f32_odd(sum);
}
template <class T>
static T conv(char op, Rnd r, u64 bits) {
  static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD, FE_TONEAREST};
  volatile u64 v = bits;
  volatile T out;
  std::fesetround(modes[r]);
  if (op == 'i')
    out = (T)(s64)v;
  else if (op == 'u')
    out = (T)(u64)v;
  else {
    volatile f64 d = bc<f64>((u64)v);
    out = (T)d;
  }
  std::fesetround(FE_TONEAREST);
  return out;
}
f32 conv_rnd(char op, Rnd r, u64 v) { return conv<f32>(op, r, v); }
f64 conv_rnd64(char op, Rnd r, u64 v) { return conv<f64>(op, r, v); }
const f32* fp8_table(bool e5m2) {
  static f32 t[2][256];
  static bool init = [] {
    for (int i = 0; i < 256; i++) {
      t[0][i] = fp82f(i, false);
      t[1][i] = fp82f(i, true);
    }
    return true;
  }();
  (void)init;
  return t[e5m2];
}
}  // namespace ptxsim
