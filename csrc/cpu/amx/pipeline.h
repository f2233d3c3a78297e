// The pipeline of attention on tiles: strips of 32 rows meet items of 64 keys.
//
// A step computes the scores of the next item, the softmax of this one and the output of the one before. The three are
// independent, and their instructions alternate, a row of softmax per one or two tile products, so that the unit and
// the vector ports are busy at the same time. Items of any strips follow each other without draining it.
//
// There is no maximum per item: weights are relative to a maximum that may be old (weights.h). When a row's weights
// grow too large the step's softmax is repeated with true maxima.
#pragma once

#include "cpu/amx/packing.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int kStripRows = 32;
constexpr int kStripTiles = kStripRows / static_cast<int>(kTileRows);
constexpr int kItemKeys = 64;
constexpr int kItemTiles = kItemKeys / static_cast<int>(kTileKeys);
constexpr int kValueSteps = 2;           // an item's values: steps of 32 keys
constexpr int16_t kNowhere = INT16_MAX;  // position of a key that no row attends
constexpr float kNoMaximum = kInfinity;

// Rows that carry one online softmax each.
struct Strip {
  const std::byte* q[3];  // by rotation (intra, succ, inter): [2 row tiles][head_dim / 32] tiles
  std::byte* o;           // [2 row tiles][head_dim / 16] tiles of float32, not yet divided by the sums
  float* base;            // [32] kMagic + kBias - 512 times the maximum in use; kNoMaximum: no key met yet
  float* sums[2];         // [32][16] partial sums: the current ones, and where the next step writes
  int64_t position;       // of the first row
  int64_t rows;           // 1 to 32; the others are zeros whose results nobody reads
  int64_t head;
};

// What the rows of an item may attend, relative to the positions' origin: row r attends lower + r < position <=
// min(upper + r, highest).
struct ItemBounds {
  int32_t lower, upper, highest;

  RowBounds of_row(int row) const {
    return {static_cast<int16_t>(lower + row), static_cast<int16_t>(min(upper + row, highest))};
  }
};

struct Item {
  Strip* strip;
  const std::byte* q;               // of the strip, in the rotation of these keys
  const std::byte* k[kItemTiles];   // [head_dim / 32] tiles each
  const std::byte* v[kValueSteps];  // the first 16 channels of 32 keys
  int64_t v_stride[kValueSteps];    // bytes to the next 16 channels
  const int16_t* positions;         // [64], read only when masked
  ItemBounds bounds;
  bool masked;  // some row may not attend some key
};

struct PipelineScratch {
  alignas(64) std::byte s[2][kStripTiles * kItemTiles * kTileBytes];   // scores: [row tile][key tile]
  alignas(64) std::byte p[2][kStripTiles * kValueSteps * kTileBytes];  // weights: [row tile][step of 32 keys]
};

// What one step reads and writes, by value: the compiler must not think that a tile instruction changes it.
struct Step {
  const std::byte *q_next, *k_next[kItemTiles];  // scores of the next item ...
  std::byte* s_next;
  const std::byte* s_now;  // ... softmax of this one ...
  std::byte* p_now;
  const float *base, *sums;
  float* new_sums;
  const int16_t* positions;
  ItemBounds bounds;
  const std::byte *p_before, *v_before[kValueSteps];  // ... and output of the one before
  int64_t v_stride[kValueSteps];
  std::byte* o_before;
  std::byte* o_pending;  // output that is still in tile registers 0 to 3
  RowF scale;
};

template <Weighing kMode>
QWEN_SPARSE_INLINE RowF weigh_row(const Step& step, int row, float base) {
  const int64_t tile = row / kTileRows, offset = row % kTileRows * kRowBytes;
  const std::byte* s = step.s_now + tile * kItemTiles * kTileBytes + offset;
  std::byte* p = step.p_now + tile * kValueSteps * kTileBytes + offset;
  const RowBounds bounds = step.bounds.of_row(row);
  RowF sum = {};
  for (int half = 0; half < kValueSteps; ++half) {
    sum = weigh<kMode>(s + 2 * half * kTileBytes, p + half * kTileBytes, step.scale, splat_row(base),
                       step.positions + 32 * half, bounds, sum);
  }
  return sum;
}

