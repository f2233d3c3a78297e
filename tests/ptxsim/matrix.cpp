// ldmatrix, stmatrix, movmatrix and mma.sync.
//
// Products accumulate in f32 in the order of k; tensor cores add in another order and with fewer guard bits.
#include <cstring>

#include "fragments.hpp"

namespace ptxsim {
// ---- ldmatrix, stmatrix, movmatrix

struct MatrixRows {
  Fiber* f;
  int n;
  bool trans;
  u32 addr;
  u32* out;
  const u32* in;
};
void ldmatrix(Thread& t, u32 key, int n, bool trans, u64 addr, u32* out) {
  MatrixRows a{&fiber(t), n, trans, u32(addr), out, nullptr};
  collective(
      t, key, ~0u, &a,
      [](Warp&, u32 m, void** args, const void*) {
        MatrixRows& a0 = *(MatrixRows*)args[__builtin_ctz(m)];
        if (m != ~0u) fault(*a0.f, "ldmatrix with inactive lanes");
        for (int x = 0; x < a0.n; x++) {
          u16 tile[8][8];
          for (int r = 0; r < 8; r++) {
            MatrixRows& s = *(MatrixRows*)args[x * 8 + r];
            if (s.addr & 15) fault(*s.f, "ldmatrix row address 0x%x is not 16-byte aligned", s.addr);
            u64 off = s.addr;
            Cta& c = cta_of(*s.f, off);
            memcpy(tile[r], async_smem(*s.f, c, off, 16, false, false), 16);
          }
          for (int l = 0; l < 32; l++) {
            int r = l >> 2, c = (l & 3) * 2;
            ((MatrixRows*)args[l])->out[x] =
                a0.trans ? tile[c][r] | u32(tile[c + 1][r]) << 16 : tile[r][c] | u32(tile[r][c + 1]) << 16;
          }
        }
      },
      nullptr, "ldmatrix");
}
void stmatrix(Thread& t, u32 key, int n, bool trans, u64 addr, const u32* in) {
  MatrixRows a{&fiber(t), n, trans, u32(addr), nullptr, in};
  collective(
      t, key, ~0u, &a,
      [](Warp&, u32 m, void** args, const void*) {
        MatrixRows& a0 = *(MatrixRows*)args[__builtin_ctz(m)];
        if (m != ~0u) fault(*a0.f, "stmatrix with inactive lanes");
        for (int x = 0; x < a0.n; x++) {
          u16 tile[8][8];
          for (int l = 0; l < 32; l++) {
            int r = l >> 2, c = (l & 3) * 2;
            u32 v = ((MatrixRows*)args[l])->in[x];
            if (a0.trans)
              tile[c][r] = v, tile[c + 1][r] = v >> 16;
            else
              tile[r][c] = v, tile[r][c + 1] = v >> 16;
          }
          for (int r = 0; r < 8; r++) {
            MatrixRows& s = *(MatrixRows*)args[x * 8 + r];
            if (s.addr & 15) fault(*s.f, "stmatrix row address 0x%x is not 16-byte aligned", s.addr);
            u64 off = s.addr;
            Cta& c = cta_of(*s.f, off);
            if ((s.f->flags & F_RACE) && &c == s.f->cta && off >= SMEM_BASE && off + 16 <= s.f->smem_end)
              race_check(*s.f, off, 16, true);
            memcpy(async_smem(*s.f, c, off, 16, true, false), tile[r], 16);
          }
        }
      },
      nullptr, "stmatrix");
}

u32 movmatrix(Thread& t, u32 key, u32 v) {
  collective(
      t, key, ~0u, &v,
      [](Warp&, u32, void** args, const void*) {
        u16 tile[8][8];
        for (int l = 0; l < 32; l++) {
          u32 x = *(u32*)args[l];
          tile[l >> 2][(l & 3) * 2] = x;
          tile[l >> 2][(l & 3) * 2 + 1] = x >> 16;
        }
        for (int l = 0; l < 32; l++)
          *(u32*)args[l] = tile[(l & 3) * 2][l >> 2] | u32(tile[(l & 3) * 2 + 1][l >> 2]) << 16;
      },
      nullptr, "movmatrix");
  return v;
}

// ---- mma.sync

struct MmaArguments {
  Fiber* f;
  const u32 *a, *b, *c;
  u32* d;
};
void mma(Thread& t, u32 key, const MmaSpec& spec, const u32* a, const u32* b, const u32* c, u32* d) {
  MmaArguments arg{&fiber(t), a, b, c, d};
  collective(
      t, key, ~0u, &arg,
      [](Warp&, u32 m, void** args, const void* sp) {
        const MmaSpec& s = *(const MmaSpec*)sp;
        auto A = [&](int l) -> MmaArguments& { return *(MmaArguments*)args[l]; };
        if (m != ~0u) fault(*A(__builtin_ctz(m)).f, "mma.sync with inactive lanes");
        int k = s.k, E = 4 / elt_bytes(s.a), nb = k / (4 * E);
        f32 fa[16 * 64], fb[64 * 8], tmp[4];
        for (int l = 0; l < 32; l++) {
          a_fragment(s.a, k, l, A(l).a, 2 * nb, fa);
          for (int r = 0; r < nb; r++) {
            decode(s.b, (const u8*)&A(l).b[r], E, tmp);
            for (int j = 0; j < E; j++) fb[((l & 3) * E + j + r * 4 * E) * 8 + (l >> 2)] = tmp[j];
          }
        }
        if (s.acc == E_S32) {
          s64 acc[16 * 8];
          each_acc(8, [&](int l, int r, int i, int j) { acc[i * 8 + j] = (s32)A(l).c[r]; });
          gemm16<s64>(8, k, fa, fb, acc);
          each_acc(8, [&](int l, int r, int i, int j) {
            s64 x = acc[i * 8 + j];
            A(l).d[r] = s.satfinite ? isat<s32>(x) : (s32)x;
          });
        } else {
          f32 acc[16 * 8];
          bool h = s.acc == E_F16;
          each_acc(8, [&](int l, int r, int i, int j) {
            acc[i * 8 + j] = h ? h2f(A(l).c[r >> 1] >> 16 * (r & 1)) : bc<f32>(A(l).c[r]);
          });
          gemm16<f32>(8, k, fa, fb, acc);
          each_acc(8, [&](int l, int r, int i, int j) {
            u32* d = A(l).d;
            if (!h)
              d[r] = bc<u32>(acc[i * 8 + j]);
            else
              d[r >> 1] = r & 1 ? d[r >> 1] | u32(f2h(acc[i * 8 + j])) << 16 : f2h(acc[i * 8 + j]);
          });
        }
      },
      &spec, "mma.sync");
}
}  // namespace ptxsim
