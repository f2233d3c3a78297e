// Warpgroup matrix products: CUTLASS's instruction wrappers, taken apart to plain arrays and addresses.
//
// Tiles lie in shared memory as a tensor map with 128-byte swizzle writes them: panels of 64 columns of 16-bit
// elements, each [rows, 128 bytes], 16-byte pieces permuted within 8 rows. Panels are aligned to 1024 bytes.
#pragma once

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <type_traits>
#include <utility>

#include "cuda/common/types.h"

namespace qwen_sparse::sm90 {

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = kPanelColumns * 2;
constexpr int kSwizzleBytes = 8 * kPanelRowBytes;  // after which the permutation repeats

// Matrix descriptors (PTX ISA, "Matrix Descriptor Format") of a tile, with 128-byte swizzle. `panel_bytes`, from panel
// to panel, is read only for operands whose columns are not the summed dimension.
class Descriptor {
 public:
  __device__ __forceinline__ explicit Descriptor(uint32_t shared_address, uint32_t panel_bytes = 0)
      : low_((shared_address & 0x3ffff) >> 4 | panel_bytes >> 4 << 16) {}

  // Of what begins `offset` bytes into the tile.
  __device__ __forceinline__ uint64_t at(uint32_t offset) const {
    constexpr uint32_t kSwizzle128 = 1u << 30;
    constexpr uint32_t kStride = kSwizzleBytes >> 4;
    return uint64_t{kSwizzle128 | kStride} << 32 | (low_ + (offset >> 4));
  }

 private:
  uint32_t low_;
};

namespace detail {

template <typename T, int kColumns, Major kMajorB>
struct Atom;

#define QWEN_SPARSE_WGMMA(type, columns, inputs)                                                   \
  template <Major kMajorB>                                                                         \
  struct Atom<type, columns, kMajorB> {                                                            \
    using Registers = cute::SM90::GMMA::MMA_64x##columns##x16_F32##inputs##_RS<Major::K, kMajorB>; \
    using Shared = cute::SM90::GMMA::MMA_64x##columns##x16_F32##inputs##_SS<Major::K, kMajorB>;    \
  }
QWEN_SPARSE_WGMMA(cuda::BFloat16, 64, BF16BF16);
QWEN_SPARSE_WGMMA(cuda::BFloat16, 128, BF16BF16);
QWEN_SPARSE_WGMMA(cuda::Float16, 64, F16F16);
QWEN_SPARSE_WGMMA(cuda::Float16, 128, F16F16);
#undef QWEN_SPARSE_WGMMA

template <typename Atom, int kColumns8, size_t... kIndexes>
__device__ __forceinline__ void call(float (&c)[kColumns8][4], const uint32_t (&a)[4], uint64_t b, ScaleOut scale,
                                     std::index_sequence<kIndexes...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, c[kIndexes / 4][kIndexes % 4]..., scale);
}

template <typename Atom, int kColumns8, size_t... kIndexes>
__device__ __forceinline__ void call(float (&c)[kColumns8][4], uint64_t a, uint64_t b, ScaleOut scale,
                                     std::index_sequence<kIndexes...>) {
  Atom::fma(a, b, c[kIndexes / 4][kIndexes % 4]..., scale);
}

}  // namespace detail

// c [64, columns] += a [64, 16] b [16, columns], or = with ScaleOut::Zero; asynchronous. A warp holds 16 rows of c and
// of an `a` in registers, as mma.m16n8k16 lays them out (cuda/common/ptx.h).
template <typename T, Major kMajorB, int kColumns8>
__device__ __forceinline__ void wgmma(float (&c)[kColumns8][4], const uint32_t (&a)[4], uint64_t b,
                                      ScaleOut scale = ScaleOut::One) {
  using Atom = typename detail::Atom<T, kColumns8 * 8, kMajorB>::Registers;
  detail::call<Atom>(c, a, b, scale, std::make_index_sequence<kColumns8 * 4>());
}

template <typename T, Major kMajorB, int kColumns8>
__device__ __forceinline__ void wgmma(float (&c)[kColumns8][4], uint64_t a, uint64_t b,
                                      ScaleOut scale = ScaleOut::One) {
  using Atom = typename detail::Atom<T, kColumns8 * 8, kMajorB>::Shared;
  detail::call<Atom>(c, a, b, scale, std::make_index_sequence<kColumns8 * 4>());
}

// Keeps the compiler from reading results before, or writing operands behind, this point.
template <typename Register, int kRows, int kColumns>
__device__ __forceinline__ void fence_registers(Register (&registers)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) cute::warpgroup_fence_operand(registers[i][j]);
  }
}

}  // namespace qwen_sparse::sm90