// One of four products with 2 x 2 accumulators, tiles 0 to 3; A in 4 and 5, B in 6 and 7.
//
// A product's result is there after 52 cycles, and a tile store that waits for it keeps everything behind it waiting.
// So a block's accumulators are not stored at its end, but by the next block just before that uses the register. K and
// V (and Q, when head_dim is 128) are loaded without filling the first-level cache: it is to keep what is stored to,
// since a tile store that misses takes 60 cycles instead of 16.
template <int kPart, bool kFirst, bool kLoad, bool kStreamA>
QWEN_SPARSE_INLINE void product(const std::byte* a0, const std::byte* a1, const std::byte* b0, const std::byte* b1,
                                std::byte* stores, int64_t store_row, const std::byte* loads, int64_t load_row) {
  if constexpr (kPart == 0) {
    kStreamA ? load_tile_streaming<4>(a0) : load_tile<4>(a0);
    load_tile_streaming<6>(b0);
  } else if constexpr (kPart == 1) {
    load_tile_streaming<7>(b1);
  } else if constexpr (kPart == 2) {
    kStreamA ? load_tile_streaming<5>(a1) : load_tile<5>(a1);
  }
  if constexpr (kFirst) {
    store_tile<kPart>(stores + kPart / 2 * store_row + kPart % 2 * kTileBytes);
    if constexpr (kLoad) {
      load_tile<kPart>(loads + kPart / 2 * load_row + kPart % 2 * kTileBytes);
    } else {
      zero_tile<kPart>();
    }
  }
  dot_bf16<kPart, 4 + kPart / 2, 6 + kPart % 2>();
}

// Product i of a step. First S = Q K^T: 2 blocks of 32 keys, head_dim / 32 steps of channels each; then O += P V:
// head_dim / 32 blocks of 32 channels, 2 steps of 32 keys each.
template <int kHeadDim, int i>
QWEN_SPARSE_INLINE void product(const Step& step) {
  constexpr int kSteps = kHeadDim / 32, kParts = kHeadDim / 16, kScores = kHeadDim / 4, kPart = i % 4;
  constexpr int64_t kRowS = kItemTiles * kTileBytes, kRowO = kParts * kTileBytes;
  if constexpr (i < kScores) {
    constexpr int kBlock = i / (4 * kSteps), kStep = i / 4 % kSteps;
    const std::byte* q = step.q_next + kStep * kTileBytes;
    product<kPart, kStep == 0, false, kHeadDim == 128>(
        q, q + kSteps * kTileBytes, step.k_next[2 * kBlock] + kStep * kTileBytes,
        step.k_next[2 * kBlock + 1] + kStep * kTileBytes, kBlock == 0 ? step.o_pending : step.s_next,
        kBlock == 0 ? kRowO : kRowS, nullptr, 0);
  } else {
    constexpr int j = i - kScores, kBlock = j / 8, kStep = j / 4 % 2;
    const std::byte* p = step.p_before + kStep * kTileBytes;
    const std::byte* v = step.v_before[kStep] + 2 * kBlock * step.v_stride[kStep];
    std::byte* o = step.o_before + 2 * kBlock * kTileBytes;
    product<kPart, kStep == 0, true, false>(p, p + kValueSteps * kTileBytes, v, v + step.v_stride[kStep],
                                            kBlock == 0 ? step.s_next + 2 * kTileBytes : o - 2 * kTileBytes,
                                            kBlock == 0 ? kRowS : kRowO, o, kRowO);
  }
}

// Product i, and a row of softmax with every product (head_dim 64) or every other one. Sums are compared as integers,
// which order like the floats they are.
template <int kHeadDim, Weighing kMode, int i>
QWEN_SPARSE_INLINE void product_and_row(const Step& step, RowU& highest) {
  constexpr int kPerRow = kHeadDim / 2 / kStripRows;
  product<kHeadDim, i>(step);
  if constexpr (i % kPerRow == 0) {
    constexpr int kRow = i / kPerRow;
    const RowF sum = weigh_row<kMode>(step, kRow, step.base[kRow]);
    store_row(step.new_sums + kRow * kRowLanes, load_row(step.sums + kRow * kRowLanes) + sum);
    highest = (RowU)sum > highest ? (RowU)sum : highest;
  }
}

template <int kHeadDim, Weighing kMode, int i = 0>
QWEN_SPARSE_INLINE void products_and_rows(const Step& step, RowU& highest) {
  if constexpr (i < kHeadDim / 2) {
    product_and_row<kHeadDim, kMode, i>(step, highest);
    products_and_rows<kHeadDim, kMode, i + 1>(step, highest);
  }
}

// True when some row needs a new maximum: some lane's weights sum to 1, 2^15 times that of the maximum, or more.
template <int kHeadDim, Weighing kMode>
__attribute__((noinline)) bool run_step(const Step& arguments) {
  const Step step = arguments;
  RowU highest = {};
  products_and_rows<kHeadDim, kMode>(step, highest);
  constexpr uint32_t kOne = 0x3f800000;
  uint32_t any = 0;
  for (int i = 0; i < kRowLanes; ++i) any |= highest[i] >= kOne;
  return any != 0;
}

