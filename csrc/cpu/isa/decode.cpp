// Decode attention: a few rows per sequence against a paged cache, split over keys, partial results merged.
//
// A task is one range of kDecodeSplit keys. It takes tile after tile of them, and of each tile one kv head after the
// other, since the heads of a key lie side by side in memory; all query heads of a kv head's group and all rows are the
// rows of one block. The key bias that an int8 cache leaves out enters the scores: for a tile whose middle is at
// rotation c, q . R_{c+t} b = (R_{-c} q) . (R_t b), and the cosines and sines of R_t are made once.
#include "cpu/isa/decode_tile.h"
#include "cpu/parallel.h"
#include "cpu/plans.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

static_assert(kBiasTable == kHalfTile, "the bias table covers half a tile of keys");

template <typename T, typename C, int kHeadDim>
class DecodeAttention {
  static constexpr bool kIsInt8 = sizeof(C) == 1;
  static constexpr bool kHasLow = kIsInt8 && sizeof(T) == 4;  // float32 rows need more than 16 bits
  static constexpr bool kPairs = kIsInt8 && !kHasLow;         // products of weights and values in integers
  static constexpr int kHalf = kHeadDim / 2;
  static constexpr int kElems = kIsInt8 ? kHalf : kHeadDim;  // of a query row or a packed key
  using Product = typename Choose<kIsInt8, Int16Product, FloatProduct>::type;
  using Elem = typename Product::Elem;

 public:
  explicit DecodeAttention(const DecodeParams& params)
      : p_(params),
        plan_(params),
        heads_per_task_(min(max(kMaxDecodeRows / (plan_.rows_per_task * plan_.group_size), int64_t{1}), kMaxHeads)),
        head_blocks_(ceil_div(plan_.num_kv_heads, heads_per_task_)),
        partials_(static_cast<float*>(params.workspace) + plan_.bias_table_size) {
    if (p_.bias.data == nullptr) return;
    for (int i = 0; i < kHalf; ++i) half_inv_freq_[i] = p_.bias.inv_freq[i] / 2;
  }

  int64_t num_tasks() const { return plan_.num_tasks * head_blocks_; }
  int64_t num_outputs() const { return p_.batch * p_.shape.seqlen_q * p_.shape.num_heads; }

  size_t scratch_bytes() const {
    Arena arena(nullptr);
    Scratch scratch(arena);
    return arena.used();
  }

  void bias_table_task(int64_t t) const {
    const Rotation<float> rotation(2 * t + 1, half_inv_freq_, kHalf, p_.bias.attention_factor);
    auto* table = static_cast<float*>(p_.workspace);
    for (int64_t i = 0; i < kHalf; ++i) {
      table[i * kHalfTile + t] = rotation.cos[i];
      table[(kHalf + i) * kHalfTile + t] = rotation.sin[i];
    }
  }

  // `following` is the task that this thread takes next, or -1: its first keys are asked for in time.
  void run_task(int64_t index, int64_t following, std::byte* memory) const {
    Arena arena(memory);
    const Scratch scratch(arena);
    const Task task(*this, index);
    Task after(*this, max<int64_t>(following, 0));
    if (following < 0) after.end = after.begin;
    const int64_t rows = task.num_rows * plan_.group_size;
    for (int64_t i = 0; i < task.num_heads * rows; ++i) scratch.l[i] = VecF{};
    for (int64_t i = 0; i < task.num_heads * kMaxDecodeRows; i += kLanes) store(scratch.m + i, splat(-kInfinity));
    for (int64_t h = 0; h < task.num_heads; ++h) {
      float* o = state_of(task.part, task.first_head + h).o;
      for (int64_t i = 0; i < rows * kHeadDim; i += kLanes) store(o + i, VecF{});
    }
    if (task.begin < task.end) run_tiles(task, after, scratch);
    for (int64_t h = 0; h < task.num_heads; ++h) {
      const SoftmaxState state = state_of(task.part, task.first_head + h);
      for (int64_t r = 0; r < rows; ++r) state.m[r] = scratch.m[h * kMaxDecodeRows + r];
      for (int64_t r = 0; r < rows; ++r) state.l[r] = reduce_sum(scratch.l[h * rows + r]);
    }
  }

