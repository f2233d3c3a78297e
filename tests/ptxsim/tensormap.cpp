// Copies through a tensor map (TMA).
#include <algorithm>
#include <cstring>

#include "core.hpp"
#include "tensormap.hpp"

namespace ptxsim {
static const TensorMap& tensor_map(Fiber& f, u64 map, int dim) {
  const TensorMap& m = *(const TensorMap*)generic_ld(f, map, 64);
  if (m.magic != TensorMap::MAGIC) fault(f, "the operand at 0x%lx is not a tensor map", map);
  if (m.rank != dim) fault(f, "tensor map has rank %d, the instruction has %d", m.rank, dim);
  return m;
}
// Calls fn(smem_offset_linear, global address or 0 if out of bounds, bytes) for each 16-byte
// chunk or smaller run of a box; elements of a row are contiguous in both memories.
template <class Fn>
static void each_run(const TensorMap& m, const s32* coord, Fn fn) {
  u32 eb = m.elem_bytes(), row = m.box[0], idx[5] = {};
  u64 off = 0;
  for (;;) {
    bool in = true;
    u64 g = m.addr;
    for (int d = 1; d < m.rank; d++) {
      s64 x = (s64)coord[d] + (s64)idx[d] * m.estride[d];
      in &= x >= 0 && x < (s64)m.dim[d];
      g += x * m.stride[d - 1];
    }
    for (u32 e = 0; e < row;) {  // runs of equal bounds status, at most 16 bytes of smem
      u32 lim = std::min(row, (u32)((off / 16 * 16 + 16 - off) / eb) + e);
      auto inb = [&](u32 i) {
        s64 x = (s64)coord[0] + (s64)i * m.estride[0];
        return in && x >= 0 && x < (s64)m.dim[0];
      };
      bool b = inb(e);
      u32 end = e + 1;
      if (m.estride[0] == 1)
        while (end < lim && inb(end) == b) end++;
      fn(off, b ? g + ((s64)coord[0] + (s64)e * m.estride[0]) * eb : 0, (end - e) * eb);
      off += (end - e) * eb;
      e = end;
    }
    int d = 1;
    while (d < m.rank && ++idx[d] == m.box[d]) idx[d++] = 0;
    if (d >= m.rank) return;
  }
}
static u64 box_bytes(const TensorMap& m) {
  u64 n = m.elem_bytes();
  for (int d = 0; d < m.rank; d++) n *= m.box[d];
  return n;
}
static u32 swizzled(const TensorMap& m, u32 a) {
  u32 s = m.swizzle == 3 ? 7 : m.swizzle == 2 ? 3 : m.swizzle == 1 ? 1 : 0;
  return a ^ (a >> 7 & s) << 4;
}
struct Coord {
  s32 x[5];
};
void tma_load(Thread& t, int dim, u64 dst, u64 map, const s32* coord, u64 mb, u32 mask) {
  Fiber* f = &fiber(t);
  TensorMap m = tensor_map(*f, map, dim);
  Coord c{};
  std::copy(coord, coord + dim, c.x);
  u64 d0 = dst;
  cta_of(*f, d0);
  if (d0 & 127) fault(t, "cp.async.bulk.tensor: shared address 0x%lx is not 128-byte aligned", d0);
  gang_issue_load(*f, dst, box_bytes(m), mask, [=] {
    for (u32 r = 0; r < f->cluster_size; r++) {
      u64 d = dst, mo = mb;
      Cta *ct = &cta_of(*f, d), *mc = &cta_of(*f, mo);
      if (mask) {
        if (!(mask >> r & 1)) continue;
        ct = mc = f->gang->ctas[r];
      } else if (r)
        break;
      each_run(m, c.x, [&](u64 off, u64 g, u32 n) {
        u8* p = async_smem(*f, *ct, swizzled(m, u32(d + off)), n, true, true);
        if (g)
          memcpy(p, global_range(*f, g, n, "tensor-map load"), n);
        else
          memset(p, 0, n);
      });
      mbar_complete_tx(*f, *mc, mo, box_bytes(m));
    }
  });
}
void tma_store(Thread& t, int dim, u64 map, const s32* coord, u64 src, int red) {
  Fiber* f = &fiber(t);
  TensorMap m = tensor_map(*f, map, dim);
  Coord c{};
  std::copy(coord, coord + dim, c.x);
  u64 s0 = src;
  cta_of(*f, s0);
  if (s0 & 127) fault(t, "cp.async.bulk.tensor: shared address 0x%lx is not 128-byte aligned", s0);
  bulk_issue(
      *f,
      [=](std::vector<u8>& v) {
        u64 s = src;
        Cta& ct = cta_of(*f, s);
        v.resize(box_bytes(m));
        each_run(m, c.x, [&](u64 off, u64 g, u32 n) {
          if (g) memcpy(&v[off], async_smem(*f, ct, swizzled(m, u32(s + off)), n, false, true), n);
        });
      },
      [=](std::vector<u8>& v) {
        int r = red == R_NONE ? R_NONE : m.red_op(red);
        each_run(m, c.x, [&](u64 off, u64 g, u32 n) {
          if (g) bulk_red(global_range(*f, g, n, "tensor-map store"), &v[off], n, r);
        });
      });
}
}  // namespace ptxsim
