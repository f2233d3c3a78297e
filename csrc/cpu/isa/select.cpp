// Vertical and slash scores: what the last rows attend, summed over columns and along diagonals.
//
// Pass 1: running maximum and sum of every row over each split of the keys. Pass 2: with the rows' log-sum-exp known,
// weights tile by tile, added to the column's score and to the diagonal's. A diagonal is addressed by where the last
// row meets it, u = j + (p_last - p): consecutive keys of a row are consecutive there, and a split's diagonals overrun
// its end by at most rows - 1 entries, which go to a buffer of their own and are added in order afterwards.
#include "cpu/isa/few_rows.h"
#include "cpu/parallel.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

template <typename T, int kHeadDim>
class SelectScores {
  using Dot = typename DotFor<T>::type;
  using Elem = typename Dot::Elem;

 public:
  explicit SelectScores(const SelectParams& params)
      : p_(params),
        rows_(params.shape.seqlen_q),
        num_keys_(params.shape.seqlen_k),
        group_size_(params.shape.num_heads / params.shape.num_kv_heads),
        num_splits_(ceil_div(num_keys_, kSelectSplit)) {
    for (int64_t r = 0; r < rows_; ++r) row_chunks_[r] = chunk_of(position_of(r), p_.chunk_len);
  }

  int64_t num_tasks() const { return p_.shape.num_heads * num_splits_; }

  size_t scratch_bytes() const {
    Arena arena(nullptr);
    Scratch scratch(arena);
    return arena.used();
  }

  void normalizer_task(int64_t task, std::byte* memory) const {
    float* m = partials(task, kPartialMax);
    float* l = partials(task, kPartialSum);
    for (int64_t r = 0; r < rows_; ++r) m[r] = -kInfinity;
    for (int64_t r = 0; r < rows_; ++r) l[r] = 0.0f;
    for_each_tile(task, memory, [&](const Scratch& scratch, int64_t begin, int64_t count) {
      for (int64_t r = 0; r < rows_; ++r) {
        float* s = scratch.s + r * kBlockN;
        const int64_t columns = mask_row(s, r, begin, count);
        VecF highest = splat(m[r]);
        for (int64_t j = 0; j < columns; j += kLanes) highest = vmax(highest, load(s + j));
        const float new_m = reduce_max(highest);
        if (new_m == -kInfinity) continue;
        VecF sum{};
        for (int64_t j = 0; j < columns; j += kLanes) sum += exp2_nonpositive(load(s + j) - new_m);
        l[r] = l[r] * exp2_nonpositive(splat(m[r] - new_m))[0] + reduce_sum(sum);
        m[r] = new_m;
      }
    });
  }

  void score_task(int64_t task, std::byte* memory) const {
    const int64_t head = task / num_splits_;
    const int64_t split_end = min(num_keys_, (task % num_splits_ + 1) * kSelectSplit);
    float* vertical = p_.vertical_scores + head * num_keys_;
    float* slash = p_.slash_scores + head * num_keys_;
    float* overrun = partials(task, kOverrun);
    for (int64_t i = 0; i < kMaxLastQ; ++i) overrun[i] = 0.0f;
    float lse[kMaxLastQ];
    for (int64_t r = 0; r < rows_; ++r) lse[r] = row_lse(head, r);
    for_each_tile(task, memory, [&](const Scratch& scratch, int64_t begin, int64_t count) {
      const int64_t columns = round_up_to_lanes(count);
      for (int64_t i = 0; i < kBlockN + kMaxLastQ; i += kLanes) store(scratch.diagonals + i, VecF{});
      for (int64_t r = 0; r < rows_; ++r) {
        float* s = scratch.s + r * kBlockN;
        mask_row(s, r, begin, count);
        float* diagonal = scratch.diagonals + (rows_ - 1 - r);
        for (int64_t j = 0; j < columns; j += kLanes) {
          const VecF weight = exp2_nonpositive(load(s + j) - lse[r]);
          store(s + j, weight);
          store(diagonal + j, load(diagonal + j) + weight);
        }
      }
      for (int64_t j = 0; j < columns; j += kLanes) {
        VecF sum{};
        for (int64_t r = 0; r < rows_; ++r) sum += load(scratch.s + r * kBlockN + j);
        store(scratch.s + j, sum);
      }
      for (int64_t j = 0; j < count; ++j) vertical[begin + j] = scratch.s[j];
      for (int64_t i = 0; i < count + rows_ - 1; ++i) {
        const int64_t u = begin + i;
        if (u < split_end) {
          slash[u] += scratch.diagonals[i];
        } else {
          overrun[u - split_end] += scratch.diagonals[i];
        }
      }
    });
  }

  void add_overruns() const {
    for (int64_t task = 0; task < num_tasks(); ++task) {
      float* slash = p_.slash_scores + task / num_splits_ * num_keys_;
      const int64_t begin = (task % num_splits_ + 1) * kSelectSplit;
      const float* overrun = partials(task, kOverrun);
      for (int64_t i = 0; i < min(kMaxLastQ, num_keys_ - begin); ++i) slash[begin + i] += overrun[i];
    }
  }

