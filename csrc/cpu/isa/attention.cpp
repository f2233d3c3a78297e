// Prefill attention: dense, vertical-slash, block groups, dual-chunk, in one pass with one online softmax.
//
// A task is a block of 64 rows (aligned to 64 absolute positions) of one head, or, when all heads of a kv group see
// the same keys (dense), of several heads of the group, so that they share the staged tiles. Under dual-chunk
// attention a block lies in one chunk (chunk_len is a multiple of 64); its keys are visited stage by stage, inter,
// succ, intra, with the query rotation swapped at the border. Scratch is O(tile): the staged tiles, scores, queries
// and outputs of a block.
#include "cpu/head_index.h"
#include "cpu/isa/arena.h"
#include "cpu/isa/prefill_tile.h"
#include "cpu/parallel.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int64_t kMaxHeadsPerTask = 8;  // bounds the scratch of a task: 8 heads x 64 rows x (Q + O) = 512 KiB at 128

// The keys of one tile: first those read in place (all of them, those of slash runs or of groups), then columns.
struct KeyTile {
  int64_t count, num_in_place;
  int32_t positions[kTileKeys];
  int32_t ranks[kTileKeys];  // of the columns: which of the head's columns
};

// Walks the keys in [lo, hi) that a block attends, up to kTileKeys at a time. With an index: slash runs first, then the
// vertical columns that no run covers; with a bitmap of groups: their keys; without both: every key.
class KeyTiles {
 public:
  KeyTiles(const HeadIndexView* index, const uint32_t* groups, int64_t block_start, int64_t lo, int64_t hi)
      : index_(index), groups_(groups), block_start_(block_start), lo_(lo), hi_(hi), next_key_(lo) {
    if (index != nullptr) column_ = first_column_from(lo);
  }

  // Fills the tile's positions (and the columns' ranks) with the next keys; false at the end.
  bool next(KeyTile& tile) { return groups_ == nullptr ? next_of_index(tile) : next_of_groups(tile); }

 private:
  bool next_of_groups(KeyTile& tile) {
    int64_t count = 0;
    while (count + kGroupKeys <= kTileKeys && find_group()) {
      const int64_t end = min(hi_, (next_key_ / kGroupKeys + 1) * kGroupKeys);
      for (; next_key_ < end; ++next_key_) tile.positions[count++] = static_cast<int32_t>(next_key_);
    }
    tile.count = tile.num_in_place = count;
    return count > 0;
  }

  // Moves next_key_ on to a key of an attended group; false if there is none before hi_.
  bool find_group() {
    while (next_key_ < hi_) {
      const int64_t group = next_key_ / kGroupKeys;
      const uint32_t bits = groups_[group / 32] >> (group % 32);
      if ((bits & 1) != 0) return true;
      const int64_t skipped = bits == 0 ? 32 - group % 32 : __builtin_ctz(bits);
      next_key_ = (group + skipped) * kGroupKeys;
    }
    return false;
  }

  bool next_of_index(KeyTile& tile) {
    int64_t count = 0;
    while (count < kTileKeys && run_ < num_runs()) {
      int64_t begin = lo_, end = hi_;
      if (index_ != nullptr) {
        begin = max(lo_, block_start_ - index_->runs[run_].hi);
        end = min(hi_, block_start_ - index_->runs[run_].lo + kBlockM);
      }
      begin = max(begin, next_key_);
      const int64_t taken = max<int64_t>(0, min(end - begin, kTileKeys - count));
      for (int64_t i = 0; i < taken; ++i) tile.positions[count + i] = static_cast<int32_t>(begin + i);
      count += taken;
      next_key_ = max(next_key_, begin + taken);
      if (begin + taken >= end) ++run_;
    }
    tile.num_in_place = count;
    if (index_ != nullptr) {
      for (; count < kTileKeys && column_ < index_->num_columns && index_->columns[column_] < hi_; ++column_) {
        const int32_t column = index_->columns[column_];
        if (is_covered(column)) continue;
        tile.ranks[count] = static_cast<int32_t>(column_);
        tile.positions[count++] = column;
      }
    }
    tile.count = count;
    return count > 0;
  }

  int64_t num_runs() const { return index_ == nullptr ? 1 : index_->num_runs; }

