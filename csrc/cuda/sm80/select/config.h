// Tile sizes and arguments of the selection's kernels.
#pragma once

#include <cstdint>

#include "cuda/common/launch.h"

namespace qwen_sparse::sm80::select {

constexpr int kRows = 64;         // voting rows; fewer than 64 are the last of them
constexpr int kStepKeys = 16;     // whose scores with 64 rows a warp holds at once, in 32 registers
constexpr int kTileKeys = 64;     // in one half of shared memory; divides every chunk length
constexpr int kSplitKeys = 2048;  // keys of a CTA: 64 CTAs at 32K tokens and 4 kv heads, 15 waves on 132 SMs at 1M
constexpr int kMaxWarps = 8;      // heads of a CTA: 255 registers each
constexpr int32_t kEndlessChunk = INT32_MAX / kTileKeys * kTileKeys;

static_assert(kRows == kMaxLastQ, "the voting rows are one block");
static_assert(kSplitKeys % kTileKeys == 0 && kBlockM % kTileKeys == 0, "a tile lies in one split and one chunk");
static_assert(kSplitKeys >= kRows, "a diagonal crosses at most one border of splits");

struct Args {
  SelectParams p;
  int32_t chunk_len;                  // kEndlessChunk without dual-chunk attention
  int heads_per_cta, ctas_per_group;  // of query heads that share keys
  int num_splits;
  float* split_lse;  // [num_heads, num_splits, kRows]: each row's base-2 log-sum-exp over the split's keys
  float* overruns;   // [num_heads, num_splits, kRows]: what the split adds to the diagonals that end after it
  float* lse;        // [num_heads, kRows]

  Args(const SelectParams& params, cuda::Arena& arena) : p(params) {
    const int64_t heads = p.shape.num_heads;
    const int64_t group_size = heads / p.shape.num_kv_heads;
    chunk_len = p.chunk_len > 0 && p.chunk_len < kEndlessChunk ? static_cast<int32_t>(p.chunk_len) : kEndlessChunk;
    ctas_per_group = static_cast<int>(cuda::ceil_div<int64_t>(group_size, kMaxWarps));
    heads_per_cta = static_cast<int>(cuda::ceil_div<int64_t>(group_size, ctas_per_group));
    num_splits = static_cast<int>(cuda::ceil_div<int64_t>(p.shape.seqlen_k, kSplitKeys));
    split_lse = arena.take<float>(heads * num_splits * kRows);
    overruns = arena.take<float>(heads * num_splits * kRows);
    lse = arena.take<float>(heads * kRows);
  }
};

}  // namespace qwen_sparse::sm80::select
