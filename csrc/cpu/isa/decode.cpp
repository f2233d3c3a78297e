// Decode attention: a few rows per sequence against a paged cache, split over keys, partial results merged.
//
// A task is one range of kDecodeSplit keys of one kv head; all query heads of its group and all rows are the rows of
// one block. int8 values are scaled while they are packed. The key bias that the cache leaves out enters the scores:
// for a tile that starts at rotation j0, q . R_{j0+t} b = (R_{-j0} q) . (R_t b), and the matrix [R_t b] is made once.
#include "cpu/isa/few_rows.h"
#include "cpu/isa/trig.h"
#include "cpu/parallel.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

static_assert(kBiasTable == kBlockN, "the bias table covers one tile of keys");

template <typename T, typename C, int kHeadDim>
class DecodeAttention {
 public:
  explicit DecodeAttention(const DecodeParams& params)
      : p_(params), plan_(params), partials_(params.workspace + plan_.bias_table_size) {}

  int64_t num_tasks() const { return plan_.num_tasks; }
  int64_t num_outputs() const { return p_.batch * p_.shape.seqlen_q * p_.shape.num_heads; }

  size_t scratch_bytes() const {
    Arena arena(nullptr);
    Scratch scratch(arena);
    return arena.used();
  }

  // Packed [head_dim][kBlockN]: R_t b of one kv head for t in [0, kBlockN).
  void bias_table_task(int64_t kv_head) const {
    float* table = bias_table(kv_head);
    const float* bias = p_.bias.data + kv_head * kHeadDim;
    float rotated[kHeadDim];
    for (int64_t t = 0; t < kBlockN; ++t) {
      rotate_row(bias, kHeadDim, Rotation<float>(t, p_.bias.inv_freq, kHeadDim / 2, p_.bias.attention_factor), rotated);
      for (int64_t d = 0; d < kHeadDim; ++d) table[d * kBlockN + t] = rotated[d];
    }
  }

  void run_task(int64_t index, std::byte* memory) const {
    Arena arena(memory);
    const Scratch scratch(arena);
    const Task task(plan_, p_, index);
    const SoftmaxState state = state_of(index);
    const int64_t rows = task.num_rows * plan_.group_size;
    reset(state, rows, kHeadDim);
    const int64_t seqlen_k = p_.seqlens_k[task.batch];
    const int64_t first_position = seqlen_k - p_.shape.seqlen_q + task.first_row;
    const int64_t lowest = first_position - p_.window + 1;
    const int64_t begin = max(task.split * kDecodeSplit, lowest);
    const int64_t end = min((task.split + 1) * kDecodeSplit, first_position + task.num_rows);
    if (begin >= end) return;

    for (int64_t m = 0; m < rows; ++m) {
      const int64_t position = first_position + m / plan_.group_size;
      scratch.row_chunks[m] = chunk_of(position, p_.chunk_len);
      scratch.limits[m] = {static_cast<int32_t>(max<int64_t>(position - p_.window, INT32_MIN)),
                           static_cast<int32_t>(position)};
    }
    stage_queries(task, scratch);
    const int64_t last_limit = scratch.limits[rows - 1].lower;
    for (int64_t key = begin; key < end;) {
      const int64_t count = tile_end(key, end, p_.chunk_len) - key;
      load_tile(task, key, count, scratch);
      score(task, rows, key, count, scratch);
      const bool masked = count % kLanes != 0 || key + count - 1 > first_position || key <= last_limit;
      attend_scores<Fp32Dot>(rows, count, kHeadDim, scratch.s, scratch.packed_v, p_.softmax_scale * kLog2E,
                             masked ? scratch.limits : nullptr, scratch.positions, state);
      key += count;
    }
  }

