// The keys that a block of rows attends under a sparse set, as items of the pipeline.
//
// Sets are walked in tiles of 16 keys, with a bit per key that the block attends; what lies between the ends of a run
// and those of its tiles is masked, so that keys and values are packed once per call and not per block. Two tiles make
// a step: where they lie if they follow each other, else with their values copied together. Two steps make an item.
#pragma once

#include "cpu/amx/pipeline.h"
#include "cpu/head_index.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int kItemsInTurns = 4;  // of a pipeline: what is pushed stays until four more have been begun
constexpr uint32_t kWholeTile = 0xffff;
constexpr int16_t kFarBack = -20000;  // stands for all positions that are farther back

// A tile of keys that some rows of a block attend.
struct KeyTile16 {
  const PackedView* source;
  int64_t number;                // in the source
  uint32_t kept;                 // bit i: key i is attended
  int16_t positions[kTileKeys];  // relative to the block's start; kNowhere: not attended
};

template <int kHeadDim>
struct KeyItem {
  const std::byte *k[kItemTiles], *v[kValueSteps];
  int64_t v_stride[kValueSteps];
  int16_t highest;  // position of a key
  bool partial;     // some key is attended by no row
  alignas(64) int16_t positions[kItemKeys];
  alignas(64) std::byte values[kValueSteps][kHeadDim / kRowLanes * kTileBytes];
};

// Collects tiles and hands items to push(const KeyItem&), one item late: the keys of the one at hand are asked for
// while the one before is worked on. A pushed item stays until four more have been begun.
template <int kHeadDim, typename Push>
class ItemBuilder {
 public:
  // `slot`: which of the items comes next, from one builder of a pipeline to the following one.
  ItemBuilder(KeyItem<kHeadDim>* items, int& slot, Push push) : items_(items), slot_(slot), push_(push) {}

  void add(const KeyTile16& tile) {
    prefetch(tile);
    if (has_last_ && last_.source == tile.source && last_.number + 1 == tile.number && tile.number % kPanelTiles != 0) {
      has_last_ = false;
      return add_step(last_, &tile, true);
    }
    if (has_last_) {
      if (has_single_) add_step(single_, &last_, false);
      single_ = last_;
      has_single_ = !has_single_;
    }
    last_ = tile;
    has_last_ = true;
  }

  // Pushes all that was added.
  void finish() {
    if (has_single_ && has_last_) {
      add_step(single_, &last_, false);
    } else if (has_single_ || has_last_) {
      add_step(has_single_ ? single_ : last_, nullptr, true);
    }
    has_single_ = has_last_ = false;
    if (steps_ == 1) {
      KeyItem<kHeadDim>& item = items_[slot_];
      for (int i = 0; i < 2; ++i) item.k[2 + i] = item.k[i];
      item.v[1] = item.v[0];
      item.v_stride[1] = item.v_stride[0];
      for (int i = kItemKeys / 2; i < kItemKeys; ++i) item.positions[i] = kNowhere;
      item.partial = true;
      complete();
    }
    if (ready_ != nullptr) push_(*ready_);
    ready_ = nullptr;
  }

 private:
  // 32 keys: of two tiles, or of one. `in_place`: the values of the second follow those of the first.
  void add_step(const KeyTile16& first, const KeyTile16* second, bool in_place) {
    KeyItem<kHeadDim>& item = items_[slot_];
    if (steps_ == 0) {
      item.highest = INT16_MIN;
      item.partial = false;
    }
    int16_t* positions = item.positions + steps_ * 2 * kTileKeys;
    memcpy(positions, first.positions, sizeof(first.positions));
    if (second != nullptr) {
      memcpy(positions + kTileKeys, second->positions, sizeof(second->positions));
    } else {
      for (int64_t i = 0; i < kTileKeys; ++i) positions[kTileKeys + i] = kNowhere;
    }
    item.partial |= first.kept != kWholeTile || second == nullptr || second->kept != kWholeTile;
    for (int64_t i = 0; i < 2 * kTileKeys; ++i) item.highest = max(item.highest, positions[i]);
    const KeyTile16& other = second == nullptr ? first : *second;
    item.k[2 * steps_] = first.source->keys(first.number);
    item.k[2 * steps_ + 1] = other.source->keys(other.number);
    const std::byte* values = first.source->values(first.number);
    item.v[steps_] = in_place ? values : item.values[steps_];
    item.v_stride[steps_] = in_place ? kPanelRow : kTileBytes;
    if (!in_place) {
      const std::byte* others = other.source->values(other.number);
      for (int64_t part = 0; part < kHeadDim / kRowLanes; ++part) {
        std::byte* out = item.values[steps_] + part * kTileBytes;
        memcpy(out, values + part * kPanelRow, kHalfTile);
        memcpy(out + kHalfTile, others + part * kPanelRow, kHalfTile);
      }
    }
    if (++steps_ == kValueSteps) complete();
  }

  void complete() {
    if (ready_ != nullptr) push_(*ready_);
    ready_ = items_ + slot_;
    slot_ = (slot_ + 1) % kItemsInTurns;
    steps_ = 0;
  }

