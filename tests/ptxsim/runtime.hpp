// ptxsim device-side runtime: what translated kernels include.
//
// Every CUDA thread is a fiber running one translated C++ function on a Thread&.
// Scalar instructions are inline here; anything that can block, fault or act on
// more than one thread is an out-of-line call into runtime.cpp / tensor.cpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <type_traits>

namespace ptxsim {
using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using s8 = int8_t; using s16 = int16_t; using s32 = int32_t; using s64 = int64_t;
using u128 = unsigned __int128; using f32 = float; using f64 = double;

template <class D, class S> inline D bc(S s) { return __builtin_bit_cast(D, s); }

// ---------------------------------------------------------------- addresses
// Shared memory has a 32-bit window: offset in the owning CTA, or (rank+1)<<24 | offset
// for an explicit CTA of the cluster.  Its generic image is SHARED_WINDOW + that value
// (a non-canonical x86 address, so it cannot collide with host pointers).
constexpr u64 SHARED_WINDOW = 0xA5A5000000000000ull;
constexpr u32 SMEM_BASE = 1024;  // sm_90 reserves the first KiB; also makes 0 a bad address

// Shadow word of one shared-memory byte: 0 = never written, else writer tid+1 (low 11
// bits; ASYNC_WRITER for cp.async/TMA) and the writer's clock at the time (upper 21 bits).
constexpr u32 ASYNC_WRITER = 0x7ff;

enum Flags : u32 { F_UNINIT = 1, F_RACE = 2, F_PROXY = 4, F_PREEMPT = 8 };
struct GlobalRange { u64 lo = 0, size = 0; };

struct Thread {
  u32 tid[3], ctaid[3], ntid[3], nctaid[3];
  u32 lane, warp, linear, line;        // line: PTX line being executed
  u32 flags, clock;                    // clock: advances at every release operation
  u32 smem_end, dyn_smem;
  u8 *smem; u32 *shadow, *rshadow;     // indexed by the shared window offset
  const u8 *params; u64 params_size;
  u64 stack_lo, stack_hi;
  GlobalRange *gcache;                 // 16 recently used allocations (per OS thread)
  u32 cluster_rank, cluster_size, cluster_ctaid[3], cluster_nctaid[3];
};

[[noreturn]] void fault(Thread &, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
u8 *shared_slow(Thread &, u64 addr, u32 n, bool store);
u8 *global_slow(Thread &, u64 addr, u32 n, bool store, bool generic);
void race_check(Thread &, u32 addr, u32 n, bool store);
void maybe_preempt(Thread &);
void spin_hint(Thread &);              // called by polling loads/atomics/nanosleep

// Each returns the host address of n bytes (n a power of two), checked.
inline u8 *shared_ld(Thread &t, u64 a, u32 n) {
  if (__builtin_expect((a & (n - 1)) || a + n > t.smem_end || a < SMEM_BASE, 0)) return shared_slow(t, a, n, false);
  if (t.flags & F_PREEMPT) maybe_preempt(t);
  const u32 *w = t.shadow + a;
  bool bad = false;
  for (u32 i = 0; i < n; i++) bad |= w[i] == 0;
  if (__builtin_expect(bad && (t.flags & F_UNINIT), 0)) fault(t, "read of shared memory never written: offset 0x%x, %u bytes", (u32)a, n);
  if (t.flags & F_RACE) race_check(t, a, n, false);
  return t.smem + a;
}
inline u8 *shared_st(Thread &t, u64 a, u32 n) {
  if (__builtin_expect((a & (n - 1)) || a + n > t.smem_end || a < SMEM_BASE, 0)) return shared_slow(t, a, n, true);
  if (t.flags & F_PREEMPT) maybe_preempt(t);
  if (t.flags & F_RACE) race_check(t, a, n, true);
  u32 tag = (t.linear + 1) | t.clock << 11, *w = t.shadow + a;
  for (u32 i = 0; i < n; i++) w[i] = tag;
  return t.smem + a;
}
// For atomics and polling loads: no race report (they synchronise), same bounds checks.
inline u8 *shared_at(Thread &t, u64 a, u32 n) {
  u32 f = t.flags; t.flags &= ~F_RACE;
  u8 *p = shared_ld(t, a, n);
  t.flags = f;
  return p;
}
inline u8 *global_ptr(Thread &t, u64 a, u32 n, bool store) {
  if (t.flags & F_PREEMPT) maybe_preempt(t);
  const GlobalRange &c = t.gcache[t.line & 15];
  if (__builtin_expect(a - c.lo < c.size && a - c.lo + n <= c.size && !(a & (n - 1)), 1)) return (u8 *)a;
  return global_slow(t, a, n, store, false);
}
inline u8 *global_ld(Thread &t, u64 a, u32 n) { return global_ptr(t, a, n, false); }
inline u8 *global_st(Thread &t, u64 a, u32 n) { return global_ptr(t, a, n, true); }
inline u8 *local_ld(Thread &t, u64 a, u32 n) {
  if (a < t.stack_lo || a + n > t.stack_hi || (a & (n - 1))) fault(t, "bad local address 0x%lx (%u bytes)", a, n);
  return (u8 *)a;
}
inline u8 *local_st(Thread &t, u64 a, u32 n) { return local_ld(t, a, n); }
inline bool is_shared(u64 a) { return (a >> 48) == (SHARED_WINDOW >> 48); }
inline u8 *generic_any(Thread &t, u64 a, u32 n, bool store) {
  if (is_shared(a)) return store ? shared_st(t, a - SHARED_WINDOW, n) : shared_ld(t, a - SHARED_WINDOW, n);
  const GlobalRange &c = t.gcache[t.line & 15];
  if (__builtin_expect(a - c.lo < c.size && a - c.lo + n <= c.size && !(a & (n - 1)), 1)) return (u8 *)a;
  return global_slow(t, a, n, store, true);
}
inline u8 *generic_ld(Thread &t, u64 a, u32 n) { return generic_any(t, a, n, false); }
inline u8 *generic_st(Thread &t, u64 a, u32 n) { return generic_any(t, a, n, true); }
inline u8 *global_at(Thread &t, u64 a, u32 n) { return global_ptr(t, a, n, true); }
inline u8 *generic_at(Thread &t, u64 a, u32 n) { return is_shared(a) ? shared_at(t, a - SHARED_WINDOW, n) : generic_any(t, a, n, true); }
inline bool is_local(Thread &t, u64 a) { return a >= t.stack_lo && a < t.stack_hi; }

template <class T> inline T rd(const u8 *p) { T v; memcpy(&v, p, sizeof v); return v; }
template <class T> inline void wr(u8 *p, T v) { memcpy(p, &v, sizeof v); }

// Atomic read-modify-write by compare-and-swap; CTAs may run on several OS threads.
template <class T, class F> inline T rmw(u8 *p, F f) {
  using U = std::conditional_t<sizeof(T) == 2, u16, std::conditional_t<sizeof(T) == 4, u32, u64>>;
  U old = __atomic_load_n((U *)p, __ATOMIC_SEQ_CST), nw;
  do nw = bc<U>((T)f(bc<T>(old)));
  while (!__atomic_compare_exchange_n((U *)p, &old, nw, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return bc<T>(old);
}

// ---------------------------------------------------------------- integer helpers
template <class T> inline T shl(T a, u32 n) { return n >= sizeof(T) * 8 ? 0 : T(a << n); }
template <class T> inline T shr(T a, u32 n) { return n >= sizeof(T) * 8 ? (a < 0 ? T(-1) : T(0)) : T(a >> n); }
template <class T> inline T idiv(T a, T b) { return b == 0 ? T(-1) : (b == T(-1) && T(-1) < 0) ? T(0 - std::make_unsigned_t<T>(a)) : T(a / b); }
template <class T> inline T irem(T a, T b) { return b == 0 ? a : (b == T(-1) && T(-1) < 0) ? T(0) : T(a % b); }
inline u32 mulhi(u32 a, u32 b) { return u64(a) * b >> 32; }
inline s32 mulhi(s32 a, s32 b) { return s64(a) * b >> 32; }
inline u64 mulhi(u64 a, u64 b) { return u128(a) * b >> 64; }
inline s64 mulhi(s64 a, s64 b) { return (__int128)a * b >> 64; }
inline u16 mulhi(u16 a, u16 b) { return u32(a) * b >> 16; }
inline s16 mulhi(s16 a, s16 b) { return s32(a) * b >> 16; }
inline s32 mul24(s32 a, s32 b) { return (a << 8 >> 8) * (b << 8 >> 8); }
inline s32 addsat(s32 a, s32 b) { s64 r = s64(a) + b; return r > INT32_MAX ? INT32_MAX : r < INT32_MIN ? INT32_MIN : r; }
inline s32 subsat(s32 a, s32 b) { s64 r = s64(a) - b; return r > INT32_MAX ? INT32_MAX : r < INT32_MIN ? INT32_MIN : r; }
inline u32 lop3(u32 a, u32 b, u32 c, u32 l) {
  u32 r = 0;
  for (u32 i = 0; i < 8; i++) if (l >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
inline u32 prmt(u32 a, u32 b, u32 sel, int mode) {
  u64 v = u64(b) << 32 | a;
  u32 r = 0, s = sel & 3;
  for (u32 i = 0; i < 4; i++) {
    u32 k = 0;
    switch (mode) {  // 0 default, f4e, b4e, rc8, ecl, ecr, rc16
      case 0: k = sel >> 4 * i & 15; break;
      case 1: k = s + i; break;
      case 2: k = (s - i) & 7; break;
      case 3: k = s; break;
      case 4: k = i > s ? i : s; break;
      case 5: k = i < s ? i : s; break;
      case 6: k = (s & 1) * 2 + (i & 1); break;
    }
    u8 byte = v >> 8 * (k & 7);
    if (mode == 0 && (k & 8)) byte = (s8)byte < 0 ? 0xff : 0;
    r |= u32(byte) << 8 * i;
  }
  return r;
}
template <class T> inline T bfe(T a, u32 pos, u32 len) {
  constexpr u32 B = sizeof(T) * 8; using U = std::make_unsigned_t<T>;
  pos &= 255; len &= 255;
  if (len == 0) return 0;
  bool neg = T(-1) < 0 && (U(a) >> (pos + len - 1 < B ? pos + len - 1 : B - 1) & 1);
  U r = pos >= B ? 0 : U(a) >> pos, m = len >= B ? U(-1) : (U(1) << len) - 1;
  r &= m;
  u32 valid = pos >= B ? 0 : (B - pos < len ? B - pos : len);
  if (neg) r |= valid >= B ? 0 : U(-1) << valid;
  return T(r);
}
template <class T> inline T bfi(T a, T b, u32 pos, u32 len) {
  constexpr u32 B = sizeof(T) * 8;
  pos &= 255; len &= 255;
  if (pos >= B || len == 0) return b;
  T m = (len >= B ? T(-1) : (T(1) << len) - 1) << pos;
  return (b & ~m) | (a << pos & m);
}
inline u32 shf(u32 a, u32 b, u32 c, bool left, bool clamp) {
  c = clamp ? (c > 32 ? 32 : c) : c & 31;
  u64 v = u64(b) << 32 | a;
  return left ? u32(c == 32 ? a : v << c >> 32) : u32(v >> c);
}
inline u32 brev(u32 a) { u32 r = 0; for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i); return r; }
inline u64 brev(u64 a) { return u64(brev(u32(a))) << 32 | brev(u32(a >> 32)); }
inline u32 clz(u32 a) { return a ? __builtin_clz(a) : 32; }
inline u32 clz(u64 a) { return a ? __builtin_clzll(a) : 64; }
template <class T> inline u32 bfind(T a, bool shiftamt) {
  using U = std::make_unsigned_t<T>; U v = a < 0 ? ~U(a) : U(a);
  u32 B = sizeof(T) * 8, p = ~0u;
  for (u32 i = 0; i < B; i++) if (v >> i & 1) p = i;
  return p == ~0u ? p : shiftamt ? B - 1 - p : p;
}
inline u32 fns(u32 mask, u32 base, s32 off) {
  if (off == 0) return mask >> base & 1 ? base : ~0u;
  s32 step = off > 0 ? 1 : -1, n = off > 0 ? off : -off;
  for (s32 p = base; p >= 0 && p < 32; p += step) if (mask >> p & 1 && --n == 0) return p;
  return ~0u;
}
inline s32 dp4a(u32 a, u32 b, s32 c, bool sa, bool sb) {
  for (int i = 0; i < 4; i++, a >>= 8, b >>= 8) c += (sa ? (s32)(s8)a : (s32)(u8)a) * (sb ? (s32)(s8)b : (s32)(u8)b);
  return c;
}

// ---------------------------------------------------------------- floating point
enum Rnd { RN, RZ, RM, RP, RNA };
inline f32 ftz(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline f32 sat01(f32 x) { return x > 0 ? (x < 1 ? x : 1.f) : 0.f; }
inline f64 sat01(f64 x) { return x > 0 ? (x < 1 ? x : 1.) : 0.; }
template <class T> inline T fmin_(T a, T b) { return a != a ? b : b != b ? a : (a < b || (a == b && std::signbit(a))) ? a : b; }
template <class T> inline T fmax_(T a, T b) { return a != a ? b : b != b ? a : (a > b || (a == b && !std::signbit(a))) ? a : b; }
template <class T> inline T fminnan(T a, T b) { return a != a ? a : b != b ? b : fmin_(a, b); }
template <class T> inline T fmaxnan(T a, T b) { return a != a ? a : b != b ? b : fmax_(a, b); }
inline f32 ex2(f32 x) { return std::exp2(x); }
inline f32 lg2(f32 x) { return std::log2(x); }
// op: '+', '-', '*', '/', 'f' (fma), 's' (sqrt), 'r' (1/a), 'i' s64->T, 'u' u64->T, 'd' f64->f32
f32 arith_rnd(char op, Rnd, f32 a, f32 b = 0, f32 c = 0);
f64 arith_rnd(char op, Rnd, f64 a, f64 b = 0, f64 c = 0);
f32 conv_rnd(char op, Rnd, u64 bits);
f64 conv_rnd64(char op, Rnd, u64 bits);

inline f32 h2f(u16 h) { return _cvtsh_ss(h); }
inline u16 f2h(f32 f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
inline u16 f2h_rz(f32 f) { return _cvtss_sh(f, _MM_FROUND_TO_ZERO); }
inline f32 b2f(u16 h) { return bc<f32>(u32(h) << 16); }
inline u16 f2b(f32 f) {
  u32 x = bc<u32>(f);
  return f != f ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16;
}
inline u16 f2b_rz(f32 f) { return f != f ? 0x7fff : bc<u32>(f) >> 16; }
inline f32 relu(f32 f) { return f > 0 ? f : f != f ? f : 0.f; }
inline f32 tf32_rna(f32 f) { return std::isfinite(f) ? bc<f32>((bc<u32>(f) + 0x1000) & ~0x1fffu) : f; }
inline f32 tf32_rn(f32 f) { u32 x = bc<u32>(f); return std::isfinite(f) ? bc<f32>((x + 0xfff + (x >> 13 & 1)) & ~0x1fffu) : f; }
u8 f2fp8(f32 f, bool e5m2);   // satfinite, round to nearest even
f32 fp82f(u8 v, bool e5m2);
template <class T> inline f64 fround(T x, Rnd r) { return r == RN ? std::nearbyint(x) : r == RZ ? std::trunc(x) : r == RM ? std::floor(x) : std::ceil(x); }
template <class I, class T> inline I f2i(T x, Rnd r) {  // saturating; NaN -> 0 (min for 64-bit is not needed here)
  if (x != x) return 0;
  f64 v = fround(x, r);
  constexpr int B = sizeof(I) * 8 - (I(-1) < 0);
  const f64 hi = std::ldexp(1., B), lo = I(-1) < 0 ? -hi : 0;
  if (v >= hi) return I(-1) < 0 ? I(~(I(1) << (sizeof(I) * 8 - 1))) : I(-1);
  if (v < lo) return I(-1) < 0 ? I(std::make_unsigned_t<I>(1) << (sizeof(I) * 8 - 1)) : 0;
  return I(v);
}
template <class D, class S> inline D isat(S v) {  // integer saturation
  __int128 x = v, lo = D(-1) < 0 ? -((__int128)1 << (sizeof(D) * 8 - 1)) : (__int128)0,
           hi = ((__int128)1 << (sizeof(D) * 8 - (D(-1) < 0))) - 1;
  return D(x < lo ? lo : x > hi ? hi : x);
}
template <class F> inline u32 map2(F f, u32 a, u32 b = 0, u32 c = 0) {  // lanewise on packed 16-bit pairs
  return u32(f(u16(a), u16(b), u16(c))) | u32(f(u16(a >> 16), u16(b >> 16), u16(c >> 16))) << 16;
}
// One rounding from the exact f32 fma keeps f16/bf16 fma/add/mul correctly rounded in practice.
inline f32 fma16(f32 a, f32 b, f32 c) { return (f32)std::fma((f64)a, (f64)b, (f64)c); }

// ---------------------------------------------------------------- warp collectives
// key identifies the instruction (its source line for .aligned forms).
u32 shfl(Thread &, u32 key, int mode, u32 v, u32 b, u32 c, u32 mask, bool *p);
u32 vote(Thread &, u32 key, int mode, bool p, u32 mask);         // 0 ballot 1 any 2 all 3 uni
u32 match(Thread &, u32 key, bool all, u64 v, u32 mask, bool *p);
u32 redux(Thread &, u32 key, int op, u32 v, u32 mask);           // and or xor add umin umax smin smax
u32 activemask(Thread &);
bool elect(Thread &, u32 key, u32 mask, u32 *leader);
void warp_bar(Thread &, u32 key, u32 mask);
void ldmatrix(Thread &, u32 key, int n, bool trans, u64 addr, u32 *out);
void stmatrix(Thread &, u32 key, int n, bool trans, u64 addr, const u32 *in);
u32 movmatrix(Thread &, u32 key, u32 v);

enum Elt : u8 { E_F16, E_BF16, E_TF32, E_E4M3, E_E5M2, E_S8, E_U8, E_F32, E_S32 };
struct MmaSpec { u16 m, n, k; Elt a, b, acc; bool satfinite; };
void mma(Thread &, u32 key, const MmaSpec &, const u32 *a, const u32 *b, const u32 *c, u32 *d);

// ---------------------------------------------------------------- barriers
void bar(Thread &, u32 id, u32 count, bool arrive);               // count 0: whole CTA
u32 bar_red(Thread &, u32 id, u32 count, int op, bool p);         // 0 popc 1 and 2 or
void cluster_bar(Thread &, bool arrive, bool wait);
void fence(Thread &, bool proxy_async);
u64 mapa(Thread &, u64 addr, u32 rank, bool generic);
void mbar_init(Thread &, u64 a, u32 count);
void mbar_inval(Thread &, u64 a);
u64 mbar_arrive(Thread &, u64 a, u32 count, s32 expect_tx, bool drop);
void mbar_tx(Thread &, u64 a, s32 delta);
bool mbar_wait_parity(Thread &, u64 a, u32 parity, bool blocking);
bool mbar_wait_state(Thread &, u64 a, u64 state, bool blocking);
inline u64 mbar_pending(u64 state) { return state & 0xfffff; }

// ---------------------------------------------------------------- asynchronous copies
void cp_async(Thread &, u64 dst, u64 src, u32 size, u32 src_size);
void cp_async_commit(Thread &);
void cp_async_wait(Thread &, s32 n);                              // -1: wait_all
void cp_async_mbar(Thread &, u64 mbar, bool noinc);
void bulk_g2s(Thread &, u64 dst, u64 src, u32 size, u64 mbar, u32 mask);
void bulk_s2g(Thread &, u64 dst, u64 src, u32 size, int red);
void bulk_s2s(Thread &, u64 dst, u64 src, u32 size, u64 mbar);
void tma_load(Thread &, int dim, u64 dst, u64 map, const s32 *coord, u64 mbar, u32 mask);
void tma_store(Thread &, int dim, u64 map, const s32 *coord, u64 src, int red);
void bulk_commit(Thread &);
void bulk_wait(Thread &, u32 n, bool read);
enum BulkRed { R_NONE, R_ADD_F32, R_ADD_F16, R_ADD_BF16, R_ADD_U32, R_ADD_U64, R_MIN_S32, R_MAX_S32, R_AND, R_OR, R_XOR };

// ---------------------------------------------------------------- wgmma
// A wgmma's results become real only at wait_group; until then its destination registers
// hold tokens (signalling-NaN patterns) that wgmma_wait replaces and arithmetic turns to NaN.
struct WgmmaSpec { u16 n, k; Elt a, b, acc; bool a_reg, tnsp_a, tnsp_b; s8 scale_a, scale_b; };
void wgmma(Thread &, u32 key, const WgmmaSpec &, u32 *d, int nd, const u32 *areg, u64 adesc, u64 bdesc, bool scale_d);
void wgmma_fence(Thread &, u32 key);
void wgmma_commit(Thread &, u32 key);
void wgmma_wait(Thread &, u32 key, u32 n, u32 *regs, int nregs);
constexpr u32 TOKEN_BASE = 0x7f800001;  // .. 0x7fbfffff

int device_printf(Thread &, u64 fmt, u64 args);
void yield_exit(Thread &);
u64 clock64(Thread &);

// ---------------------------------------------------------------- kernel registration
struct ParamInfo { u32 offset, size; };
struct KernelInfo {
  const char *name, *ptx_file;
  void (*fn)(Thread &);
  const ParamInfo *params; u32 n_params, params_size;
  u32 static_smem, dyn_align, max_threads, reqntid, cluster[3];
  u32 arch;
};
struct GlobalInfo { const char *name; u8 *address; u64 size; };
// The translation of one source. Names are looked up in the module that the host code belongs to, so that sources may
// have kernels, constants and variables of the same name.
struct Module {
  const KernelInfo *const *kernels; u32 n_kernels;
  const GlobalInfo *globals; u32 n_globals;
  void (*init)();                      // initialisers that hold addresses
  bool loaded;
};
void load_module(Module &);            // does nothing the second time
}  // namespace ptxsim
