// A stand-in for libcudart: the part of the CUDA runtime that host programs use, on host memory.
#include <cuda.h>
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include "core.hpp"
#include "tensormap.hpp"
using namespace ptxsim;

namespace {
thread_local cudaError_t last_error = cudaSuccess;
cudaError_t err(cudaError_t e) { if (e != cudaSuccess) last_error = e; return e; }
struct Func { const KernelInfo *k; int max_dyn = 48 << 10; };
std::map<const void *, Func> &funcs() { static std::map<const void *, Func> m; return m; }
std::map<const void *, const GlobalInfo *> &vars() { static std::map<const void *, const GlobalInfo *> m; return m; }
struct CallConfig { dim3 grid, block; size_t smem; cudaStream_t stream; };
thread_local std::vector<CallConfig> configs;
int arch() { return config().arch ? config().arch : highest_arch(); }

cudaError_t do_launch(const void *fn, dim3 g, dim3 b, void **args, size_t smem, dim3 cl) {
  auto i = funcs().find(fn);
  if (i == funcs().end()) return err(cudaErrorInvalidDeviceFunction);
  const KernelInfo *k = i->second.k;
  if ((long)(smem + k->static_smem) > std::max(i->second.max_dyn, 48 << 10)) {
    report_launch(std::string("launch of ") + k->name + ": " + std::to_string(smem) + " bytes of dynamic shared memory without cudaFuncSetAttribute");
    return err(cudaErrorInvalidValue);
  }
  if (k->cluster[0]) cl = dim3(k->cluster[0], k->cluster[1], k->cluster[2]);
  Launch l = {{g.x, g.y, g.z}, {b.x, b.y, b.z}, {cl.x, cl.y, cl.z}, (u32)smem};
  return err((cudaError_t)launch(*k, l, args));
}
// Device memory: pages are touched lazily, filled with 0xff (NaN) so unwritten data shows.
void *dev_alloc(size_t n) {
  void *p = nullptr;
  if (posix_memalign(&p, 512, n ? n : 1)) return nullptr;
  memset(p, 0xff, n);
  add_range(p, n);
  return p;
}
}  // namespace

extern "C" {
// ---------------------------------------------------------------- registration and launch
// __cudaRegisterFatBinary is renamed in every source and defined by its translation; the handle is the Module.
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
char __cudaInitModule(void **) { return 1; }
void __cudaRegisterFunction(void **module, const char *host, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
  const Module &m = *(const Module *)module;
  for (u32 i = 0; i < m.n_kernels; i++) if (!strcmp(m.kernels[i]->name, name)) { funcs()[host] = {m.kernels[i]}; return; }
  fprintf(stderr, "ptxsim: kernel %s has no translation\n", name);
}
void __cudaRegisterVar(void **module, char *host, char *, const char *name, int, size_t, int, int) {
  const Module &m = *(const Module *)module;
  for (u32 i = 0; i < m.n_globals; i++) if (!strcmp(m.globals[i].name, name)) { vars()[host] = &m.globals[i]; return; }
  fprintf(stderr, "ptxsim: variable %s has no translation\n", name);
}
void __cudaRegisterManagedVar(void **, void **, char *, const char *, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t smem, CUstream_st *s) { configs.push_back({g, b, smem, s}); return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *smem, void *s) {
  CallConfig c = configs.back(); configs.pop_back();
  *g = c.grid; *b = c.block; *smem = c.smem; *(cudaStream_t *)s = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f) { *k = (cudaKernel_t)f; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **args, size_t smem, cudaStream_t) { return do_launch((const void *)k, g, b, args, smem, dim3(1)); }
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t k, dim3 g, dim3 b, void **args, size_t smem, cudaStream_t) { return do_launch((const void *)k, g, b, args, smem, dim3(1)); }
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **args, size_t smem, cudaStream_t) { return do_launch(f, g, b, args, smem, dim3(1)); }
cudaError_t cudaLaunchCooperativeKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t) { return err(cudaErrorNotSupported); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **args) {
  dim3 cl(1);
  for (unsigned i = 0; i < c->numAttrs; i++) {
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) cl = dim3(c->attrs[i].val.clusterDim.x, c->attrs[i].val.clusterDim.y, c->attrs[i].val.clusterDim.z);
    if (c->attrs[i].id == cudaLaunchAttributeCooperative && c->attrs[i].val.cooperative) return err(cudaErrorNotSupported);
  }
  return do_launch(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, cl);
}
cudaError_t cudaFuncSetAttribute(const void *f, cudaFuncAttribute a, int v) {
  auto i = funcs().find(f);
  if (i == funcs().end()) return err(cudaErrorInvalidDeviceFunction);
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    const KernelInfo *k = i->second.k;
    int limit = (arch() >= 90 ? 227 : 163) << 10;
    if (v < 0 || v + (int)k->static_smem > limit) return err(cudaErrorInvalidValue);
    i->second.max_dyn = v + k->static_smem;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetCacheConfig(const void *, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *f) {
  auto i = funcs().find(f); const KernelInfo *k = i == funcs().end() ? nullptr : i->second.k;
  if (!k) return err(cudaErrorInvalidDeviceFunction);
  memset(a, 0, sizeof *a);
  a->sharedSizeBytes = k->static_smem; a->maxThreadsPerBlock = k->max_threads ? k->max_threads : 1024;
  a->numRegs = 128; a->binaryVersion = a->ptxVersion = k->arch; a->maxDynamicSharedSizeBytes = i->second.max_dyn;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int threads, size_t smem, unsigned) {
  auto i = funcs().find(f); const KernelInfo *k = i == funcs().end() ? nullptr : i->second.k;
  if (!k) return err(cudaErrorInvalidDeviceFunction);
  size_t sm = (arch() >= 90 ? 228 : 164) << 10;
  *n = (int)std::min<size_t>(2048 / std::max(threads, 32), sm / (k->static_smem + smem + 1024));
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int t, size_t s) { return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, t, s, 0); }
cudaError_t cudaOccupancyMaxActiveClusters(int *n, const void *, const cudaLaunchConfig_t *) { *n = 1; return cudaSuccess; }