  bool is_covered(int64_t column) const {
    const int64_t bit = block_start_ + kBlockM - 1 - column;
    return (index_->covered[bit / 64] >> (bit % 64)) & 1;
  }

  int64_t first_column_from(int64_t lo) const {
    int64_t begin = 0, end = index_->num_columns;
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (index_->columns[middle] < lo) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }

  const HeadIndexView* index_;
  const uint32_t* groups_;
  int64_t block_start_, lo_, hi_;
  int64_t run_ = 0, next_key_, column_ = 0;
};

template <typename T, int kHeadDim>
class PrefillAttention {
  using Dot = typename DotFor<T>::type;
  using Elem = typename Dot::Elem;

 public:
  PrefillAttention(const AttentionParams& params, const HeadIndexView* heads)
      : p_(params),
        heads_(heads),
        past_(params.shape.seqlen_k - params.shape.seqlen_q),
        group_size_(params.shape.num_heads / params.shape.num_kv_heads),
        heads_per_task_(params.key_set == KeySet::kAll ? min(group_size_, kMaxHeadsPerTask) : 1),
        tasks_per_group_(ceil_div(group_size_, heads_per_task_)),
        blocks_(params.shape) {}

  int64_t num_tasks() const { return blocks_.count * p_.shape.num_kv_heads * tasks_per_group_; }

  int64_t scratch_bytes() const {
    Arena arena(nullptr);
    Scratch scratch(arena, heads_per_task_);
    return arena.used();
  }

  // Blocks in descending order: under a causal mask the longest come first.
  void run_task(int64_t task, std::byte* memory) const {
    const int64_t tasks_per_block = p_.shape.num_kv_heads * tasks_per_group_;
    const int64_t block = blocks_.first + blocks_.count - 1 - task / tasks_per_block;
    const int64_t kv_head = task % tasks_per_block / tasks_per_group_;
    const int64_t first_in_group = task % tasks_per_group_ * heads_per_task_;
    const int64_t first_head = kv_head * group_size_ + first_in_group;
    const int64_t num_heads = min(heads_per_task_, group_size_ - first_in_group);

    Arena arena(memory);
    Scratch scratch(arena, heads_per_task_);
    const int64_t begin = max(block * kBlockM, past_);
    const int64_t end = min((block + 1) * kBlockM, p_.shape.seqlen_k);
    run_block({block * kBlockM, begin, end, first_head, num_heads, kv_head}, scratch);
  }

 private:
  struct Block {
    int64_t start;       // 64 * (position / 64)
    int64_t begin, end;  // positions of its rows in this call
    int64_t first_head, num_heads, kv_head;
    int64_t rows() const { return end - begin; }
  };

  struct Scratch {
    Scratch(Arena& arena, int64_t num_heads)
        : q(arena.take<Elem>(num_heads * kBlockM * kHeadDim / Dot::kPair)),
          k(arena.take<Elem>(kTileKeys * kHeadDim / Dot::kPair)),
          v(arena.take<Elem>(kTileKeys * (kHeadDim + kPadV) / Dot::kPair)),
          s(arena.take<float>(kTileKeys * kBlockM)),
          m(arena.take<float>(num_heads * kBlockM)),
          l(arena.take<float>(num_heads * kBlockM)),
          o(arena.take<float>(num_heads * kBlockM * kHeadDim)),
          lower(arena.take<int32_t>(kBlockM)),
          upper(arena.take<int32_t>(kBlockM)),
          tiles(arena.take<KeyTile>(2)) {}

    Elem* q_of(int64_t head) const { return q + head * kBlockM * kHeadDim / Dot::kPair; }
    LaneState state_of(int64_t head) const {
      return {m + head * kBlockM, l + head * kBlockM, o + head * kBlockM * kHeadDim};
    }

    Elem *q, *k, *v;
    float *s, *m, *l, *o;
    int32_t *lower, *upper;  // row r attends lower[r] < position <= upper[r]
    KeyTile* tiles;          // at hand, and the next one
  };

