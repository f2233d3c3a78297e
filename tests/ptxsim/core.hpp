// Structures that the parts of the simulator share; translated code does not see them.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime.hpp"

namespace ptxsim {
enum Async { LAZY, EAGER, RANDOM };

constexpr u32 kMaxDevices = 8;
struct Config {                                    // environment PTXSIM_<NAME>, or ptxsim_set(name, value)
  u64 seed = 0;                                    // SEED
  bool random = false;                             // SCHED=random|fifo
  Async async = LAZY;                              // ASYNC=lazy|eager|random
  u32 preempt = 0;                                 // PREEMPT=n: yield at about one in n memory accesses
  bool uninit = true, race = false, proxy = true;  // UNINIT, RACE, PROXY: 0|1
  bool global_check = true;                        // GLOBAL=0 turns off allocation checking
  bool random_cta = false;                         // CTA_ORDER=random
  u32 threads = 0;                                 // THREADS: OS threads (0: all cores)
  u32 arch = 0;         // ARCH: compute capability of the device, such as 80 (0: the highest that is loaded)
  u32 sms = 0;          // SMS: multiprocessors of the device (0: 132 for Hopper, else 108)
  u32 devices = 1;      // DEVICES=n: how many the runtime has, up to kMaxDevices
  bool verbose = true;  // VERBOSE=0: no report on stderr
};
Config& config();

using VectorClock = std::vector<u32>;  // vector clock (race mode only)
struct Fiber;
struct Warp;
struct Cta;
struct Gang;
using RendezvousFunction = void (*)(Warp&, u32 mask, void** args, const void* spec);
struct Rendezvous {
  u32 key, mask, arrived;
  RendezvousFunction fn;
  const void* spec;
  void* args[32];
};

struct CopyOp {
  u64 dst, src;
  u32 size, src_size, group, line;
  u64 mbar;
  int arrive;
};  // arrive: 0 copy, 1 arrival on mbar
struct BulkStore {
  u32 group, line;
  bool read_done;
  std::function<void(std::vector<u8>&)> read, write;
  std::vector<u8> data;
};

struct Fiber : Thread {
  void* sp;
  u8* stack;
  Cta* cta;
  Warp* own_warp;
  Gang* gang;
  bool done;
  const char* why;  // what it is blocked on
  u32 why_arg;
  std::deque<CopyOp> copies;
  u32 copy_group;
  std::vector<BulkStore> bulk;
  u32 bulk_group;
  u64 wait_mbar, wait_phase;
  u32 bar_result;
  u32 spins, proxy_clock, cluster_phase;
  VectorClock vc;
};

// One wgmma of a warpgroup.  It exists from its issue by the first of the four warps and runs
// (for all four) when a warp waits for it and all four have issued it: code that lets one
// thread of the warpgroup release a buffer after its own wait_group relies on this.
struct WgmmaOp {
  u64 seq;
  u32 group, line;
  const WgmmaSpec* spec;
  u64 adesc, bdesc;
  bool scale_d, done;
  int nd;
  u32 issued, released;  // bit per warp: has issued it; has waited for it
  std::vector<u32> acc;  // [128][nd]: inputs, then results
  std::vector<u32> a;    // [128][4] for A in registers
};
struct WarpGroup {
  std::deque<WgmmaOp> ops;
  std::vector<Fiber*> waiting;
};
struct Warp {
  Fiber* lanes[32];
  u32 live, priority;
  Cta* cta;
  WarpGroup* wg;
  std::vector<Rendezvous> rendezvous;
  u64 wgmma_count;
  u32 wgmma_group;
  bool wgmma_fenced;
};
struct Barrier {
  u32 expected, arrived, acc_and, acc_or, popc;
  bool whole_block;
  std::vector<Fiber*> waiting;
  VectorClock vc;
};
struct MBarrier {
  u32 expected, pending;
  s64 tx;
  u64 phase;
  VectorClock vc;
};
struct Cta {
  u32 ctaid[3], rank, nthreads, exited;
  std::vector<u8> smem_buf;
  u8* smem;
  std::vector<u32> shadow, rshadow;
  std::vector<Fiber*> threads;
  std::vector<Warp> warps;
  std::vector<WarpGroup> groups;
  Barrier barriers[16];
  std::unordered_map<u32, MBarrier> mbarriers;
  std::vector<Fiber*> mbarrier_waiters;
  ~Cta();
};
inline Cta::~Cta() {
  for (Fiber* f : threads) delete f;
}
struct AsyncOp {
  Fiber* by;
  u32 line;
  std::function<void()> run;
};

struct Gang {  // the CTAs of one cluster, run together on one OS thread
  const KernelInfo* k;
  u32 smem_end;
  std::vector<Cta*> ctas;
  std::vector<Fiber*> run_queue;
  size_t head = 0;
  std::vector<Fiber*> polling;
  std::vector<AsyncOp> async;         // TMA/bulk loads in flight
  std::vector<Fiber*> copy_arrivals;  // threads with a cp.async.mbarrier.arrive in flight
  u64 rng, spin_rounds, ticks;
  u32 alive, tournament;
  u32 cluster_arrived, cluster_phase;
  std::vector<Fiber*> cluster_waiting;
  void* main_stack;
  Fiber* cur;
  bool failed;
  std::string error;
  GlobalRange gcache[16];

