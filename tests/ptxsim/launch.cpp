// Modules, the launch of a grid on OS threads, the life of a thread block, printf.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core.hpp"

namespace ptxsim {
// ---- printf

int device_printf(Thread& t, u64 fmt, u64 args) {
  std::string out;
  u64 a = args;
  auto arg = [&](u32 n) {
    a = (a + n - 1) & ~u64(n - 1);
    const u8* p = generic_ld(t, a, n);
    a += n;
    return p;
  };
  for (const char* p = (const char*)fmt; *p; p++) {
    if (*p != '%') {
      out += *p;
      continue;
    }
    if (p[1] == '%') {
      out += *p++;
      continue;
    }
    std::string spec = "%";
    bool l = false;
    while (*++p && !strchr("diouxXeEfFgGaAcsp", *p)) {
      l |= *p == 'l';
      spec += *p;
    }
    spec += *p;
    char b[512];
    if (strchr("eEfFgGaA", *p))
      snprintf(b, sizeof b, spec.c_str(), rd<f64>(arg(8)));
    else if (*p == 's')
      snprintf(b, sizeof b, spec.c_str(), (const char*)rd<u64>(arg(8)));
    else if (*p == 'p' || l)
      snprintf(b, sizeof b, spec.c_str(), rd<u64>(arg(8)));
    else
      snprintf(b, sizeof b, spec.c_str(), rd<u32>(arg(4)));
    out += b;
  }
  fputs(out.c_str(), stdout);
  fflush(stdout);
  return 1;
}

// ---- modules

static std::map<std::string, const KernelInfo*>& kernels() {
  static std::map<std::string, const KernelInfo*> m;
  return m;
}
static int g_highest_arch = 0;
void load_module(Module& m) {
  if (m.loaded) return;
  m.loaded = true;
  m.init();
  for (u32 i = 0; i < m.n_globals; i++) add_range(m.globals[i].address, m.globals[i].size);
  for (u32 i = 0; i < m.n_kernels; i++) {
    kernels()[m.kernels[i]->name] = m.kernels[i];
    g_highest_arch = std::max<int>(g_highest_arch, m.kernels[i]->arch);
  }
}
int device_arch() { return config().arch ? config().arch : g_highest_arch ? g_highest_arch : 90; }
u32 sm_count() {
  if (config().sms) return config().sms;
  return device_arch() >= 90 ? 132 : 108;
}
const KernelInfo* find_kernel(const std::string& n) {
  auto i = kernels().find(n);
  return i == kernels().end() ? nullptr : i->second;
}

// ---- fibers of a thread block
constexpr size_t STACK = 256 << 10;
static thread_local Gang* tl_gang;
// Fibers, shared memory and stacks are reused from launch to launch.
struct Worker {
  Gang gang;
  std::vector<u8*> stacks;
};
static std::mutex g_workers_mutex;
static std::vector<Worker*> g_workers;  // idle
static thread_local Worker* tl_worker;

static u8* stack_for(size_t i) {
  auto& stacks = tl_worker->stacks;
  while (stacks.size() <= i) {
    void* p = mmap(nullptr, STACK + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      perror("ptxsim: mmap of a fiber stack");
      abort();
    }
    mprotect(p, 4096, PROT_NONE);
    stacks.push_back((u8*)p + 4096);
  }
  return stacks[i];
}
static void fiber_exit(Fiber& f) {
  Gang& g = *f.gang;
  Cta& c = *f.cta;
  Warp& w = *f.own_warp;
  cp_async_wait(f, -1);
  for (auto& b : f.bulk) {
    f.line = b.line;
    if (!b.read_done)
      fault(f, "thread exits before its bulk store has finished reading shared memory (no cp.async.bulk.wait_group)");
    bulk_finish(f, b, true);
  }
  for (auto& op : w.wg->ops)
    if (op.issued & ~op.released & 1u << f.warp % 4) {
      f.line = op.line;
      fault(f, "thread exits with a wgmma that was never waited for");
    }
  f.done = true;
  w.live &= ~(1u << f.lane);
  c.exited++;
  g.alive--;
  g.spin_rounds = 0;
  for (size_t i = 0; i < w.rendezvous.size();)
    if (w.rendezvous[i].arrived && w.rendezvous[i].arrived == (w.rendezvous[i].mask & w.live)) {
      finish_rendezvous(w, i, nullptr);
      i = 0;
    } else
      i++;
  for (auto& b : c.barriers)
    if (b.arrived && b.whole_block && b.arrived >= c.nthreads - c.exited) complete_barrier(b, nullptr, g);
  if (g.cluster_arrived && g.cluster_arrived == g.alive) {
    g.cluster_phase++;
    g.cluster_arrived = 0;
    for (Fiber* x : g.cluster_waiting) g.ready(x);
    g.cluster_waiting.clear();
  }
  if (!g.alive) {
    for (Cta* ct : g.ctas)
      for (size_t i = 0; i + 3 < ct->warps.size(); i += 4)
        for (int j = 1; j < 4; j++)
          if (ct->warps[i].wgmma_count != ct->warps[i + j].wgmma_count)
            fault(f, "the warps of warpgroup %zu executed different numbers of wgmma instructions", i / 4);
    while (g.run_async_one()) {
    }
    to_main(g);
  }
  Fiber* n = g.pick();
  if (!n) fail_deadlock(g);
  n->why = nullptr;
  g.cur = n;
  ptxsim_switch(&f.sp, n->sp);
  __builtin_unreachable();
}
static void fiber_main() {
  Fiber& f = *tl_gang->cur;
  f.gang->k->fn(f);
  fiber_exit(f);
}

// ---- launch
struct Job {
  const KernelInfo* k;
  Launch l;
  std::vector<u8> params;
  u8* pp;
  u32 ngangs, gd[3];
  std::atomic<u32> next{0};
  std::atomic<bool> stop{false};
};

static void run_gang(Gang& g, Job& j, u32 index) {
  const KernelInfo& k = *j.k;
  const Launch& l = j.l;
  Config& cfg = config();
  u32 gx = index % j.gd[0], gy = index / j.gd[0] % j.gd[1], gz = index / j.gd[0] / j.gd[1];
  u32 nt = l.block[0] * l.block[1] * l.block[2], csize = l.cluster[0] * l.cluster[1] * l.cluster[2];
  g.k = &k;
  g.run_queue.clear();
  g.head = 0;
  g.polling.clear();
  g.async.clear();
  g.copy_arrivals.clear();
  g.cluster_waiting.clear();
  g.spin_rounds = g.ticks = 0;
  g.alive = nt * csize;
  g.cluster_arrived = g.cluster_phase = 0;
  g.failed = false;
  g.rng = (cfg.seed * 0x9E3779B97F4A7C15ull + index * 0xD1B54A32D192ED03ull) | 1;
  for (int i = 0; i < 4; i++) g.next_random();
  g.tournament = 1u << (g.next_random() >> 40) % 3 * 2;  // 1, 4 or 16 candidates
  u32 dyn_base = (SMEM_BASE + k.static_smem + k.dyn_align - 1) / k.dyn_align * k.dyn_align;
  g.smem_end = dyn_base + l.dyn_smem;
  if (!l.dyn_smem) g.smem_end = SMEM_BASE + k.static_smem;
  while (g.ctas.size() < csize) g.ctas.push_back(new Cta());
  while (g.ctas.size() > csize) {  // of a launch with larger clusters
    delete g.ctas.back();
    g.ctas.pop_back();
  }
  for (u32 r = 0; r < csize; r++) {
    Cta& c = *g.ctas[r];
    u32 cr[3] = {r % l.cluster[0], r / l.cluster[0] % l.cluster[1], r / l.cluster[0] / l.cluster[1]},
        gi[3] = {gx, gy, gz};
    for (int i = 0; i < 3; i++) c.ctaid[i] = gi[i] * l.cluster[i] + cr[i];
    c.rank = r;
    c.nthreads = nt;
    c.exited = 0;
    c.smem_buf.resize(g.smem_end + 2048);
    c.smem = (u8*)(((u64)c.smem_buf.data() + 1023) & ~1023ull);
    memset(c.smem, 0xff, g.smem_end);  // NaN in every float format
    c.shadow.assign(g.smem_end, 0);
    if (cfg.race) c.rshadow.assign(g.smem_end, 0);
    c.mbarriers.clear();
    c.mbarrier_waiters.clear();
    for (auto& b : c.barriers) {
      b.waiting.clear();
      b.vc.clear();
      b.arrived = b.popc = b.acc_or = 0;
      b.acc_and = 1;
      b.whole_block = true;
    }
    while (c.threads.size() < nt) c.threads.push_back(new Fiber());
    c.warps.assign((nt + 31) / 32, Warp());
    c.groups.assign((nt + 127) / 128, WarpGroup());
    for (size_t i = 0; i < c.warps.size(); i++) {
      Warp& w = c.warps[i];
      w.cta = &c;
      w.wg = &c.groups[i / 4];
      w.priority = g.next_random() >> 32;
    }
    for (u32 i = 0; i < nt; i++) {
      Fiber& f = *c.threads[i];
      f = Fiber();
      f.tid[0] = i % l.block[0];
      f.tid[1] = i / l.block[0] % l.block[1];
      f.tid[2] = i / l.block[0] / l.block[1];
      for (int d = 0; d < 3; d++) {
        f.ctaid[d] = c.ctaid[d];
        f.ntid[d] = l.block[d];
        f.nctaid[d] = l.grid[d];
        f.cluster_ctaid[d] = cr[d];
        f.cluster_nctaid[d] = l.cluster[d];
      }
      f.cluster_rank = r;
      f.cluster_size = csize;
      f.lane = i % 32;
      f.warp = i / 32;
      f.linear = i;
      f.clock = 1;
      f.flags = (cfg.uninit ? F_UNINIT : 0u) | (cfg.race ? F_RACE : 0u) | (cfg.proxy ? F_PROXY : 0u) |
                (cfg.preempt ? F_PREEMPT : 0u);
      f.smem = c.smem;
      f.shadow = c.shadow.data();
      f.rshadow = c.rshadow.data();
      f.smem_end = g.smem_end;
      f.dyn_smem = l.dyn_smem;
      f.params = j.pp;
      f.params_size = k.params_size;
      f.gcache = g.gcache;
      if (cfg.race) f.vc.assign(nt, 0);
      f.cta = &c;
      f.gang = &g;
      f.own_warp = &c.warps[i / 32];
      f.own_warp->lanes[f.lane] = &f;
      f.own_warp->live |= 1u << f.lane;
      f.stack = stack_for((size_t)r * nt + i);
      f.stack_lo = (u64)f.stack;
      f.stack_hi = f.stack_lo + STACK;
      void** sp = (void**)(f.stack + STACK - 64);
      *--sp = nullptr;
      *--sp = (void*)fiber_main;  // entry, 16-byte alignment as after a call
      sp -= 6;
      f.sp = sp;
      g.ready(&f);
    }
  }
  for (auto& c : g.gcache) c = GlobalRange();
  tl_gang = &g;
  g.cur = g.pick();
  ptxsim_switch(&g.main_stack, g.cur->sp);
}

int launch(const KernelInfo& k, const Launch& l, void** args) {
  Job j;
  j.k = &k;
  j.l = l;
  u64 nt = u64(l.block[0]) * l.block[1] * l.block[2];
  auto bad = [&](const char* why, int code) {
    report_launch(std::string("launch of ") + k.name + ": " + why);
    return code;
  };
  if (!nt || nt > 1024 || (k.max_threads && nt > k.max_threads)) return bad("bad block size", 1);
  if (k.reqntid && nt != k.reqntid) return bad("block size differs from .reqntid", 1);
  if (!l.grid[0] || !l.grid[1] || !l.grid[2] || l.grid[1] > 65535 || l.grid[2] > 65535) return bad("bad grid", 9);
  for (int i = 0; i < 3; i++) {
    if (!l.cluster[i] || l.grid[i] % l.cluster[i]) return bad("grid is not a multiple of the cluster", 912);
    j.gd[i] = l.grid[i] / l.cluster[i];
  }
  if (k.static_smem + l.dyn_smem > (k.arch >= 90 ? 232448u : 166912u)) return bad("too much shared memory", 1);
  j.params.assign(k.params_size + 128, 0);
  j.pp = (u8*)(((u64)j.params.data() + 63) & ~63ull);
  for (u32 i = 0; i < k.n_params; i++) memcpy(j.pp + k.params[i].offset, args[i], k.params[i].size);
  j.ngangs = j.gd[0] * j.gd[1] * j.gd[2];
  u32 nw = config().threads ? config().threads : std::max(1u, std::thread::hardware_concurrency());
  nw = std::min(nw, j.ngangs);
  std::vector<u32> order(j.ngangs);
  for (u32 i = 0; i < j.ngangs; i++) order[i] = i;
  if (config().random_cta) {
    u64 s = config().seed * 2654435761u + 12345;
    for (u32 i = j.ngangs; i-- > 1;) {
      s = s * 6364136223846793005ull + 1;
      std::swap(order[i], order[(s >> 33) % (i + 1)]);
    }
  }
  auto work = [&] {
    {
      std::lock_guard<std::mutex> l(g_workers_mutex);
      if (g_workers.empty()) g_workers.push_back(new Worker());
      tl_worker = g_workers.back();
      g_workers.pop_back();
    }
    for (u32 i; !j.stop && (i = j.next++) < j.ngangs;) {
      run_gang(tl_worker->gang, j, order[i]);
      if (tl_worker->gang.failed) j.stop = true;
    }
    std::lock_guard<std::mutex> l(g_workers_mutex);
    g_workers.push_back(tl_worker);
  };
  std::vector<std::thread> ws;
  for (u32 i = 1; i < nw; i++) ws.emplace_back(work);
  work();
  for (auto& t : ws) t.join();
  return j.stop ? 719 : 0;  // cudaErrorLaunchFailure
}
}  // namespace ptxsim