  void run_block(const Block& block, const Scratch& scratch) const {
    for (int64_t h = 0; h < block.num_heads; ++h) reset(scratch.state_of(h), kHeadDim);
    for (int64_t r = 0; r < kBlockM; ++r) {
      const int64_t position = min(block.begin + r, block.end - 1);
      scratch.lower[r] = static_cast<int32_t>(max<int64_t>(position - p_.window, INT32_MIN));
      scratch.upper[r] = static_cast<int32_t>(p_.causal ? position : p_.shape.seqlen_k - 1);
    }
    const int64_t lo = max<int64_t>(0, block.begin - p_.window + 1);
    const int64_t hi = p_.causal ? max<int64_t>(0, block.end) : p_.shape.seqlen_k;
    int64_t attended = 0;
    if (p_.chunk_len == 0) {
      attended += run_stage(block, p_.q_intra, lo, hi, scratch);
    } else {
      const int64_t chunk_start = floor_div(block.start, p_.chunk_len) * p_.chunk_len;
      attended += run_stage(block, p_.q_inter, lo, chunk_start - p_.chunk_len, scratch);
      attended += run_stage(block, p_.q_succ, max(lo, chunk_start - p_.chunk_len), chunk_start, scratch);
      attended += run_stage(block, p_.q_intra, max(lo, chunk_start), hi, scratch);
    }
    if (p_.attended != nullptr) {
      for (int64_t h = 0; h < block.num_heads; ++h) {
        __atomic_fetch_add(p_.attended + block.first_head + h, attended, __ATOMIC_RELAXED);
      }
    }
    for (int64_t h = 0; h < block.num_heads; ++h) write_head(block, block.first_head + h, scratch.state_of(h));
  }

  // Attends the block's keys in [lo, hi) with one query rotation; returns the number of attended (row, key) pairs.
  int64_t run_stage(const Block& block, const Rows& q, int64_t lo, int64_t hi, const Scratch& scratch) const {
    if (lo >= hi) return 0;
    const HeadIndexView* index = heads_ == nullptr ? nullptr : heads_ + block.first_head;
    KeyTiles tiles(index, groups_of(block), block.start, lo, hi);
    const int64_t vecs = ceil_div(block.rows(), kLanes);
    int64_t attended = 0;
    bool more = tiles.next(scratch.tiles[0]);
    if (more) stage_queries(block, q, scratch);
    for (int parity = 0; more; parity ^= 1) {
      KeyTile& tile = scratch.tiles[parity];
      const bool masked = needs_mask(block, tile, scratch);
      const int64_t count = stage_keys(block, index, tile, scratch);
      more = tiles.next(scratch.tiles[parity ^ 1]);
      if (more && p_.key_set != KeySet::kAll) prefetch(block, scratch.tiles[parity ^ 1]);
      for (int64_t h = 0; h < block.num_heads; ++h) {
        attend_tile<Dot, kHeadDim>(count, vecs, scratch.q_of(h), scratch.k, scratch.v, p_.softmax_scale * kLog2E,
                                   tile.positions, {masked ? scratch.lower : nullptr, scratch.upper}, scratch.s,
                                   scratch.state_of(h));
      }
      if (p_.attended != nullptr) attended += count_pairs(block, tile);
    }
    return attended;
  }

  const uint32_t* groups_of(const Block& block) const {
    if (p_.key_set != KeySet::kBlockGroups) return nullptr;
    const int64_t number = floor_div(block.start, kBlockM) - blocks_.first;
    return p_.block_groups + (block.first_head * blocks_.count + number) * p_.group_words;
  }

  void stage_queries(const Block& block, const Rows& q, const Scratch& scratch) const {
    for (int64_t h = 0; h < block.num_heads; ++h) {
      const T* first =
          static_cast<const T*>(q.data) + (block.begin - past_) * q.row_stride + (block.first_head + h) * q.head_stride;
      stage_queries_in_lanes<Dot, T>(
          block.rows(), kHeadDim, [=](int64_t r) { return first + r * q.row_stride; }, scratch.q_of(h));
    }
  }

