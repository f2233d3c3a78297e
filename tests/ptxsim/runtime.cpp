// Scheduler, memory checks, barriers, warp collectives, asynchronous copies, launch.
#include <sys/mman.h>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <thread>
#include "core.hpp"

namespace ptxsim {
std::string g_last_error;

// ================================================================ configuration
static bool set_option(Config &c, const std::string &k, const std::string &v) {
  u64 n = strtoull(v.c_str(), nullptr, 0);
  if (k == "SEED") c.seed = n;
  else if (k == "SCHED") c.random = v == "random";
  else if (k == "ASYNC") c.async = v == "eager" ? EAGER : v == "random" ? RANDOM : LAZY;
  else if (k == "PREEMPT") c.preempt = n;
  else if (k == "UNINIT") c.uninit = n;
  else if (k == "RACE") c.race = n;
  else if (k == "PROXY") c.proxy = n;
  else if (k == "GLOBAL") c.global_check = n;
  else if (k == "CTA_ORDER") c.random_cta = v == "random";
  else if (k == "THREADS") c.threads = n;
  else if (k == "ARCH") c.arch = n;
  else if (k == "VERBOSE") c.verbose = n;
  else return false;
  return true;
}
Config &config() {
  static Config c = [] {
    Config c;
    for (const char *k : {"SEED", "SCHED", "ASYNC", "PREEMPT", "UNINIT", "RACE", "PROXY", "GLOBAL", "CTA_ORDER", "THREADS", "ARCH", "VERBOSE"})
      if (const char *v = getenv((std::string("PTXSIM_") + k).c_str())) set_option(c, k, v);
    return c;
  }();
  return c;
}

// ================================================================ fibers
// Saves the callee-saved registers on the current stack and continues on another one.
extern "C" void ptxsim_switch(void **save, void *load);
asm(R"(
.globl ptxsim_switch
.type ptxsim_switch, @function
ptxsim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size ptxsim_switch, .-ptxsim_switch
)");
constexpr size_t STACK = 256 << 10;
static thread_local Gang *tl_gang;
// Fibers, shared memory and stacks are reused from launch to launch.
struct Worker { Gang gang; std::vector<u8 *> stacks; };
static std::mutex g_workers_mutex;
static std::vector<Worker *> g_workers;       // idle
static thread_local Worker *tl_worker;

static u8 *stack_for(size_t i) {
  auto &stacks = tl_worker->stacks;
  while (stacks.size() <= i) {
    void *p = mmap(nullptr, STACK + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) { perror("ptxsim: mmap of a fiber stack"); abort(); }
    mprotect(p, 4096, PROT_NONE);
    stacks.push_back((u8 *)p + 4096);
  }
  return stacks[i];
}
[[noreturn]] static void to_main(Gang &g) {
  void *dead;
  ptxsim_switch(&dead, g.main_sp);
  __builtin_unreachable();
}

// ================================================================ reports
static std::string ptx_line(const KernelInfo &k, u32 line) {
  std::ifstream in(k.ptx_file);
  std::string s, text, loc;
  std::map<std::string, std::string> files;
  for (u32 n = 1; std::getline(in, s); n++) {
    std::istringstream is(s);
    std::string w; is >> w;
    if (n <= line && w == ".loc") { std::string f, l; is >> f >> l; loc = f + ":" + l; }
    if (w == ".file") { std::string f, name; is >> f >> name; files[f] = name; }
    if (n == line) { text = s.substr(std::min(s.size(), s.find_first_not_of(" \t"))); }
  }
  if (text.size() > 140) text = text.substr(0, 140) + "...";
  std::string r = std::string(k.ptx_file) + ":" + std::to_string(line) + ": " + text;
  if (!loc.empty()) r += "   (" + files[loc.substr(0, loc.find(':'))] + loc.substr(loc.find(':')) + ")";
  return r;
}
static std::mutex g_err_mutex;
static void report(Gang &g, const std::string &msg) {
  g.failed = true;
  g.error = msg;
  std::lock_guard<std::mutex> l(g_err_mutex);
  if (g_last_error.empty()) g_last_error = msg;
  if (config().verbose) fprintf(stderr, "ptxsim: %s\n", msg.c_str());
}
void report_launch(const std::string &msg) {
  std::lock_guard<std::mutex> l(g_err_mutex);
  if (g_last_error.empty()) g_last_error = msg;
  if (config().verbose) fprintf(stderr, "ptxsim: %s\n", msg.c_str());
}
void fault(Thread &t, const char *fmt, ...) {
  char buf[1024];
  va_list ap; va_start(ap, fmt); vsnprintf(buf, sizeof buf, fmt, ap); va_end(ap);
  Fiber &f = F(t);
  std::ostringstream o;
  o << "kernel " << f.gang->k->name << " ctaid (" << t.ctaid[0] << "," << t.ctaid[1] << "," << t.ctaid[2] << ") tid ("
    << t.tid[0] << "," << t.tid[1] << "," << t.tid[2] << "): " << buf << "\n  at " << ptx_line(*f.gang->k, t.line);
  report(*f.gang, o.str());
  to_main(*f.gang);
}
static std::string deadlock_report(Gang &g, const char *kind) {
  std::ostringstream o;
  o << kind << " in kernel " << g.k->name << ": no thread can continue";
  for (Cta *c : g.ctas) {
    o << "\n  ctaid (" << c->ctaid[0] << "," << c->ctaid[1] << "," << c->ctaid[2] << ")";
    for (size_t w = 0; w < c->warps.size(); w++) {  // group the lanes of a warp by position
      std::map<std::pair<u32, std::string>, u32> at;
      for (int l = 0; l < 32; l++) {
        Fiber *f = c->warps[w].lanes[l];
        if (!f) continue;
        char why[96];
        if (f->done) at[{0, "exited"}] |= 1u << l;
        else { snprintf(why, sizeof why, f->why ? f->why : "runnable", f->why_arg); at[{f->line, why}] |= 1u << l; }
      }
      for (auto &[k, m] : at) {
        char b[64]; snprintf(b, sizeof b, "\n    warp %zu lanes %08x: ", w, m);
        o << b << k.second;
        if (k.first) o << " at " << ptx_line(*g.k, k.first);
      }
    }
    for (int i = 0; i < 16; i++)
      if (c->bars[i].arrived) o << "\n    barrier " << i << ": " << c->bars[i].arrived << " of " << (c->bars[i].dflt ? c->nthreads - c->exited : c->bars[i].expected) << " threads arrived";
    for (auto &[a, m] : c->mbars) { char b[128]; snprintf(b, sizeof b, "\n    mbarrier 0x%x: phase %lu, %u of %u arrivals pending, tx-count %ld", a, m.phase, m.pending, m.expected, m.tx); o << b; }
  }
  return o.str();
}

// ================================================================ scheduling
bool Gang::run_async_one() {
  if (!async.empty()) {
    size_t i = config().random ? rnd() % async.size() : 0;
    AsyncOp op = std::move(async[i]);
    async.erase(async.begin() + i);
    u32 line = op.by->line; op.by->line = op.line;
    op.run();
    op.by->line = line;
    return true;
  }
  return false;
}
static bool run_cp_until_arrive(Fiber &f);
Fiber *Gang::pick() {
  if (config().async == RANDOM && !async.empty() && (rnd() >> 40) % 8 == 0) run_async_one();
  for (;;) {
    if (head < rq.size()) {
      if (config().random) {
        // Uniform choice keeps warps in step and hides reuse races; so warps get random
        // priorities (changed now and then) and the best of a few random candidates runs.
        size_t best = head;
        for (u32 i = 0; i < tournament; i++) {
          size_t j = head + (rnd() >> 20) % (rq.size() - head);
          if (!i || rq[j]->wp->priority > rq[best]->wp->priority) best = j;
        }
        std::swap(rq[head], rq[best]);
        if ((rnd() >> 22) % 2048 == 0) rq[head]->wp->priority = rnd() >> 32;
      }
      Fiber *f = rq[head++];
      if (head == rq.size()) { rq.clear(); head = 0; }
      else if (head > 4096) { rq.erase(rq.begin(), rq.begin() + head); head = 0; }
      return f;
    }
    if (run_async_one()) continue;
    if (!cp_waiters.empty()) {
      size_t i = config().random ? rnd() % cp_waiters.size() : 0;
      Fiber *f = cp_waiters[i];
      cp_waiters.erase(cp_waiters.begin() + i);
      run_cp_until_arrive(*f);
      continue;
    }
    if (!spinq.empty()) {
      if (++spin_rounds > 1000) std::this_thread::yield();
      if (spin_rounds > 300000) return nullptr;
      for (Fiber *f : spinq) ready(f);
      spinq.clear();
      continue;
    }
    return nullptr;
  }
}
void Gang::block(Fiber &f, const char *why, u32 arg) {
  f.why = why; f.why_arg = arg;
  Fiber *n = pick();
  if (!n) { report(*this, deadlock_report(*this, spinq.empty() ? "deadlock" : "livelock")); to_main(*this); }
  n->why = nullptr;
  if (n == &f) return;
  cur = n;
  ptxsim_switch(&f.sp, n->sp);
}
void maybe_preempt(Thread &t) {
  Fiber &f = F(t);
  if ((f.gang->rnd() >> 24) % config().preempt) return;
  f.gang->ready(&f);
  f.gang->block(f, "preempted");
}
static void spin_yield(Fiber &f) {
  f.gang->spinq.push_back(&f);
  f.gang->block(f, "polling");
}
void spin_hint(Thread &t) { if (++F(t).spins % 256 == 0) spin_yield(F(t)); }
void yield_exit(Thread &t) { spin_yield(F(t)); }  // nanosleep
u64 clock64(Thread &t) { return F(t).gang->ticks += 16; }

static void coll_done(Warp &w, size_t i, Fiber *self) {
  Coll c = w.colls[i];
  w.colls.erase(w.colls.begin() + i);
  c.fn(w, c.arrived, c.args, c.spec);
  for (int l = 0; l < 32; l++) if ((c.arrived >> l & 1) && w.lanes[l] != self) w.lanes[l]->gang->ready(w.lanes[l]);
}
void collective(Thread &t, u32 key, u32 mask, void *arg, CollFn fn, const void *spec, const char *what) {
  Fiber &f = F(t); Warp &w = *f.wp;
  if (!(mask >> t.lane & 1)) fault(t, "%s: executing lane %u is not in the member mask 0x%08x", what, t.lane, mask);
  size_t i = 0;
  while (i < w.colls.size() && !(w.colls[i].key == key && w.colls[i].mask == mask && !(w.colls[i].arrived >> t.lane & 1))) i++;
  if (i == w.colls.size()) w.colls.push_back({key, mask, 0, fn, spec, {}});
  Coll &c = w.colls[i];
  c.args[t.lane] = arg; c.arrived |= 1u << t.lane;
  if (c.arrived == (mask & w.live)) coll_done(w, i, &f);
  else f.gang->block(f, what);
}

// ---------------------------------------------------------------- vector clocks
static void join(VC &a, const VC &b) { if (a.size() < b.size()) a.resize(b.size()); for (size_t i = 0; i < b.size(); i++) a[i] = std::max(a[i], b[i]); }
static void release(Fiber &f, VC &o) {
  if (f.flags & F_RACE) { f.vc[f.linear] = f.clock; join(o, f.vc); }
  f.clock++;
}
static void acquire(Fiber &f, const VC &o) { if (f.flags & F_RACE) join(f.vc, o); }
void race_check(Thread &t, u32 a, u32 n, bool store) {
  Fiber &f = F(t);
  u32 tag = (t.linear + 1) | t.clock << 11;
  auto conflict = [&](u32 w) { u32 who = w & 0x7ff; return w && who != ASYNC_WRITER && who != t.linear + 1 && f.vc[who - 1] < w >> 11; };
  for (u32 i = 0; i < n; i++) {
    u32 w = t.shadow[a + i], r = t.rshadow[a + i];
    if (conflict(w)) fault(t, "race: %s of shared offset 0x%x is not ordered after the write by thread %u", store ? "write" : "read", a + i, (w & 0x7ff) - 1);
    if (store && conflict(r)) fault(t, "race: write of shared offset 0x%x is not ordered after the read by thread %u", a + i, (r & 0x7ff) - 1);
    if (!store) t.rshadow[a + i] = tag;
  }
}

// ================================================================ memory
static std::shared_mutex g_ranges_mutex;
static std::map<u64, u64> g_ranges;
// A range that overlaps the new one was freed without notice (a tensor, on the host) and its memory is used again.
void add_range(const void *p, u64 n) {
  std::unique_lock l(g_ranges_mutex);
  u64 lo = (u64)p;
  auto i = g_ranges.lower_bound(lo);
  if (i != g_ranges.begin() && std::prev(i)->first + std::prev(i)->second > lo) --i;
  while (i != g_ranges.end() && i->first < lo + n) i = g_ranges.erase(i);
  g_ranges[lo] = n;
}
void drop_range(const void *p) { std::unique_lock l(g_ranges_mutex); g_ranges.erase((u64)p); }
u64 range_size(const void *p) { std::shared_lock l(g_ranges_mutex); auto i = g_ranges.find((u64)p); return i == g_ranges.end() ? 0 : i->second; }
static bool find_range(u64 a, GlobalRange &r, std::string *near) {
  std::shared_lock l(g_ranges_mutex);
  auto i = g_ranges.upper_bound(a);
  if (i != g_ranges.begin()) {
    --i;
    if (a - i->first < i->second) { r.lo = i->first; r.size = i->second; return true; }
    if (near && a - i->first - i->second < (1 << 20)) *near = "; it is " + std::to_string(a - i->first - i->second) + " bytes past the end of an allocation of " + std::to_string(i->second) + " bytes";
  }
  return false;
}
bool touches_range(const void *p) { GlobalRange r; return find_range((u64)p, r, nullptr); }
bool in_range(const void *p, u64 n) {
  GlobalRange r;
  if (!n || !config().global_check) return true;
  return find_range((u64)p, r, nullptr) && (u64)p + n <= r.lo + r.size;
}
u8 *global_slow(Thread &t, u64 a, u32 n, bool store, bool generic) {
  if (a & (n - 1)) fault(t, "misaligned %s of %u bytes at 0x%lx", store ? "store" : "load", n, a);
  if (!generic && is_shared(a)) fault(t, "shared-memory address used in the global space");
  if (generic && a >= t.stack_lo && a + n <= t.stack_hi) return (u8 *)a;
  if (!store && a >= (u64)t.params && a + n <= (u64)t.params + t.params_size) return (u8 *)a;
  if (!config().global_check) return (u8 *)a;
  GlobalRange r; std::string near;
  if (!find_range(a, r, &near) || a + n > r.lo + r.size)
    fault(t, "out-of-bounds global %s of %u bytes at 0x%lx%s", store ? "store" : "load", n, a,
          r.size ? "; it crosses the end of its allocation" : near.c_str());
  t.gcache[t.line & 15] = r;
  return (u8 *)a;
}
u8 *global_range(Fiber &f, u64 a, u64 n, const char *what) {
  if (!config().global_check) return (u8 *)a;
  GlobalRange r; std::string near;
  if (!find_range(a, r, &near) || a + n > r.lo + r.size) fault(f, "out-of-bounds %s: %lu bytes at global 0x%lx%s", what, n, a, near.c_str());
  return (u8 *)a;
}
Cta &cta_of(Fiber &f, u64 &a) {
  if (is_shared(a)) a -= SHARED_WINDOW;
  u64 r = a >> 24;
  if (!r) return *f.cta;
  if (r > f.gang->ctas.size()) fault(f, "bad shared address 0x%lx", a);
  a &= 0xffffff;
  return *f.gang->ctas[r - 1];
}
u8 *shared_slow(Thread &t, u64 a, u32 n, bool store) {
  Fiber &f = F(t);
  if (a & (n - 1)) fault(t, "misaligned shared %s of %u bytes at offset 0x%lx", store ? "store" : "load", n, a);
  if (a >> 24 && a >> 32 == 0) {  // another CTA of the cluster
    Cta &c = cta_of(f, a);
    return async_smem(f, c, a, n, store, false);
  }
  fault(t, "out-of-bounds shared %s of %u bytes at offset 0x%lx; this CTA has 0x%x..0x%x", store ? "store" : "load", n, a, SMEM_BASE, t.smem_end);
}
u8 *async_smem(Fiber &f, Cta &c, u32 off, u32 n, bool store, bool async_proxy) {
  if (off < SMEM_BASE || (u64)off + n > f.smem_end) fault(f, "out-of-bounds shared %s of %u bytes at offset 0x%x", store ? "write" : "read", n, off);
  u32 *w = &c.shadow[off];
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
    if (!x) { if (f.flags & F_UNINIT) fault(f, "asynchronous or matrix read of shared memory never written: offset 0x%x", off + i); continue; }
    u32 who = x & 0x7ff;
    if (async_proxy && (f.flags & F_PROXY) && who != ASYNC_WRITER && c.threads[who - 1]->proxy_clock <= x >> 11)
      fault(f, "async-proxy read of shared offset 0x%x written by thread %u without fence.proxy.async", off + i, who - 1);
    if (!async_proxy && (f.flags & F_RACE) && &c == f.cta && who != ASYNC_WRITER && who != f.linear + 1 && f.vc[who - 1] < x >> 11)
      fault(f, "race: read of shared offset 0x%x is not ordered after the write by thread %u", off + i, who - 1);
  }
  if (!async_proxy && (f.flags & F_RACE) && &c == f.cta) for (u32 i = 0; i < n; i++) c.rshadow[off + i] = (f.linear + 1) | f.clock << 11;
  return c.smem + off;
}

