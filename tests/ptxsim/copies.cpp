// cp.async, and bulk copies without a tensor map.
//
// A copy happens at its issue (eager) or as late as the program allows (lazy): a cp.async when its thread waits for it,
// a bulk load when no thread can run, a bulk store when its thread waits for it.
#include <algorithm>
#include <cstring>

#include "core.hpp"

namespace ptxsim {
static void run_copy(Fiber& f, CopyOp& op) {
  u32 line = f.line;
  f.line = op.line;
  if (op.arrive) {
    mbar_arrive(f, op.mbar, 1, 0, false);
    f.line = line;
    return;
  }
  u64 off = op.dst;
  Cta& c = cta_of(f, off);
  u8* d = async_smem(f, c, off, op.size, true, false);
  if (op.src_size) memcpy(d, global_range(f, op.src, op.src_size, "cp.async source"), op.src_size);
  memset(d + op.src_size, 0, op.size - op.src_size);
  f.line = line;
}
void cp_async(Thread& t, u64 dst, u64 src, u32 size, u32 src_size) {
  Fiber& f = fiber(t);
  if (src_size > size) fault(t, "cp.async of %u bytes with a source size of %u", size, src_size);
  if ((dst | (src_size ? src : 0)) & (size - 1))
    fault(t, "misaligned cp.async of %u bytes: shared 0x%lx, global 0x%lx", size, dst, src);
  u64 off = dst;
  Cta& c = cta_of(f, off);
  if (off < SMEM_BASE || off + size > t.smem_end)
    fault(t, "out-of-bounds asynchronous copy: %u bytes to shared offset 0x%lx", size, off);
  if ((t.flags & F_RACE) && &c == f.cta) race_check(t, off, size, true);
  CopyOp op{dst, src, size, src_size, f.copy_group, t.line, 0, 0};
  if (f.copies.empty() && f.gang->eager()) {
    run_copy(f, op);
  } else {
    mark_in_flight(f, c, off, size);
    f.copies.push_back(op);
  }
}
void cp_async_commit(Thread& t) { fiber(t).copy_group++; }
void cp_async_wait(Thread& t, s32 n) {
  Fiber& f = fiber(t);
  while (!f.copies.empty() && (n < 0 || (s32)(f.copy_group - f.copies.front().group) > n)) {
    CopyOp op = f.copies.front();
    f.copies.pop_front();
    run_copy(f, op);
  }
}
void cp_async_mbar(Thread& t, u64 a, bool noinc) {
  Fiber& f = fiber(t);
  u64 off = a;
  Cta& c = cta_of(f, off);
  MBarrier& m = find_mbarrier(f, c, off);
  if (!noinc) m.pending++;
  CopyOp op{0, 0, 0, 0, f.copy_group, t.line, a, 1};
  if (f.copies.empty())
    run_copy(f, op);
  else {
    f.copies.push_back(op);
    f.gang->copy_arrivals.push_back(&f);
  }
}
bool run_copies_until_arrival(Fiber& f) {
  while (!f.copies.empty()) {
    CopyOp op = f.copies.front();
    f.copies.pop_front();
    run_copy(f, op);
    if (op.arrive) return true;
  }
  return false;
}
void gang_issue_load(Fiber& f, u64 dst, u64 n, u32 mask, std::function<void()> run) {
  if (f.gang->eager()) return run();
  u64 off = dst;
  Cta& own = cta_of(f, off);
  for (u32 rank = 0; rank < f.cluster_size; rank++)
    if (mask >> rank & 1) mark_in_flight(f, *f.gang->ctas[rank], off, n);
  if (!mask) mark_in_flight(f, own, off, n);
  f.gang->async.push_back({&f, f.line, std::move(run)});
}
static void check_bulk_alignment(Fiber& f, u64 a, u64 b, u32 n) {
  if ((a | b | n) & 15)
    fault(f, "cp.async.bulk: addresses and size must be multiples of 16 (0x%lx, 0x%lx, %u)", a, b, n);
}
void bulk_g2s(Thread& t, u64 dst, u64 src, u32 n, u64 mb, u32 mask) {
  Fiber* f = &fiber(t);
  check_bulk_alignment(*f, dst, src, n);
  gang_issue_load(*f, dst, n, mask, [=] {
    for (u32 r = 0; r < f->cluster_size; r++) {
      u64 d = dst, m = mb;
      Cta *c = &cta_of(*f, d), *mc = &cta_of(*f, m);
      if (mask) {
        if (!(mask >> r & 1)) continue;
        c = mc = f->gang->ctas[r];
      } else if (r)
        break;
      memcpy(async_smem(*f, *c, d, n, true, true), global_range(*f, src, n, "cp.async.bulk source"), n);
      mbar_complete_tx(*f, *mc, m, n);
    }
  });
}
void bulk_s2s(Thread& t, u64 dst, u64 src, u32 n, u64 mb) {
  Fiber* f = &fiber(t);
  check_bulk_alignment(*f, dst, src, n);
  gang_issue_load(*f, dst, n, 0, [=] {
    u64 d = dst, s = src, m = mb;
    Cta &c = cta_of(*f, d), &sc = cta_of(*f, s), &mc = cta_of(*f, m);
    memcpy(async_smem(*f, c, d, n, true, true), async_smem(*f, sc, s, n, false, true), n);
    mbar_complete_tx(*f, mc, m, n);
  });
}
template <class T, class Fn>
static void each(u8* d, const u8* s, u32 n, Fn fn) {
  for (u32 i = 0; i + sizeof(T) <= n; i += sizeof(T)) {
    T v = rd<T>(s + i);
    rmw<T>(d + i, [&](T o) { return fn(o, v); });
  }
}
void bulk_red(u8* d, const u8* s, u32 n, int red) {
  switch (red) {
    case R_NONE:
      memcpy(d, s, n);
      break;
    case R_ADD_F32:
      each<f32>(d, s, n, [](f32 a, f32 b) { return a + b; });
      break;
    case R_ADD_F16:
      each<u16>(d, s, n, [](u16 a, u16 b) { return f2h(h2f(a) + h2f(b)); });
      break;
    case R_ADD_BF16:
      each<u16>(d, s, n, [](u16 a, u16 b) { return f2b(b2f(a) + b2f(b)); });
      break;
    case R_ADD_U32:
      each<u32>(d, s, n, [](u32 a, u32 b) { return a + b; });
      break;
    case R_ADD_U64:
      each<u64>(d, s, n, [](u64 a, u64 b) { return a + b; });
      break;
    case R_MIN_S32:
      each<s32>(d, s, n, [](s32 a, s32 b) { return std::min(a, b); });
      break;
    case R_MAX_S32:
      each<s32>(d, s, n, [](s32 a, s32 b) { return std::max(a, b); });
      break;
    case R_AND:
      each<u32>(d, s, n, [](u32 a, u32 b) { return a & b; });
      break;
    case R_OR:
      each<u32>(d, s, n, [](u32 a, u32 b) { return a | b; });
      break;
    case R_XOR:
      each<u32>(d, s, n, [](u32 a, u32 b) { return a ^ b; });
      break;
  }
}
void bulk_issue(Fiber& f, std::function<void(std::vector<u8>&)> read, std::function<void(std::vector<u8>&)> write) {
  BulkStore b{f.bulk_group, f.line, false, read, write, {}};
  if (f.gang->eager()) {
    b.read(b.data);
    b.write(b.data);
  } else
    f.bulk.push_back(std::move(b));
}
void bulk_s2g(Thread& t, u64 dst, u64 src, u32 n, int red) {
  Fiber* f = &fiber(t);
  check_bulk_alignment(*f, dst, src, n);
  bulk_issue(
      *f,
      [=](std::vector<u8>& v) {
        u64 s = src;
        Cta& c = cta_of(*f, s);
        u8* p = async_smem(*f, c, s, n, false, true);
        v.assign(p, p + n);
      },
      [=](std::vector<u8>& v) { bulk_red(global_range(*f, dst, n, "cp.async.bulk destination"), v.data(), n, red); });
}
void bulk_commit(Thread& t) { fiber(t).bulk_group++; }
void bulk_finish(Fiber& f, BulkStore& b, bool write) {
  u32 line = f.line;
  f.line = b.line;
  if (!b.read_done) {
    b.read(b.data);
    b.read_done = true;
  }
  if (write) b.write(b.data);
  f.line = line;
}
void bulk_wait(Thread& t, u32 n, bool read) {
  Fiber& f = fiber(t);
  for (size_t i = 0; i < f.bulk.size();) {
    BulkStore& b = f.bulk[i];
    if (f.bulk_group - b.group <= n) {
      i++;
      continue;
    }
    bulk_finish(f, b, !read);
    if (read)
      i++;
    else
      f.bulk.erase(f.bulk.begin() + i);
  }
}
}  // namespace ptxsim
