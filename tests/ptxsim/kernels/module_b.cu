// One of two sources with kernels, constants and variables of the same names, linked into one library.
#include "module.cuh"

static __constant__ int table[4] = {2, 22, 222, 2222};
static __device__ int counter = 20;
static __device__ int* counter_address = &counter;  // an initialiser that holds an address

namespace {
__global__ void fill_k(int* out) { out[threadIdx.x] = table[threadIdx.x] + atomicAdd(counter_address, 2); }
}  // namespace

extern "C" int module_b(int* out, int base) {
  cudaMemcpyToSymbol(counter, &base, sizeof(base));
  fill_k<<<1, 4>>>(out);
  scale_k<3><<<1, 4>>>(out);
  cudaMemcpyFromSymbol(out + 4, counter, sizeof(int));
  return cudaGetLastError();
}
