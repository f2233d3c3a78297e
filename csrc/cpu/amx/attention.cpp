// Prefill attention in bf16 on AMX tiles: dense, vertical-slash, block groups, dual-chunk (docs/cpu-kernels.md).
//
// Keys and values are packed once per call. Then a task is up to eight strips of 32 rows: of the heads of a kv group,
// which meet the same keys (all keys), or of four blocks of one head (a sparse set). Strips begin at multiples of 32
// positions, so that one lies in one dual-chunk chunk, and what a row computes does not depend on where a prompt is
// cut.
#include "cpu/amx/key_items.h"
#include "cpu/isa/arena.h"
#include "cpu/parallel.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int64_t kStripsPerTask = 8;
constexpr int64_t kBlockStrips = kBlockM / kStripRows;
constexpr int64_t kTaskBlocks = kStripsPerTask / kBlockStrips;
constexpr int64_t kPanelItems = 16;  // that stay in the second-level cache while a task's strips meet them

float magnitude_of(uint32_t bits) {
  const uint32_t wide = bits << 16;
  float value;
  memcpy(&value, &wide, sizeof(value));
  return value;
}

template <int kHeadDim>
class TileAttention {
 public:
  TileAttention(const AttentionParams& params, const HeadIndexView* heads)
      : p_(params),
        heads_(heads),
        past_(params.shape.seqlen_k - params.shape.seqlen_q),
        group_size_(params.shape.num_heads / params.shape.num_kv_heads),
        first_strip_(floor_div(past_, kStripRows)),
        num_strips_(params.shape.seqlen_q == 0 ? 0 : ceil_div(params.shape.seqlen_k, kStripRows) - first_strip_),
        blocks_(params.shape) {}

  static int64_t workspace(const AttentionParams& p) {
    int64_t bytes = p.shape.num_kv_heads * PackedView::bytes(p.shape.seqlen_k, kHeadDim);
    if (p.key_set == KeySet::kVerticalSlash) bytes += p.shape.num_heads * PackedView::bytes(p.num_vertical, kHeadDim);
    return bytes;
  }

  // False when the inputs are such that tiles would not give what the definition says: numbers that are not finite, or
  // scores or sums that might become so. Outputs are not complete then.
  bool run() {
    if (!pack()) return false;
    const auto body = [&](int64_t task, std::byte* memory) {
      if (!__atomic_load_n(&failed_, __ATOMIC_RELAXED)) run_task(task, memory);
    };
    parallel_tasks(num_tasks(), scratch_bytes(), body);
    if (failed_) return false;
    if (p_.attended != nullptr && p_.key_set == KeySet::kAll) count_all_pairs();
    return true;
  }

 private:
  struct Scratch {
    Scratch(Arena& arena, int64_t num_rotations)
        : pipeline(arena.take<PipelineScratch>(1)),
          items(arena.take<KeyItem<kHeadDim>>(kItemsInTurns)),
          strips(arena.take<Strip>(kStripsPerTask + 1)),
          q(arena.take<std::byte>((kStripsPerTask + 1) * num_rotations * kQueryBytes)),
          o(arena.take<std::byte>((kStripsPerTask + 1) * kOutputBytes)),
          sums(arena.take<float>((kStripsPerTask + 1) * 2 * kStripRows * kRowLanes)),
          base(arena.take<float>((kStripsPerTask + 1) * kStripRows)) {}

    PipelineScratch* pipeline;
    KeyItem<kHeadDim>* items;
    Strip* strips;  // the last one is idle
    std::byte *q, *o;
    float *sums, *base;
  };

  static constexpr int64_t kQueryBytes = kStripTiles * (kHeadDim / 32) * kTileBytes;
  static constexpr int64_t kOutputBytes = kStripTiles * (kHeadDim / 16) * kTileBytes;

  int64_t num_rotations() const { return p_.chunk_len == 0 ? 1 : 3; }

  size_t scratch_bytes() const {
    Arena arena(nullptr);
    Scratch scratch(arena, num_rotations());
    return arena.used();
  }

  PackedView packed(int64_t kv_head) const {
    return {static_cast<std::byte*>(p_.workspace) + kv_head * PackedView::bytes(p_.shape.seqlen_k, kHeadDim),
            p_.shape.seqlen_k, kHeadDim};
  }
  PackedView packed_columns(int64_t head) const {
    std::byte* first =
        static_cast<std::byte*>(p_.workspace) + p_.shape.num_kv_heads * PackedView::bytes(p_.shape.seqlen_k, kHeadDim);
    return {first + head * PackedView::bytes(p_.num_vertical, kHeadDim), p_.num_vertical, kHeadDim};
  }