  // Merges the splits of one (sequence, row, head).
  void merge_task(int64_t output) const {
    const int64_t head = output % p_.shape.num_heads;
    const int64_t row = output / p_.shape.num_heads % p_.shape.seqlen_q;
    const int64_t batch = output / p_.shape.num_heads / p_.shape.seqlen_q;
    const int64_t kv_head = head / plan_.group_size;
    const int64_t m_index = row % plan_.rows_per_task * plan_.group_size + head % plan_.group_size;
    const int64_t first_task =
        ((batch * p_.shape.num_kv_heads + kv_head) * plan_.row_blocks + row / plan_.rows_per_task) * plan_.num_splits;
    float m = -kInfinity, l = 0.0f;
    for (int64_t split = 0; split < plan_.num_splits; ++split) m = max(m, state_of(first_task + split).m[m_index]);
    float o[kHeadDim];
    for (int64_t d = 0; d < kHeadDim; d += kLanes) store(o + d, VecF{});
    for (int64_t split = 0; split < plan_.num_splits && m > -kInfinity; ++split) {
      const SoftmaxState part = state_of(first_task + split);
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
  struct Task {
    Task(const DecodePlan& plan, const DecodeParams& p, int64_t index)
        : split(index % plan.num_splits),
          first_row(index / plan.num_splits % plan.row_blocks * plan.rows_per_task),
          num_rows(min(plan.rows_per_task, p.shape.seqlen_q - first_row)),
          kv_head(index / plan.num_splits / plan.row_blocks % p.shape.num_kv_heads),
          batch(index / plan.num_splits / plan.row_blocks / p.shape.num_kv_heads) {}
    int64_t split, first_row, num_rows, kv_head, batch;
  };

  struct Scratch {
    explicit Scratch(Arena& arena)
        : packed_k(arena.take<float>(kBlockN * kHeadDim)),
          packed_v(arena.take<float>(kBlockN * kHeadDim)),
          s(arena.take<float>(kMaxDecodeRows * kBlockN)),
          unrotated(arena.take<float>(kMaxDecodeRows * kHeadDim)),
          limits(arena.take<RowLimits>(kMaxDecodeRows)),
          row_chunks(arena.take<int64_t>(kMaxDecodeRows)),
          positions(arena.take<int32_t>(kBlockN)) {
      for (float*& rotation : q) rotation = arena.take<float>(kMaxDecodeRows * kHeadDim);
    }
    float *packed_k, *packed_v, *s, *unrotated;
    RowLimits* limits;
    int64_t* row_chunks;
    int32_t* positions;
    float* q[3];
  };

  float* bias_table(int64_t kv_head) const { return p_.workspace + kv_head * kHeadDim * kBlockN; }

  SoftmaxState state_of(int64_t task) const {
    const int64_t rows = plan_.rows_per_task * plan_.group_size;
    float* base = partials_ + task * plan_.floats_per_task;
    return {base, base + rows, base + 2 * rows};
  }

  void stage_queries(const Task& task, const Scratch& scratch) const {
    const Rows* rotations[3] = {&p_.q_intra, &p_.q_succ, &p_.q_inter};
    for (int i = 0; i < (p_.chunk_len == 0 ? 1 : 3); ++i) {
      for (int64_t m = 0; m < task.num_rows * plan_.group_size; ++m) {
        const int64_t row = task.batch * p_.shape.seqlen_q + task.first_row + m / plan_.group_size;
        const int64_t head = task.kv_head * plan_.group_size + m % plan_.group_size;
        const T* q = static_cast<const T*>(rotations[i]->data) + row * rotations[i]->row_stride +
                     head * rotations[i]->head_stride;
        stage_query_row<Fp32Dot>(q, kHeadDim, scratch.q[i] + m * kHeadDim);
      }
    }
  }

  int64_t offset(const Pages& pages, const Task& task, int64_t key) const {
    const int64_t page = p_.block_table[task.batch * p_.block_table_stride + key / p_.page_size];
    return page * pages.page_stride + key % p_.page_size * pages.row_stride + task.kv_head * pages.head_stride;
  }

  void load_tile(const Task& task, int64_t first, int64_t count, const Scratch& scratch) const {
    for (int64_t i = 0; i < kBlockN; ++i) {
      scratch.positions[i] = i < count ? static_cast<int32_t>(first + i) : INT32_MAX;
    }
    const auto row_in = [&, this](const Pages* values, const Pages* scales) {
      return [=, &task, this](int64_t i) {
        const C* row = static_cast<const C*>(values->data) + offset(*values, task, first + i);
        if constexpr (sizeof(C) == 1) {
          return Int8Row{row, static_cast<const float*>(scales->data)[offset(*scales, task, first + i)]};
        } else {
          return row;
        }
      };
    };
    pack_k<Fp32Dot>(count, kHeadDim, row_in(&p_.k, &p_.k_scale), scratch.packed_k);
    pack_v<Fp32Dot>(count, kHeadDim, row_in(&p_.v, &p_.v_scale), scratch.packed_v);
  }

  void score(const Task& task, int64_t rows, int64_t first, int64_t count, const Scratch& scratch) const {
    for_each_rotation(scratch.row_chunks, rows, chunk_of(first, p_.chunk_len),
                      [&](int64_t row, int64_t num_rows, int rotation) {
                        const float* q = scratch.q[rotation] + row * kHeadDim;
                        float* s = scratch.s + row * kBlockN;
                        score_tile<Fp32Dot>(num_rows, count, kHeadDim, q, scratch.packed_k, s);
                        if (p_.bias.data != nullptr) add_bias(task, num_rows, first, count, q, scratch, s);
                      });
  }

  void add_bias(const Task& task, int64_t rows, int64_t first, int64_t count, const float* q, const Scratch& scratch,
                float* s) const {
    const int64_t position = p_.chunk_len == 0 ? first : first % p_.chunk_len;
    const Rotation<float> backwards(-position, p_.bias.inv_freq, kHeadDim / 2, 1.0);
    for (int64_t r = 0; r < rows; ++r) {
      rotate_row(q + r * kHeadDim, kHeadDim, backwards, scratch.unrotated + r * kHeadDim);
    }
    gemm<Fp32Dot>(rows, round_up_to_lanes(count), kHeadDim, scratch.unrotated, kHeadDim, bias_table(task.kv_head),
                  kBlockN, s, kBlockN, true);
  }

  const DecodeParams& p_;
  DecodePlan plan_;
  float* partials_;
};

template <typename T, typename C, int kHeadDim>
void run(const DecodeParams& params) {
  const DecodeAttention<T, C, kHeadDim> kernel(params);
  if (params.bias.data != nullptr) {
    parallel_tasks(params.shape.num_kv_heads, 0, [&](int64_t task, std::byte*) { kernel.bias_table_task(task); });
  }
  parallel_tasks(kernel.num_tasks(), kernel.scratch_bytes(),
                 [&](int64_t task, std::byte* scratch) { kernel.run_task(task, scratch); });
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
