// Instructions by family; each kernel writes what test_ptxsim_instructions.py computes independently.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace {
__device__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---- asynchronous copies
// 32 lanes copy 4, 8 and 16 bytes, all or the first `valid` of them; lanes with an odd number ignore their source in
// the last row.
__global__ void cp_async_sizes_k(const char* in, char* out, int valid) {
  __shared__ __align__(16) char buffer[4][512];
  int lane = threadIdx.x;
  uint32_t row[4];
  for (int i = 0; i < 4; i++) row[i] = shared_address(buffer[i]);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(row[0] + lane * 4), "l"(in + lane * 4),
               "r"(min(valid, 4)));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(row[1] + lane * 8), "l"(in + lane * 8),
               "r"(min(valid, 8)));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(row[2] + lane * 16), "l"(in + lane * 16),
               "r"(valid));
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %2, 0; cp.async.ca.shared.global [%0], [%1], 16, p; }" ::"r"(row[3] + lane * 16),
      "l"(in + lane * 16), "r"(lane & 1));
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
  for (int i = 0; i < 4; i++)
    for (int j = lane; j < 512; j += 32)
      if (i >= 2 || j < 128 << i) out[i * 512 + j] = buffer[i][j];
}
// Groups of one copy each; after wait_group `pending` the first 4 - pending may be read. Reads `extra` more.
template <int kPending>
__global__ void cp_async_groups_k(const int4* in, int4* out, int extra) {
  __shared__ int4 buffer[4][32];
  int lane = threadIdx.x;
  for (int i = 0; i < 4; i++) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&buffer[i][lane])),
                 "l"(in + i * 32 + lane));
    asm volatile("cp.async.commit_group;");
  }
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  __syncwarp();
  for (int i = 0; i < 4 - kPending + extra; i++) out[i * 32 + lane] = buffer[i][31 - lane];  // FAULT in flight
}
__global__ void cache_hints_k(const float4* in, float4* out) {
  __shared__ float4 buffer[32];
  int lane = threadIdx.x;
  uint64_t policy;
  float4 a, b;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(in + lane));
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(a.x), "=f"(a.y), "=f"(a.z), "=f"(a.w)
               : "l"(in + lane));
  asm volatile("ld.global.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
               : "=f"(b.x), "=f"(b.y), "=f"(b.z), "=f"(b.w)
               : "l"(in + 32 + lane), "l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(buffer + lane)),
               "l"(in + 64 + lane), "l"(policy));
  asm volatile("cp.async.commit_group; cp.async.wait_group 0;" ::: "memory");
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(out + lane), "f"(a.x + b.x),
               "f"(a.y + b.y), "f"(a.z + b.z), "f"(a.w + b.w), "l"(policy));
  __stcs(out + 32 + lane, buffer[lane]);
  __threadfence();
  __threadfence_block();
  __threadfence_system();
  __nanosleep(20);
}

// ---- atomics: every thread applies every operation to the words of its type
template <class T>
__device__ void integer_atomics(T* w, T v, unsigned i) {
  atomicAdd(w, v);
  atomicMin(w + 1, v);
  atomicMax(w + 2, v);
  atomicAnd(w + 3, v);
  atomicOr(w + 4, v);
  atomicXor(w + 5, v);
  for (T old = w[6], seen; (seen = atomicCAS(w + 6, old, old + v)) != old;) old = seen;
  if (i == 0) w[7] = atomicExch(w + 7, v) + 1;
}
__global__ void atomics_k(const unsigned long long* values, unsigned* u32, unsigned long long* u64, float* f32,
                          double* f64, __nv_bfloat162* bf16) {
  __shared__ unsigned shared32[10];
  __shared__ unsigned long long shared64[8];
  __shared__ float shared_float;
  int i = threadIdx.x;
  if (i < 10) shared32[i] = u32[i];
  if (i < 8) shared64[i] = u64[i];
  if (i == 0) shared_float = 0;
  __syncthreads();
  unsigned long long v = values[i];
  integer_atomics<unsigned>(u32, (unsigned)v, i);
  integer_atomics<unsigned long long>(u64, v, i);
  integer_atomics<unsigned>(shared32, (unsigned)v, i);
  integer_atomics<unsigned long long>(shared64, v, i);
  atomicInc(u32 + 8, 100);
  atomicDec(u32 + 9, 100);
  atomicInc(shared32 + 8, 100);
  atomicDec(shared32 + 9, 100);
  atomicAdd(f32, (float)(v & 255));
  atomicAdd(f64, (double)(v & 255));
  atomicAdd(&shared_float, (float)(v & 255));
  atomicAdd(bf16, __floats2bfloat162_rn(1.f, 2.f));
  __syncthreads();
  if (i < 10) u32[10 + i] = shared32[i];
  if (i < 8) u64[8 + i] = shared64[i];
  if (i == 0) f32[1] = shared_float;
}

