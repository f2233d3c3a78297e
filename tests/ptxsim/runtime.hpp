// ptxsim device-side runtime: what translated kernels include.
//
// Every CUDA thread is a fiber that runs one translated C++ function on a Thread&. Scalar instructions are inline here
// and in arith.hpp; whatever can block, fault or act on several threads is a call into the other files.
#pragma once
#include <immintrin.h>
#include <cstring>

#include "arith.hpp"

namespace ptxsim {
// ---- addresses
// Shared memory has a 32-bit window: offset in the owning CTA, or (rank+1)<<24 | offset
// for an explicit CTA of the cluster.  Its generic image is SHARED_WINDOW + that value
// (a non-canonical x86 address, so it cannot collide with host pointers).
constexpr u64 SHARED_WINDOW = 0xA5A5000000000000ull;
constexpr u32 SMEM_BASE = 1024;  // sm_90 reserves the first KiB; also makes 0 a bad address

// Shadow word of one shared-memory byte: 0 = never written, else writer tid+1 (low 11
// bits; ASYNC_WRITER for cp.async/TMA) and the writer's clock at the time (upper 21 bits).
constexpr u32 ASYNC_WRITER = 0x7ff;
constexpr u32 IN_FLIGHT = ~0u;  // the byte will be written by an asynchronous copy that has been issued

enum Flags : u32 { F_UNINIT = 1, F_RACE = 2, F_PROXY = 4, F_PREEMPT = 8 };
struct GlobalRange {
  u64 lo = 0, size = 0;
};

struct Thread {
  u32 tid[3], ctaid[3], ntid[3], nctaid[3];
  u32 lane, warp, linear, line;  // line: PTX line being executed
  u32 flags, clock;              // clock: advances at every release operation
  u32 smem_end, dyn_smem;
  u8* smem;
  u32 *shadow, *rshadow;  // indexed by the shared window offset
  const u8* params;
  u64 params_size;
  u64 stack_lo, stack_hi;
  GlobalRange* gcache;  // 16 recently used allocations (per OS thread)
  u32 cluster_rank, cluster_size, cluster_ctaid[3], cluster_nctaid[3];
};

[[noreturn]] void fault(Thread&, const char* fmt, ...) __attribute__((format(printf, 2, 3)));
u8* shared_slow(Thread&, u64 addr, u32 n, bool store);
u8* global_slow(Thread&, u64 addr, u32 n, bool store, bool generic);
[[noreturn]] void fault_unreadable(Thread&, u32 addr, u32 n);  // never written, or in flight
void race_check(Thread&, u32 addr, u32 n, bool store);
void maybe_preempt(Thread&);
void spin_hint(Thread&);  // called by polling loads/atomics/nanosleep

// Each returns the host address of n bytes (n a power of two), checked.
inline u8* shared_ld(Thread& t, u64 a, u32 n) {
  if (__builtin_expect((a & (n - 1)) || a + n > t.smem_end || a < SMEM_BASE, 0)) return shared_slow(t, a, n, false);
  if (t.flags & F_PREEMPT) maybe_preempt(t);
  const u32* w = t.shadow + a;
  bool bad = false;
  for (u32 i = 0; i < n; i++) bad |= w[i] + 1 < 2;  // 0 or IN_FLIGHT
  if (__builtin_expect(bad && (t.flags & F_UNINIT), 0)) fault_unreadable(t, a, n);
  if (t.flags & F_RACE) race_check(t, a, n, false);
  return t.smem + a;
}
inline u8* shared_st(Thread& t, u64 a, u32 n) {
  if (__builtin_expect((a & (n - 1)) || a + n > t.smem_end || a < SMEM_BASE, 0)) return shared_slow(t, a, n, true);
  if (t.flags & F_PREEMPT) maybe_preempt(t);
  if (t.flags & F_RACE) race_check(t, a, n, true);
  u32 tag = (t.linear + 1) | t.clock << 11, *w = t.shadow + a;
  bool in_flight = false;
  for (u32 i = 0; i < n; i++) {
    in_flight |= w[i] == IN_FLIGHT;
    w[i] = tag;
  }
  if (__builtin_expect(in_flight && (t.flags & F_UNINIT), 0))
    fault(t, "write of shared memory that an asynchronous copy still writes: offset 0x%x, %u bytes", (u32)a, n);
  return t.smem + a;
}
// For atomics and polling loads: no race report (they synchronise), same bounds checks.
inline u8* shared_at(Thread& t, u64 a, u32 n) {
  u32 f = t.flags;
  t.flags &= ~F_RACE;
  u8* p = shared_ld(t, a, n);
  t.flags = f;
  return p;
}
inline u8* global_ptr(Thread& t, u64 a, u32 n, bool store) {
  if (t.flags & F_PREEMPT) maybe_preempt(t);
  const GlobalRange& c = t.gcache[t.line & 15];
  if (__builtin_expect(a - c.lo < c.size && a - c.lo + n <= c.size && !(a & (n - 1)), 1)) return (u8*)a;
  return global_slow(t, a, n, store, false);
}
inline u8* global_ld(Thread& t, u64 a, u32 n) { return global_ptr(t, a, n, false); }
inline u8* global_st(Thread& t, u64 a, u32 n) { return global_ptr(t, a, n, true); }
inline u8* local_ld(Thread& t, u64 a, u32 n) {
  if (a < t.stack_lo || a + n > t.stack_hi || (a & (n - 1))) fault(t, "bad local address 0x%lx (%u bytes)", a, n);
  return (u8*)a;
}
inline u8* local_st(Thread& t, u64 a, u32 n) { return local_ld(t, a, n); }
inline bool is_shared(u64 a) { return (a >> 48) == (SHARED_WINDOW >> 48); }
inline u8* generic_any(Thread& t, u64 a, u32 n, bool store) {
  if (is_shared(a)) return store ? shared_st(t, a - SHARED_WINDOW, n) : shared_ld(t, a - SHARED_WINDOW, n);
  const GlobalRange& c = t.gcache[t.line & 15];
  if (__builtin_expect(a - c.lo < c.size && a - c.lo + n <= c.size && !(a & (n - 1)), 1)) return (u8*)a;
  return global_slow(t, a, n, store, true);
}
inline u8* generic_ld(Thread& t, u64 a, u32 n) { return generic_any(t, a, n, false); }
inline u8* generic_st(Thread& t, u64 a, u32 n) { return generic_any(t, a, n, true); }
inline u8* global_at(Thread& t, u64 a, u32 n) { return global_ptr(t, a, n, true); }
inline u8* generic_at(Thread& t, u64 a, u32 n) {
  return is_shared(a) ? shared_at(t, a - SHARED_WINDOW, n) : generic_any(t, a, n, true);
}
inline bool is_local(Thread& t, u64 a) { return a >= t.stack_lo && a < t.stack_hi; }

template <class T>
inline T rd(const u8* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void wr(u8* p, T v) {
  memcpy(p, &v, sizeof v);
}

// Atomic read-modify-write by compare-and-swap; CTAs may run on several OS threads.
template <class T, class F>
inline T rmw(u8* p, F f) {
  using U = std::conditional_t<sizeof(T) == 2, u16, std::conditional_t<sizeof(T) == 4, u32, u64>>;
  U old = __atomic_load_n((U*)p, __ATOMIC_SEQ_CST), nw;
  do nw = bc<U>((T)f(bc<T>(old)));
  while (!__atomic_compare_exchange_n((U*)p, &old, nw, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return bc<T>(old);
}

// ---- warp collectives
// key identifies the instruction (its source line for .aligned forms).
u32 shfl(Thread&, u32 key, int mode, u32 v, u32 b, u32 c, u32 mask, bool* p);
u32 vote(Thread&, u32 key, int mode, bool p, u32 mask);  // 0 ballot 1 any 2 all 3 uni
u32 match(Thread&, u32 key, bool all, u64 v, u32 mask, bool* p);
u32 redux(Thread&, u32 key, int op, u32 v, u32 mask);  // and or xor add umin umax smin smax
u32 activemask(Thread&);
bool elect(Thread&, u32 key, u32 mask, u32* leader);
void warp_bar(Thread&, u32 key, u32 mask);
void ldmatrix(Thread&, u32 key, int n, bool trans, u64 addr, u32* out);
void stmatrix(Thread&, u32 key, int n, bool trans, u64 addr, const u32* in);
u32 movmatrix(Thread&, u32 key, u32 v);

enum Elt : u8 { E_F16, E_BF16, E_TF32, E_E4M3, E_E5M2, E_S8, E_U8, E_F32, E_S32 };
struct MmaSpec {
  u16 m, n, k;
  Elt a, b, acc;
  bool satfinite;
};
void mma(Thread&, u32 key, const MmaSpec&, const u32* a, const u32* b, const u32* c, u32* d);

// ---- barriers
void bar(Thread&, u32 id, u32 count, bool arrive);        // count 0: whole CTA
u32 bar_red(Thread&, u32 id, u32 count, int op, bool p);  // 0 popc 1 and 2 or
void cluster_bar(Thread&, bool arrive, bool wait);
void fence(Thread&, bool proxy_async);
u64 mapa(Thread&, u64 addr, u32 rank, bool generic);
void mbar_init(Thread&, u64 a, u32 count);
void mbar_inval(Thread&, u64 a);
u64 mbar_arrive(Thread&, u64 a, u32 count, s32 expect_tx, bool drop);
void mbar_tx(Thread&, u64 a, s32 delta);
bool mbar_wait_parity(Thread&, u64 a, u32 parity, bool blocking);
bool mbar_wait_state(Thread&, u64 a, u64 state, bool blocking);
inline u64 mbar_pending(u64 state) { return state & 0xfffff; }

// ---- asynchronous copies
void cp_async(Thread&, u64 dst, u64 src, u32 size, u32 src_size);
void cp_async_commit(Thread&);
void cp_async_wait(Thread&, s32 n);  // -1: wait_all
void cp_async_mbar(Thread&, u64 mbar, bool noinc);
void bulk_g2s(Thread&, u64 dst, u64 src, u32 size, u64 mbar, u32 mask);
void bulk_s2g(Thread&, u64 dst, u64 src, u32 size, int red);
void bulk_s2s(Thread&, u64 dst, u64 src, u32 size, u64 mbar);
void tma_load(Thread&, int dim, u64 dst, u64 map, const s32* coord, u64 mbar, u32 mask);
void tma_store(Thread&, int dim, u64 map, const s32* coord, u64 src, int red);
void bulk_commit(Thread&);
void bulk_wait(Thread&, u32 n, bool read);
enum BulkRed {
  R_NONE,
  R_ADD_F32,
  R_ADD_F16,
  R_ADD_BF16,
  R_ADD_U32,
  R_ADD_U64,
  R_MIN_S32,
  R_MAX_S32,
  R_AND,
  R_OR,
  R_XOR
};

// ---- wgmma
// A wgmma's results become real only at wait_group; until then its destination registers
// hold tokens (signalling-NaN patterns) that wgmma_wait replaces and arithmetic turns to NaN.
struct WgmmaSpec {
  u16 n, k;
  Elt a, b, acc;
  bool a_reg, tnsp_a, tnsp_b;
  s8 scale_a, scale_b;
};
void wgmma(Thread&, u32 key, const WgmmaSpec&, u32* d, int nd, const u32* areg, u64 adesc, u64 bdesc, bool scale_d);
void wgmma_fence(Thread&, u32 key);
void wgmma_commit(Thread&, u32 key);
void wgmma_wait(Thread&, u32 key, u32 n, u32* regs, int nregs);
constexpr u32 TOKEN_BASE = 0x7f800001;  // .. 0x7fbfffff
constexpr u32 TOKENS = 0x3fffff;
// For instructions that read a register which may hold a token. f16 accumulators that are NaN look the same.
inline void check_resolved(Thread& t, u32 line, u32 bits) {
  if (__builtin_expect(bits - TOKEN_BASE >= TOKENS, 1)) return;
  t.line = line;
  fault(t, "read of a wgmma result that has not been waited for (wgmma.wait_group)");
}

int device_printf(Thread&, u64 fmt, u64 args);
u32 sm_count();
void polling_yield(Thread&);  // nanosleep
u64 clock64(Thread&);

// ---- kernel registration
struct ParamInfo {
  u32 offset, size;
};
struct KernelInfo {
  const char *name, *ptx_file;
  void (*fn)(Thread&);
  const ParamInfo* params;
  u32 n_params, params_size;
  u32 static_smem, dyn_align, max_threads, reqntid, cluster[3];
  u32 arch;
};
struct GlobalInfo {
  const char* name;
  u8* address;
  u64 size;
};
// The translation of one source. Names are looked up in the module that the host code belongs to, so that sources may
// have kernels, constants and variables of the same name.
struct Module {
  const KernelInfo* const* kernels;
  u32 n_kernels;
  const GlobalInfo* globals;
  u32 n_globals;
  void (*init)();  // initialisers that hold addresses
  bool loaded;
};
void load_module(Module&);  // does nothing the second time
}  // namespace ptxsim