  // Merges the splits of one (sequence, row, head).
  void merge_task(int64_t output) const {
    const int64_t head = output % p_.shape.num_heads;
    const int64_t row = output / p_.shape.num_heads % p_.shape.seqlen_q;
    const int64_t batch = output / p_.shape.num_heads / p_.shape.seqlen_q;
    const int64_t kv_head = head / plan_.group_size;
    const int64_t m_index = row % plan_.rows_per_task * plan_.group_size + head % plan_.group_size;
    const int64_t first_part = (batch * plan_.row_blocks + row / plan_.rows_per_task) * plan_.num_splits;
    const auto part_of = [&](int64_t split) { return state_of(first_part + split, kv_head); };
    float m = -kInfinity, l = 0.0f;
    for (int64_t split = 0; split < plan_.num_splits; ++split) m = max(m, part_of(split).m[m_index]);
    float o[kHeadDim];
    for (int64_t d = 0; d < kHeadDim; d += kLanes) store(o + d, VecF{});
    for (int64_t split = 0; split < plan_.num_splits; ++split) {
      const SoftmaxState part = part_of(split);
      if (part.m[m_index] == -kInfinity) continue;  // attended nothing
      const float weight = exp2_nonpositive(splat(part.m[m_index] - m))[0];
      l += part.l[m_index] * weight;
      for (int64_t d = 0; d < kHeadDim; d += kLanes) {
        store(o + d, load(o + d) + load(part.o + m_index * kHeadDim + d) * weight);
      }
    }
    write_row(o, l, kHeadDim, static_cast<T*>(p_.out) + output * kHeadDim);
    p_.lse[output] = natural_lse(m, l);
  }

 private:
  static constexpr int64_t kMaxHeads = 8;  // whose next keys and values wait in the second-level cache: 2 x 256 KiB

  // Some rows of one sequence, some neighbouring kv heads, and the keys [begin, end), of which there may be none.
  struct Task {
    Task(const DecodeAttention& a, int64_t index)
        : part(index / a.head_blocks_),
          first_head(index % a.head_blocks_ * a.heads_per_task_),
          num_heads(min(a.heads_per_task_, a.plan_.num_kv_heads - first_head)),
          batch(part / a.plan_.num_splits / a.plan_.row_blocks),
          first_row(part / a.plan_.num_splits % a.plan_.row_blocks * a.plan_.rows_per_task),
          num_rows(min(a.plan_.rows_per_task, a.p_.shape.seqlen_q - first_row)),
          first_position(a.p_.seqlens_k[batch] - a.p_.shape.seqlen_q + first_row) {
      const int64_t split = part % a.plan_.num_splits;
      begin = max(split * kDecodeSplit, first_position - a.p_.window + 1);
      end = min((split + 1) * kDecodeSplit, first_position + num_rows);
    }
    int64_t part, first_head, num_heads, batch, first_row, num_rows, first_position, begin, end;
  };

  // Of the rows, one of the three rotations.
  struct Queries {
    Elem *high, *low;  // [kMaxDecodeRows, kElems]; low: kHasLow only
    float* unit;       // [kMaxDecodeRows] what one of `high` stands for, int8 only
    float* bias;       // [kMaxDecodeRows, kHeadDim] q . R_j b = bias[:half] . cos + bias[half:] . sin
  };