// ================================================================ warp collectives
struct ShflArg { int mode; u32 v, b, c, out; bool p; };
u32 shfl(Thread &t, u32 key, int mode, u32 v, u32 b, u32 c, u32 mask, bool *p) {
  ShflArg a{mode, v, b, c, v, false};
  collective(t, key, mask, &a, [](Warp &, u32 m, void **args, const void *) {
    for (u32 l = 0; l < 32; l++) if (m >> l & 1) {
      ShflArg &a = *(ShflArg *)args[l];
      u32 seg = a.c >> 8 & 31, clamp = a.c & 31, b = a.b & 31;
      u32 maxl = (l & seg) | (clamp & ~seg), minl = l & seg, j = l;
      switch (a.mode) {
        case 0: j = l - b; a.p = (s32)j >= (s32)maxl; break;    // up
        case 1: j = l + b; a.p = j <= maxl; break;               // down
        case 2: j = l ^ b; a.p = j <= maxl; break;               // bfly
        case 3: j = minl | (b & ~seg); a.p = j <= maxl; break;   // idx
      }
      if (!a.p) j = l;
      a.out = m >> j & 1 ? ((ShflArg *)args[j])->v : 0xdeadbeef;  // reading an inactive lane is undefined
    }
  }, nullptr, "shfl.sync");
  if (p) *p = a.p;
  return a.out;
}
struct VoteArg { int mode; bool p; u32 out; };
u32 vote(Thread &t, u32 key, int mode, bool p, u32 mask) {
  VoteArg a{mode, p, 0};
  collective(t, key, mask, &a, [](Warp &, u32 m, void **args, const void *) {
    u32 b = 0;
    for (u32 l = 0; l < 32; l++) if ((m >> l & 1) && ((VoteArg *)args[l])->p) b |= 1u << l;
    for (u32 l = 0; l < 32; l++) if (m >> l & 1) {
      VoteArg &a = *(VoteArg *)args[l];
      a.out = a.mode == 0 ? b : a.mode == 1 ? b != 0 : a.mode == 2 ? b == m : (b == m || b == 0);
    }
  }, nullptr, "vote.sync");
  return a.out;
}
struct MatchArg { bool all; u64 v; u32 out; bool p; };
u32 match(Thread &t, u32 key, bool all, u64 v, u32 mask, bool *p) {
  MatchArg a{all, v, 0, false};
  collective(t, key, mask, &a, [](Warp &, u32 m, void **args, const void *) {
    for (u32 l = 0; l < 32; l++) if (m >> l & 1) {
      MatchArg &a = *(MatchArg *)args[l];
      u32 eq = 0;
      for (u32 j = 0; j < 32; j++) if ((m >> j & 1) && ((MatchArg *)args[j])->v == a.v) eq |= 1u << j;
      a.p = eq == m;
      a.out = a.all ? (a.p ? m : 0) : eq;
    }
  }, nullptr, "match.sync");
  if (p) *p = a.p;
  return a.out;
}
struct ReduxArg { int op; u32 v; };
u32 redux(Thread &t, u32 key, int op, u32 v, u32 mask) {
  ReduxArg a{op, v};
  collective(t, key, mask, &a, [](Warp &, u32 m, void **args, const void *) {
    u32 r = 0; bool first = true;
    for (u32 l = 0; l < 32; l++) if (m >> l & 1) {
      ReduxArg &a = *(ReduxArg *)args[l];
      if (first) { r = a.v; first = false; continue; }
      switch (a.op) {
        case 0: r &= a.v; break; case 1: r |= a.v; break; case 2: r ^= a.v; break; case 3: r += a.v; break;
        case 4: r = std::min(r, a.v); break; case 5: r = std::max(r, a.v); break;
        case 6: r = std::min((s32)r, (s32)a.v); break; case 7: r = std::max((s32)r, (s32)a.v); break;
      }
    }
    for (u32 l = 0; l < 32; l++) if (m >> l & 1) ((ReduxArg *)args[l])->v = r;
  }, nullptr, "redux.sync");
  return a.v;
}
// Divergence has no fixed meaning for independent fibers; the live lanes are a legal answer
// for code that is converged, which is the only portable use of activemask.
u32 activemask(Thread &t) { return F(t).wp->live; }
bool elect(Thread &t, u32 key, u32 mask, u32 *leader) {
  u32 out = 0;
  collective(t, key, mask, &out, [](Warp &, u32 m, void **args, const void *) {
    for (u32 l = 0; l < 32; l++) if (m >> l & 1) *(u32 *)args[l] = __builtin_ctz(m);
  }, nullptr, "elect.sync");
  if (leader) *leader = out;
  return out == t.lane;
}
void warp_bar(Thread &t, u32 key, u32 mask) {
  collective(t, key, mask, nullptr, [](Warp &w, u32 m, void **, const void *) {
    VC all;
    for (u32 l = 0; l < 32; l++) if (m >> l & 1) release(*w.lanes[l], all);
    for (u32 l = 0; l < 32; l++) if (m >> l & 1) acquire(*w.lanes[l], all);
  }, nullptr, "bar.warp.sync");
}

