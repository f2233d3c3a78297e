// wgmma: operands by descriptor, and results that exist only after the wait.
#include <cstring>

#include "fragments.hpp"

namespace ptxsim {
// Reads the R x k operand at a matrix descriptor to out: row-major [R][k], or [k][R] if kmaj.
// All address arithmetic is on 16-byte chunks; the swizzle acts on absolute address bits.
static void read_operand(Fiber& f, u64 desc, Elt e, int row0, int R, int k, bool tnsp, bool transpose_out, f32* out) {
  u32 start = (desc & 0x3fff) << 4, lbo = (desc >> 16 & 0x3fff) << 4, sbo = (desc >> 32 & 0x3fff) << 4;
  int sw = desc >> 62 & 3, swz = sw == 1 ? 7 : sw == 2 ? 3 : sw == 3 ? 1 : 0;  // 128B, 64B, 32B, none
  int W = swz + 1, eb = elt_bytes(e), per = 16 / eb;                           // W: chunks per swizzle row
  if (desc >> 49 & 7) fault(f, "wgmma descriptor with a base offset is not supported");
  auto put = [&](u32 addr, int r, int c, int dr, int dc) {
    addr ^= (addr >> 7 & swz) << 4;
    f32 v[16];
    decode(e, async_smem(f, *f.cta, addr, 16, false, true), per, v);
    for (int i = 0; i < per; i++) {
      int rr = r + dr * i, cc = c + dc * i;
      if (transpose_out)
        out[cc * R + rr] = v[i];
      else
        out[rr * k + cc] = v[i];
    }
  };
  if (!tnsp) {
    for (int r = 0; r < R; r++)
      for (int c = 0; c < k; c += per) {
        int row = row0 + r, ch = c / per;
        put(start + row / 8 * sbo + row % 8 * 16 * W + (sw ? ch * 16 : ch * lbo), r, c, 0, 1);
      }
  } else {  // MN-major: chunks run along the row index
    for (int r = 0; r < R; r += per)
      for (int c = 0; c < k; c++) {
        int ch = (row0 + r) / per;
        u32 a = sw ? start + ch % W * 16 + ch / W * lbo + c % 8 * 16 * W + c / 8 * sbo
                   : start + ch * sbo + c % 8 * 16 + c / 8 * lbo;
        put(a, r, c, 1, 0);
      }
  }
}
// Tokens: 15 bits of the operation's sequence number, 7 of the register index.
static u32 token(u64 seq, int reg) { return TOKEN_BASE + (u32(seq % 0x7fff) << 7 | reg); }
static void resolve(WarpGroup& g, u32* v, int n, int lane) {  // lane: within the warpgroup
  WgmmaOp* last = nullptr;
  for (int i = 0; i < n; i++) {
    u32 tok = v[i] - TOKEN_BASE;
    if (__builtin_expect(tok >= 0x3fffff, 1)) continue;
    if (!last || last->seq % 0x7fff != tok >> 7) {
      last = nullptr;
      for (auto& op : g.ops)
        if (op.seq % 0x7fff == tok >> 7) last = &op;
    }
    if (last && last->done) v[i] = last->acc[lane * last->nd + (tok & 127)];
  }
}
static void wgmma_exec(Fiber& f, WarpGroup& g, WgmmaOp& op) {
  const WgmmaSpec& s = *op.spec;
  int n = s.n, k = s.k;
  static thread_local std::vector<f32> fa, fb, acc;
  static thread_local std::vector<s32> iacc;
  fa.resize(16 * k);
  fb.resize(k * n);
  u32 line = f.line;
  f.line = op.line;
  read_operand(f, op.bdesc, s.b, 0, n, k, s.tnsp_b, true, fb.data());
  if (s.scale_a * s.scale_b < 0)
    for (auto& x : fb) x = -x;
  for (int w = 0; w < 4; w++) {
    u32* d = &op.acc[w * 32 * op.nd];
    if (s.a_reg)
      for (int l = 0; l < 32; l++) a_fragment(s.a, k, l, &op.a[(w * 32 + l) * 4], 4, fa.data());
    else
      read_operand(f, op.adesc, s.a, 16 * w, 16, k, s.tnsp_a, false, fa.data());
    for (int l = 0; l < 32; l++) resolve(g, &d[l * op.nd], op.nd, w * 32 + l);
    if (s.acc == E_S32) {
      iacc.assign(16 * n, 0);
      if (op.scale_d) each_acc(n, [&](int l, int r, int i, int j) { iacc[i * n + j] = d[l * op.nd + r]; });
      gemm16<s32>(n, k, fa.data(), fb.data(), iacc.data());
      each_acc(n, [&](int l, int r, int i, int j) { d[l * op.nd + r] = iacc[i * n + j]; });
      continue;
    }
    bool h = s.acc == E_F16;
    acc.assign(16 * n, 0);
    if (op.scale_d)
      each_acc(n, [&](int l, int r, int i, int j) {
        acc[i * n + j] = h ? h2f(d[l * op.nd + (r >> 1)] >> 16 * (r & 1)) : bc<f32>(d[l * op.nd + r]);
      });
    gemm16<f32>(n, k, fa.data(), fb.data(), acc.data());
    each_acc(n, [&](int l, int r, int i, int j) {
      if (!h) {
        d[l * op.nd + r] = bc<u32>(acc[i * n + j]);
        return;
      }
      u32& x = d[l * op.nd + (r >> 1)];
      x = r & 1 ? (x & 0xffff) | u32(f2h(acc[i * n + j])) << 16 : f2h(acc[i * n + j]);
    });
  }
  f.line = line;
  op.done = true;
}
struct WgmmaArguments {
  Fiber* f;
  u32* d;
  const u32* a;
  u64 ad, bd;
  bool scale_d;
  u32 n;
  int nregs;
};
static constexpr const char* ALIGNED = "waiting for the other lanes at a wgmma instruction";
void wgmma(Thread& t, u32 key, const WgmmaSpec& spec, u32* d, int nd, const u32* areg, u64 ad, u64 bd, bool scale_d) {
  WgmmaArguments arg{&fiber(t), d, areg, ad, bd, scale_d, 0, nd};
  collective(
      t, key, ~0u, &arg,
      [](Warp& w, u32 m, void** args, const void* sp) {
        const WgmmaSpec& s = *(const WgmmaSpec*)sp;
        WgmmaArguments& a0 = *(WgmmaArguments*)args[__builtin_ctz(m)];
        WarpGroup& g = *w.wg;
        u32 wi = a0.f->warp % 4, line = a0.f->line;
        int nd = a0.nregs;
        if (m != ~0u) fault(*a0.f, "wgmma with inactive lanes");
        if (a0.f->warp / 4 * 4 + 3 >= w.cta->warps.size()) fault(*a0.f, "wgmma in an incomplete warpgroup");
        if (!w.wgmma_fenced) fault(*a0.f, "wgmma.mma_async without a preceding wgmma.fence");
        u64 seq = w.wgmma_count++;
        WgmmaOp* op = nullptr;
        for (auto& o : g.ops)
          if (o.seq == seq) op = &o;
        if (!op) {
          g.ops.push_back({seq, w.wgmma_group, line, &s, a0.ad, a0.bd, a0.scale_d, false, nd, 0, 0, {}, {}});
          op = &g.ops.back();
          op->acc.resize(128 * nd);
          if (s.a_reg) op->a.resize(128 * 4);
        }
        if (op->line != line || op->group != w.wgmma_group)
          fault(*a0.f, "the warps of a warpgroup execute different wgmma instructions (the other at line %u)",
                op->line);
        for (int l = 0; l < 32; l++) {
          WgmmaArguments& x = *(WgmmaArguments*)args[l];
          if (x.ad != op->adesc || x.bd != op->bdesc || x.scale_d != op->scale_d)
            fault(*x.f, "wgmma descriptors or scale-d differ between the threads of a warpgroup");
          int wl = wi * 32 + l;
          memcpy(&op->acc[wl * nd], x.d, nd * 4);
          if (s.a_reg) memcpy(&op->a[wl * 4], x.a, 16);
          resolve(g, &op->acc[wl * nd], nd, wl);
          for (int r = 0; r < nd; r++) x.d[r] = token(seq, r);
        }
        op->issued |= 1u << wi;
        if (op->issued == 15) {
          for (Fiber* f : g.waiting) f->gang->ready(f);
          g.waiting.clear();
        }
      },
      &spec, ALIGNED);
}
void wgmma_fence(Thread& t, u32) { fiber(t).own_warp->wgmma_fenced = true; }
void wgmma_commit(Thread& t, u32 key) {
  collective(t, key, ~0u, nullptr, [](Warp& w, u32, void**, const void*) { w.wgmma_group++; }, nullptr, ALIGNED);
}
void wgmma_wait(Thread& t, u32 key, u32 n, u32* regs, int nregs) {
  WgmmaArguments arg{&fiber(t), regs, nullptr, 0, 0, false, n, nregs};
  collective(
      t, key, ~0u, &arg,
      [](Warp& w, u32, void** args, const void*) {
        Fiber& f = *w.lanes[0]->gang->cur;  // the lane that arrived last; the others are blocked
        WarpGroup& g = *w.wg;
        u32 bit = 1u << f.warp % 4, left = ((WgmmaArguments*)args[f.lane])->n;
        for (size_t i = 0; i < g.ops.size(); i++) {
          WgmmaOp* op = &g.ops[i];
          if (!(op->issued & bit) || w.wgmma_group - op->group <= left) continue;
          u64 seq = op->seq;
          while (op->issued != 15) {
            g.waiting.push_back(&f);
            f.gang->block(f, "wgmma.wait_group, for the other warps of the warpgroup");
            for (i = 0; g.ops[i].seq != seq; i++) {
            }  // finished operations may have been dropped
            op = &g.ops[i];
          }
          if (!op->done) wgmma_exec(f, g, *op);
          op->released |= bit;
        }
        for (int l = 0; l < 32; l++)
          if (args[l]) {
            WgmmaArguments& x = *(WgmmaArguments*)args[l];
            resolve(g, x.d, x.nregs, f.warp % 4 * 32 + l);
          }
        size_t drop = 0;
        while (drop < g.ops.size() && g.ops[drop].released == 15) drop++;
        if (!drop) return;
        for (auto& op : g.ops)
          if (!op.done)
            for (int l = 0; l < 128; l++) resolve(g, &op.acc[l * op.nd], op.nd, l);
        g.ops.erase(g.ops.begin(), g.ops.begin() + drop);
      },
      nullptr, ALIGNED);
}
}  // namespace ptxsim
