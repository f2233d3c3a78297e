// A stand-in for libcudart on host memory: registration, launches, function and device attributes, errors.
//
// Functions that are not here are undefined symbols when a library is loaded.
#include "cudart.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

namespace ptxsim {
namespace {
struct HostFunction {
  const KernelInfo* kernel;
  int max_shared[kMaxDevices] = {};  // static and dynamic; 0: 48 KiB. Devices do not share attributes
};
struct CallConfiguration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
std::map<const void*, HostFunction>& functions() {
  static std::map<const void*, HostFunction> table;
  return table;
}
std::map<const void*, const GlobalInfo*>& variables() {
  static std::map<const void*, const GlobalInfo*> table;
  return table;
}
thread_local std::vector<CallConfiguration> configurations;
thread_local int current_device = 0;
std::atomic<u64> launches[kMaxDevices];
int shared_per_sm() { return max_shared_memory() + 1024; }

HostFunction* find_function(const void* host) {
  auto i = functions().find(host);
  return i == functions().end() ? nullptr : &i->second;
}

cudaError_t submit_launch(const void* host, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream,
                          dim3 cluster = dim3(1)) {
  HostFunction* function = find_function(host);
  if (!function) return fail(cudaErrorInvalidDeviceFunction);
  const KernelInfo& kernel = *function->kernel;
  if ((long)(shared + kernel.static_smem) > std::max(function->max_shared[current_device], 48 << 10)) {
    report_launch(std::string("launch of ") + kernel.name + ": " + std::to_string(shared) +
                  " bytes of dynamic shared memory without cudaFuncSetAttribute");
    return fail(cudaErrorInvalidValue);
  }
  if (kernel.cluster[0]) cluster = dim3(kernel.cluster[0], kernel.cluster[1], kernel.cluster[2]);
  Launch launched = {
      {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, {cluster.x, cluster.y, cluster.z}, (u32)shared};
  auto values = std::make_shared<std::vector<u8>>(kernel.params_size);  // a captured launch outlives its arguments
  for (u32 i = 0; i < kernel.n_params; i++)
    memcpy(values->data() + kernel.params[i].offset, args[i], kernel.params[i].size);
  return submit(stream, [&kernel, launched, values, device = current_device] {
    ++launches[device];
    std::vector<void*> pointers;
    for (u32 i = 0; i < kernel.n_params; i++) pointers.push_back(values->data() + kernel.params[i].offset);
    return fail((cudaError_t)launch(kernel, launched, pointers.data()));
  });
}
}  // namespace

cudaError_t& last_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}
cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) last_error() = error;
  return error;
}
int max_shared_memory() { return (device_arch() >= 90 ? 227 : 163) << 10; }
const GlobalInfo* find_variable(const void* host) {
  auto i = variables().find(host);
  return i == variables().end() ? nullptr : i->second;
}
}  // namespace ptxsim

using namespace ptxsim;
extern "C" {
u64 ptxsim_launches(int device) { return launches[device]; }
void ptxsim_clear() {
  g_last_error.clear();
  last_error() = cudaSuccess;
}

// ---- registration: __cudaRegisterFatBinary is renamed in every source and defined by its translation, which returns
// its Module as the handle
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  const Module& module = *(const Module*)handle;
  for (u32 i = 0; i < module.n_kernels; i++)
    if (!strcmp(module.kernels[i]->name, name)) {
      functions()[host] = {module.kernels[i]};
      return;
    }
  fprintf(stderr, "ptxsim: kernel %s has no translation\n", name);
}
void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t, int, int) {
  const Module& module = *(const Module*)handle;
  for (u32 i = 0; i < module.n_globals; i++)
    if (!strcmp(module.globals[i].name, name)) {
      variables()[host] = &module.globals[i];
      return;
    }
  fprintf(stderr, "ptxsim: variable %s has no translation\n", name);
}
void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}

// ---- launches
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  CallConfiguration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *(cudaStream_t*)stream = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = (cudaKernel_t)host;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t stream) {
  return submit_launch((const void*)kernel, grid, block, args, shared, stream);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                                    cudaStream_t stream) {
  return submit_launch((const void*)kernel, grid, block, args, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) {
  return submit_launch(host, grid, block, args, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return fail(cudaErrorNotSupported);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** args) {
  dim3 cluster(1);
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      cluster = dim3(attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z);
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative) return fail(cudaErrorNotSupported);
  }
  return submit_launch(host, config->gridDim, config->blockDim, args, config->dynamicSmemBytes, config->stream,
                       cluster);
}

// ---- functions
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  HostFunction* function = find_function(host);
  if (!function) return fail(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    int in_all = value + (int)function->kernel->static_smem;
    if (value < 0 || in_all > max_shared_memory()) return fail(cudaErrorInvalidValue);
    function->max_shared[current_device] = in_all;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
  HostFunction* function = find_function(host);
  if (!function) return fail(cudaErrorInvalidDeviceFunction);
  const KernelInfo& kernel = *function->kernel;
  memset(attributes, 0, sizeof *attributes);
  attributes->sharedSizeBytes = kernel.static_smem;
  attributes->maxThreadsPerBlock = kernel.max_threads ? kernel.max_threads : 1024;
  attributes->numRegs = 128;  // not known: PTX has no register allocation
  attributes->binaryVersion = attributes->ptxVersion = kernel.arch;
  attributes->maxDynamicSharedSizeBytes = std::max(function->max_shared[current_device], 48 << 10) - kernel.static_smem;
  return cudaSuccess;
}
// By threads and shared memory; registers are not known.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int threads,
                                                                   size_t shared, unsigned) {
  HostFunction* function = find_function(host);
  if (!function) return fail(cudaErrorInvalidDeviceFunction);
  size_t by_shared = shared_per_sm() / (function->kernel->static_smem + shared + 1024);
  *blocks = (int)std::min<size_t>({32u, 2048u / std::max(threads, 32), by_shared});
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, shared, 0);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = 1;
  return cudaSuccess;
}

// ---- device
cudaError_t cudaGetDeviceCount(int* count) {
  *count = (int)config().devices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= (int)config().devices) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return capturing() ? fail(cudaErrorStreamCaptureUnsupported) : last_error(); }
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= (int)config().devices) return fail(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  strcpy(p->name, "ptxsim");
  p->major = device_arch() / 10;
  p->minor = device_arch() % 10;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->multiProcessorCount = sm_count();
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = max_shared_memory();
  p->sharedMemPerMultiprocessor = shared_per_sm();
  p->reservedSharedMemPerBlock = 1024;
  p->totalGlobalMem = size_t(16) << 30;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = 50 << 20;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = p.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = p.minor;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = p.multiProcessorCount;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = p.sharedMemPerBlock;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = p.sharedMemPerBlockOptin;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = p.sharedMemPerMultiprocessor;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = p.reservedSharedMemPerBlock;
      break;
    case cudaDevAttrWarpSize:
      *value = p.warpSize;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = p.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = p.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = p.maxBlocksPerMultiProcessor;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = 65536;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = p.maxGridSize[0];
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *value = p.maxGridSize[1];
      break;
    case cudaDevAttrL2CacheSize:
      *value = p.l2CacheSize;
      break;
    case cudaDevAttrClockRate:
      *value = 1000000;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}

// ---- errors
cudaError_t cudaGetLastError() {
  cudaError_t error = last_error();
  last_error() = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error(); }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    default:
      return "cudaError";
  }
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  static thread_local std::string text;
  text = std::string(cudaGetErrorName(error)) + (g_last_error.empty() ? "" : ": ptxsim: ") + g_last_error;
  return text.c_str();
}
}