// ---------------------------------------------------------------- memory
cudaError_t cudaMalloc(void **p, size_t n) { *p = dev_alloc(n); return *p ? cudaSuccess : err(cudaErrorMemoryAllocation); }
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaMallocHost(void **p, size_t n) { return cudaMalloc(p, n); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned) { return cudaMalloc(p, n); }
cudaError_t cudaMallocManaged(void **p, size_t n, unsigned) { return cudaMalloc(p, n); }
cudaError_t cudaFree(void *p) {
  if (!p) return cudaSuccess;
  if (!range_size(p)) return err(cudaErrorInvalidValue);
  drop_range(p); free(p);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void *p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaFreeHost(void *p) { return cudaFree(p); }
cudaError_t cudaHostRegister(void *p, size_t n, unsigned) { add_range(p, n); return cudaSuccess; }
cudaError_t cudaHostUnregister(void *p) { drop_range(p); return cudaSuccess; }
cudaError_t cudaHostGetDevicePointer(void **d, void *h, unsigned) { *d = h; return cudaSuccess; }
// The device side of a copy, and of a default copy whatever lies in device memory, must be within one allocation.
static cudaError_t device_memory(const char *what, const void *p, size_t n) {
  if (in_range(p, n)) return cudaSuccess;
  char b[160];
  snprintf(b, sizeof b, "%s: %zu bytes at %p are not within an allocation of device memory", what, n, p);
  report_launch(b);
  return err(cudaErrorInvalidValue);
}
cudaError_t cudaMemcpy2D(void *d, size_t dp, const void *s, size_t sp, size_t w, size_t h, cudaMemcpyKind k) {
  if (!w || !h) return cudaSuccess;
  if (w > dp || w > sp) return err(cudaErrorInvalidPitchValue);
  bool dst = k == cudaMemcpyHostToDevice || k == cudaMemcpyDeviceToDevice || (k == cudaMemcpyDefault && touches_range(d));
  bool src = k == cudaMemcpyDeviceToHost || k == cudaMemcpyDeviceToDevice || (k == cudaMemcpyDefault && touches_range(s));
  if (dst) if (cudaError_t e = device_memory("copy to the device", d, dp * (h - 1) + w)) return e;
  if (src) if (cudaError_t e = device_memory("copy from the device", s, sp * (h - 1) + w)) return e;
  for (size_t i = 0; i < h; i++) memmove((char *)d + i * dp, (const char *)s + i * sp, w);
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *d, size_t dp, const void *s, size_t sp, size_t w, size_t h, cudaMemcpyKind k, cudaStream_t) { return cudaMemcpy2D(d, dp, s, sp, w, h, k); }
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, cudaMemcpyKind k) { return cudaMemcpy2D(d, n, s, n, n, 1, k); }
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, cudaMemcpyKind k, cudaStream_t) { return cudaMemcpy(d, s, n, k); }
cudaError_t cudaMemset2D(void *d, size_t pitch, int v, size_t w, size_t h) {
  if (!w || !h) return cudaSuccess;
  if (w > pitch) return err(cudaErrorInvalidPitchValue);
  if (cudaError_t e = device_memory("memset", d, pitch * (h - 1) + w)) return e;
  for (size_t i = 0; i < h; i++) memset((char *)d + i * pitch, v, w);
  return cudaSuccess;
}
cudaError_t cudaMemset2DAsync(void *d, size_t p, int v, size_t w, size_t h, cudaStream_t) { return cudaMemset2D(d, p, v, w, h); }
cudaError_t cudaMemset(void *d, int v, size_t n) { return cudaMemset2D(d, n, v, n, 1); }
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t) { return cudaMemset(d, v, n); }
cudaError_t cudaMemGetInfo(size_t *f, size_t *t) { *f = *t = size_t(16) << 30; return cudaSuccess; }
static void *symbol(const void *s) { auto i = vars().find(s); return i == vars().end() ? nullptr : i->second->address; }
void ptxsim_clear() { g_last_error.clear(); last_error = cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void **p, const void *s) { *p = symbol(s); return *p ? cudaSuccess : err(cudaErrorInvalidSymbol); }
cudaError_t cudaMemcpyToSymbol(const void *s, const void *src, size_t n, size_t off, cudaMemcpyKind) {
  void *p = symbol(s);
  if (!p) return err(cudaErrorInvalidSymbol);
  return cudaMemcpy((char *)p + off, src, n, cudaMemcpyHostToDevice);
}
cudaError_t cudaMemcpyFromSymbol(void *d, const void *s, size_t n, size_t off, cudaMemcpyKind) {
  void *p = symbol(s);
  if (!p) return err(cudaErrorInvalidSymbol);
  return cudaMemcpy(d, (char *)p + off, n, cudaMemcpyDeviceToHost);
}
cudaError_t cudaMemcpyToSymbolAsync(const void *s, const void *src, size_t n, size_t off, cudaMemcpyKind k, cudaStream_t) { return cudaMemcpyToSymbol(s, src, n, off, k); }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) { memset(a, 0, sizeof *a); a->type = cudaMemoryTypeDevice; a->devicePointer = a->hostPointer = (void *)p; return cudaSuccess; }

