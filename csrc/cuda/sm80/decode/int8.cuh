// int8 to 16-bit floats in registers, exactly and without conversion instructions, which run at a quarter of the rate
// of others.
#pragma once

#include <type_traits>

#include "cuda/common/types.h"

namespace qwen_sparse::sm80::decode {

template <typename Pair>
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
  Pair x, y;
  memcpy(&x, &a, sizeof(x));
  memcpy(&y, &b, sizeof(y));
  const Pair difference = __hsub2(x, y);
  uint32_t bits;
  memcpy(&bits, &difference, sizeof(bits));
  return bits;
}

// Bytes kFirst and kSecond of x.
//
// bfloat16 0x4300 | m is 128 + m for m up to 127; bit 7, worth -128, falls into the exponent and makes 256 of 128.
// float16 0x6400 | m is 1024 + m for m up to 1023; with bit 7 flipped, m is 128 more than the byte.
template <typename T, int kFirst, int kSecond>
__device__ __forceinline__ uint32_t widen(uint32_t x) {
  constexpr uint32_t kSelector = 0x4040 | kSecond << 8 | kFirst;  // digits below 4: bytes of x; 4: the high byte
  if constexpr (std::is_same_v<T, cuda::BFloat16>) {
    const uint32_t y = __byte_perm(x, 0x43u, kSelector);
    return subtract<__nv_bfloat162>(y & 0xff7fff7fu, y & 0xff80ff80u);
  } else {
    const uint32_t y = __byte_perm(x ^ 0x80808080u, 0x64u, kSelector);
    return subtract<__half2>(y, 0x64806480u);
  }
}

}  // namespace qwen_sparse::sm80::decode