// ================================================================ CTA and cluster barriers
static void bar_complete(Cta &c, NamedBar &b, Fiber *self, Gang &g) {
  for (Fiber *f : b.waiting) {
    acquire(*f, b.vc);
    f->bar_result = (b.popc & 0xffff) | b.acc_and << 16 | b.acc_or << 17;
    if (f != self) g.ready(f);
  }
  b.arrived = 0; b.waiting.clear(); b.vc.clear(); b.popc = 0; b.acc_and = 1; b.acc_or = 0;
  g.spin_rounds = 0;
}
static void bar_arrive(Fiber &f, u32 id, u32 count, bool arrive, bool p) {
  Cta &c = *f.cta;
  if (id > 15) fault(f, "barrier %u does not exist", id);
  if (count % 32) fault(f, "barrier %u: thread count %u is not a multiple of 32", id, count);
  if (count > c.nthreads) fault(f, "barrier %u: thread count %u is larger than the CTA (%u)", id, count, c.nthreads);
  NamedBar &b = c.bars[id];
  if (b.arrived && (b.dflt != (count == 0) || (count && b.expected != count))) fault(f, "barrier %u: thread count %u differs from the %u of earlier arrivals", id, count, b.dflt ? 0 : b.expected);
  b.dflt = count == 0; b.expected = count ? count : c.nthreads - c.exited;
  b.arrived++; b.popc += p; b.acc_and &= p; b.acc_or |= p;
  release(f, b.vc);
  if (!arrive) b.waiting.push_back(&f);
  if (b.arrived >= b.expected) bar_complete(c, b, &f, *f.gang);
  else if (!arrive) f.gang->block(f, "waiting at barrier %u", id);
}
void bar(Thread &t, u32 id, u32 count, bool arrive) { bar_arrive(F(t), id, count, arrive, false); }
u32 bar_red(Thread &t, u32 id, u32 count, int op, bool p) {
  bar_arrive(F(t), id, count, false, p);
  u32 r = F(t).bar_result;
  return op == 0 ? r & 0xffff : op == 1 ? r >> 16 & 1 : r >> 17 & 1;
}
void cluster_bar(Thread &t, bool arrive, bool wait) {
  Fiber &f = F(t); Gang &g = *f.gang;
  if (arrive) {
    f.cluster_phase = g.cl_phase;
    f.clock++;
    if (++g.cl_arrived == g.alive) {
      g.cl_phase++; g.cl_arrived = 0; g.spin_rounds = 0;
      for (Fiber *x : g.cl_waiting) g.ready(x);
      g.cl_waiting.clear();
      if (f.flags & F_RACE) for (Cta *c : g.ctas) {  // everything so far is ordered
        VC all;
        for (u32 i = 0; i < c->nthreads; i++) { Fiber *x = c->threads[i]; x->vc[i] = x->clock; join(all, x->vc); }
        for (u32 i = 0; i < c->nthreads; i++) c->threads[i]->vc = all, c->threads[i]->clock++;
      }
    }
  }
  if (wait && f.cluster_phase == g.cl_phase) { g.cl_waiting.push_back(&f); g.block(f, "waiting at barrier.cluster"); }
}
void fence(Thread &t, bool proxy_async) { if (proxy_async) F(t).proxy_clock = ++t.clock; }
u64 mapa(Thread &t, u64 a, u32 rank, bool generic) {
  if (rank >= t.cluster_size) fault(t, "mapa: rank %u outside the cluster", rank);
  u64 base = generic ? SHARED_WINDOW : 0;
  return base | ((a - base) & 0xffffff) | u64(rank + 1) << 24;
}