// ---- 64-bit integers
__global__ void wide_k(const unsigned long long* a, const unsigned long long* b, unsigned long long* out, int n) {
  int i = threadIdx.x, k = 0;
  unsigned long long x = a[i], y = b[i], r, low;
#define OUT(expression) out[n * k++ + i] = (expression)
  OUT(x * y);
  OUT(__umul64hi(x, y));
  OUT((unsigned long long)__mul64hi((long long)x, (long long)y));
  OUT(x / (y | 1));
  OUT((unsigned long long)((long long)x % (long long)(y >> 9 | 1)));
  OUT(__popcll(x));
  OUT(__clzll(x));
  OUT(__brevll(x));
  OUT(__ffsll(x));
  OUT(x << (y & 63));
  OUT((unsigned long long)((long long)x >> (y & 63)));
  asm("{ mad.lo.cc.u64 %0, %2, %3, %2; madc.hi.u64 %1, %2, %3, 0; }" : "=l"(low), "=l"(r) : "l"(x), "l"(y));
  OUT(low);
  OUT(r);  // high half of x * y + x
  asm("sub.cc.u64 %0, %2, %3; subc.u64 %1, %3, 0;" : "=&l"(low), "=&l"(r) : "l"(x), "l"(y));
  OUT(r);
  asm("bfe.s64 %0, %1, %2, %3;" : "=l"(r) : "l"(x), "r"((unsigned)y & 63), "r"((unsigned)(y >> 8) & 63));
  OUT(r);
}

// ---- conversions and 16-bit arithmetic on bit patterns
__global__ void to_integers_k(const float* a, const double* b, long long* out, int n) {
  int i = threadIdx.x, k = 0;
  float x = a[i];
  double z = b[i];
  int r;
  long long w;
  unsigned long long u;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(r) : "f"(x));
  OUT(r);
  asm("cvt.rzi.u8.f32 %0, %1;" : "=r"(r) : "f"(x));
  OUT((unsigned)r);
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(r) : "f"(x));
  OUT(r);
  asm("cvt.rmi.u32.f32 %0, %1;" : "=r"(r) : "f"(x));
  OUT((unsigned)r);
  asm("cvt.rzi.s64.f32 %0, %1;" : "=l"(w) : "f"(x));
  OUT(w);
  asm("cvt.rzi.u64.f32 %0, %1;" : "=l"(u) : "f"(x));
  OUT((long long)u);
  asm("cvt.rpi.s32.f64 %0, %1;" : "=r"(r) : "d"(z));
  OUT(r);
  asm("cvt.rzi.s64.f64 %0, %1;" : "=l"(w) : "d"(z));
  OUT(w);
}
// Three operands of any bits: f16 and bf16 operations, each in its 16 low bits.
__global__ void halves_k(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
  int i = threadIdx.x, k = 0;
  uint32_t x = a[i], y = b[i], z = c[i], r;
#define HALF3(name)                                                \
  asm(name " %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(z)); \
  OUT(r)
#define HALF2(name)                                    \
  asm(name " %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y)); \
  OUT(r)
  HALF3("fma.rn.f16x2");
  HALF3("fma.rn.bf16x2");
  HALF3("fma.rn.ftz.f16x2");
  HALF2("add.rn.f16x2");
  HALF2("mul.rn.f16x2");
  HALF2("max.bf16x2");
  HALF2("max.NaN.f16x2");
  asm("ex2.approx.f16x2 %0, %1;" : "=r"(r) : "r"(x));
  OUT(r);
}
__global__ void floats_k(const float* a, const float* b, uint32_t* out, int n) {
  int i = threadIdx.x, k = 0;
  float x = a[i], y = b[i], f;
  uint32_t r;
  uint16_t h;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(x), "f"(y));
  OUT(r);
  asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(x), "f"(y));
  OUT(r);
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(x), "f"(y));
  OUT(r);
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  OUT(h);
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(f) : "f"(x));
  OUT(__float_as_uint(f));
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(f) : "f"(x), "f"(y));
  OUT(__float_as_uint(f));
  asm("mul.f32 %0, %1, %2;" : "=f"(f) : "f"(x), "f"(y));
  OUT(__float_as_uint(f));
}
__global__ void doubles_k(const double* a, const double* b, double* out, int n) {
  int i = threadIdx.x, k = 0;
  double x = a[i], y = b[i], s, c;
  OUT(sin(x));
  OUT(cos(x));
  OUT(x / y);
  OUT(sqrt(fabs(x)));
  OUT(fma(x, y, -x));
  OUT(exp(y));
  OUT(log(fabs(x)));
  OUT(fmod(x, y));
  sincos(x * 1e6, &s, &c);
  OUT(s);
  OUT(c);
  OUT(rint(x));
  OUT((double)(float)x);
}

