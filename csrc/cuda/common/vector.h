// Consecutive elements of a row, moved 16 bytes at a time where addresses allow it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/common/ptx.h"
#include "cuda/common/types.h"

namespace qwen_sparse::cuda {

template <typename T, int N>
struct Vector {
  static constexpr int kBytes = N * static_cast<int>(sizeof(T));
  using Word = std::conditional_t<kBytes % 16 == 0, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  static_assert(kWords * sizeof(Word) == kBytes, "4, 8 or a multiple of 16 bytes");

  T at[N];

  // `aligned`: p is a multiple of sizeof(Word).
  __device__ __forceinline__ static Vector load(const T* p, bool aligned) {
    Vector result;
    if (aligned) {
      Word words[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const Word*>(p)[i];
      memcpy(result.at, words, kBytes);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) result.at[i] = p[i];
    }
    return result;
  }

  // To global memory.
  __device__ __forceinline__ void store(T* p, bool aligned) const {
    if (aligned) {
      Word words[kWords];
      memcpy(words, at, kBytes);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if constexpr (sizeof(Word) == 16) {
          ptx::store(reinterpret_cast<Word*>(p) + i, words[i]);
        } else {
          reinterpret_cast<Word*>(p)[i] = words[i];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) p[i] = at[i];
    }
  }
};

template <typename T, int N>
__device__ __forceinline__ void to_floats(const Vector<T, N>& x, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_float(x.at[i]);
}

// int8 without conversion instructions, which run at a quarter of the rate or less: byte b + 128 in the low mantissa
// bits of 2^23 is the float 2^23 + 128 + b.
template <int N>
__device__ __forceinline__ void to_floats(const Vector<int8_t, N>& x, float (&values)[N]) {
  uint32_t words[N / 4];
  memcpy(words, x.at, N);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint32_t bits = __byte_perm(words[i / 4] ^ 0x80808080u, 0x4b000000u, 0x7650 + i % 4);
    values[i] = __uint_as_float(bits) - 8388736.0f;
  }
}

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> from_floats(const float (&values)[N]) {
  Vector<T, N> result;
  if constexpr (sizeof(T) == 2) {
    uint32_t pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    memcpy(result.at, pairs, sizeof(pairs));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) result.at[i] = values[i];
  }
  return result;
}

}  // namespace qwen_sparse::cuda
