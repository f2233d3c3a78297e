// sm_90a kernels that are wrong; the line of each mistake, as the report must name it, is marked with FAULT.
#include <cuda_runtime.h>

#include <cstdint>

namespace {
__device__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ void wait_parity(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
__device__ void bulk_load(uint32_t to, const int* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ uint64_t descriptor(uint32_t address) {  // K-major, 128-byte swizzle, 64 columns of 16 bits
  return (uint64_t)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Without expect_tx the arrival completes the phase before the copy has.
__global__ void missing_expect_tx(const int* in, int* out) {
  __shared__ __align__(16) int buffer[64];
  __shared__ __align__(8) uint64_t barrier;
  uint32_t b = shared_address(&barrier);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(b));
    bulk_load(shared_address(buffer), in, 256, b);
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory");
  }
  __syncthreads();
  wait_parity(b, 0);
  int value = buffer[threadIdx.x % 64];  // FAULT missing_expect_tx
  if (threadIdx.x == 0) out[0] = value;
}
// The barrier expects a second arrival, which never comes.
__global__ void missing_arrive(const int* in, int* out) {
  __shared__ __align__(8) uint64_t barrier;
  uint32_t b = shared_address(&barrier);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" ::"r"(b));
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory");
  }
  __syncthreads();
  wait_parity(b, 0);  // FAULT missing_arrive
  out[0] = in[0];
}
// The buffer is given back to the copy while other threads may still read it.
__global__ void refill_under_read(const int* in, int* out) {
  __shared__ __align__(16) int buffer[64];
  __shared__ __align__(8) uint64_t barrier;
  uint32_t b = shared_address(&barrier);
  if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(b));
  __syncthreads();
  int sum = 0;
  for (int round = 0; round < 2; round++) {
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 256;" ::"r"(b) : "memory");
      bulk_load(shared_address(buffer), in, 256, b);
    }
    wait_parity(b, round);
    sum += buffer[63 - threadIdx.x % 64];  // FAULT refill_under_read
  }
  out[threadIdx.x % 64] = sum;
}
__global__ void __launch_bounds__(128) missing_wgmma_wait(const int* in, int* out) {
  extern __shared__ __align__(1024) char tile[];
  for (int i = threadIdx.x; i < 4096; i += 128) ((int*)tile)[i] = 0;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  uint64_t a = descriptor(shared_address(tile)), b = descriptor(shared_address(tile + 8192));
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  float larger = fmaxf(d[0], (float)in[0]);  // FAULT missing_wgmma_wait
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  out[threadIdx.x % 64] = (int)larger;
}
}  // namespace

#define WRONG(name, threads, shared)                   \
  extern "C" int run_##name(const int* in, int* out) { \
    name<<<1, threads, shared>>>(in, out);             \
    return cudaDeviceSynchronize();                    \
  }
WRONG(missing_expect_tx, 64, 0)
WRONG(missing_arrive, 64, 0)
WRONG(refill_under_read, 64, 0)
WRONG(missing_wgmma_wait, 128, 16384)
