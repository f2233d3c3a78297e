// Elements and register fragments of the matrix instructions.
#pragma once
#include "core.hpp"

namespace ptxsim {
const f32* fp8_table(bool e5m2);  // values of the 256 codes
inline int elt_bytes(Elt e) { return e <= E_BF16 ? 2 : e == E_TF32 || e >= E_F32 ? 4 : 1; }
// Decodes n elements of type e to float (integers convert exactly).
inline void decode(Elt e, const u8* p, int n, f32* out) {
  switch (e) {
    case E_F16:
      for (int i = 0; i < n; i++) out[i] = h2f(rd<u16>(p + 2 * i));
      break;
    case E_BF16:
      for (int i = 0; i < n; i++) out[i] = b2f(rd<u16>(p + 2 * i));
      break;
    case E_TF32:
      for (int i = 0; i < n; i++) out[i] = bc<f32>(rd<u32>(p + 4 * i) & ~0x1fffu);
      break;
    case E_E4M3:
    case E_E5M2: {
      const f32* t = fp8_table(e == E_E5M2);
      for (int i = 0; i < n; i++) out[i] = t[p[i]];
      break;
    }
    case E_S8:
      for (int i = 0; i < n; i++) out[i] = (s8)p[i];
      break;
    case E_U8:
      for (int i = 0; i < n; i++) out[i] = p[i];
      break;
    default:
      break;
  }
}
// acc[16][n] += A[16][k] * Bt[k][n]; the integer form is exact.
template <class T>
inline void gemm16(int n, int k, const f32* a, const f32* bt, T* acc) {
  for (int i = 0; i < 16; i++)
    for (int x = 0; x < k; x++) {
      T av = (T)a[i * k + x];
      const f32* b = bt + x * n;
      T* d = acc + i * n;
      for (int j = 0; j < n; j++) d[j] += av * (T)b[j];
    }
}
// Accumulator fragments: register r of lane l holds row gid + 8*(r/2%2), col 8*(r/4) + 2*tig + r%2.
template <class Fn>
inline void each_acc(int n, Fn fn) {
  for (int l = 0; l < 32; l++)
    for (int r = 0; r < n / 2; r++) fn(l, r, (l >> 2) + 8 * (r >> 1 & 1), 8 * (r >> 2) + 2 * (l & 3) + (r & 1));
}
inline void a_fragment(Elt e, int k, int lane, const u32* reg, int nreg, f32* a) {
  int E = 4 / elt_bytes(e);
  for (int r = 0; r < nreg; r++)
    decode(e, (const u8*)&reg[r], E, a + ((lane >> 2) + 8 * (r & 1)) * k + (r >> 1) * 4 * E + (lane & 3) * E);
}

}  // namespace ptxsim