// ---------------------------------------------------------------- device
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *d) { *d = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int d) { return d ? err(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return last_error; }
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "ptxsim");
  p->major = arch() / 10; p->minor = arch() % 10; p->warpSize = 32; p->maxThreadsPerBlock = 1024; p->multiProcessorCount = arch() >= 90 ? 132 : 108;
  p->sharedMemPerBlock = 48 << 10; p->sharedMemPerBlockOptin = (arch() >= 90 ? 227 : 163) << 10; p->sharedMemPerMultiprocessor = (arch() >= 90 ? 228 : 164) << 10;
  p->totalGlobalMem = size_t(16) << 30; p->regsPerBlock = p->regsPerMultiprocessor = 65536; p->maxThreadsPerMultiProcessor = 2048; p->l2CacheSize = 50 << 20;
  p->maxGridSize[0] = 0x7fffffff; p->maxGridSize[1] = p->maxGridSize[2] = 65535; p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int) {
  cudaDeviceProp p; cudaGetDeviceProperties(&p, 0);
  switch (a) {
    case cudaDevAttrComputeCapabilityMajor: *v = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *v = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *v = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = 2048; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *v = 65536; break;
    case cudaDevAttrL2CacheSize: *v = p.l2CacheSize; break;
    case cudaDevAttrClockRate: *v = 1000000; break;
    default: *v = 0;
  }
  return cudaSuccess;
}