  // Asks for a tile's keys and values while the one before is worked on: no prefetcher foresees where runs and groups
  // lie.
  void prefetch(const Block& block, const KeyTile& tile) const {
    for (const Rows* rows : {&p_.k, &p_.v}) {
      const T* head = static_cast<const T*>(rows->data) + block.kv_head * rows->head_stride;
      for (int64_t i = 0; i < tile.num_in_place; ++i) {
        const T* row = head + tile.positions[i] * rows->row_stride;
        for (int64_t d = 0; d < kHeadDim; d += 64 / sizeof(T)) __builtin_prefetch(row + d, 0, 2);
      }
    }
  }

  // Brings the tile's keys and values to the scratch; a masked copy of the last one makes their number even.
  int64_t stage_keys(const Block& block, const HeadIndexView* index, KeyTile& tile, const Scratch& scratch) const {
    const T* k = static_cast<const T*>(p_.k.data) + block.kv_head * p_.k.head_stride;
    const T* v = static_cast<const T*>(p_.v.data) + block.kv_head * p_.v.head_stride;
    const auto row_of = [&](int64_t i, const T* head, int64_t stride, const void* columns) {
      return i < tile.num_in_place ? head + tile.positions[i] * stride
                                   : static_cast<const T*>(columns) + tile.ranks[i] * kHeadDim;
    };
    if (tile.count % 2 != 0) tile.positions[tile.count] = INT32_MAX;
    const int64_t count = tile.count + tile.count % 2;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t key = min(i, tile.count - 1);
      stage_key<Dot>(row_of(key, k, p_.k.row_stride, index == nullptr ? nullptr : index->column_k), kHeadDim,
                     scratch.k + i * (kHeadDim / Dot::kPair));
    }
    for (int64_t i = 0; i < count; i += Dot::kPair) {
      const void* columns = index == nullptr ? nullptr : index->column_v;
      stage_values<Dot>(row_of(min(i, tile.count - 1), v, p_.v.row_stride, columns),
                        row_of(min(i + 1, tile.count - 1), v, p_.v.row_stride, columns), kHeadDim,
                        scratch.v + i / Dot::kPair * (kHeadDim + kPadV));
    }
    return count;
  }

  static bool needs_mask(const Block& block, const KeyTile& tile, const Scratch& scratch) {
    if (tile.count % 2 != 0) return true;
    int32_t lowest = INT32_MAX, highest = INT32_MIN;
    for (int64_t i = 0; i < tile.count; ++i) lowest = min(lowest, tile.positions[i]);
    for (int64_t i = 0; i < tile.count; ++i) highest = max(highest, tile.positions[i]);
    return highest > scratch.upper[0] || lowest <= scratch.lower[block.rows() - 1];
  }

  int64_t count_pairs(const Block& block, const KeyTile& tile) const {
    int64_t pairs = 0;
    for (int64_t i = 0; i < tile.count; ++i) pairs += block.end - max<int64_t>(block.begin, tile.positions[i]);
    return pairs;
  }

  void write_head(const Block& block, int64_t head, const LaneState& state) const {
    const int64_t first = (block.begin - past_) * p_.shape.num_heads + head;
    T* out = static_cast<T*>(p_.out) + first * kHeadDim;
    const int64_t stride = p_.shape.num_heads * kHeadDim;
    write_rows<T>(state, block.rows(), kHeadDim, [=](int64_t r) { return out + r * stride; });
    for (int64_t r = 0; r < block.rows(); ++r) {
      p_.lse[first + r * p_.shape.num_heads] = natural_lse(state.m[r], state.l[r]);
    }
  }

  const AttentionParams& p_;
  const HeadIndexView* heads_;  // null unless vertical-slash
  int64_t past_, group_size_, heads_per_task_, tasks_per_group_;
  RowBlocks blocks_;
};

template <typename T, int kHeadDim>
void run(const AttentionParams& params, const HeadIndexView* heads) {
  const PrefillAttention<T, kHeadDim> kernel(params, heads);
  const auto body = [&](int64_t task, std::byte* scratch) { kernel.run_task(task, scratch); };
  parallel_tasks(kernel.num_tasks(), kernel.scratch_bytes(), body);
}

}  // namespace

void attention(const AttentionParams& params, const HeadIndexView* heads) {
  dispatch_float(params.dtype, [&](auto type) {
    using T = decltype(type);
    if (params.shape.head_dim == 64) {
      run<T, 64>(params, heads);
    } else {
      run<T, 128>(params, heads);
    }
  });
}

}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
