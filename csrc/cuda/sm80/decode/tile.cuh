// Keys of a tile as the lanes of a warp see them, and the online softmax of a lane's rows.
//
// Keys of a warp's 16, a `part` of the tile: group 0, 8 keys after the middle of the tile, and group 1, the 8 that
// mirror them before it, in reverse. That is what the bias product wants (bias.cuh), and costs nothing elsewhere, as
// matrices are loaded row by row.
#pragma once

#include <cmath>

#include "cuda/common/attention.h"
#include "cuda/common/ptx.h"
#include "cuda/sm80/decode/config.h"

namespace qwen_sparse::sm80::decode {

namespace ptx = cuda::ptx;

// Where in the tile key `i` of group `n` lies.
__device__ __forceinline__ int key_offset(int part, int n, int i) {
  return n == 0 ? kTileKeys / 2 + part * 8 + i : kTileKeys / 2 - 1 - part * 8 - i;
}

// cuda::swizzled for rows of bytes; of the short ones, two share 128 bytes.
template <int kRowBytes>
__device__ __forceinline__ int swizzled_bytes(int row, int piece) {
  if constexpr (kRowBytes == 64) return row * kRowBytes + ((piece ^ (row >> 1 & 3)) << 4);
  return cuda::swizzled<kRowBytes / 2>(row, piece);
}

// A lane's address for ldmatrix: key lane % 8 of group `n`, 16-byte piece `piece`. Parts are 8 keys apart, which the
// permutation of pieces repeats after.
template <int kRowBytes>
class MatrixRow {
 public:
  __device__ MatrixRow(int n, int piece)
      : first_(swizzled_bytes<kRowBytes>(key_offset(0, n, threadIdx.x % 8), piece)),
        step_(n == 0 ? 8 * kRowBytes : -8 * kRowBytes) {}

  __device__ uint32_t in(const uint8_t* tile, int part) const {
    return ptx::shared_address(tile) + first_ + part * step_;
  }

 private:
  int first_, step_;
};

// Rows lane / 4 and, if there are two, lane / 4 + 8: which keys they attend, and their softmax so far. Scores and
// weights are s[n][2 * row + e] of key 2 * (lane % 4) + e of group n.
template <int kLaneRows>
struct LaneRows {
  int32_t last_key[kLaneRows], key_before[kLaneRows];  // key_before < key <= last_key
  float max[kLaneRows], sum[kLaneRows];                // the sum is over the lane's own keys

  // Scores of keys that are not attended, or do not exist, become -infinity.
  __device__ void mask(int part, int32_t first_key, const uint32_t (&exists)[2], float (&s)[2][2 * kLaneRows]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int offset = key_offset(part, n, threadIdx.x % 4 * 2 + e);
        const bool here = exists[1 - n] >> offset % 32 & 1;
        const int32_t key = first_key + offset;
#pragma unroll
        for (int row = 0; row < kLaneRows; ++row) {
          if (!here || key > last_key[row] || key <= key_before[row]) s[n][2 * row + e] = -INFINITY;
        }
      }
    }
  }

  // Scores to weights, in place. What was summed before is to be multiplied by `shrink`; the result says whether that
  // changes anything for a row of the warp.
  __device__ bool update(float (&s)[2][2 * kLaneRows], float (&shrink)[kLaneRows]) {
    bool changed = false;
#pragma unroll
    for (int row = 0; row < kLaneRows; ++row) {
      float highest = max[row];
#pragma unroll
      for (int n = 0; n < 2; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * row], s[n][2 * row + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      const float base = highest == -INFINITY ? 0.0f : highest;
      shrink[row] = ptx::exp2(max[row] - base);
      changed = changed || max[row] != highest;
      max[row] = highest;
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight = ptx::exp2(s[n][2 * row + e] - base);
          s[n][2 * row + e] = weight;
          added += weight;
        }
      }
      sum[row] = sum[row] * shrink[row] + added;
    }
    return __any_sync(0xffffffffu, changed);
  }
};

}  // namespace qwen_sparse::sm80::decode
