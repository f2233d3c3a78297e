// Kernels that are wrong; the line of each mistake, as the report must name it, is marked with FAULT.
#include <cuda_runtime.h>

#include <cstdint>

namespace {
__device__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__global__ void load_out_of_bounds(const int* in, int* out) {
  int i = threadIdx.x;
  int value = in[i];  // FAULT load_out_of_bounds
  out[i < 4 ? i : 0] = value;
}
__global__ void store_out_of_bounds(const int* in, int* out) {
  int i = threadIdx.x;
  out[i + 1] = in[0];  // FAULT store_out_of_bounds
}
__global__ void load_misaligned(const int* in, int* out) {
  const char* p = (const char*)in + 1;
  out[0] = *(const int*)p;  // FAULT load_misaligned
}
__global__ void shared_out_of_bounds(const int* in, int* out) {
  extern __shared__ int dynamic[];
  dynamic[threadIdx.x] = in[0];  // FAULT shared_out_of_bounds
  out[0] = dynamic[0];
}
__global__ void shared_unwritten(const int* in, int* out) {
  __shared__ int buffer[64];
  if (threadIdx.x < 63) buffer[threadIdx.x] = in[0];
  __syncthreads();
  int value = buffer[63 - threadIdx.x];  // FAULT shared_unwritten
  if (threadIdx.x == 0) out[0] = value;
}
__global__ void missing_barrier(const int* in, int* out) {
  __shared__ int buffer[64];
  buffer[threadIdx.x] = in[0] + threadIdx.x;
  int value = buffer[63 - threadIdx.x];  // FAULT missing_barrier
  if (threadIdx.x == 0) out[0] = value;
}
__global__ void missing_copy_wait(const int* in, int* out) {
  __shared__ int buffer[64];
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(buffer + threadIdx.x)), "l"(in));
  asm volatile("cp.async.commit_group;" ::: "memory");
  __syncthreads();
  int value = buffer[threadIdx.x];  // FAULT missing_copy_wait
  if (threadIdx.x == 0) out[0] = value;
}
// The second round refills what was read before, but is not waited for: the old values would be used again.
__global__ void missing_second_wait(const int* in, int* out) {
  __shared__ int buffer[64];
  int sum = 0;
  for (int round = 0; round < 2; round++) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(buffer + threadIdx.x)),
                 "l"(in + round));
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (round == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    sum += buffer[threadIdx.x];  // FAULT missing_second_wait
    __syncthreads();
  }
  if (threadIdx.x == 0) out[0] = sum;
}
__global__ void store_under_copy(const int* in, int* out) {
  __shared__ int buffer[64];
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(buffer + threadIdx.x)), "l"(in));
  buffer[threadIdx.x] = 7;  // FAULT store_under_copy
  asm volatile("cp.async.wait_all;" ::: "memory");
  out[0] = buffer[0];
}
__global__ void copy_out_of_bounds(const int* in, int* out) {
  __shared__ int buffer[64];
  uint32_t to = shared_address(buffer + threadIdx.x);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to),
               "l"(in + threadIdx.x));  // FAULT copy_out_of_bounds
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (threadIdx.x == 0) out[0] = buffer[0];
}
__global__ void deadlock(const int* in, int* out) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;" ::: "memory");  // FAULT deadlock
  else
    asm volatile("bar.sync 2, 64;" ::: "memory");
  out[0] = in[0];
}
__global__ void lane_outside_mask(const int* in, int* out) {
  int value = in[0];
  if (threadIdx.x < 16) value = __shfl_sync(0x0000ff00, value, 8);  // FAULT lane_outside_mask
  if (threadIdx.x == 0) out[0] = value;
}
__global__ void diverged_ldmatrix(const int* in, int* out) {
  __shared__ uint4 rows[32];
  rows[threadIdx.x % 32] = make_uint4(in[0], 0, 0, 0);
  __syncthreads();
  uint32_t value = 0;
  if (threadIdx.x % 32 < 8)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(value)
                 : "r"(shared_address(rows + threadIdx.x)));  // FAULT diverged_ldmatrix
  out[0] = value;
}
}  // namespace

#define WRONG(name, shared)                            \
  extern "C" int run_##name(const int* in, int* out) { \
    name<<<1, 64, shared>>>(in, out);                  \
    return cudaDeviceSynchronize();                    \
  }
WRONG(load_out_of_bounds, 0)
WRONG(store_out_of_bounds, 0)
WRONG(load_misaligned, 0)
WRONG(shared_out_of_bounds, 128)
WRONG(shared_unwritten, 0)
WRONG(missing_barrier, 0)
WRONG(missing_copy_wait, 0)
WRONG(missing_second_wait, 0)
WRONG(store_under_copy, 0)
WRONG(copy_out_of_bounds, 0)
WRONG(deadlock, 0)
WRONG(lane_outside_mask, 0)
WRONG(diverged_ldmatrix, 0)
