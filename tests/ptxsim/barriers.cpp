// Barriers of a thread block and of a cluster, and mbarriers.
#include <algorithm>
#include <cstdlib>

#include "core.hpp"

namespace ptxsim {
// ---- thread block and cluster

void complete_barrier(Barrier& b, Fiber* self, Gang& g) {
  for (Fiber* f : b.waiting) {
    acquire(*f, b.vc);
    f->bar_result = (b.popc & 0xffff) | b.acc_and << 16 | b.acc_or << 17;
    if (f != self) g.ready(f);
  }
  b.arrived = 0;
  b.waiting.clear();
  b.vc.clear();
  b.popc = 0;
  b.acc_and = 1;
  b.acc_or = 0;
  g.spin_rounds = 0;
}
static void bar_arrive(Fiber& f, u32 id, u32 count, bool arrive, bool p) {
  Cta& c = *f.cta;
  if (id > 15) fault(f, "barrier %u does not exist", id);
  if (count % 32) fault(f, "barrier %u: thread count %u is not a multiple of 32", id, count);
  if (count > c.nthreads) fault(f, "barrier %u: thread count %u is larger than the CTA (%u)", id, count, c.nthreads);
  Barrier& b = c.barriers[id];
  if (b.arrived && (b.whole_block != (count == 0) || (count && b.expected != count)))
    fault(f, "barrier %u: thread count %u differs from the %u of earlier arrivals", id, count,
          b.whole_block ? 0 : b.expected);
  b.whole_block = count == 0;
  b.expected = count ? count : c.nthreads - c.exited;
  b.arrived++;
  b.popc += p;
  b.acc_and &= p;
  b.acc_or |= p;
  release(f, b.vc);
  if (!arrive) b.waiting.push_back(&f);
  if (b.arrived >= b.expected)
    complete_barrier(b, &f, *f.gang);
  else if (!arrive)
    f.gang->block(f, "waiting at barrier %u", id);
}
void bar(Thread& t, u32 id, u32 count, bool arrive) { bar_arrive(fiber(t), id, count, arrive, false); }
u32 bar_red(Thread& t, u32 id, u32 count, int op, bool p) {
  bar_arrive(fiber(t), id, count, false, p);
  u32 r = fiber(t).bar_result;
  return op == 0 ? r & 0xffff : op == 1 ? r >> 16 & 1 : r >> 17 & 1;
}
void cluster_bar(Thread& t, bool arrive, bool wait) {
  Fiber& f = fiber(t);
  Gang& g = *f.gang;
  if (arrive) {
    f.cluster_phase = g.cluster_phase;
    f.clock++;
    if (++g.cluster_arrived == g.alive) {
      g.cluster_phase++;
      g.cluster_arrived = 0;
      g.spin_rounds = 0;
      for (Fiber* x : g.cluster_waiting) g.ready(x);
      g.cluster_waiting.clear();
      if (f.flags & F_RACE)
        for (Cta* c : g.ctas) {  // everything so far is ordered
          VectorClock all;
          for (u32 i = 0; i < c->nthreads; i++) {
            Fiber* x = c->threads[i];
            x->vc[i] = x->clock;
            join(all, x->vc);
          }
          for (u32 i = 0; i < c->nthreads; i++) c->threads[i]->vc = all, c->threads[i]->clock++;
        }
    }
  }
  if (wait && f.cluster_phase == g.cluster_phase) {
    g.cluster_waiting.push_back(&f);
    g.block(f, "waiting at barrier.cluster");
  }
}
void fence(Thread& t, bool proxy_async) {
  if (proxy_async) fiber(t).proxy_clock = ++t.clock;
}
u64 mapa(Thread& t, u64 a, u32 rank, bool generic) {
  if (rank >= t.cluster_size) fault(t, "mapa: rank %u outside the cluster", rank);
  u64 base = generic ? SHARED_WINDOW : 0;
  return base | ((a - base) & 0xffffff) | u64(rank + 1) << 24;
}

// ---- mbarriers

MBarrier& find_mbarrier(Fiber& f, Cta& c, u32 off) {
  auto i = c.mbarriers.find(off);
  if (i == c.mbarriers.end()) fault(f, "mbarrier at shared offset 0x%x is not initialised", off);
  return i->second;
}
static void mbar_check(Fiber& f, Cta& c, u32 off, MBarrier& m) {
  if (std::abs(m.tx) >= 1 << 20) fault(f, "mbarrier 0x%x: tx-count %ld is out of range", off, m.tx);
  if (m.pending || m.tx) return;
  m.phase++;
  m.pending = m.expected;
  f.gang->spin_rounds = 0;
  auto& w = c.mbarrier_waiters;
  for (size_t i = 0; i < w.size();)
    if (w[i]->wait_mbar == off && w[i]->wait_phase < m.phase) {
      acquire(*w[i], m.vc);
      f.gang->ready(w[i]);
      w[i] = w.back();
      w.pop_back();
    } else
      i++;
}
void mbar_init(Thread& t, u64 a, u32 count) {
  Fiber& f = fiber(t);
  Cta& c = cta_of(f, a);
  if (a & 7) fault(t, "mbarrier address 0x%lx is not 8-byte aligned", a);
  if (!count || count >= 1u << 20) fault(t, "mbarrier.init with count %u", count);
  async_smem(f, c, a, 8, true, false);
  MBarrier m{count, count, 0, 0, {}};
  c.mbarriers[a] = m;
}
void mbar_inval(Thread& t, u64 a) {
  Fiber& f = fiber(t);
  Cta& c = cta_of(f, a);
  find_mbarrier(f, c, a);
  c.mbarriers.erase(a);
}
u64 mbar_arrive(Thread& t, u64 a, u32 count, s32 expect, bool drop) {
  Fiber& f = fiber(t);
  Cta& c = cta_of(f, a);
  MBarrier& m = find_mbarrier(f, c, a);
  u64 state = (m.phase & 0xfffffff) << 20 | m.pending;
  if (count > m.pending) fault(t, "mbarrier 0x%lx: arrival count %u exceeds the pending count %u", a, count, m.pending);
  release(f, m.vc);
  m.tx += expect;
  m.pending -= count;
  if (drop) m.expected -= count;
  mbar_check(f, c, a, m);
  return state;
}
void mbar_tx(Thread& t, u64 a, s32 d) {
  Fiber& f = fiber(t);
  Cta& c = cta_of(f, a);
  MBarrier& m = find_mbarrier(f, c, a);
  m.tx += d;
  mbar_check(f, c, a, m);
}
void mbar_complete_tx(Fiber& f, Cta& c, u32 off, s64 bytes) {
  MBarrier& m = find_mbarrier(f, c, off);
  m.tx -= bytes;
  mbar_check(f, c, off, m);
}
static bool mbar_wait(Fiber& f, u64 a, u64 phase, bool blocking) {  // until phase is complete
  Cta& c = cta_of(f, a);
  MBarrier& m = find_mbarrier(f, c, a);
  if (m.phase > phase) {
    acquire(f, m.vc);
    return true;
  }
  // try_wait may give up at any time; so that code which does not try again is found, it sometimes does.
  if (!blocking || (config().random && f.gang->next_random() >> 40 & 1)) {
    yield_polling(f);
    return false;
  }
  f.wait_mbar = a;
  f.wait_phase = phase;
  c.mbarrier_waiters.push_back(&f);
  f.gang->block(f, "waiting on mbarrier 0x%x", a);
  return true;
}
bool mbar_wait_parity(Thread& t, u64 a, u32 parity, bool blocking) {
  Fiber& f = fiber(t);
  u64 off = a;
  Cta& c = cta_of(f, off);
  MBarrier& m = find_mbarrier(f, c, off);
  if ((m.phase & 1) != (parity & 1)) {
    acquire(f, m.vc);
    return true;
  }
  return mbar_wait(f, a, m.phase, blocking);
}
bool mbar_wait_state(Thread& t, u64 a, u64 state, bool blocking) {
  return mbar_wait(fiber(t), a, state >> 20 & 0xfffffff, blocking);
}
}  // namespace ptxsim
