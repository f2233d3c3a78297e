// A head's vertical-slash index in the form that every row block shares (docs/vertical-slash.md).
//
// Slashes s1 < s2 overlap or touch iff s2 - s1 <= 64, whatever the block. Merged once into runs [lo, hi], block
// `a` attends the keys [a - hi, a - lo + 64) of each run. Column v is covered by the slashes of block `a` iff bit
// a + 63 - v is set in a bitmap that has [lo, hi + 63] set for every run. O(S) runs and seqlen_k bits per head.
//
// Every block reads the columns' keys and values, so they are gathered once per call: read in place, each would cost
// a translation miss and a few cache lines that no prefetcher foresees, in every block again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "params.h"

namespace qwen_sparse::cpu {

struct SlashRun {
  int64_t lo;  // distances, inclusive
  int64_t hi;
};

struct HeadIndexView {
  const SlashRun* runs = nullptr;  // descending distance, so keys ascend
  int64_t num_runs = 0;
  const int32_t* columns = nullptr;  // ascending, without padding
  int64_t num_columns = 0;
  const uint64_t* covered = nullptr;  // bit d: the slashes cover key a + 63 - d of every block a
  const void* column_k = nullptr;     // [num_columns, head_dim], the columns' keys
  const void* column_v = nullptr;     // and values
};

class HeadIndexes {
 public:
  // Reads the params' vertical_indexes and slash_indexes, which must have been validated.
  explicit HeadIndexes(const AttentionParams& params);
  const HeadIndexView* views() const { return views_.data(); }

 private:
  std::vector<std::vector<SlashRun>> runs_;
  std::vector<std::vector<uint64_t>> covered_;
  std::vector<std::unique_ptr<std::byte[]>> column_kv_;
  std::vector<HeadIndexView> views_;
};

}  // namespace qwen_sparse::cpu