  struct Scratch {
    explicit Scratch(Arena& arena)
        : packed_k(arena.take<Elem>(kTileKeys * kElems)),
          s(arena.take<float>(kMaxDecodeRows * kTileKeys)),
          sums(arena.take<Elem>(2 * kMaxDecodeRows * kTileKeys)),
          turned(arena.take<float>(kMaxDecodeRows * kHeadDim)),
          l(arena.take<VecF>(kMaxDecodeRows)),
          m(arena.take<float>(kMaxHeads * kMaxDecodeRows)),
          softmax{arena.take<float>(kMaxDecodeRows), arena.take<float>(kMaxDecodeRows),
                  arena.take<float>(kMaxDecodeRows), arena.take<float>(kMaxDecodeRows)},
          k_scale(arena.take<float>(kTileKeys)),
          v_scale(arena.take<float>(kTileKeys)),
          limits(arena.take<RowLimits>(kMaxDecodeRows)),
          row_chunks(arena.take<int64_t>(kMaxDecodeRows)),
          positions(arena.take<int32_t>(kTileKeys)) {
      for (Tile<C>& tile : tiles) {
        tile.k = arena.take<const C*>(kTileKeys);
        tile.v = arena.take<const C*>(kTileKeys);
      }
      for (Queries& rotation : q) {
        rotation.high = arena.take<Elem>(kMaxDecodeRows * kElems);
        rotation.low = arena.take<Elem>(kHasLow ? kMaxDecodeRows * kElems : 0);
        rotation.unit = arena.take<float>(kMaxDecodeRows);
        rotation.bias = arena.take<float>(kMaxDecodeRows * kHeadDim);
      }
    }
    // Of one head and tile:
    Elem* packed_k;
    float* s;
    Elem* sums;
    float* turned;
    // Of all heads, one after the other:
    VecF* l;
    float* m;  // each head's kMaxDecodeRows
    TileSoftmax softmax;
    float *k_scale, *v_scale;  // [kTileKeys], 0 behind the last key; int8 only
    // Of the rows of any head:
    RowLimits* limits;
    int64_t* row_chunks;
    int32_t* positions;
    Tile<C> tiles[2];
    Queries q[3];
  };

  SoftmaxState state_of(int64_t part, int64_t kv_head) const {
    const int64_t rows = plan_.rows_per_task * plan_.group_size;
    float* base = partials_ + (part * p_.shape.num_kv_heads + kv_head) * plan_.floats_per_head;
    return {base, base + rows, base + 2 * rows};
  }