  // ---- Packing --------------------------------------------------------------------------------------------------

  bool pack() {
    const int64_t panels = PackedView::panels(p_.shape.seqlen_k);
    const int64_t num_tasks = panels * p_.shape.num_kv_heads;
    const bool columns = p_.key_set == KeySet::kVerticalSlash;
    const auto body = [&](int64_t task, std::byte*) {
      if (task >= num_tasks) return pack_columns(task - num_tasks);
      const int64_t kv_head = task % p_.shape.num_kv_heads, first = task / p_.shape.num_kv_heads * kPanelKeys;
      pack_panel(static_cast<const bf16*>(p_.k.data) + kv_head * p_.k.head_stride, p_.k.row_stride,
                 static_cast<const bf16*>(p_.v.data) + kv_head * p_.v.head_stride, p_.v.row_stride, first,
                 p_.shape.seqlen_k, packed(kv_head));
    };
    parallel_tasks(num_tasks + (columns ? p_.shape.num_heads : 0), 0, body);
    constexpr float kLargestValue = 0x1p96f;  // sums of fewer than 2^31 weights below 2 stay finite
    return magnitude_of(k_bits_) < kInfinity && magnitude_of(v_bits_) < kLargestValue;
  }

  void pack_columns(int64_t head) {
    const HeadIndexView& index = heads_[head];
    for (int64_t first = 0; first < index.num_columns; first += kPanelKeys) {
      pack_panel(static_cast<const bf16*>(index.column_k), kHeadDim, static_cast<const bf16*>(index.column_v), kHeadDim,
                 first, index.num_columns, packed_columns(head));
    }
  }

  // Keys and values from `first` on, up to a panel of them; the rest of the panel's tiles are zeros, and so is what is
  // read as the second half of its very last tile of values.
  void pack_panel(const bf16* k, int64_t k_stride, const bf16* v, int64_t v_stride, int64_t first, int64_t end,
                  const PackedView& out) {
    Magnitude of_keys, of_values;
    for (int64_t key = first; key < first + kPanelKeys; key += kTileKeys) {
      const int64_t count = max<int64_t>(0, min(kTileKeys, end - key)), from = count == 0 ? 0 : key;
      pack_keys(k + from * k_stride, k_stride, count, kHeadDim, out.keys(key / kTileKeys), of_keys);
      pack_values(v + from * v_stride, v_stride, count, kHeadDim, out.values(key / kTileKeys), of_values);
    }
    if (first + kPanelKeys >= end) memset(out.values(first / kTileKeys + kPanelTiles), 0, kHalfTile);
    raise(k_bits_, of_keys.bits());
    raise(v_bits_, of_values.bits());
  }

