// The key tiles that a row tile visits, stage by stage: first the parts of slash runs that lie in the stage's keys (all
// keys when dense), ascending, then the gathered columns among them.
//
// One thread advances the cursor, ahead of the products; the others read tiles from shared memory.
#pragma once

#include "cuda/common/prefill.h"

namespace qwen_sparse::cuda {

struct KeyTile {
  int32_t first;  // first key, or first entry of the gathered columns
  int32_t count;  // keys in it; 0: there are no more tiles
  Stage stage;
  bool is_columns;
  bool late;  // columns: some row of the row tile comes before some of them
  Use use[2];
  // By block of the row tile. Keys that it attends, as far as causality and the window let it:
  int32_t begin[2], end[2];
  uint64_t columns[2];  // or entries, as bits

#ifdef __CUDACC__
  // Whether rows before `row` may attend some of it.
  __device__ bool begins_before(int32_t row, bool causal) const { return is_columns || !causal || first < row; }
#endif
};

#ifdef __CUDACC__

template <int kKeys>
class KeyTiles {
 public:
  using Tile = KeyTile;
  static constexpr int kTileKeys = kKeys;
  static constexpr int kThreads = 1;  // that call start() and next() together
  static constexpr bool kWaitsForCopies = false;

  __device__ void start(const PrefillArgs& args, const RowTile& rows) {
    const AttentionParams& p = args.p;
    rows_ = rows;
    causal_ = p.causal;
    window_ = args.window;
    run_ = {};
    rows.stage_borders(args, p.causal ? rows.end : p.shape.seqlen_k, borders_);
    if (p.key_set == KeySet::kVerticalSlash) {
      runs_ = args.indexes.runs + rows.head * p.num_slash;
      columns_ = p.vertical_indexes + rows.head * p.num_vertical;
      num_runs_ = args.indexes.num_runs[rows.head];
      num_columns_ = args.indexes.num_columns[rows.head];
      open_columns_ = open_columns_of(args.indexes, rows.head, rows.first);
      open_words_ = args.indexes.open_words;
    } else {
      runs_ = nullptr;
      num_runs_ = 1;
      num_columns_ = 0;
      // Key 0 is `farthest` away from the second block.
      const int32_t farthest = rows.first + static_cast<int32_t>(kBlockM);
      all_.lo = p.causal ? 0 : rows.first - static_cast<int32_t>(p.shape.seqlen_k);
      all_.hi = min(window_ - 1, farthest);
    }
    begin_stage(kInter);
  }

  // The next tile that a row attends; its count is 0 when there is none.
  __device__ KeyTile next() {
    for (;;) {
      while (position_ >= end_) {
        if (!next_range()) return KeyTile{};
      }
      const KeyTile tile = in_columns_ ? columns_at(position_) : keys_at(position_);
      position_ += kTileKeys;
      if (tile.use[0] != Use::kNone || tile.use[1] != Use::kNone) return tile;
    }
  }

 private:
  static constexpr int32_t kRows = static_cast<int32_t>(kBlockM);

  __device__ KeyTile keys_at(int32_t position) const {
    KeyTile tile;
    tile.first = position;
    tile.count = min(kTileKeys, end_ - position);
    tile.stage = stage_;
    tile.is_columns = false;
    tile.late = false;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int32_t row = rows_.block(b), last_row = min(row + kRows, rows_.end) - 1;
      const int32_t last = position + tile.count - 1;
      tile.columns[b] = 0;
      tile.begin[b] = max(row - run_.hi, position);
      tile.end[b] = min(row - run_.lo + kRows, last + 1);
      const int32_t reach = causal_ ? min(tile.end[b], last_row + 1) : tile.end[b];
      const bool full = tile.count == kTileKeys && tile.begin[b] == position && tile.end[b] == last + 1 &&
                        (!causal_ || last <= row) && position > row + kRows - 1 - window_;
      tile.use[b] = !rows_.has_rows(b) || tile.begin[b] >= reach ? Use::kNone : full ? Use::kFull : Use::kPartial;
    }
    return tile;
  }

  __device__ KeyTile columns_at(int32_t entry) const {
    KeyTile tile;
    tile.first = entry;
    tile.count = min(kTileKeys, num_columns_ - entry);
    tile.stage = stage_;
    tile.is_columns = true;
    const int32_t last = min(entry + tile.count, end_) - 1;
    tile.late = columns_[last] > rows_.first;
    uint64_t inside = ~uint64_t{0};  // of the entries, those whose keys are the stage's
    if (entry < first_entry_) inside <<= first_entry_ - entry;
    if (end_ - entry < kTileKeys) inside &= (uint64_t{1} << (end_ - entry)) - 1;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      tile.begin[b] = tile.end[b] = 0;
      tile.columns[b] = rows_.has_rows(b) ? open_columns_[b * open_words_ + entry / kTileKeys] & inside : 0;
      tile.use[b] = tile.columns[b] == 0                            ? Use::kNone
                    : tile.columns[b] == ~uint64_t{0} && !tile.late ? Use::kFull
                                                                    : Use::kPartial;
    }
    return tile;
  }

  __device__ void begin_stage(Stage stage) {
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
      position_ = max(rows_.first - run_.hi, begin);
      end_ = min(rows_.block(1) - run_.lo + kRows, end);
      if (position_ < end_) return true;
    }
    if (begin < end && !in_columns_ && num_columns_ > 0) {
      in_columns_ = true;
      first_entry_ = first_column(begin);
      end_ = first_column(end);
      position_ = first_entry_ / kTileKeys * kTileKeys;  // where a word of bits begins
      if (first_entry_ < end_) return true;
      position_ = end_;
    }
    if (stage_ == kIntra) return false;
    begin_stage(static_cast<Stage>(stage_ + 1));
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

  RowTile rows_;
  bool causal_;
  int32_t window_;
  const SlashRun* runs_;  // null: dense, run all_
  const int32_t* columns_;
  const uint64_t* open_columns_;  // of the first block; the second's follow open_words_ later
  int32_t open_words_;
  int32_t num_runs_, num_columns_;
  int32_t borders_[kNumStages + 1];  // a stage's keys are [borders_[stage], borders_[stage + 1])
  SlashRun all_, run_;
  Stage stage_;
  int32_t next_run_;
  bool in_columns_;
  int32_t first_entry_;
  int32_t position_, end_;  // what is left of the current range
};

#endif

}  // namespace qwen_sparse::cuda
