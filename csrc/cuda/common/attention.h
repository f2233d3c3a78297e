// What the kernels that form query-key products share.
#pragma once

#include <cstdint>

namespace qwen_sparse::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

#ifdef __CUDACC__

// Byte offset of 16-byte piece `piece` of row `row` in a shared tile of 16-bit rows: pieces are permuted within 128
// bytes so that the eight rows that ldmatrix reads at once lie in different banks. With tiles aligned to the size of a
// row, the address of piece `piece ^ x` is the address of `piece` with x << 4 flipped: one register serves all pieces
// and rows of a lane.
template <int kHeadDim>
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * kHeadDim * 2 + ((piece ^ (row & 7)) << 4);
}

#endif

}  // namespace qwen_sparse::cuda