// Repeats a step's softmax with the true maximum of each row, and scales what the row has so far. False if a maximum is
// too large for the arithmetic of weights.
template <int kHeadDim>
__attribute__((noinline)) bool take_new_maxima(const Step& step, Strip& strip) {
  constexpr float kLargest = 0x1p28f;  // a base beyond has too few bits for the fraction of a binade
  for (int row = 0; row < kStripRows; ++row) {
    const RowBounds bounds = step.bounds.of_row(row);
    RowF lanes = splat_row(-kInfinity);
    for (int part = 0; part < kItemTiles; ++part) {
      const RowF x = step.scale * load_row(step.s_now + (row / kTileRows * kItemTiles + part) * kTileBytes +
                                           row % kTileRows * kRowBytes);
      RowI kept;
      for (int i = 0; i < kRowLanes; ++i) {
        const int16_t position = step.positions[part * kTileKeys + i];
        kept[i] = -(position > bounds.lower && position <= bounds.upper);
      }
      lanes = (kept & (x > lanes)) ? x : lanes;
    }
    float highest = -kInfinity;
    for (int i = 0; i < kRowLanes; ++i) highest = max(highest, lanes[i]);
    const float old = step.base[row];
    const float base = min(old, kMagic + kBias - highest);  // a row that meets no key keeps kNoMaximum
    if (base < -kLargest) return false;
    if (base > kLargest && base != kNoMaximum) return false;
    const RowF sum = weigh_row<Weighing::kExact>(step, row, base == kNoMaximum ? 0.0f : base);
    const float shrink = old == kNoMaximum ? 0.0f
                         : base == old     ? 1.0f
                                           : __builtin_exp2f((base - old) / kStepsPerBinade);
    store_row(step.new_sums + row * kRowLanes, load_row(step.sums + row * kRowLanes) * shrink + sum);
    strip.base[row] = base;
    if (old == kNoMaximum || shrink == 1.0f) continue;
    for (int part = 0; part < kHeadDim / 16; ++part) {
      std::byte* o = strip.o + (row / kTileRows * (kHeadDim / 16) + part) * kTileBytes + row % kTileRows * kRowBytes;
      store_row(o, load_row(o) * shrink);
    }
  }
  return true;
}

constexpr struct ConsecutivePositions {
  alignas(64) int16_t of_key[kItemKeys];
  constexpr ConsecutivePositions() : of_key() {
    for (int i = 0; i < kItemKeys; ++i) of_key[i] = static_cast<int16_t>(i);
  }
} kConsecutive;

// Runs a stream of items: push() computes the item's scores, the softmax of the item before and the output of the one
// before that. What an item points to must stay until two more have been pushed.
template <int kHeadDim>
class Pipeline {
 public:
  // `idle` is an item whose results nobody reads; it fills the pipeline at both ends. `scale` is that of scores in
  // units of weights.
  Pipeline(PipelineScratch& scratch, float scale, const Item& idle)
      : scratch_(scratch),
        scale_(splat_row(scale)),
        now_(idle),
        before_(idle),
        idle_(idle),
        pending_(last_block(idle)) {
    memset(&scratch, 0, sizeof(scratch));
    for_pending<false>();
  }

  void push(const Item& next) {
    const int parity = parity_;
    parity_ ^= 1;
    Strip& strip = *now_.strip;
    Step step;
    step.q_next = next.q;
    for (int i = 0; i < kItemTiles; ++i) step.k_next[i] = next.k[i];
    step.s_next = scratch_.s[parity ^ 1];
    step.s_now = scratch_.s[parity];
    step.p_now = scratch_.p[parity];
    step.base = strip.base;
    step.sums = strip.sums[0];
    step.new_sums = strip.sums[1];
    step.positions = now_.positions;
    step.bounds = now_.bounds;
    step.p_before = scratch_.p[parity ^ 1];
    for (int i = 0; i < kValueSteps; ++i) {
      step.v_before[i] = before_.v[i];
      step.v_stride[i] = before_.v_stride[i];
    }
    step.o_before = before_.strip->o;
    step.o_pending = pending_;
    step.scale = scale_;
    pending_ = last_block(before_);
    const bool grown =
        now_.masked ? run_step<kHeadDim, Weighing::kMasked>(step) : run_step<kHeadDim, Weighing::kAll>(step);
    if (__builtin_expect(grown, 0)) {
      for_pending<true>();
      in_range_ &= take_new_maxima<kHeadDim>(step, strip);
      for_pending<false>();
    }
    float* const sums = strip.sums[0];
    strip.sums[0] = strip.sums[1];
    strip.sums[1] = sums;
    before_ = now_;
    now_ = next;
  }

  // Completes the output of all items. False when scores were too large for the arithmetic of weights.
  bool finish() {
    push(idle_);
    push(idle_);
    for_pending<true>();
    return in_range_;
  }

 private:
  static std::byte* last_block(const Item& item) { return item.strip->o + (kHeadDim / 16 - 2) * kTileBytes; }

  template <bool kStore, int kPart = 0>
  void for_pending() {
    if constexpr (kPart < 4) {
      std::byte* p = pending_ + kPart / 2 * (kHeadDim / 16) * kTileBytes + kPart % 2 * kTileBytes;
      if constexpr (kStore) {
        store_tile<kPart>(p);
      } else {
        load_tile<kPart>(p);
      }
      for_pending<kStore, kPart + 1>();
    }
  }

  PipelineScratch& scratch_;
  RowF scale_;
  int parity_ = 0;
  bool in_range_ = true;
  Item now_, before_, idle_;
  std::byte* pending_;  // where the accumulators in tiles 0 to 3 belong
};

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