// ---- matrix instructions on fragments as they are in memory: [32][registers]
__global__ void ldmatrix_k(const uint4* in, uint32_t* out) {
  __shared__ uint4 rows[32];
  int lane = threadIdx.x;
  rows[lane ^ 5] = in[lane ^ 5];
  __syncwarp();
  uint32_t address = shared_address(rows + lane), r[14];
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[1]), "=r"(r[2]) : "r"(address));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6])
               : "r"(address));
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[7]) : "r"(address));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[8]), "=r"(r[9])
               : "r"(address));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[10]), "=r"(r[11]), "=r"(r[12]), "=r"(r[13])
               : "r"(address));
  for (int i = 0; i < 14; i++) out[i * 32 + lane] = r[i];
}
#define MMA_FLOAT(types)                                                                                    \
  asm volatile("mma.sync.aligned." types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])                                             \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y))
#define MMA_INTEGER(types)                                                                                  \
  asm volatile("mma.sync.aligned." types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+r"(c.x), "+r"(c.y), "+r"(c.z), "+r"(c.w)                                                 \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y))
__global__ void mma_k(const uint4* fragments_a, const uint2* fragments_b, uint4* fragments_c, int kind) {
  int lane = threadIdx.x;
  uint4 a = fragments_a[lane], c = fragments_c[lane];
  uint2 b = fragments_b[lane];
  float f[4] = {__uint_as_float(c.x), __uint_as_float(c.y), __uint_as_float(c.z), __uint_as_float(c.w)};
  switch (kind) {
    case 0:
      MMA_FLOAT("m16n8k16.row.col.f32.bf16.bf16.f32");
      break;
    case 1:
      MMA_FLOAT("m16n8k16.row.col.f32.f16.f16.f32");
      break;
    case 2:
      MMA_INTEGER("m16n8k32.row.col.s32.s8.s8.s32");
      break;
    case 3:
      MMA_INTEGER("m16n8k32.row.col.s32.u8.s8.s32");
      break;
    case 4:
      MMA_INTEGER("m16n8k32.row.col.satfinite.s32.s8.s8.s32");
      break;
  }
  if (kind < 2)
    c = make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3]));
  fragments_c[lane] = c;
}
// ---- one block sums what the others wrote: the last to arrive, by a counter in global memory
__device__ unsigned arrived;
__global__ void last_block_k(const int* in, int* partial, int* out) {
  __shared__ bool last;
  int sum = __reduce_add_sync(~0u, in[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(&arrived, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    int total = 0;
    for (unsigned i = 0; i < gridDim.x; i++) total += ((volatile int*)partial)[i];
    *out = total;
    arrived = 0;
  }
}
__device__ __noinline__ int ackermann(int m, int n) {
  return m == 0 ? n + 1 : ackermann(m - 1, n == 0 ? 1 : ackermann(m, n - 1));
}
__global__ void recursion_k(int* out) { out[threadIdx.x] = ackermann(2, threadIdx.x); }
}  // namespace

#define LAUNCH(kernel, blocks, threads, ...) \
  kernel<<<blocks, threads>>>(__VA_ARGS__);  \
  return cudaGetLastError()
extern "C" {
int cp_async_sizes(const char* in, char* out, int valid) { LAUNCH(cp_async_sizes_k, 1, 32, in, out, valid); }
int cp_async_groups(const int4* in, int4* out, int pending, int extra) {
  auto kernel = pending == 0 ? cp_async_groups_k<0> : pending == 1 ? cp_async_groups_k<1> : cp_async_groups_k<2>;
  LAUNCH(kernel, 1, 32, in, out, extra);
}
int cache_hints(const float4* in, float4* out) { LAUNCH(cache_hints_k, 1, 32, in, out); }
int atomics(const unsigned long long* v, unsigned* a, unsigned long long* b, float* c, double* d, void* e) {
  LAUNCH(atomics_k, 1, 128, v, a, b, c, d, (__nv_bfloat162*)e);
}
int wide(const unsigned long long* a, const unsigned long long* b, unsigned long long* out, int n) {
  LAUNCH(wide_k, 1, n, a, b, out, n);
}
int to_integers(const float* a, const double* b, long long* out, int n) { LAUNCH(to_integers_k, 1, n, a, b, out, n); }
int halves(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
  LAUNCH(halves_k, 1, n, a, b, c, out, n);
}
int floats(const float* a, const float* b, uint32_t* out, int n) { LAUNCH(floats_k, 1, n, a, b, out, n); }
int doubles(const double* a, const double* b, double* out, int n) { LAUNCH(doubles_k, 1, n, a, b, out, n); }
int ldmatrix(const uint4* in, uint32_t* out) { LAUNCH(ldmatrix_k, 1, 32, in, out); }
int mma(const uint4* a, const uint2* b, uint4* c, int kind) { LAUNCH(mma_k, 1, 32, a, b, c, kind); }
int last_block(const int* in, int* partial, int* out, int blocks) {
  LAUNCH(last_block_k, blocks, 32, in, partial, out);
}
int recursion(int* out) { LAUNCH(recursion_k, 1, 8, out); }

// A captured launch, fill and copy, repeated; counts[0] += 1 at every repetition of the graph.
__global__ void count_k(int* counts, int by) { atomicAdd(counts, by); }
int graph(int* counts, int* copied, int repeats) {
  cudaStream_t stream, other;
  cudaEvent_t fork, join;
  cudaGraph_t captured;
  cudaGraphExec_t executable;
  cudaStreamCreate(&stream);
  cudaStreamCreate(&other);
  cudaEventCreate(&fork);
  cudaEventCreate(&join);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  int by = 1;
  count_k<<<1, 1, 0, stream>>>(counts, by);
  by = 100;  // the launch has its own copy
  cudaEventRecord(fork, stream);
  cudaStreamWaitEvent(other, fork, 0);
  cudaMemsetAsync(counts + 1, 0xff, sizeof(int), other);
  cudaEventRecord(join, other);
  cudaStreamWaitEvent(stream, join, 0);
  cudaMemcpyAsync(copied, counts, sizeof(int), cudaMemcpyDeviceToDevice, stream);
  if (cudaStreamSynchronize(stream) != cudaErrorStreamCaptureUnsupported) return 1;
  cudaGetLastError();
  if (cudaStreamEndCapture(stream, &captured)) return 2;
  if (counts[0] != 0) return 3;  // nothing has run
  cudaGraphInstantiate(&executable, captured, 0);
  cudaGraphDestroy(captured);
  for (int i = 0; i < repeats; i++)
    if (cudaGraphLaunch(executable, stream)) return 4;
  cudaGraphExecDestroy(executable);
  cudaStreamDestroy(stream);
  cudaStreamDestroy(other);
  return cudaStreamSynchronize(0);
}
int fill(char* p, int bytes) { return cudaMemsetAsync(p, 0, bytes, 0); }
int copy(char* to, const char* from, int bytes) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, 0);
}
}