  u64 next_random() {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng * 0x2545F4914F6CDD1Dull;
  }
  void ready(Fiber* f) { run_queue.push_back(f); }
  Fiber* pick();
  bool run_async_one();
  void block(Fiber&, const char* why, u32 arg = 0);
  ~Gang() {
    for (Cta* c : ctas) delete c;
  }
  bool eager() {
    Async a = config().async;
    return a == EAGER || (a == RANDOM && (next_random() >> 33 & 1));
  }
};

// ---- scheduler.cpp
extern "C" void ptxsim_switch(void** save, void* load);  // to another fiber's stack
[[noreturn]] void to_main(Gang&);                        // gives the gang up
void report(Gang&, const std::string&);                  // the gang has failed
[[noreturn]] void fail_deadlock(Gang&);
void yield_polling(Fiber&);  // until nothing else can run
void finish_rendezvous(Warp&, size_t i, Fiber* self);

// ---- memory.cpp: vector clocks
void join(VectorClock&, const VectorClock&);
void release(Fiber&, VectorClock&);
void acquire(Fiber&, const VectorClock&);

// ---- barriers.cpp, copies.cpp
void complete_barrier(Barrier&, Fiber* self, Gang&);
MBarrier& find_mbarrier(Fiber&, Cta&, u32 off);
bool run_copies_until_arrival(Fiber&);  // copies up to the next mbarrier arrival
void bulk_finish(Fiber&, BulkStore&, bool write);

inline Fiber& fiber(Thread& t) { return static_cast<Fiber&>(t); }
void collective(Thread&, u32 key, u32 mask, void* arg, RendezvousFunction, const void* spec, const char* what);
// Host pointer for an asynchronous (or whole-operand) access to n bytes of shared memory.
u8* async_smem(Fiber&, Cta&, u32 off, u32 n, bool store, bool async_proxy);
void mark_in_flight(Fiber&, Cta&, u64 off, u64 n);  // a copy has been issued: the bytes must not be touched
Cta& cta_of(Fiber&, u64& addr);                     // resolves and strips the cluster rank / generic window
u8* global_range(Fiber&, u64 a, u64 n, const char* what);
void mbar_complete_tx(Fiber&, Cta&, u32 off, s64 bytes);
// Now (eager) or when the gang is idle (lazy); writes n bytes at dst, in the CTAs of mask if it is not 0.
void gang_issue_load(Fiber&, u64 dst, u64 n, u32 mask, std::function<void()> run);
void bulk_red(u8* dst, const u8* src, u32 n, int red);
void bulk_issue(Fiber&, std::function<void(std::vector<u8>&)> read, std::function<void(std::vector<u8>&)> write);

// launch interface used by cudart.cpp
struct Launch {
  u32 grid[3], block[3], cluster[3];
  u32 dyn_smem;
};
int launch(const KernelInfo&, const Launch&, void** args);  // cudaError_t
const KernelInfo* find_kernel(const std::string&);
int device_arch();  // ARCH, or the highest of the loaded modules, or 90
void add_range(const void*, u64), drop_range(const void*);
u64 range_size(const void*);
bool in_range(const void*, u64 n);  // lies within one range (always, with GLOBAL=0)
bool touches_range(const void*);
extern std::string g_last_error;
void report_launch(const std::string&);  // an error of the host side
}  // namespace ptxsim