// ---------------------------------------------------------------- errors, streams, events
cudaError_t cudaGetLastError() { cudaError_t e = last_error; last_error = cudaSuccess; return e; }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char *cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : e == cudaErrorLaunchFailure ? "ptxsim: kernel fault" : "ptxsim: CUDA error"; }
const char *cudaGetErrorName(cudaError_t e) { return e == cudaSuccess ? "cudaSuccess" : e == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaError"; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = (cudaStream_t)malloc(8); return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { return cudaStreamCreate(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned, int) { return cudaStreamCreate(s); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { free(s); return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return last_error; }
cudaError_t cudaStreamQuery(cudaStream_t) { return last_error; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *s) { *s = cudaStreamCaptureStatusNone; return cudaSuccess; }
static double now_ms() { return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = (cudaEvent_t)new double(0); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { delete (double *)e; return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) { *(double *)e = now_ms(); return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = *(double *)b - *(double *)a; return cudaSuccess; }

// ---------------------------------------------------------------- driver entry points
CUresult ptxsim_cuTensorMapEncodeTiled(CUtensorMap *out, CUtensorMapDataType dt, cuuint32_t rank, void *addr, const cuuint64_t *dim, const cuuint64_t *stride,
                                       const cuuint32_t *box, const cuuint32_t *es, CUtensorMapInterleave il, CUtensorMapSwizzle sw, CUtensorMapL2promotion, CUtensorMapFloatOOBfill oob) {
  auto bad = [](const char *why) { fprintf(stderr, "ptxsim: cuTensorMapEncodeTiled: %s\n", why); return CUDA_ERROR_INVALID_VALUE; };
  if (rank < 1 || rank > 5) return bad("rank");
  if (il != CU_TENSOR_MAP_INTERLEAVE_NONE || sw > CU_TENSOR_MAP_SWIZZLE_128B || dt > CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ || oob) return bad("interleave, swizzle atom, type or NaN fill is not supported by ptxsim");
  if ((u64)out & 63) return bad("the tensor map must be 64-byte aligned");
  if ((u64)addr & 15) return bad("the global address must be 16-byte aligned");
  TensorMap m{};
  m.magic = TensorMap::MAGIC; m.dtype = dt; m.rank = rank; m.swizzle = sw; m.oob = oob; m.addr = (u64)addr;
  for (u32 d = 0; d < rank; d++) {
    if (!dim[d] || dim[d] > 1ull << 32) return bad("global dimension");
    if (!box[d] || box[d] > 256) return bad("box dimension must be 1..256");
    if (!es[d] || es[d] > 8) return bad("element stride must be 1..8");
    if (d && (stride[d - 1] % 16 || stride[d - 1] >= 1ull << 40)) return bad("global strides must be multiples of 16 bytes");
    m.dim[d] = dim[d]; m.box[d] = box[d]; m.estride[d] = es[d];
    if (d) m.stride[d - 1] = stride[d - 1];
  }
  u32 row = box[0] * m.elem_bytes();
  if (row % 16) return bad("the inner box dimension must be a multiple of 16 bytes");
  if (sw && row > 16u << sw) return bad("the inner box dimension is larger than the swizzle span");
  memset(out, 0, sizeof *out);
  memcpy(out, &m, sizeof m);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *o, CUtensorMapDataType d, cuuint32_t r, void *a, const cuuint64_t *dim, const cuuint64_t *st, const cuuint32_t *b, const cuuint32_t *es,
                                CUtensorMapInterleave il, CUtensorMapSwizzle sw, CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill oob) { return ptxsim_cuTensorMapEncodeTiled(o, d, r, a, dim, st, b, es, il, sw, l2, oob); }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned, unsigned long long, cudaDriverEntryPointQueryResult *q) {
  *f = std::string(name) == "cuTensorMapEncodeTiled" ? (void *)ptxsim_cuTensorMapEncodeTiled : nullptr;
  if (q) *q = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *f ? cudaSuccess : err(cudaErrorSymbolNotFound);
}
cudaError_t cudaGetDriverEntryPoint(const char *name, void **f, unsigned long long fl, cudaDriverEntryPointQueryResult *q) { return cudaGetDriverEntryPointByVersion(name, f, 0, fl, q); }
}