  void run_tiles(const Task& task, const Task& after, const Scratch& scratch) const {
    const int64_t rows = task.num_rows * plan_.group_size;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t position = task.first_position + m / plan_.group_size;
      scratch.row_chunks[m] = chunk_of(position, p_.chunk_len);
      scratch.limits[m] = {static_cast<int32_t>(max<int64_t>(position - p_.window, INT32_MIN)),
                           static_cast<int32_t>(position)};
    }
    for (int64_t h = 0; h < task.num_heads; ++h) stage_queries(task, task.first_head + h, h * rows, scratch);
    const int64_t last_limit = scratch.limits[rows - 1].lower;
    Tile<C> tile = locate(task, task.begin, scratch.tiles[0]);
    while (true) {
      const int64_t key = tile.first, count = tile.count;
      const bool is_last = key + count == task.end;
      const Tile<C> next = locate(is_last ? after : task, is_last ? after.begin : key + count,
                                  scratch.tiles[tile.k == scratch.tiles[0].k]);
      const bool masked = count % kKeyGroup != 0 || key + count - 1 > task.first_position || key <= last_limit;
      for (int64_t i = 0; masked && i < round_up_to_groups(count); ++i) {
        scratch.positions[i] = i < count ? static_cast<int32_t>(key + i) : INT32_MAX;
      }
      for (int64_t h = 0; h < task.num_heads; ++h) {  // beside each head's work, a share of the next tile is asked for
        Ahead<kHeadDim, C> ahead(next, h, task.num_heads, p_.k.head_stride, p_.v.head_stride);
        run_tile(task, h, rows, tile, masked, scratch, ahead);
      }
      if (is_last) break;
      tile = next;
    }
  }

  // One tile of the h-th head.
  void run_tile(const Task& task, int64_t h, int64_t rows, const Tile<C>& tile, bool masked, const Scratch& scratch,
                Ahead<kHeadDim, C>& ahead) const {
    const int64_t columns = round_up_to_groups(tile.count);
    const TileSoftmax& softmax = scratch.softmax;
    float* o = state_of(task.part, task.first_head + h).o;
    float v_unit = 1.0f;
    if constexpr (kIsInt8) {
      copy_scales(p_.k_scale, task, task.first_head + h, tile, scratch.k_scale);
      copy_scales(p_.v_scale, task, task.first_head + h, tile, scratch.v_scale);
    }
    pack_keys<kHeadDim>(tile.k, h * p_.k.head_stride, columns, scratch.packed_k, ahead);
    score(h * rows, rows, tile, columns, scratch, ahead);
    if constexpr (kPairs) v_unit = to_fixed_scales(scratch.v_scale);
    for (int64_t r = 0; r < rows; ++r) {
      float* s = scratch.s + r * kTileKeys;
      softmax.top[r] = largest_lane(masked ? largest_scores<true>(s, columns, scratch.limits[r], scratch.positions)
                                           : largest_scores<false>(s, columns, {}, nullptr));
    }
    advance<kPairs>(rows, softmax, scratch.m + h * kMaxDecodeRows);
    for (int64_t r = 0; r < rows; ++r) {
      float* s = scratch.s + r * kTileKeys;
      int32_t* pairs = reinterpret_cast<int32_t*>(scratch.sums) + r * (kTileKeys / 2);
      VecF& l = scratch.l[h * rows + r];
      ahead.request(max<int64_t>(16 / rows, 1));
      if (softmax.top[r] == -kInfinity) {  // nothing attended
        for (int64_t j = 0; j < columns; j += kLanes) store(s + j, VecF{});
        for (int64_t j = 0; kPairs && j < columns / 2; j += kLanes) memset(pairs + j, 0, sizeof(VecI));
      } else if constexpr (kPairs) {
        const VecF sum = scores_to_pairs(s, columns, scratch.v_scale, softmax.base[r], pairs);
        l = l * softmax.correction[r] + sum * softmax.scale[r];
      } else {
        const VecF sum = scores_to_weights<kIsInt8>(s, columns, scratch.v_scale, softmax.base[r]);
        l = l * softmax.correction[r] + sum;
      }
    }
    if constexpr (kPairs) {
      add_int8(rows, columns, tile, h * p_.v.head_stride, v_unit, scratch, o, ahead);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        const float correction = softmax.correction[r];
        for (int64_t d = 0; correction != 1.0f && d < kHeadDim; d += kLanes) {
          store(o + r * kHeadDim + d, load(o + r * kHeadDim + d) * correction);
        }
      }
      add_values<kHeadDim>(rows, tile.count, scratch.s, tile.v, h * p_.v.head_stride, o);
    }
    ahead.request(INT64_MAX);
  }

  // Rows of a kv head; they become those from first_m on.
  void stage_queries(const Task& task, int64_t kv_head, int64_t first_m, const Scratch& scratch) const {
    const Rows* rotations[3] = {&p_.q_intra, &p_.q_succ, &p_.q_inter};
    const float factor = p_.scale_factors == nullptr ? 1.0f : p_.scale_factors[task.batch];
    const float scale = p_.softmax_scale * factor * kLog2E;  // so that scores are in base 2
    for (int i = 0; i < (p_.chunk_len == 0 ? 1 : 3); ++i) {
      const Queries& queries = scratch.q[i];
      for (int64_t m = 0; m < task.num_rows * plan_.group_size; ++m) {
        const int64_t row = task.batch * p_.shape.seqlen_q + task.first_row + m / plan_.group_size;
        const int64_t head = kv_head * plan_.group_size + m % plan_.group_size;
        const T* q = static_cast<const T*>(rotations[i]->data) + row * rotations[i]->row_stride +
                     head * rotations[i]->head_stride;
        float scaled[kHeadDim];
        for (int d = 0; d < kHeadDim; d += kLanes) store(scaled + d, load(q + d) * scale);
        if constexpr (kIsInt8) {
          const int64_t at = first_m + m;
          queries.unit[at] = to_fixed_point<kHeadDim>(scaled, queries.high + at * kElems,
                                                      kHasLow ? queries.low + at * kElems : nullptr);
        } else {
          memcpy(queries.high + (first_m + m) * kElems, scaled, sizeof(scaled));
        }
        if (p_.bias.data == nullptr) continue;
        const float* bias = p_.bias.data + kv_head * kHeadDim;
        float* out = queries.bias + (first_m + m) * kHeadDim;
        for (int d = 0; d < kHalf; d += kLanes) {
          const VecF q0 = load(scaled + d), q1 = load(scaled + kHalf + d);
          const VecF b0 = load(bias + d), b1 = load(bias + kHalf + d);
          store(out + d, q0 * b0 + q1 * b1);
          store(out + kHalf + d, q1 * b0 - q0 * b1);
        }
      }
    }
  }

  // Calls body(first, last, page, row) for each page of a tile: keys [first, last) of the tile lie there from `row` on.
  template <typename Body>
  void for_each_page(const Task& task, const Tile<C>& tile, Body body) const {
    for (int64_t i = 0; i < tile.count;) {
      const int64_t page = p_.block_table[task.batch * p_.block_table_stride + (tile.first + i) / p_.page_size];
      const int64_t row = (tile.first + i) % p_.page_size;
      const int64_t last = min(tile.count, i + p_.page_size - row);
      body(i, last, page, row);
      i = last;
    }
  }

  template <typename E>
  static const E* row_of(const Pages& pages, int64_t page, int64_t row, int64_t kv_head) {
    return static_cast<const E*>(pages.data) + page * pages.page_stride + row * pages.row_stride +
           kv_head * pages.head_stride;
  }

  // The tile of a task that starts at key `first`; without keys if the task has none left.
  Tile<C> locate(const Task& task, int64_t first, Tile<C> tile) const {
    tile.first = first;
    tile.count = max<int64_t>(tile_end(first, task.end, p_.chunk_len) - first, 0);
    tile.num_heads = task.num_heads;
    for_each_page(task, tile, [&](int64_t i, int64_t last, int64_t page, int64_t row) {
      const C* k = row_of<C>(p_.k, page, row, task.first_head);
      const C* v = row_of<C>(p_.v, page, row, task.first_head);
      for (int64_t j = i; j < last; ++j, k += p_.k.row_stride) tile.k[j] = k;
      for (int64_t j = i; j < last; ++j, v += p_.v.row_stride) tile.v[j] = v;
    });
    for (int64_t i = tile.count; 0 < i && i < kTileKeys; ++i) {
      tile.k[i] = tile.k[tile.count - 1];
      tile.v[i] = tile.v[tile.count - 1];
    }
    return tile;
  }

  void copy_scales(const Pages& pages, const Task& task, int64_t kv_head, const Tile<C>& tile, float* scales) const {
    for_each_page(task, tile, [&](int64_t i, int64_t last, int64_t page, int64_t row) {
      const float* from = row_of<float>(pages, page, row, kv_head);
      const int64_t stride = pages.row_stride;
      for (; i + 8 <= last; i += 8, from += 8 * stride) {
        QWEN_SPARSE_UNROLL
        for (int j = 0; j < 8; ++j) scales[i + j] = from[j * stride];
      }
      for (; i < last; ++i, from += stride) scales[i] = *from;
    });
    for (int64_t i = tile.count; i < kTileKeys; ++i) scales[i] = 0.0f;
  }

  // Rows first_m to first_m + rows of all heads, scores from scratch.s on.
  void score(int64_t first_m, int64_t rows, const Tile<C>& tile, int64_t columns, const Scratch& scratch,
             Ahead<kHeadDim, C>& ahead) const {
    const auto score_rows = [&](int64_t row, int64_t num_rows, int rotation) {
      const Queries& q = scratch.q[rotation];
      float* s = scratch.s + row * kTileKeys;
      if constexpr (kIsInt8) {
        score_int8(q, first_m + row, num_rows, columns, scratch, s, ahead);
      } else {
        const float* elems = q.high + (first_m + row) * kElems;
        score_keys<Product, kElems>(num_rows, columns, elems, scratch.packed_k, s, ahead);
      }
      if (p_.bias.data != nullptr) turn_and_add_bias(q, first_m + row, num_rows, tile.first, scratch, s);
    };
    for_each_rotation(scratch.row_chunks, rows, chunk_of(tile.first, p_.chunk_len), score_rows);
  }

  void score_int8(const Queries& q, int64_t row, int64_t rows, int64_t columns, const Scratch& scratch, float* s,
                  Ahead<kHeadDim, C>& ahead) const {
    int32_t* high = scratch.sums;
    int32_t* low = high + kMaxDecodeRows * kTileKeys;
    const auto product = [&](const int32_t* digits, int32_t* sums) {
#ifdef __AVX512BW__
      if (has_vnni_) return score_keys<VnniProduct, kElems>(rows, columns, digits, scratch.packed_k, sums, ahead);
#endif
      score_keys<Int16Product, kElems>(rows, columns, digits, scratch.packed_k, sums, ahead);
    };
    product(q.high + row * kElems, high);
    if constexpr (kHasLow) product(q.low + row * kElems, low);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        VecF x = __builtin_convertvector(load_as<VecI>(high + r * kTileKeys + j), VecF);
        if constexpr (kHasLow) {
          x += __builtin_convertvector(load_as<VecI>(low + r * kTileKeys + j), VecF) * (1.0f / kLowUnit);
        }
        store(s + r * kTileKeys + j, x * (q.unit[row + r] * load(scratch.k_scale + j)));
      }
    }
  }

  void add_int8(int64_t rows, int64_t columns, const Tile<C>& tile, int64_t offset, float unit, const Scratch& scratch,
                float* o, Ahead<kHeadDim, C>& ahead) const {
#ifdef __AVX512BW__
    if (has_vnni_) {
      return add_int8_values<VnniProduct, kHeadDim>(rows, columns, scratch.sums, scratch.softmax, unit, tile.v, offset,
                                                    o, ahead);
    }
#endif
    add_int8_values<Int16Product, kHeadDim>(rows, columns, scratch.sums, scratch.softmax, unit, tile.v, offset, o,
                                            ahead);
  }

  void turn_and_add_bias(const Queries& q, int64_t row, int64_t rows, int64_t first, const Scratch& scratch,
                         float* s) const {
    const int64_t position = p_.chunk_len == 0 ? first : first % p_.chunk_len;
    const Rotation<float> backwards(-(2 * position + kTileKeys - 1), half_inv_freq_, kHalf, 1.0);
    for (int64_t r = 0; r < rows; ++r) {
      rotate_row(q.bias + (row + r) * kHeadDim, kHeadDim, backwards, scratch.turned + r * kHeadDim);
    }
    add_bias<kHeadDim>(rows, scratch.turned, static_cast<const float*>(p_.workspace),
                       reinterpret_cast<float*>(scratch.sums), s);
  }

  const DecodeParams& p_;
  DecodePlan plan_;
  int64_t heads_per_task_, head_blocks_;
  float* partials_;
  double half_inv_freq_[kHalf];
#ifdef __AVX512BW__
  bool has_vnni_ = __builtin_cpu_supports("avx512vnni");
#endif
};

template <typename T, typename C, int kHeadDim>
void run(const DecodeParams& params) {
  const DecodeAttention<T, C, kHeadDim> kernel(params);
  if (params.bias.data != nullptr) {
    parallel_tasks(kHalfTile, 0, [&](int64_t task, std::byte*) { kernel.bias_table_task(task); });
  }
  parallel_tasks_ahead(
      kernel.num_tasks(), kernel.scratch_bytes(),
      [&](int64_t task, int64_t following, std::byte* scratch) { kernel.run_task(task, following, scratch); });
  parallel_tasks(kernel.num_outputs(), 0, [&](int64_t output, std::byte*) { kernel.merge_task(output); });
}

}  // namespace

void decode_attention(const DecodeParams& params) {
  dispatch_float(params.dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_int8 = params.cache_dtype == DType::kInt8;
    if (params.shape.head_dim == 64) {
      is_int8 ? run<T, int8_t, 64>(params) : run<T, T, 64>(params);
    } else {
      is_int8 ? run<T, int8_t, 128>(params) : run<T, T, 128>(params);
    }
  });
}

}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
