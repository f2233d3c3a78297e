// A head's vertical-slash index in the form that every row block shares (docs/vertical-slash.md), in device memory.
//
// Slashes s1 < s2 overlap or touch iff s2 - s1 <= 64, whatever the block. Merged once into runs [lo, hi], block
// `a` attends the keys [a - hi, a - lo + 64) of each run. Column v is covered by the slashes of block `a` iff bit
// a + 63 - v is set in a bitmap that has [lo, hi + 63] set for every run. From it follow, per block of the call, the
// columns that are open: not covered, so that their tiles attend them. The columns' keys and values are gathered once
// per call, since every block reads them.
//
// Indexes are not checked on a GPU (that would stop the host): what is out of range counts as the end of the list, and
// whatever a list holds, no kernel reads outside its tensors.
#pragma once

#include "cuda/common/launch.h"

namespace qwen_sparse::cuda {

struct SlashRun {
  int32_t lo;  // distances, inclusive
  int32_t hi;
};

struct HeadIndexes {
  SlashRun* runs = nullptr;        // [num_heads, num_slash], ascending
  int32_t* num_runs = nullptr;     // [num_heads]
  int32_t* num_columns = nullptr;  // [num_heads]
  uint32_t* covered = nullptr;     // [num_heads, covered_words]
  int64_t covered_words = 0;
  uint64_t* open_columns = nullptr;  // [num_heads, num_blocks, open_words]: bit i of word w is column 64 w + i
  int32_t open_words = 0;
  int64_t first_block = 0;  // a row tile may begin one block before the call and end one behind it
  int64_t num_blocks = 0;
  void* column_k = nullptr;  // [num_heads, num_vertical, head_dim], params.dtype; zeros behind a head's columns
  void* column_v = nullptr;

  HeadIndexes() = default;
  HeadIndexes(const AttentionParams& p, Arena& arena)
      : covered_words((p.shape.seqlen_k + kBlockM + 31) / 32),
        open_words(static_cast<int32_t>(ceil_div<int64_t>(p.num_vertical, 64))),
        first_block(floor_div(p.shape.seqlen_k - p.shape.seqlen_q, kBlockM) - 1),
        num_blocks(ceil_div(p.shape.seqlen_k, kBlockM) + 1 - first_block) {
    const int64_t heads = p.shape.num_heads;
    const int64_t column_bytes = heads * p.num_vertical * p.shape.head_dim * 2;
    runs = arena.take<SlashRun>(heads * p.num_slash);
    num_runs = arena.take<int32_t>(heads);
    num_columns = arena.take<int32_t>(heads);
    covered = arena.take<uint32_t>(heads * covered_words);
    open_columns = arena.take<uint64_t>(heads * num_blocks * open_words);
    column_k = arena.take<char>(column_bytes);
    column_v = arena.take<char>(column_bytes);
  }
};

// Fills `indexes` from the lists of `p`.
void build_head_indexes(const AttentionParams& p, const HeadIndexes& indexes, cudaStream_t stream);

// Adds the number of (row, key) pairs that each head attends to p.attended. `indexes` is read only for vertical-slash.
void count_attended(const AttentionParams& p, const HeadIndexes& indexes, cudaStream_t stream);

#ifdef __CUDACC__

// Open columns of the block that starts at row `row`; those of later blocks follow, open_words each.
__device__ __forceinline__ const uint64_t* open_columns_of(const HeadIndexes& indexes, int64_t head, int64_t row) {
  const int64_t block = floor_div(row, kBlockM) - indexes.first_block;
  return indexes.open_columns + (head * indexes.num_blocks + block) * indexes.open_words;
}

// Whether the slashes of the block that starts at row `block` cover `column`.
__device__ __forceinline__ bool is_covered(const uint32_t* covered, int64_t covered_words, int32_t block,
                                           int32_t column) {
  const int64_t bit = int64_t{block} + kBlockM - 1 - column;
  return bit >= 0 && bit < covered_words * 32 && (covered[bit / 32] >> (bit % 32) & 1) != 0;
}

#endif

}  // namespace qwen_sparse::cuda