 private:
  enum Partial { kPartialMax, kPartialSum, kOverrun };

  struct Scratch {
    explicit Scratch(Arena& arena)
        : packed_k(arena.take<Elem>(kBlockN * kHeadDim / Dot::kPair)),
          s(arena.take<float>(kMaxLastQ * kBlockN)),
          diagonals(arena.take<float>(kBlockN + 2 * kMaxLastQ)) {
      for (Elem*& rotation : q) rotation = arena.take<Elem>(kMaxLastQ * kHeadDim / Dot::kPair);
    }
    Elem* packed_k;
    float *s, *diagonals;
    Elem* q[3];
  };

  int64_t position_of(int64_t row) const { return num_keys_ - rows_ + row; }

  float* partials(int64_t task, Partial which) const {
    return p_.workspace + task * kSelectPartials + which * kMaxLastQ;
  }

  float row_lse(int64_t head, int64_t row) const {
    float m = -kInfinity, l = 0.0f;
    for (int64_t split = 0; split < num_splits_; ++split) {
      m = max(m, partials(head * num_splits_ + split, kPartialMax)[row]);
    }
    for (int64_t split = 0; split < num_splits_; ++split) {
      const int64_t task = head * num_splits_ + split;
      l += partials(task, kPartialSum)[row] * exp2_nonpositive(splat(partials(task, kPartialMax)[row] - m))[0];
    }
    return m + __builtin_log2f(l);
  }

  // Scales a row's scores to base 2 and masks what the row does not see; returns the padded number of columns.
  int64_t mask_row(float* s, int64_t row, int64_t begin, int64_t count) const {
    const int64_t columns = round_up_to_lanes(count);
    const float scale = p_.softmax_scale * kLog2E;
    for (int64_t j = 0; j < columns; j += kLanes) store(s + j, load(s + j) * scale);
    for (int64_t j = max<int64_t>(0, min(count, position_of(row) + 1 - begin)); j < columns; ++j) s[j] = -kInfinity;
    return columns;
  }

  // Scores of all rows of the task's head against each tile of its split.
  template <typename Body>
  void for_each_tile(int64_t task, std::byte* memory, Body body) const {
    Arena arena(memory);
    const Scratch scratch(arena);
    const int64_t head = task / num_splits_;
    const Rows* rotations[3] = {&p_.q_intra, &p_.q_succ, &p_.q_inter};
    for (int i = 0; i < (p_.chunk_len == 0 ? 1 : 3); ++i) {
      const T* q = static_cast<const T*>(rotations[i]->data) + head * rotations[i]->head_stride;
      for (int64_t r = 0; r < rows_; ++r) {
        stage_query_row<Dot>(q + r * rotations[i]->row_stride, kHeadDim, scratch.q[i] + r * kHeadDim / Dot::kPair);
      }
    }
    const T* keys = static_cast<const T*>(p_.k.data) + head / group_size_ * p_.k.head_stride;
    const int64_t end = min(num_keys_, (task % num_splits_ + 1) * kSelectSplit);
    for (int64_t begin = task % num_splits_ * kSelectSplit; begin < end;) {
      const int64_t count = tile_end(begin, end, p_.chunk_len) - begin;
      pack_k<Dot>(count, kHeadDim, [&](int64_t i) { return keys + (begin + i) * p_.k.row_stride; }, scratch.packed_k);
      for_each_rotation(row_chunks_, rows_, chunk_of(begin, p_.chunk_len),
                        [&](int64_t row, int64_t num_rows, int rotation) {
                          score_tile<Dot>(num_rows, count, kHeadDim, scratch.q[rotation] + row * kHeadDim / Dot::kPair,
                                          scratch.packed_k, scratch.s + row * kBlockN);
                        });
      body(scratch, begin, count);
      begin += count;
    }
  }

  const SelectParams& p_;
  int64_t rows_, num_keys_, group_size_, num_splits_;
  int64_t row_chunks_[kMaxLastQ];
};

template <typename T, int kHeadDim>
void run(const SelectParams& params) {
  const SelectScores<T, kHeadDim> kernel(params);
  parallel_tasks(kernel.num_tasks(), kernel.scratch_bytes(),
                 [&](int64_t task, std::byte* scratch) { kernel.normalizer_task(task, scratch); });
  parallel_tasks(kernel.num_tasks(), kernel.scratch_bytes(),
                 [&](int64_t task, std::byte* scratch) { kernel.score_task(task, scratch); });
  kernel.add_overruns();
}

}  // namespace

void select_scores(const SelectParams& params) {
  dispatch_float(params.dtype, [&](auto type) {
    using T = decltype(type);
    if (params.shape.head_dim == 64) {
      run<T, 64>(params);
    } else {
      run<T, 128>(params);
    }
  });
}

}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