// ================================================================ mbarriers
static MBar &mbar(Fiber &f, Cta &c, u32 off) {
  auto i = c.mbars.find(off);
  if (i == c.mbars.end()) fault(f, "mbarrier at shared offset 0x%x is not initialised", off);
  return i->second;
}
static void mbar_check(Fiber &f, Cta &c, u32 off, MBar &m) {
  if (m.pending || m.tx) return;
  m.phase++; m.pending = m.expected;
  f.gang->spin_rounds = 0;
  auto &w = c.mbar_waiters;
  for (size_t i = 0; i < w.size();)
    if (w[i]->wait_mbar == off && w[i]->wait_phase < m.phase) { acquire(*w[i], m.vc); f.gang->ready(w[i]); w[i] = w.back(); w.pop_back(); }
    else i++;
}
void mbar_init(Thread &t, u64 a, u32 count) {
  Fiber &f = F(t); Cta &c = cta_of(f, a);
  if (a & 7) fault(t, "mbarrier address 0x%lx is not 8-byte aligned", a);
  if (!count || count >= 1u << 20) fault(t, "mbarrier.init with count %u", count);
  async_smem(f, c, a, 8, true, false);
  MBar m{count, count, 0, 0, {}};
  c.mbars[a] = m;
}
void mbar_inval(Thread &t, u64 a) { Fiber &f = F(t); Cta &c = cta_of(f, a); mbar(f, c, a); c.mbars.erase(a); }
u64 mbar_arrive(Thread &t, u64 a, u32 count, s32 expect, bool drop) {
  Fiber &f = F(t); Cta &c = cta_of(f, a); MBar &m = mbar(f, c, a);
  u64 state = (m.phase & 0xfffffff) << 20 | m.pending;
  if (count > m.pending) fault(t, "mbarrier 0x%lx: arrival count %u exceeds the pending count %u", a, count, m.pending);
  release(f, m.vc);
  m.tx += expect; m.pending -= count;
  if (drop) m.expected -= count;
  mbar_check(f, c, a, m);
  return state;
}
void mbar_tx(Thread &t, u64 a, s32 d) { Fiber &f = F(t); Cta &c = cta_of(f, a); MBar &m = mbar(f, c, a); m.tx += d; mbar_check(f, c, a, m); }
void mbar_complete_tx(Fiber &f, Cta &c, u32 off, s64 bytes) { MBar &m = mbar(f, c, off); m.tx -= bytes; mbar_check(f, c, off, m); }
static bool mbar_wait(Fiber &f, u64 a, u64 phase, bool blocking) {  // until phase is complete
  Cta &c = cta_of(f, a);
  MBar &m = mbar(f, c, a);
  if (m.phase > phase) { acquire(f, m.vc); return true; }
  if (!blocking) { spin_yield(f); return false; }
  f.wait_mbar = a; f.wait_phase = phase;
  c.mbar_waiters.push_back(&f);
  f.gang->block(f, "waiting on mbarrier 0x%x", a);
  return true;
}
bool mbar_wait_parity(Thread &t, u64 a, u32 parity, bool blocking) {
  Fiber &f = F(t); u64 off = a; Cta &c = cta_of(f, off);
  MBar &m = mbar(f, c, off);
  if ((m.phase & 1) != (parity & 1)) { acquire(f, m.vc); return true; }
  return mbar_wait(f, a, m.phase, blocking);
}
bool mbar_wait_state(Thread &t, u64 a, u64 state, bool blocking) { return mbar_wait(F(t), a, state >> 20 & 0xfffffff, blocking); }

