// Masking and online softmax of a warp's 16 rows of scores, held as mma and wgmma leave them: s[n][2 * half + e] is row
// lane / 4 + 8 * half and key 8 * n + 2 * (lane % 4) + e of the tile.
#pragma once

#include <cmath>

#include "cuda/common/group_tiles.h"
#include "cuda/common/key_tiles.h"
#include "cuda/common/ptx.h"

namespace qwen_sparse::cuda {

// Of the entries that `bits` names, those whose columns are not behind row `row`.
__device__ __forceinline__ uint64_t causal_columns(uint64_t bits, const int32_t* columns, int32_t count, int32_t row) {
  int32_t low = 0, high = count;  // the first entry behind the row
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (columns[middle] > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low == 64 ? bits : bits & ((uint64_t{1} << low) - 1);
}

// Scores that the rows `row` and `row + 8` of block `b` do not attend become -infinity.
template <int kKeys8>
__device__ __forceinline__ void mask(const PrefillArgs& args, const KeyTile& tile, int b, int32_t head, int32_t row,
                                     float (&s)[kKeys8][4]) {
  const int first = threadIdx.x % 4 * 2;
  if (kKeys8 <= 8 && tile.is_columns) {  // larger tiles are dense
    const int32_t* columns = args.p.vertical_indexes + head * args.p.num_vertical + tile.first;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint64_t bits = tile.columns[b];
      if (tile.late) bits = causal_columns(bits, columns, tile.count, row + 8 * half);
      bits >>= first;
#pragma unroll
      for (int n = 0; n < kKeys8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if ((bits >> (8 * n + e) & 1) == 0) s[n][2 * half + e] = -INFINITY;
        }
      }
    }
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t position = row + 8 * half;
    const int32_t begin = max(tile.begin[b], position - args.window + 1) - tile.first - first;
    const int32_t end = min(tile.end[b], args.p.causal ? position + 1 : INT32_MAX) - tile.first - first;
#pragma unroll
    for (int n = 0; n < kKeys8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * n + e < begin || 8 * n + e >= end) s[n][2 * half + e] = -INFINITY;
      }
    }
  }
}

// Keys of block groups: causality is all that cuts them.
__device__ __forceinline__ void mask(const PrefillArgs&, const GroupTile& tile, int, int32_t, int32_t row,
                                     float (&s)[GroupTiles::kTileKeys / 8][4]) {
  constexpr int kGroupKeys8 = static_cast<int>(kGroupKeys) / 8;
  const int first = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < GroupTiles::kTileKeys / 8; ++n) {
    const int32_t last = row - tile.groups[n / kGroupKeys8] - n % kGroupKeys8 * 8 - first;  // of e, that the row sees
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (e > last + 8 * half) s[n][2 * half + e] = -INFINITY;
      }
    }
  }
}

// Running maximum of the scores and sum of the weights of a lane's two rows; the sum is over the lane's own keys.
struct SoftmaxRows {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  // Scores to weights, in place. What was summed before is to be multiplied by `shrink`; the result says whether that
  // changes anything for a row of the lane.
  template <int kKeys8>
  __device__ __forceinline__ bool update(float (&s)[kKeys8][4], float scale_log2, float (&shrink)[2]) {
    bool changed = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = max[half];
#pragma unroll
      for (int n = 0; n < kKeys8; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      const float base = highest == -INFINITY ? 0.0f : highest * scale_log2;
      shrink[half] = ptx::exp2(max[half] * scale_log2 - base);
      changed = changed || max[half] != highest;
      max[half] = highest;
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight = ptx::exp2(s[n][2 * half + e] * scale_log2 - base);
          s[n][2 * half + e] = weight;
          added += weight;
        }
      }
      sum[half] = sum[half] * shrink[half] + added;
    }
    return changed;
  }

  // Sum of the weights of a row over all lanes.
  __device__ __forceinline__ float total(int half) const {
    float all = sum[half];
    all += __shfl_xor_sync(0xffffffffu, all, 1);
    return all + __shfl_xor_sync(0xffffffffu, all, 2);
  }

  // Log-sum-exp of a row whose weights sum to `total`.
  __device__ __forceinline__ float lse(int half, float total, float scale_log2) const {
    return total > 0.0f ? max[half] * scale_log2 * kLn2 + logf(total) : -INFINITY;
  }
};

// Weights as the left operand of the product with values: two 8-key accumulators lie in registers as one 16-key
// operand.
template <typename T>
__device__ __forceinline__ void pack_weights(const float (&low)[4], const float (&high)[4], uint32_t (&operand)[4]) {
  operand[0] = pack<T>(low[0], low[1]);
  operand[1] = pack<T>(low[2], low[3]);
  operand[2] = pack<T>(high[0], high[1]);
  operand[3] = pack<T>(high[2], high[3]);
}

}  // namespace qwen_sparse::cuda