  static void prefetch(const KeyTile16& tile) {
    const std::byte* k = tile.source->keys(tile.number);
    const std::byte* v = tile.source->values(tile.number);
    for (int64_t i = 0; i < kTileKeys * kHeadDim * 2; i += 64) __builtin_prefetch(k + i, 0, 2);
    for (int64_t part = 0; part < kHeadDim / kRowLanes; ++part) {
      for (int64_t i = 0; i < kHalfTile; i += 64) __builtin_prefetch(v + part * kPanelRow + i, 0, 2);
    }
  }

  KeyItem<kHeadDim>* items_;  // [kItemsInTurns], used in turns
  int& slot_;
  Push push_;
  KeyTile16 last_, single_;  // the latest tile, whose successor may come yet; an earlier one without
  bool has_last_ = false, has_single_ = false;
  int steps_ = 0;
  const KeyItem<kHeadDim>* ready_ = nullptr;
};

// A block of rows for the walks below.
struct BlockRows {
  int64_t start;       // 64 * (position / 64)
  int64_t begin, end;  // positions of its rows

  int64_t attended(int64_t key) const { return max<int64_t>(0, end - max(begin, key)); }  // rows that attend it

  // A tile whose first key is at `first`. Adds its pairs to `pairs`.
  KeyTile16 tile(const PackedView* source, int64_t number, int64_t first, uint32_t kept, int64_t& pairs) const {
    KeyTile16 result{source, number, kept, {}};
    for (int64_t i = 0; i < kTileKeys; ++i) {
      const int64_t relative = max<int64_t>(first + i - start, kFarBack);
      result.positions[i] = (kept >> i & 1) != 0 ? static_cast<int16_t>(relative) : kNowhere;
      if ((kept >> i & 1) != 0) pairs += attended(first + i);
    }
    return result;
  }
};

// The attended groups among the keys [lo, hi); both are multiples of 16, or hi is the end of the block. Returns the
// number of attended (row, key) pairs.
template <typename Add>
int64_t walk_groups(const uint32_t* groups, const PackedView& packed, const BlockRows& block, int64_t lo, int64_t hi,
                    Add add) {
  int64_t pairs = 0;
  const int64_t end = ceil_div(hi, kGroupKeys);
  for (int64_t group = lo / kGroupKeys; group < end;) {
    const uint32_t bits = groups[group / 32] >> (group % 32);
    if ((bits & 1) != 0) {
      add(block.tile(&packed, group, group * kGroupKeys, kWholeTile, pairs));
      ++group;
    } else {
      group += bits == 0 ? 32 - group % 32 : __builtin_ctz(bits);
    }
  }
  return pairs;
}

// The same for the runs of slashes, tile by tile, then for the columns that no run covers.
template <typename Add>
int64_t walk_index(const HeadIndexView& index, const PackedView& packed, const PackedView& columns,
                   const BlockRows& block, int64_t lo, int64_t hi, Add add) {
  int64_t pairs = 0, number = -1;
  uint32_t kept = 0;
  const auto flush = [&] {
    if (kept != 0) add(block.tile(&packed, number, number * kTileKeys, kept, pairs));
    kept = 0;
  };
  for (int64_t run = 0; run < index.num_runs; ++run) {
    const int64_t begin = max(lo, block.start - index.runs[run].hi);
    const int64_t end = min(hi, block.start - index.runs[run].lo + kBlockM);
    for (int64_t key = begin; key < end;) {
      const int64_t tile = key / kTileKeys, tile_end = min(end, (tile + 1) * kTileKeys);
      if (tile != number) flush();
      number = tile;
      kept |= ((1u << (tile_end - key)) - 1) << (key % kTileKeys);
      key = tile_end;
    }
  }
  flush();

  const auto is_kept = [&](int64_t column) {
    const int64_t bit = block.start + kBlockM - 1 - column;
    return column >= lo && column < hi && ((index.covered[bit / 64] >> (bit % 64)) & 1) == 0;
  };
  int64_t first = 0;
  for (int64_t step = index.num_columns; step > 0;) {  // the first column of [lo, hi), by bisection
    const int64_t half = step / 2;
    if (index.columns[first + half] < lo) {
      first += half + 1;
      step -= half + 1;
    } else {
      step = half;
    }
  }
  for (int64_t tile = first / kTileKeys; tile * kTileKeys < index.num_columns; ++tile) {
    const int32_t* column = index.columns + tile * kTileKeys;
    const int64_t count = min(kTileKeys, index.num_columns - tile * kTileKeys);
    if (column[0] >= hi) break;
    KeyTile16 result{&columns, tile, 0, {}};
    for (int64_t i = 0; i < kTileKeys; ++i) {
      const bool attended = i < count && is_kept(column[i]);
      result.positions[i] = attended ? static_cast<int16_t>(max<int64_t>(column[i] - block.start, kFarBack)) : kNowhere;
      result.kept |= static_cast<uint32_t>(attended) << i;
      if (attended) pairs += block.attended(column[i]);
    }
    if (result.kept != 0) add(result);
  }
  return pairs;
}

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