// ================================================================ asynchronous copies
static void cp_run(Fiber &f, CpOp &op) {
  u32 line = f.line; f.line = op.line;
  if (op.arrive) { if (op.arrive == 2) mbar_tx(f, op.mbar, 0); mbar_arrive(f, op.mbar, 1, 0, false); f.line = line; return; }
  u64 off = op.dst; Cta &c = cta_of(f, off);
  u8 *d = async_smem(f, c, off, op.size, true, false);
  if (f.flags & F_RACE) { f.shadow = c.shadow.data(); }
  if (op.src_size) memcpy(d, global_range(f, op.src, op.src_size, "cp.async source"), op.src_size);
  memset(d + op.src_size, 0, op.size - op.src_size);
  f.line = line;
}
void cp_async(Thread &t, u64 dst, u64 src, u32 size, u32 src_size) {
  Fiber &f = F(t);
  src_size = std::min(src_size, size);
  if ((dst | (src_size ? src : 0)) & (size - 1)) fault(t, "misaligned cp.async of %u bytes: shared 0x%lx, global 0x%lx", size, dst, src);
  if (t.flags & F_RACE) { u64 o = dst; if (&cta_of(f, o) == f.cta && o >= SMEM_BASE && o + size <= t.smem_end) race_check(t, o, size, true); }
  CpOp op{dst, src, size, src_size, f.cp_group, t.line, 0, 0};
  if (f.cpq.empty() && f.gang->eager()) cp_run(f, op); else f.cpq.push_back(op);
}
void cp_async_commit(Thread &t) { F(t).cp_group++; }
void cp_async_wait(Thread &t, s32 n) {
  Fiber &f = F(t);
  while (!f.cpq.empty() && (n < 0 || (s32)(f.cp_group - f.cpq.front().group) > n)) { CpOp op = f.cpq.front(); f.cpq.pop_front(); cp_run(f, op); }
}
void cp_async_mbar(Thread &t, u64 a, bool noinc) {
  Fiber &f = F(t);
  u64 off = a; Cta &c = cta_of(f, off); MBar &m = mbar(f, c, off);
  if (!noinc) m.pending++;
  CpOp op{0, 0, 0, 0, f.cp_group, t.line, a, 1};
  if (f.cpq.empty()) cp_run(f, op);
  else { f.cpq.push_back(op); f.gang->cp_waiters.push_back(&f); }
}
static bool run_cp_until_arrive(Fiber &f) {
  while (!f.cpq.empty()) { CpOp op = f.cpq.front(); f.cpq.pop_front(); cp_run(f, op); if (op.arrive) return true; }
  return false;
}
void gang_issue_load(Fiber &f, std::function<void()> run) {
  if (f.gang->eager()) run();
  else f.gang->async.push_back({&f, f.line, std::move(run)});
}
static void bulk_align(Fiber &f, u64 a, u64 b, u32 n) { if ((a | b | n) & 15) fault(f, "cp.async.bulk: addresses and size must be multiples of 16 (0x%lx, 0x%lx, %u)", a, b, n); }
void bulk_g2s(Thread &t, u64 dst, u64 src, u32 n, u64 mb, u32 mask) {
  Fiber *f = &F(t);
  bulk_align(*f, dst, src, n);
  gang_issue_load(*f, [=] {
    for (u32 r = 0; r < f->cluster_size; r++) {
      u64 d = dst, m = mb; Cta *c = &cta_of(*f, d), *mc = &cta_of(*f, m);
      if (mask) { if (!(mask >> r & 1)) continue; c = mc = f->gang->ctas[r]; } else if (r) break;
      memcpy(async_smem(*f, *c, d, n, true, true), global_range(*f, src, n, "cp.async.bulk source"), n);
      mbar_complete_tx(*f, *mc, m, n);
    }
  });
}
void bulk_s2s(Thread &t, u64 dst, u64 src, u32 n, u64 mb) {
  Fiber *f = &F(t);
  bulk_align(*f, dst, src, n);
  gang_issue_load(*f, [=] {
    u64 d = dst, s = src, m = mb; Cta &c = cta_of(*f, d), &sc = cta_of(*f, s), &mc = cta_of(*f, m);
    memcpy(async_smem(*f, c, d, n, true, true), async_smem(*f, sc, s, n, false, true), n);
    mbar_complete_tx(*f, mc, m, n);
  });
}
template <class T, class Fn> static void each(u8 *d, const u8 *s, u32 n, Fn fn) { for (u32 i = 0; i + sizeof(T) <= n; i += sizeof(T)) { T v = rd<T>(s + i); rmw<T>(d + i, [&](T o) { return fn(o, v); }); } }
void bulk_red(u8 *d, const u8 *s, u32 n, int red) {
  switch (red) {
    case R_NONE: memcpy(d, s, n); break;
    case R_ADD_F32: each<f32>(d, s, n, [](f32 a, f32 b) { return a + b; }); break;
    case R_ADD_F16: each<u16>(d, s, n, [](u16 a, u16 b) { return f2h(h2f(a) + h2f(b)); }); break;
    case R_ADD_BF16: each<u16>(d, s, n, [](u16 a, u16 b) { return f2b(b2f(a) + b2f(b)); }); break;
    case R_ADD_U32: each<u32>(d, s, n, [](u32 a, u32 b) { return a + b; }); break;
    case R_ADD_U64: each<u64>(d, s, n, [](u64 a, u64 b) { return a + b; }); break;
    case R_MIN_S32: each<s32>(d, s, n, [](s32 a, s32 b) { return std::min(a, b); }); break;
    case R_MAX_S32: each<s32>(d, s, n, [](s32 a, s32 b) { return std::max(a, b); }); break;
    case R_AND: each<u32>(d, s, n, [](u32 a, u32 b) { return a & b; }); break;
    case R_OR: each<u32>(d, s, n, [](u32 a, u32 b) { return a | b; }); break;
    case R_XOR: each<u32>(d, s, n, [](u32 a, u32 b) { return a ^ b; }); break;
  }
}
void bulk_issue(Fiber &f, std::function<void(std::vector<u8> &)> read, std::function<void(std::vector<u8> &)> write) {
  BulkStore b{f.bulk_group, f.line, false, read, write, {}};
  if (f.gang->eager()) { b.read(b.data); b.write(b.data); }
  else f.bulk.push_back(std::move(b));
}
void bulk_s2g(Thread &t, u64 dst, u64 src, u32 n, int red) {
  Fiber *f = &F(t);
  bulk_align(*f, dst, src, n);
  bulk_issue(*f, [=](std::vector<u8> &v) { u64 s = src; Cta &c = cta_of(*f, s); u8 *p = async_smem(*f, c, s, n, false, true); v.assign(p, p + n); },
             [=](std::vector<u8> &v) { bulk_red(global_range(*f, dst, n, "cp.async.bulk destination"), v.data(), n, red); });
}
void bulk_commit(Thread &t) { F(t).bulk_group++; }
static void bulk_finish(Fiber &f, BulkStore &b, bool write) {
  u32 line = f.line; f.line = b.line;
  if (!b.read_done) { b.read(b.data); b.read_done = true; }
  if (write) b.write(b.data);
  f.line = line;
}
void bulk_wait(Thread &t, u32 n, bool read) {
  Fiber &f = F(t);
  for (size_t i = 0; i < f.bulk.size();) {
    BulkStore &b = f.bulk[i];
    if (f.bulk_group - b.group <= n) { i++; continue; }
    bulk_finish(f, b, !read);
    if (read) i++; else f.bulk.erase(f.bulk.begin() + i);
  }
}

