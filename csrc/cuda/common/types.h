// The two 16-bit types as kernels see them: conversions and pairs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "params.h"

namespace qwen_sparse::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return __float2half_rn(x);
}

// Two values in one register, `low` at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// The two values that pack() put into one register.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t bits);
template <>
__device__ __forceinline__ float2 unpack<BFloat16>(uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<Float16>(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, sizeof(pair));
  return __half22float2(pair);
}

// Two values as sums of two bfloat16 each, which leaves a relative error of at most 2^-16.
__device__ __forceinline__ void split(float first, float second, uint32_t& high, uint32_t& low) {
  high = pack<BFloat16>(first, second);
  const float2 rounded = unpack<BFloat16>(high);
  low = pack<BFloat16>(first - rounded.x, second - rounded.y);
}

// Calls body(T{}) with the type that `dtype` names.
template <typename Body>
void dispatch_float(DType dtype, const Body& body) {
  if (dtype == DType::kBFloat16) return body(BFloat16{});
  if (dtype == DType::kFloat16) return body(Float16{});
  body(float{});
}

template <typename Body>
void dispatch_float16_bits(DType dtype, const Body& body) {
  if (dtype == DType::kBFloat16) return body(BFloat16{});
  body(Float16{});
}

}  // namespace qwen_sparse::cuda
