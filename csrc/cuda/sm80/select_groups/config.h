// Tile sizes and arguments of the kernels that select block groups.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/launch.h"

namespace qwen_sparse::sm80::select_groups {

constexpr int kGroupRows = static_cast<int>(kGroupKeys);           // rows that are pooled, like the keys of a group
constexpr int kQuarters = static_cast<int>(kBlockM) / kGroupRows;  // pooled rows of a block
constexpr int kTileBlocks = 16;                                    // blocks of a warp: as many rows as an mma has
constexpr int kRows = kTileBlocks * kQuarters;                     // pooled rows of a warp
constexpr int kStepGroups = 16;     // whose scores with 64 rows a warp holds in 32 registers
constexpr int kWindowGroups = 64;   // in one half of shared memory: two words of a bitmap
constexpr int kSplitGroups = 1024;  // of a CTA, 16384 keys: 4 waves on 132 SMs for 32768 rows of 1M keys, 28 / 4 heads
constexpr int kWarps = 8;           // 255 registers each
constexpr int32_t kEndlessChunk = INT32_MAX / 4;

static_assert(kSplitGroups % kWindowGroups == 0 && kWindowGroups == 64, "a word of the bitmap belongs to one window");

struct Args {
  SelectGroupsParams p;
  RowBlocks blocks;
  int32_t num_groups;
  int32_t chunk_groups;  // of a chunk; kEndlessChunk without dual-chunk attention
  int num_rotations;
  int num_tiles;  // of kTileBlocks blocks
  int num_splits;
  int ctas_per_kv_head;  // and split
  void* pooled_k;        // [num_kv_heads, num_groups, head_dim], dtype
  void* pooled_q[3];     // [num_heads, blocks.count, kQuarters, head_dim], dtype: intra, succ, inter
  // What a warp leaves for each split. Row 4 i + s of a tile is quarter s of its block i.
  float* split_lse;   // [num_heads, num_tiles, num_splits, kRows]: each row's base-2 log-sum-exp
  float* split_kept;  // [num_heads, num_tiles, num_splits, kTileBlocks]
  float* lse;         // [num_heads, num_tiles, kRows], + log2 of the quarters with rows; infinite for those without

  Args(const SelectGroupsParams& params, cuda::Arena& arena) : p(params), blocks(params.shape) {
    const AttentionShape& shape = p.shape;
    num_groups = static_cast<int32_t>(cuda::ceil_div(shape.seqlen_k, kGroupKeys));
    chunk_groups = p.chunk_len > 0 ? static_cast<int32_t>(std::min<int64_t>(p.chunk_len / kGroupKeys, kEndlessChunk))
                                   : kEndlessChunk;
    num_rotations = p.chunk_len > 0 ? 3 : 1;
    num_tiles = static_cast<int>(cuda::ceil_div<int64_t>(blocks.count, kTileBlocks));
    num_splits = cuda::ceil_div(num_groups, kSplitGroups);
    const int64_t group_size = shape.num_heads / shape.num_kv_heads;
    ctas_per_kv_head = static_cast<int>(cuda::ceil_div<int64_t>(group_size * num_tiles, kWarps));
    pooled_k = arena.take<char>(shape.num_kv_heads * num_groups * shape.head_dim * 2);
    for (int i = 0; i < 3; ++i) {
      pooled_q[i] = i < num_rotations
                        ? arena.take<char>(shape.num_heads * blocks.count * kQuarters * shape.head_dim * 2)
                        : nullptr;
    }
    const int64_t tiles = shape.num_heads * num_tiles;
    split_lse = arena.take<float>(tiles * num_splits * kRows);
    split_kept = arena.take<float>(tiles * num_splits * kTileBlocks);
    lse = arena.take<float>(tiles * kRows);
  }

#ifdef __CUDACC__
  // Of the prompt's quarters, those with rows of the call are [first_quarter(), end_quarter()).
  __device__ int32_t first_quarter() const {
    return static_cast<int32_t>((p.shape.seqlen_k - p.shape.seqlen_q) / kGroupRows);
  }
  __device__ int32_t end_quarter() const { return num_groups; }

  // Number of the first quarter of a tile, and groups that its last block sees.
  __device__ int32_t tile_quarter(int tile) const {
    return (static_cast<int32_t>(blocks.first) + tile * kTileBlocks) * kQuarters;
  }
  __device__ int32_t tile_groups(int tile) const { return min(num_groups, tile_quarter(tile) + kRows); }
  __device__ int tile_splits(int tile) const { return cuda::ceil_div(tile_groups(tile), kSplitGroups); }
#endif
};

}  // namespace qwen_sparse::sm80::select_groups