// ================================================================ printf
int device_printf(Thread &t, u64 fmt, u64 args) {
  std::string out;
  u64 a = args;
  auto arg = [&](u32 n) { a = (a + n - 1) & ~u64(n - 1); const u8 *p = generic_ld(t, a, n); a += n; return p; };
  for (const char *p = (const char *)fmt; *p; p++) {
    if (*p != '%') { out += *p; continue; }
    if (p[1] == '%') { out += *p++; continue; }
    std::string spec = "%"; bool l = false;
    while (*++p && !strchr("diouxXeEfFgGaAcsp", *p)) { l |= *p == 'l'; spec += *p; }
    spec += *p;
    char b[512];
    if (strchr("eEfFgGaA", *p)) snprintf(b, sizeof b, spec.c_str(), rd<f64>(arg(8)));
    else if (*p == 's') snprintf(b, sizeof b, spec.c_str(), (const char *)rd<u64>(arg(8)));
    else if (*p == 'p' || l) snprintf(b, sizeof b, spec.c_str(), rd<u64>(arg(8)));
    else snprintf(b, sizeof b, spec.c_str(), rd<u32>(arg(4)));
    out += b;
  }
  fputs(out.c_str(), stdout);
  fflush(stdout);
  return 1;
}

// ================================================================ launch
static std::map<std::string, const KernelInfo *> &kernels() { static std::map<std::string, const KernelInfo *> m; return m; }
static int g_highest_arch = 0;
void load_module(Module &m) {
  if (m.loaded) return;
  m.loaded = true;
  m.init();
  for (u32 i = 0; i < m.n_globals; i++) add_range(m.globals[i].address, m.globals[i].size);
  for (u32 i = 0; i < m.n_kernels; i++) {
    kernels()[m.kernels[i]->name] = m.kernels[i];
    g_highest_arch = std::max<int>(g_highest_arch, m.kernels[i]->arch);
  }
}
int highest_arch() { return g_highest_arch ? g_highest_arch : 90; }
const KernelInfo *find_kernel(const std::string &n) { auto i = kernels().find(n); return i == kernels().end() ? nullptr : i->second; }

