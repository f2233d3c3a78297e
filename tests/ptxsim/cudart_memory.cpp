// A stand-in for libcudart: device memory, which is host memory that is registered.
//
// Copies and fills are checked: the device side must lie within one allocation or registered range.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cudart.hpp"

using namespace ptxsim;

namespace {
// Filled with 0xff, NaN in every float format, so that data that was never written shows.
void* allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 512, std::max<size_t>(bytes, 1))) return nullptr;
  memset(p, 0xff, bytes);
  add_range(p, std::max<size_t>(bytes, 1));
  return p;
}
cudaError_t check_device_memory(const char* what, const void* p, size_t bytes) {
  if (in_range(p, bytes)) return cudaSuccess;
  char text[160];
  snprintf(text, sizeof text, "%s: %zu bytes at %p are not within an allocation of device memory", what, bytes, p);
  report_launch(text);
  return fail(cudaErrorInvalidValue);
}
cudaError_t copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                 cudaMemcpyKind kind) {
  if (!width || !height) return cudaSuccess;
  if (width > to_pitch || width > from_pitch) return fail(cudaErrorInvalidPitchValue);
  auto on_device = [&](const void* p, cudaMemcpyKind other) {
    return kind == cudaMemcpyDeviceToDevice || kind == other || (kind == cudaMemcpyDefault && touches_range(p));
  };
  cudaError_t error = cudaSuccess;
  if (on_device(to, cudaMemcpyHostToDevice))
    error = check_device_memory("copy to the device", to, to_pitch * (height - 1) + width);
  if (!error && on_device(from, cudaMemcpyDeviceToHost))
    error = check_device_memory("copy from the device", from, from_pitch * (height - 1) + width);
  if (error) return error;
  for (size_t i = 0; i < height; i++) memmove((char*)to + i * to_pitch, (const char*)from + i * from_pitch, width);
  return cudaSuccess;
}
cudaError_t fill(void* to, size_t pitch, int value, size_t width, size_t height) {
  if (!width || !height) return cudaSuccess;
  if (width > pitch) return fail(cudaErrorInvalidPitchValue);
  if (cudaError_t error = check_device_memory("memset", to, pitch * (height - 1) + width)) return error;
  for (size_t i = 0; i < height; i++) memset((char*)to + i * pitch, value, width);
  return cudaSuccess;
}
}  // namespace

extern "C" {
cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (capturing()) return fail(cudaErrorStreamCaptureUnsupported);
  *p = allocate(bytes);
  return *p ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return cudaMalloc(p, bytes); }
cudaError_t cudaMallocHost(void** p, size_t bytes) { return cudaMalloc(p, bytes); }
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
cudaError_t cudaMallocManaged(void** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  if (!range_size(p)) return fail(cudaErrorInvalidValue);
  drop_range(p);
  free(p);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  add_range(p, bytes);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  drop_range(p);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = *total = size_t(16) << 30;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = touches_range(p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->devicePointer = attributes->hostPointer = (void*)p;
  return cudaSuccess;
}

// ---- copies and fills
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return copy(to, bytes, from, bytes, bytes, 1, kind);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return submit(stream, [=] { return copy(to, bytes, from, bytes, bytes, 1, kind); });
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind) {
  return copy(to, to_pitch, from, from_pitch, width, height, kind);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  return submit(stream, [=] { return copy(to, to_pitch, from, from_pitch, width, height, kind); });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return fill(to, bytes, value, bytes, 1); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return submit(stream, [=] { return fill(to, bytes, value, bytes, 1); });
}
cudaError_t cudaMemset2D(void* to, size_t pitch, int value, size_t width, size_t height) {
  return fill(to, pitch, value, width, height);
}
cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t stream) {
  return submit(stream, [=] { return fill(to, pitch, value, width, height); });
}

// ---- __device__ and __constant__ variables
cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
  const GlobalInfo* variable = find_variable(symbol);
  if (!variable) return fail(cudaErrorInvalidSymbol);
  *p = variable->address;
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind) {
  const GlobalInfo* variable = find_variable(symbol);
  if (!variable) return fail(cudaErrorInvalidSymbol);
  return copy(variable->address + offset, bytes, from, bytes, bytes, 1, cudaMemcpyHostToDevice);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind) {
  const GlobalInfo* variable = find_variable(symbol);
  if (!variable) return fail(cudaErrorInvalidSymbol);
  return copy(to, bytes, variable->address + offset, bytes, bytes, 1, cudaMemcpyDeviceToHost);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                    cudaMemcpyKind kind, cudaStream_t stream) {
  return submit(stream, [=] { return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind); });
}
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind kind,
                                      cudaStream_t stream) {
  return submit(stream, [=] { return cudaMemcpyFromSymbol(to, symbol, bytes, offset, kind); });
}
}
