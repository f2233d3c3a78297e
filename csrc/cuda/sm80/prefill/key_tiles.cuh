// The key tiles that a row tile visits, stage by stage: first the parts of slash runs that lie in the stage's keys (all
// keys when dense), ascending, then the gathered columns among them.
//
// One thread advances the cursor, one tile ahead of the products; the others read the tile from shared memory.
#pragma once

#include "cuda/sm80/prefill/config.h"

namespace qwen_sparse::sm80::prefill {

enum Stage : int { kInter, kSucc, kIntra, kNumStages };

struct KeyTile {
  int32_t first;  // first key, or first entry of the gathered columns
  int32_t count;  // keys in it; 0: there are no more tiles
  bool is_columns;
  int stage;
  int32_t begin[2];  // keys that each block of the row tile attends, as far as causality lets it; unused for columns
  int32_t end[2];
};

class KeyTiles {
 public:
  __device__ void start(const Args& args, int64_t head, int32_t block, int32_t last_row, int64_t chunk) {
    const AttentionParams& p = args.p;
    block_ = block;
    run_ = {};
    const int64_t chunk_begin = chunk * args.tiles.chunk_len;
    const int64_t limit = p.causal ? last_row + int64_t{1} : p.shape.seqlen_k;
    const int64_t borders[kNumStages + 1] = {0, chunk_begin - args.tiles.chunk_len, chunk_begin, limit};
    for (int i = 0; i <= kNumStages; ++i) {
      borders_[i] = static_cast<int32_t>(borders[i] < 0 ? 0 : borders[i] > limit ? limit : borders[i]);
    }
    if (p.sparse) {
      runs_ = args.indexes.runs + head * p.num_slash;
      columns_ = p.vertical_indexes + head * p.num_vertical;
      num_runs_ = args.indexes.num_runs[head];
      num_columns_ = args.indexes.num_columns[head];
    } else {
      runs_ = nullptr;
      num_runs_ = 1;
      num_columns_ = 0;
      const int64_t farthest = int64_t{block} + kBlockRows;  // key 0 from the second block
      all_.lo = p.causal ? 0 : block - static_cast<int32_t>(p.shape.seqlen_k);
      all_.hi = static_cast<int32_t>(p.window - 1 < farthest ? p.window - 1 : farthest);
    }
    begin_stage(kInter);
  }

  // The next tile; its count is 0 when there is none.
  __device__ KeyTile next() {
    while (position_ >= end_) {
      if (!next_range()) return KeyTile{};
    }
    KeyTile tile;
    tile.first = position_;
    tile.count = min(kTileKeys, end_ - position_);
    tile.is_columns = in_columns_;
    tile.stage = stage_;
    for (int i = 0; i < 2; ++i) {
      const int32_t block = block_ + i * kBlockRows;
      tile.begin[i] = max(block - run_.hi, borders_[stage_]);
      tile.end[i] = min(block - run_.lo + kBlockRows, borders_[stage_ + 1]);
    }
    position_ += kTileKeys;
    return tile;
  }

 private:
  __device__ void begin_stage(int stage) {
    stage_ = stage;
    next_run_ = num_runs_ - 1;
    in_columns_ = false;
    position_ = end_ = 0;
  }

  __device__ bool next_range() {
    const int32_t begin = borders_[stage_], end = borders_[stage_ + 1];
    while (begin < end && next_run_ >= 0) {
      run_ = runs_ == nullptr ? all_ : runs_[next_run_];
      --next_run_;
      position_ = max(block_ - run_.hi, begin);
      end_ = min(block_ + kBlockRows - run_.lo + kBlockRows, end);
      if (position_ < end_) return true;
    }
    if (begin < end && !in_columns_ && num_columns_ > 0) {
      in_columns_ = true;
      position_ = first_column(begin);
      end_ = first_column(end);
      if (position_ < end_) return true;
    }
    if (stage_ == kIntra) return false;
    begin_stage(stage_ + 1);
    return true;
  }

  // Entry of the first column that is not before `key`.
  __device__ int32_t first_column(int32_t key) const {
    int32_t low = 0, high = num_columns_;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (columns_[middle] >= key) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  const cuda::SlashRun* runs_;  // null: dense, run all_
  const int32_t* columns_;
  int32_t num_runs_, num_columns_;
  int32_t block_;                    // first row of the row tile
  int32_t borders_[kNumStages + 1];  // a stage's keys are [borders_[stage], borders_[stage + 1])
  cuda::SlashRun all_, run_;
  int stage_;
  int32_t next_run_;
  bool in_columns_;
  int32_t position_, end_;  // what is left of the current range
};

}  // namespace qwen_sparse::sm80::prefill