static void fiber_exit(Fiber &f) {
  Gang &g = *f.gang; Cta &c = *f.cta; Warp &w = *f.wp;
  cp_async_wait(f, -1);
  for (auto &b : f.bulk) {
    f.line = b.line;
    if (!b.read_done) fault(f, "thread exits before its bulk store has finished reading shared memory (no cp.async.bulk.wait_group)");
    bulk_finish(f, b, true);
  }
  for (auto &op : w.wg->ops)
    if (op.issued & ~op.released & 1u << f.warp % 4) { f.line = op.line; fault(f, "thread exits with a wgmma that was never waited for"); }
  f.done = true; w.live &= ~(1u << f.lane); c.exited++; g.alive--; g.spin_rounds = 0;
  for (size_t i = 0; i < w.colls.size();)
    if (w.colls[i].arrived && w.colls[i].arrived == (w.colls[i].mask & w.live)) { coll_done(w, i, nullptr); i = 0; } else i++;
  for (auto &b : c.bars) if (b.arrived && b.dflt && b.arrived >= c.nthreads - c.exited) bar_complete(c, b, nullptr, g);
  if (g.cl_arrived && g.cl_arrived == g.alive) { g.cl_phase++; g.cl_arrived = 0; for (Fiber *x : g.cl_waiting) g.ready(x); g.cl_waiting.clear(); }
  if (!g.alive) {
    for (Cta *ct : g.ctas) for (size_t i = 0; i + 3 < ct->warps.size(); i += 4) for (int j = 1; j < 4; j++)
      if (ct->warps[i].wg_count != ct->warps[i + j].wg_count) fault(f, "the warps of warpgroup %zu executed different numbers of wgmma instructions", i / 4);
    while (g.run_async_one()) {}
    to_main(g);
  }
  Fiber *n = g.pick();
  if (!n) { report(g, deadlock_report(g, g.spinq.empty() ? "deadlock" : "livelock")); to_main(g); }
  n->why = nullptr; g.cur = n;
  ptxsim_switch(&f.sp, n->sp);
  __builtin_unreachable();
}
static void fiber_main() {
  Fiber &f = *tl_gang->cur;
  f.gang->k->fn(f);
  fiber_exit(f);
}

struct Job { const KernelInfo *k; Launch l; std::vector<u8> params; u8 *pp; u32 ngangs, gd[3]; std::atomic<u32> next{0}; std::atomic<bool> stop{false}; };

