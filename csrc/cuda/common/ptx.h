// Instructions that CUDA C++ has no function for. PTX ISA chapters in brackets.
#pragma once

#include <cstdint>

#include "cuda/common/types.h"

namespace qwen_sparse::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// [cp.async] 16 bytes from global to shared memory, around L1; `bytes` = 0 writes zeros and reads nothing.
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// 4 bytes, through L1.
__device__ __forceinline__ void copy_async_4(uint32_t shared, const void* global, uint32_t bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are incomplete. A barrier must follow before other
// threads read what it copied.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// [st] 16 bytes to global memory. In C++, nvcc may split such a store in four.
__device__ __forceinline__ void store(uint4* global, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// [ldmatrix] Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. Lane l
// receives, of each matrix, the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4. `offset` is a constant: part of the
// instruction once the caller's loop is unrolled.
__device__ __forceinline__ void load_matrices(uint32_t address, int offset, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address + offset));
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(uint32_t address, int offset, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address + offset));
}

// [mma] c [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and t = lane % 4, the lane holds
//   a[0]: row g, columns 2t, 2t + 1     a[1]: row g + 8     a[2]: row g, columns 2t + 8, 2t + 9     a[3]: row g + 8
//   b0:   column g, rows 2t, 2t + 1     b1: rows 2t + 8, 2t + 9
//   c[0], c[1]: row g, columns 2t, 2t + 1                   c[2], c[3]: row g + 8
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// [mma] c [16, 8] += a [16, 32] b [32, 8], signed bytes. As above, with elements 4t to 4t + 3 of 16 in a register:
//   a[0]: row g, columns 4t to 4t + 3   a[1]: row g + 8    a[2]: row g, columns 4t + 16 to 4t + 19   a[3]: row g + 8
//   b0:   column g, rows 4t to 4t + 3   b1: rows 4t + 16 to 4t + 19
__device__ __forceinline__ void mma_int8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// [ex2] 2 ** x; subnormal inputs and results are 0, 2 ** -infinity is 0.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace qwen_sparse::cuda::ptx