  static void raise(uint32_t& largest, uint32_t bits) {
    uint32_t seen = __atomic_load_n(&largest, __ATOMIC_RELAXED);
    while (seen < bits &&
           !__atomic_compare_exchange_n(&largest, &seen, bits, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  // ---- Tasks ----------------------------------------------------------------------------------------------------

  int64_t num_tasks() const {
    if (p_.key_set == KeySet::kAll) {
      return p_.shape.num_kv_heads * ceil_div(num_strips_ * group_size_, kStripsPerTask);
    }
    return p_.shape.num_heads * ceil_div(blocks_.count, kTaskBlocks);
  }

  // The last rows come first: under a causal mask they take longest.
  void run_task(int64_t task, std::byte* memory) {
    Arena arena(memory);
    Scratch scratch(arena, num_rotations());
    const bool dense = p_.key_set == KeySet::kAll;
    const int64_t columns = dense ? p_.shape.num_kv_heads : p_.shape.num_heads;
    const int64_t number = num_tasks() / columns - 1 - task / columns;
    const TileScope tiles;
    const bool done =
        dense ? attend_all(task % columns, number, scratch) : attend_blocks(task % columns, number, scratch);
    if (!done) __atomic_store_n(&failed_, true, __ATOMIC_RELAXED);
  }

  // Strips of the heads of a kv group, heads first, against all keys.
  bool attend_all(int64_t kv_head, int64_t task, Scratch& scratch) {
    const int64_t first = task * kStripsPerTask;
    const int64_t count = min(kStripsPerTask, num_strips_ * group_size_ - first);
    Magnitude magnitude;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t head = kv_head * group_size_ + (first + i) % group_size_;
      begin_strip(scratch, i, head, (first_strip_ + (first + i) / group_size_) * kStripRows, magnitude);
    }
    const PackedView keys = packed(kv_head);
    const Item idle = begin_idle(scratch, keys);
    if (!scores_are_finite(magnitude)) return false;

    Strip* const strips = scratch.strips;
    const Strip& last = strips[count - 1];
    const int64_t lo = max<int64_t>(0, strips[0].position - p_.window + 1) / kItemKeys;
    const int64_t hi = ceil_div(p_.causal ? last.position + last.rows : p_.shape.seqlen_k, kItemKeys);
    Pipeline<kHeadDim> pipeline(*scratch.pipeline, scale(), idle);
    for (int64_t panel = lo; panel < hi; panel += kPanelItems) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t item = panel; item < min(hi, panel + kPanelItems); ++item)
          push_all(pipeline, keys, strips[i], item);
      }
    }
    if (!pipeline.finish()) return false;
    for (int64_t i = 0; i < count; ++i) write(strips[i]);
    return true;
  }

  // 64 consecutive keys.
  void push_all(Pipeline<kHeadDim>& pipeline, const PackedView& keys, Strip& strip, int64_t number) const {
    constexpr int64_t kFar = 4 * kItemKeys;
    const auto relative = [&](int64_t position) {
      return static_cast<int32_t>(max(-kFar, min(kFar, position - number * kItemKeys)));
    };
    const int64_t last_row = strip.position + strip.rows - 1, last_key = p_.shape.seqlen_k - 1;
    ItemBounds bounds;
    bounds.lower = relative(strip.position - p_.window);
    bounds.upper = relative(p_.causal ? strip.position : last_key);
    bounds.highest = relative(p_.causal ? last_row : last_key);
    if (bounds.highest < 0 || bounds.lower >= kItemKeys - 1) return;  // no row attends any

    Item item;
    item.strip = &strip;
    item.q = strip.q[rotation(strip, number * kItemKeys)];
    for (int i = 0; i < kItemTiles; ++i) item.k[i] = keys.keys(number * kItemTiles + i);
    for (int i = 0; i < kValueSteps; ++i) {
      item.v[i] = keys.values(number * kItemTiles + 2 * i);
      item.v_stride[i] = kPanelRow;
    }
    item.positions = kConsecutive.of_key;
    item.bounds = bounds;
    item.masked = min(bounds.upper, bounds.highest) < kItemKeys - 1 || bounds.lower + kStripRows - 1 >= 0;
    pipeline.push(item);
  }

  // Blocks of one head against the keys of a sparse set.
  bool attend_blocks(int64_t head, int64_t task, Scratch& scratch) {
    const int64_t first = task * kTaskBlocks, count = min(kTaskBlocks, blocks_.count - first);
    Magnitude magnitude;
    int64_t num_strips = 0, strips_of[kTaskBlocks + 1] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t start = (blocks_.first + first + i) * kBlockM;
      for (int64_t row = start; row < start + kBlockM; row += kStripRows) {
        if (row + kStripRows <= past_ || row >= p_.shape.seqlen_k) continue;
        begin_strip(scratch, num_strips++, head, row, magnitude);
      }
      strips_of[i + 1] = num_strips;
    }
    const PackedView keys = packed(head / group_size_);
    const Item idle = begin_idle(scratch, keys);
    if (!scores_are_finite(magnitude)) return false;

    Pipeline<kHeadDim> pipeline(*scratch.pipeline, scale(), idle);
    int64_t pairs = 0;
    int slot = 0;
    for (int64_t i = 0; i < count; ++i) {
      pairs += attend_block(pipeline, keys, head, first + i, scratch.strips + strips_of[i],
                            scratch.strips + strips_of[i + 1], scratch.items, slot);
    }
    if (!pipeline.finish()) return false;
    for (int64_t i = 0; i < num_strips; ++i) write(scratch.strips[i]);
    if (p_.attended != nullptr) __atomic_fetch_add(p_.attended + head, pairs, __ATOMIC_RELAXED);
    return true;
  }

  int64_t attend_block(Pipeline<kHeadDim>& pipeline, const PackedView& keys, int64_t head, int64_t number, Strip* begin,
                       Strip* end, KeyItem<kHeadDim>* items, int& slot) const {
    const int64_t start = (blocks_.first + number) * kBlockM;
    const BlockRows block{start, max(start, past_), min(start + kBlockM, p_.shape.seqlen_k)};
    int64_t chunk_start = 0;  // of the stage whose items are pushed
    const auto push = [&](const KeyItem<kHeadDim>& keys_of_item) {
      for (Strip* strip = begin; strip < end; ++strip) {
        constexpr int32_t kNoLowerBound = INT16_MIN;
        const auto first_row = static_cast<int32_t>(strip->position - start);
        Item item;
        item.strip = strip;
        item.q = strip->q[rotation(*strip, chunk_start)];
        memcpy(item.k, keys_of_item.k, sizeof(item.k));
        memcpy(item.v, keys_of_item.v, sizeof(item.v));
        memcpy(item.v_stride, keys_of_item.v_stride, sizeof(item.v_stride));
        item.positions = keys_of_item.positions;
        item.bounds = {kNoLowerBound, first_row, first_row + static_cast<int32_t>(strip->rows) - 1};
        item.masked = keys_of_item.partial || keys_of_item.highest > first_row;
        pipeline.push(item);
      }
    };
    ItemBuilder<kHeadDim, decltype(push)> builder(items, slot, push);
    const auto add = [&](const KeyTile16& tile) { builder.add(tile); };
    const PackedView columns = packed_columns(head);
    int64_t pairs = 0;
    const auto stage = [&](int64_t lo, int64_t hi) {
      chunk_start = lo;
      if (lo >= hi) return;
      pairs += p_.key_set == KeySet::kBlockGroups ? walk_groups(groups_of(head, number), keys, block, lo, hi, add)
                                                  : walk_index(heads_[head], keys, columns, block, lo, hi, add);
      builder.finish();
    };
    const int64_t hi = max<int64_t>(0, block.end);
    if (p_.chunk_len == 0) {
      stage(0, hi);
    } else {
      const int64_t own = floor_div(start, p_.chunk_len) * p_.chunk_len;
      stage(0, own - p_.chunk_len);
      stage(max<int64_t>(0, own - p_.chunk_len), own);
      stage(max<int64_t>(0, own), hi);
    }
    return pairs;
  }

  const uint32_t* groups_of(int64_t head, int64_t block) const {
    return p_.block_groups + (head * blocks_.count + block) * p_.group_words;
  }

  // ---- Strips ---------------------------------------------------------------------------------------------------

  float scale() const { return p_.softmax_scale * kLog2E * kStepsPerBinade; }

  // Of the strip's queries, for keys of the chunk in which `key` lies.
  int rotation(const Strip& strip, int64_t key) const {
    if (p_.chunk_len == 0) return 0;
    const int64_t chunks_back = floor_div(strip.position, p_.chunk_len) - key / p_.chunk_len;
    return static_cast<int>(max<int64_t>(0, min<int64_t>(2, chunks_back)));
  }

  bool scores_are_finite(const Magnitude& of_queries) const {
    return magnitude_of(of_queries.bits()) * magnitude_of(k_bits_) < 0x1p118f;  // sums of head_dim products
  }

  // Empties strip i: the rows of this call among the 32 from `position` on.
  void begin_strip(Scratch& scratch, int64_t i, int64_t head, int64_t position, Magnitude& magnitude) const {
    Strip& strip = scratch.strips[i];
    strip.head = head;
    strip.position = max(position, past_);
    strip.rows = min(position + kStripRows, p_.shape.seqlen_k) - strip.position;
    reset(scratch, i, kNoMaximum);
    const int64_t chunk = p_.chunk_len == 0 ? 0 : floor_div(position, p_.chunk_len);
    const Rows* const sources[] = {&p_.q_intra, &p_.q_succ, &p_.q_inter};
    for (int64_t r = 0; r < num_rotations(); ++r) {
      std::byte* out = scratch.q + (i * num_rotations() + r) * kQueryBytes;
      strip.q[r] = out;
      if (r <= chunk || r == 0) copy_queries(*sources[r], strip, out, magnitude);
    }
  }

  void copy_queries(const Rows& q, const Strip& strip, std::byte* out, Magnitude& magnitude) const {
    const bf16* first =
        static_cast<const bf16*>(q.data) + (strip.position - past_) * q.row_stride + strip.head * q.head_stride;
    for (int64_t row = 0; row < kStripRows; ++row) {
      for (int64_t part = 0; part < kHeadDim / 32; ++part) {
        RowU x = {};
        if (row < strip.rows) memcpy(&x, first + row * q.row_stride + part * 32, kRowBytes);
        magnitude.add(x);
        memcpy(out + (row / kTileRows * (kHeadDim / 32) + part) * kTileBytes + row % kTileRows * kRowBytes, &x,
               kRowBytes);
      }
    }
  }

  // The strip behind the others, and an item of it.
  Item begin_idle(Scratch& scratch, const PackedView& keys) const {
    Strip& strip = scratch.strips[kStripsPerTask];
    strip.position = strip.head = 0;
    strip.rows = kStripRows;
    reset(scratch, kStripsPerTask, kMagic + kBias);
    std::byte* q = scratch.q + kStripsPerTask * num_rotations() * kQueryBytes;
    memset(q, 0, kQueryBytes);
    strip.q[0] = q;
    Item item;
    item.strip = &strip;
    item.q = q;
    for (const std::byte*& k : item.k) k = keys.keys(0);
    for (const std::byte*& v : item.v) v = keys.values(0);
    for (int64_t& stride : item.v_stride) stride = kPanelRow;
    item.positions = kConsecutive.of_key;
    item.bounds = {-kItemKeys, kItemKeys, kItemKeys};
    item.masked = false;
    return item;
  }

  static void reset(Scratch& scratch, int64_t i, float base) {
    Strip& strip = scratch.strips[i];
    strip.o = scratch.o + i * kOutputBytes;
    strip.base = scratch.base + i * kStripRows;
    memset(strip.o, 0, kOutputBytes);
    for (int row = 0; row < kStripRows; ++row) strip.base[row] = base;
    for (int j = 0; j < 2; ++j) {
      strip.sums[j] = scratch.sums + (i * 2 + j) * kStripRows * kRowLanes;
      memset(strip.sums[j], 0, kStripRows * kRowLanes * sizeof(float));
    }
  }

  // Divides by the sums and rounds; a row that attended nothing gives zeros.
  void write(const Strip& strip) const {
    for (int64_t row = 0; row < strip.rows; ++row) {
      const float sum = sum_of_row(load_row(strip.sums[0] + row * kRowLanes));
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int64_t index = (strip.position - past_ + row) * p_.shape.num_heads + strip.head;
      bf16* out = static_cast<bf16*>(p_.out) + index * kHeadDim;
      for (int64_t part = 0; part < kHeadDim / kRowLanes; ++part) {
        const RowF x = load_row(strip.o + (row / kTileRows * (kHeadDim / kRowLanes) + part) * kTileBytes +
                                row % kTileRows * kRowBytes) *
                       inverse;
        const RowU bits = (RowU)x;
        const RowH rounded = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, RowH);
        memcpy(out + part * kRowLanes, &rounded, sizeof(rounded));
      }
      const float maximum = (kMagic + kBias - strip.base[row]) / kStepsPerBinade;
      p_.lse[index] = natural_lse(maximum + kBinadesAbove, sum);
    }
  }

  void count_all_pairs() const {
    int64_t pairs = 0;
    for (int64_t position = past_; position < p_.shape.seqlen_k; ++position) pairs += max<int64_t>(0, position + 1);
    for (int64_t head = 0; head < p_.shape.num_heads; ++head) p_.attended[head] = pairs;
  }

  const AttentionParams& p_;
  const HeadIndexView* heads_;  // null unless vertical-slash
  int64_t past_, group_size_, first_strip_, num_strips_;
  RowBlocks blocks_;
  uint32_t k_bits_ = 0, v_bits_ = 0;
  bool failed_ = false;
};

}  // namespace

int64_t tile_workspace(const AttentionParams& params) {
  if (params.dtype != DType::kBFloat16) return 0;
  return params.shape.head_dim == 64 ? TileAttention<64>::workspace(params) : TileAttention<128>::workspace(params);
}

bool attend_on_tiles(const AttentionParams& params, const HeadIndexView* heads) {
  if (params.dtype != DType::kBFloat16 || params.shape.seqlen_k == 0) return false;
  return params.shape.head_dim == 64 ? TileAttention<64>(params, heads).run() : TileAttention<128>(params, heads).run();
}

}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