static void run_gang(Gang &g, Job &j, u32 index) {
  const KernelInfo &k = *j.k; const Launch &l = j.l; Config &cfg = config();
  u32 gx = index % j.gd[0], gy = index / j.gd[0] % j.gd[1], gz = index / j.gd[0] / j.gd[1];
  u32 nt = l.block[0] * l.block[1] * l.block[2], csize = l.cluster[0] * l.cluster[1] * l.cluster[2];
  g.k = &k; g.rq.clear(); g.head = 0; g.spinq.clear(); g.async.clear(); g.cp_waiters.clear(); g.cl_waiting.clear();
  g.spin_rounds = g.ticks = 0; g.alive = nt * csize; g.cl_arrived = g.cl_phase = 0; g.failed = false;
  g.rng = (cfg.seed * 0x9E3779B97F4A7C15ull + index * 0xD1B54A32D192ED03ull) | 1;
  for (int i = 0; i < 4; i++) g.rnd();
  g.tournament = 1u << (g.rnd() >> 40) % 3 * 2;              // 1, 4 or 16 candidates
  u32 dyn_base = (SMEM_BASE + k.static_smem + k.dyn_align - 1) / k.dyn_align * k.dyn_align;
  g.smem_end = dyn_base + l.dyn_smem;
  if (!l.dyn_smem) g.smem_end = SMEM_BASE + k.static_smem;
  while (g.ctas.size() < csize) g.ctas.push_back(new Cta());
  for (u32 r = 0; r < csize; r++) {
    Cta &c = *g.ctas[r];
    u32 cr[3] = {r % l.cluster[0], r / l.cluster[0] % l.cluster[1], r / l.cluster[0] / l.cluster[1]}, gi[3] = {gx, gy, gz};
    for (int i = 0; i < 3; i++) c.ctaid[i] = gi[i] * l.cluster[i] + cr[i];
    c.rank = r; c.nthreads = nt; c.exited = 0;
    c.smem_buf.resize(g.smem_end + 2048);
    c.smem = (u8 *)(((u64)c.smem_buf.data() + 1023) & ~1023ull);
    memset(c.smem, 0xff, g.smem_end);                       // NaN in every float format
    c.shadow.assign(g.smem_end, 0);
    if (cfg.race) c.rshadow.assign(g.smem_end, 0);
    c.mbars.clear(); c.mbar_waiters.clear();
    for (auto &b : c.bars) { b.waiting.clear(); b.vc.clear(); b.arrived = b.popc = b.acc_or = 0; b.acc_and = 1; b.dflt = true; }
    while (c.threads.size() < nt) c.threads.push_back(new Fiber());
    c.warps.assign((nt + 31) / 32, Warp());
    c.groups.assign((nt + 127) / 128, WarpGroup());
    for (size_t i = 0; i < c.warps.size(); i++) { Warp &w = c.warps[i]; w.cta = &c; w.wg = &c.groups[i / 4]; w.priority = g.rnd() >> 32; }
    for (u32 i = 0; i < nt; i++) {
      Fiber &f = *c.threads[i];
      f = Fiber();
      f.tid[0] = i % l.block[0]; f.tid[1] = i / l.block[0] % l.block[1]; f.tid[2] = i / l.block[0] / l.block[1];
      for (int d = 0; d < 3; d++) {
        f.ctaid[d] = c.ctaid[d]; f.ntid[d] = l.block[d]; f.nctaid[d] = l.grid[d];
        f.cluster_ctaid[d] = cr[d]; f.cluster_nctaid[d] = l.cluster[d];
      }
      f.cluster_rank = r; f.cluster_size = csize;
      f.lane = i % 32; f.warp = i / 32; f.linear = i; f.clock = 1;
      f.flags = (cfg.uninit ? F_UNINIT : 0) | (cfg.race ? F_RACE : 0) | (cfg.proxy ? F_PROXY : 0) | (cfg.preempt ? F_PREEMPT : 0);
      f.smem = c.smem; f.shadow = c.shadow.data(); f.rshadow = c.rshadow.data(); f.smem_end = g.smem_end; f.dyn_smem = l.dyn_smem;
      f.params = j.pp; f.params_size = k.params_size; f.gcache = g.gcache;
      if (cfg.race) f.vc.assign(nt, 0);
      f.cta = &c; f.gang = &g; f.wp = &c.warps[i / 32];
      f.wp->lanes[f.lane] = &f; f.wp->live |= 1u << f.lane;
      f.stack = stack_for((size_t)r * nt + i);
      f.stack_lo = (u64)f.stack; f.stack_hi = f.stack_lo + STACK;
      void **sp = (void **)(f.stack + STACK - 64);
      *--sp = nullptr; *--sp = (void *)fiber_main;          // entry, 16-byte alignment as after a call
      sp -= 6; f.sp = sp;
      g.ready(&f);
    }
  }
  for (auto &c : g.gcache) c = GlobalRange();
  tl_gang = &g;
  g.cur = g.pick();
  ptxsim_switch(&g.main_sp, g.cur->sp);
}

int launch(const KernelInfo &k, const Launch &l, void **args) {
  Job j; j.k = &k; j.l = l;
  u64 nt = u64(l.block[0]) * l.block[1] * l.block[2];
  auto bad = [&](const char *why, int code) { report_launch(std::string("launch of ") + k.name + ": " + why); return code; };
  if (!nt || nt > 1024 || (k.max_threads && nt > k.max_threads)) return bad("bad block size", 1);
  if (k.reqntid && nt != k.reqntid) return bad("block size differs from .reqntid", 1);
  if (!l.grid[0] || !l.grid[1] || !l.grid[2] || l.grid[1] > 65535 || l.grid[2] > 65535) return bad("bad grid", 9);
  for (int i = 0; i < 3; i++) { if (!l.cluster[i] || l.grid[i] % l.cluster[i]) return bad("grid is not a multiple of the cluster", 912); j.gd[i] = l.grid[i] / l.cluster[i]; }
  if (k.static_smem + l.dyn_smem > (k.arch >= 90 ? 232448u : 166912u)) return bad("too much shared memory", 1);
  j.params.assign(k.params_size + 128, 0);
  j.pp = (u8 *)(((u64)j.params.data() + 63) & ~63ull);
  for (u32 i = 0; i < k.n_params; i++) memcpy(j.pp + k.params[i].offset, args[i], k.params[i].size);
  j.ngangs = j.gd[0] * j.gd[1] * j.gd[2];
  u32 nw = config().threads ? config().threads : std::max(1u, std::thread::hardware_concurrency());
  nw = std::min(nw, j.ngangs);
  std::vector<u32> order(j.ngangs);
  for (u32 i = 0; i < j.ngangs; i++) order[i] = i;
  if (config().random_cta) { u64 s = config().seed * 2654435761u + 12345; for (u32 i = j.ngangs; i-- > 1;) { s = s * 6364136223846793005ull + 1; std::swap(order[i], order[(s >> 33) % (i + 1)]); } }
  auto work = [&] {
    {
      std::lock_guard<std::mutex> l(g_workers_mutex);
      if (g_workers.empty()) g_workers.push_back(new Worker());
      tl_worker = g_workers.back(); g_workers.pop_back();
    }
    for (u32 i; !j.stop && (i = j.next++) < j.ngangs;) { run_gang(tl_worker->gang, j, order[i]); if (tl_worker->gang.failed) j.stop = true; }
    std::lock_guard<std::mutex> l(g_workers_mutex);
    g_workers.push_back(tl_worker);
  };
  std::vector<std::thread> ws;
  for (u32 i = 1; i < nw; i++) ws.emplace_back(work);
  work();
  for (auto &t : ws) t.join();
  return j.stop ? 719 : 0;  // cudaErrorLaunchFailure
}
}  // namespace ptxsim

// ---------------------------------------------------------------- C interface for Python
extern "C" {
int ptxsim_set(const char *k, const char *v) { return ptxsim::set_option(ptxsim::config(), k, v) ? 0 : 1; }
void ptxsim_register(void *p, uint64_t n) { ptxsim::add_range(p, n); }
void ptxsim_unregister(void *p) { ptxsim::drop_range(p); }
const char *ptxsim_error() { return ptxsim::g_last_error.c_str(); }
// Launch by mangled name: dims = grid xyz, block xyz, cluster xyz.
int ptxsim_launch(const char *name, const uint32_t *dims, uint32_t smem, void **args) {
  const ptxsim::KernelInfo *k = ptxsim::find_kernel(name);
  if (!k) { ptxsim::g_last_error = std::string("no kernel ") + name; return 98; }
  ptxsim::Launch l;
  memcpy(l.grid, dims, 36);
  l.dyn_smem = smem;
  return ptxsim::launch(*k, l, args);
}
}
