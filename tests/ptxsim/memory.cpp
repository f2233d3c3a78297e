// Checks of memory accesses: allocations, bounds, data that was never written, races, proxies.
#include <algorithm>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>

#include "core.hpp"

namespace ptxsim {
// ---- vector clocks
void join(VectorClock& a, const VectorClock& b) {
  if (a.size() < b.size()) a.resize(b.size());
  for (size_t i = 0; i < b.size(); i++) a[i] = std::max(a[i], b[i]);
}
void release(Fiber& f, VectorClock& o) {
  if (f.flags & F_RACE) {
    f.vc[f.linear] = f.clock;
    join(o, f.vc);
  }
  f.clock++;
}
void acquire(Fiber& f, const VectorClock& o) {
  if (f.flags & F_RACE) join(f.vc, o);
}
void race_check(Thread& t, u32 a, u32 n, bool store) {
  Fiber& f = fiber(t);
  u32 tag = (t.linear + 1) | t.clock << 11;
  auto conflict = [&](u32 w) {
    u32 who = w & 0x7ff;
    return w && who != ASYNC_WRITER && who != t.linear + 1 && f.vc[who - 1] < w >> 11;
  };
  for (u32 i = 0; i < n; i++) {
    u32 w = t.shadow[a + i], r = t.rshadow[a + i];
    if (conflict(w))
      fault(t, "race: %s of shared offset 0x%x is not ordered after the write by thread %u", store ? "write" : "read",
            a + i, (w & 0x7ff) - 1);
    if (store && conflict(r))
      fault(t, "race: write of shared offset 0x%x is not ordered after the read by thread %u", a + i, (r & 0x7ff) - 1);
    if (!store) t.rshadow[a + i] = tag;
  }
}

// ---- global, shared and asynchronous accesses

static std::shared_mutex g_ranges_mutex;
static std::map<u64, u64> g_ranges;
// A range that overlaps the new one was freed without notice (a tensor, on the host) and its memory is used again.
void add_range(const void* p, u64 n) {
  std::unique_lock l(g_ranges_mutex);
  u64 lo = (u64)p;
  auto i = g_ranges.lower_bound(lo);
  if (i != g_ranges.begin() && std::prev(i)->first + std::prev(i)->second > lo) --i;
  while (i != g_ranges.end() && i->first < lo + n) i = g_ranges.erase(i);
  g_ranges[lo] = n;
}
void drop_range(const void* p) {
  std::unique_lock l(g_ranges_mutex);
  g_ranges.erase((u64)p);
}
u64 range_size(const void* p) {
  std::shared_lock l(g_ranges_mutex);
  auto i = g_ranges.find((u64)p);
  return i == g_ranges.end() ? 0 : i->second;
}
static bool find_range(u64 a, GlobalRange& r, std::string* near) {
  std::shared_lock l(g_ranges_mutex);
  auto i = g_ranges.upper_bound(a);
  if (i != g_ranges.begin()) {
    --i;
    if (a - i->first < i->second) {
      r.lo = i->first;
      r.size = i->second;
      return true;
    }
    if (near && a - i->first - i->second < (1 << 20))
      *near = "; it is " + std::to_string(a - i->first - i->second) + " bytes past the end of an allocation of " +
              std::to_string(i->second) + " bytes";
  }
  return false;
}
bool touches_range(const void* p) {
  GlobalRange r;
  return find_range((u64)p, r, nullptr);
}
bool in_range(const void* p, u64 n) {
  GlobalRange r;
  if (!n || !config().global_check) return true;
  return find_range((u64)p, r, nullptr) && (u64)p + n <= r.lo + r.size;
}
u8* global_slow(Thread& t, u64 a, u32 n, bool store, bool generic) {
  if (a & (n - 1)) fault(t, "misaligned %s of %u bytes at 0x%lx", store ? "store" : "load", n, a);
  if (!generic && is_shared(a)) fault(t, "shared-memory address used in the global space");
  if (generic && a >= t.stack_lo && a + n <= t.stack_hi) return (u8*)a;
  if (!store && a >= (u64)t.params && a + n <= (u64)t.params + t.params_size) return (u8*)a;
  if (!config().global_check) return (u8*)a;
  GlobalRange r;
  std::string near;
  if (!find_range(a, r, &near) || a + n > r.lo + r.size)
    fault(t, "out-of-bounds global %s of %u bytes at 0x%lx%s", store ? "store" : "load", n, a,
          r.size ? "; it crosses the end of its allocation" : near.c_str());
  t.gcache[t.line & 15] = r;
  return (u8*)a;
}
u8* global_range(Fiber& f, u64 a, u64 n, const char* what) {
  if (!config().global_check) return (u8*)a;
  GlobalRange r;
  std::string near;
  if (!find_range(a, r, &near) || a + n > r.lo + r.size)
    fault(f, "out-of-bounds %s: %lu bytes at global 0x%lx%s", what, n, a, near.c_str());
  return (u8*)a;
}
Cta& cta_of(Fiber& f, u64& a) {
  if (is_shared(a)) a -= SHARED_WINDOW;
  u64 r = a >> 24;
  if (!r) return *f.cta;
  if (r > f.gang->ctas.size()) fault(f, "bad shared address 0x%lx", a);
  a &= 0xffffff;
  return *f.gang->ctas[r - 1];
}
void fault_unreadable(Thread& t, u32 a, u32 n) {
  const u32* w = t.shadow + a;
  bool in_flight = std::find(w, w + n, IN_FLIGHT) != w + n;
  if (in_flight) fault(t, "read of shared memory that an asynchronous copy still writes: offset 0x%x, %u bytes", a, n);
  fault(t, "read of shared memory never written: offset 0x%x, %u bytes", a, n);
}
void mark_in_flight(Fiber& f, Cta& c, u64 off, u64 n) {
  if (off < SMEM_BASE || off + n > f.smem_end)
    fault(f, "out-of-bounds asynchronous copy: %lu bytes to shared offset 0x%lx", n, off);
  if (f.flags & F_UNINIT) std::fill(&c.shadow[off], &c.shadow[off] + n, IN_FLIGHT);
}
u8* shared_slow(Thread& t, u64 a, u32 n, bool store) {
  Fiber& f = fiber(t);
  if (a & (n - 1)) fault(t, "misaligned shared %s of %u bytes at offset 0x%lx", store ? "store" : "load", n, a);
  if (a >> 24 && a >> 32 == 0) {  // another CTA of the cluster
    Cta& c = cta_of(f, a);
    return async_smem(f, c, a, n, store, false);
  }
  fault(t, "out-of-bounds shared %s of %u bytes at offset 0x%lx; this CTA has 0x%x..0x%x", store ? "store" : "load", n,
        a, SMEM_BASE, t.smem_end);
}
u8* async_smem(Fiber& f, Cta& c, u32 off, u32 n, bool store, bool async_proxy) {
  if (off < SMEM_BASE || (u64)off + n > f.smem_end)
    fault(f, "out-of-bounds shared %s of %u bytes at offset 0x%x", store ? "write" : "read", n, off);
  u32* w = &c.shadow[off];
  if (store) {
    u32 tag = async_proxy || &c != f.cta ? ASYNC_WRITER : (f.linear + 1) | f.clock << 11;
    std::fill(w, w + n, tag);
    return c.smem + off;
  }
  u32 prev = 0;
  for (u32 i = 0; i < n; i++) {
    u32 x = w[i];
    if (x == prev && x) continue;
    prev = x;
    if (x + 1 < 2) {
      if (f.flags & F_UNINIT)
        fault(f, "asynchronous or matrix read of shared memory %s: offset 0x%x",
              x ? "that an asynchronous copy still writes" : "never written", off + i);
      continue;
    }
    u32 who = x & 0x7ff;
    if (async_proxy && (f.flags & F_PROXY) && who != ASYNC_WRITER && c.threads[who - 1]->proxy_clock <= x >> 11)
      fault(f, "async-proxy read of shared offset 0x%x written by thread %u without fence.proxy.async", off + i,
            who - 1);
    if (!async_proxy && (f.flags & F_RACE) && &c == f.cta && who != ASYNC_WRITER && who != f.linear + 1 &&
        f.vc[who - 1] < x >> 11)
      fault(f, "race: read of shared offset 0x%x is not ordered after the write by thread %u", off + i, who - 1);
  }
  if (!async_proxy && (f.flags & F_RACE) && &c == f.cta)
    for (u32 i = 0; i < n; i++) c.rshadow[off + i] = (f.linear + 1) | f.clock << 11;
  return c.smem + off;
}
}  // namespace ptxsim
