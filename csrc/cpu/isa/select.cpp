// Vertical and slash scores: what the last rows attend, summed over columns and along diagonals.
//
// Pass 1: maximum and sum of every row over each split of the keys. Pass 2: with the rows' log-sum-exp known, weights,
// added to the column's score and to the distance's. A task is one split of one kv head, for all query heads of its
// group. Splits do not depend on the number of threads, so results do not either.
//
// Scores are formed transposed, S^T [keys, rows] = K Q^T: keys are broadcast as they lie in memory and only the 64 rows
// are ever packed, once per task. A vector then holds rows, lane i the row i before the last. This makes every sum
// cheap: a row's maximum and sum stay in its lane, and from one key to the next each diagonal moves one lane down, so
// that shifting the 64 running sums lines them up with the next weights and lane 0 drops out complete.
#include "cpu/isa/few_rows.h"
#include "cpu/isa/lanes.h"
#include "cpu/parallel.h"
#include "cpu/plans.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

static_assert(kMaxLastQ == kBlockM, "the voting rows are one block of lanes");
constexpr int kRowVecs = kMaxLastQ / kLanes;
// Keys widened at once, for all heads of the group: 96 KiB at head_dim 128, in L2 beside the group's packed queries.
constexpr int64_t kTileKeys = 192;
// Keys whose scores are used before the next are formed: 3 KiB with AVX-512, in L1 beside one head's 32 KiB of queries.
constexpr int64_t kBlockKeys = 2 * kGemmRows;

// {a[1], ..., a[kLanes - 1], b[0]}
QWEN_SPARSE_INLINE VecF shift_down(VecF a, VecF b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8);
#else
  return __builtin_shufflevector(a, b, 1, 2, 3, 4);
#endif
}

template <typename T, int kHeadDim>
class SelectScores {
  using Dot = typename DotFor<T>::type;
  using Elem = typename Dot::Elem;
  static constexpr int64_t kDepth = kHeadDim / Dot::kPair;

 public:
  explicit SelectScores(const SelectParams& params)
      : p_(params),
        rows_(params.shape.seqlen_q),
        num_keys_(params.shape.seqlen_k),
        group_size_(params.shape.num_heads / params.shape.num_kv_heads),
        num_splits_(ceil_div(num_keys_, kSelectSplit)),
        scale_(params.softmax_scale * kLog2E) {}

  int64_t num_tasks() const { return p_.shape.num_kv_heads * num_splits_; }

  size_t scratch_bytes() const {
    Arena arena(nullptr);
    Scratch scratch(arena, group_size_);
    return arena.used();
  }

  void normalizer_task(int64_t task, std::byte* memory) const {
    const int64_t split = task % num_splits_;
    for (int64_t member = 0; member < group_size_; ++member) {
      const int64_t head = task / num_splits_ * group_size_ + member;
      for (int64_t i = 0; i < kMaxLastQ; ++i) partials(head, split, kPartialMax)[i] = kLowest;
      for (int64_t i = 0; i < kMaxLastQ; ++i) partials(head, split, kPartialSum)[i] = 0.0f;
    }
    for_each_tile(task, memory, [&](const Scratch& scratch, int64_t head, int64_t begin, int64_t count) {
      float* m = partials(head, split, kPartialMax);
      float* l = partials(head, split, kPartialSum);
      for_each_block(scratch, head, begin, count, [&](int64_t, int64_t keys, auto scaled) {
        QWEN_SPARSE_UNROLL
        for (int v = 0; v < kRowVecs; ++v) {
          const VecF old_m = load(m + v * kLanes);
          VecF new_m = old_m;
          for (int64_t key = 0; key < keys; ++key) new_m = vmax(new_m, scaled(key, v));
          VecF sum = load(l + v * kLanes) * exp2_nonpositive(old_m - new_m);
          for (int64_t key = 0; key < keys; ++key) sum += exp2_nonpositive(scaled(key, v) - new_m);
          store(m + v * kLanes, new_m);
          store(l + v * kLanes, sum);
        }
      });
    });
  }

  // The log-sum-exp of one head's rows over all splits.
  void merge_normalizers(int64_t head) const {
    float* lse = partials(head, num_splits_, kLogSumExp);
    for (int64_t i = 0; i < kMaxLastQ; i += kLanes) {
      VecF m = splat(kLowest), l{};
      for (int64_t split = 0; split < num_splits_; ++split) m = vmax(m, load(partials(head, split, kPartialMax) + i));
      for (int64_t split = 0; split < num_splits_; ++split) {
        l += load(partials(head, split, kPartialSum) + i) *
             exp2_nonpositive(load(partials(head, split, kPartialMax) + i) - m);
      }
      for (int lane = 0; lane < kLanes; ++lane) {  // lanes past the rows get no weight
        lse[i + lane] = i + lane < rows_ ? m[lane] + __builtin_log2f(l[lane]) : kInfinity;
      }
    }
  }

  void score_task(int64_t task, std::byte* memory) const {
    const int64_t split = task % num_splits_;
    for (int64_t member = 0; member < group_size_; ++member) {
      const int64_t head = task / num_splits_ * group_size_ + member;
      for (int64_t i = 0; i < kMaxLastQ; ++i) partials(head, split, kOverrun)[i] = 0.0f;
    }
    for_each_tile(task, memory, [&](const Scratch& scratch, int64_t head, int64_t begin, int64_t count) {
      const float* lse = partials(head, num_splits_, kLogSumExp);
      float* pending = partials(head, split, kOverrun);
      float* slash = p_.slash_scores + (head + 1) * num_keys_ - 1;  // distance num_keys - 1 - j from the last row
      VecF diagonals[kRowVecs];  // [i]: the diagonal on which row i before the last meets the coming key
      QWEN_SPARSE_UNROLL
      for (int v = 0; v < kRowVecs; ++v) diagonals[v] = load(pending + v * kLanes);
      for_each_block(scratch, head, begin, count, [&](int64_t block, int64_t keys, auto scaled) {
        for (int64_t key = 0; key < keys; ++key) {
          VecF column{};
          QWEN_SPARSE_UNROLL
          for (int v = 0; v < kRowVecs; ++v) {
            const VecF weight = exp2_nonpositive(scaled(key, v) - load(lse + v * kLanes));
            column += weight;
            diagonals[v] += weight;
          }
          store(scratch.columns + (block + key) * kLanes, column);
          slash[-(begin + block + key)] = diagonals[0][0];
          QWEN_SPARSE_UNROLL
          for (int v = 0; v < kRowVecs; ++v) {
            diagonals[v] = shift_down(diagonals[v], v + 1 < kRowVecs ? diagonals[v + 1] : VecF{});
          }
        }
      });
      QWEN_SPARSE_UNROLL
      for (int v = 0; v < kRowVecs; ++v) store(pending + v * kLanes, diagonals[v]);
      write_columns(scratch.columns, count, p_.vertical_scores + head * num_keys_ + begin);
    });
  }

  // Adds to each split's first diagonals what the split before it left of them.
  void add_overruns() const {
    for (int64_t head = 0; head < p_.shape.num_heads; ++head) {
      for (int64_t split = 0; split + 1 < num_splits_; ++split) {
        const int64_t begin = (split + 1) * kSelectSplit;
        float* slash = p_.slash_scores + (head + 1) * num_keys_ - 1 - begin;
        const float* overrun = partials(head, split, kOverrun);
        for (int64_t i = 0; i < min(kMaxLastQ, num_keys_ - begin); ++i) slash[-i] += overrun[i];
      }
    }
  }

 private:
  enum Partial { kPartialMax, kPartialSum, kOverrun, kLogSumExp = 0 };

  struct Scratch {
    Scratch(Arena& arena, int64_t group_size)
        : k(arena.take<Elem>(kTileKeys * kDepth)),
          q(arena.take<Elem>(group_size * kDepth * kMaxLastQ)),
          s(arena.take<float>(kBlockKeys * kMaxLastQ)),
          columns(arena.take<float>((kTileKeys + kLanes) * kLanes)) {}
    Elem* k;         // [kTileKeys, kDepth]
    Elem* q;         // [group_size, kDepth, kMaxLastQ], last row first
    float* s;        // [kBlockKeys, kMaxLastQ]
    float* columns;  // [kTileKeys, kLanes]: a column's score, yet to be summed over the lanes
  };

  // [kMaxLastQ], last row first; split == num_splits_ holds what the splits merge to.
  float* partials(int64_t head, int64_t split, Partial which) const {
    return static_cast<float*>(p_.workspace) + (head * (num_splits_ + 1) + split) * kSelectPartials + which * kMaxLastQ;
  }

  const T* key_row(int64_t kv_head, int64_t key) const {
    return static_cast<const T*>(p_.k.data) + kv_head * p_.k.head_stride + key * p_.k.row_stride;
  }

  // Asks for the next tile's keys while this one is worked on, a block's worth per block of the group's first head.
  void prefetch_keys(int64_t head, int64_t key, int64_t count) const {
    if (head % group_size_ != 0) return;
    for (int64_t i = 0; i < count; ++i) {
      const T* row = key_row(head / group_size_, min(key + i, num_keys_ - 1));
      for (int64_t d = 0; d < kHeadDim; d += 64 / sizeof(T)) __builtin_prefetch(row + d, 0, 2);
    }
  }

  // Sums [count, kLanes] over the lanes.
  static void write_columns(const float* columns, int64_t count, float* out) {
    for (int64_t key = 0; key < count; key += kLanes) {
      VecF block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(columns + (key + i) * kLanes);
      transpose(block);
      VecF sum = block[0];
      for (int i = 1; i < kLanes; ++i) sum += block[i];
      if (key + kLanes <= count) {
        store(out + key, sum);
      } else {
        memcpy(out + key, &sum, (count - key) * sizeof(float));
      }
    }
  }

  // The rows of one head in `rotation_of(row)` as the right operand [kDepth, kMaxLastQ]. Lanes past the rows repeat
  // the first row: their scores are finite where the others are.
  template <typename RotationOf>
  void pack_q(int64_t head, RotationOf rotation_of, const Scratch& scratch) const {
    Elem* packed = scratch.q + head % group_size_ * kDepth * kMaxLastQ;
    const Rows* rotations[3] = {&p_.q_intra, &p_.q_succ, &p_.q_inter};
    const auto row_of = [&](int64_t lane) {
      const int64_t row = max<int64_t>(rows_ - 1 - lane, 0);
      const Rows& q = *rotations[rotation_of(row)];
      return static_cast<const T*>(q.data) + row * q.row_stride + head * q.head_stride;
    };
    stage_queries_in_lanes<Dot, T>(kMaxLastQ, kHeadDim, row_of, packed);
  }

  // Calls body(scratch, head, begin, count) for each tile of the task's keys and each head of the group, keys
  // ascending.
  template <typename Body>
  void for_each_tile(int64_t task, std::byte* memory, Body body) const {
    Arena arena(memory);
    const Scratch scratch(arena, group_size_);
    const int64_t kv_head = task / num_splits_;
    const int64_t first_position = num_keys_ - rows_;
    const int64_t end = min(num_keys_, (task % num_splits_ + 1) * kSelectSplit);
    for (int64_t begin = task % num_splits_ * kSelectSplit; begin < end;) {
      const int64_t key_chunk = chunk_of(begin, p_.chunk_len);
      const int64_t chunk_end = p_.chunk_len == 0 ? end : min(end, (key_chunk + 1) * p_.chunk_len);
      const auto rotation_of = [&](int64_t row) {
        return rotation_for(chunk_of(first_position + row, p_.chunk_len), key_chunk);
      };
      for (int64_t member = 0; member < group_size_; ++member) {
        pack_q(kv_head * group_size_ + member, rotation_of, scratch);
      }
      for (; begin < chunk_end; begin += kTileKeys) {
        const int64_t count = min(kTileKeys, chunk_end - begin);
        for (int64_t i = 0; i < count; ++i) {
          stage_key<Dot>(key_row(kv_head, begin + i), kHeadDim, scratch.k + i * kDepth);
        }
        for (int64_t member = 0; member < group_size_; ++member) {
          body(scratch, kv_head * group_size_ + member, begin, count);
        }
      }
      begin = chunk_end;
    }
  }

  // Calls body(block, keys, scaled) for each block of a tile's keys; scaled(key, v) are the base-2 scores of the
  // block's key with the rows of vector v, -inf where the key lies after the row.
  template <typename Body>
  void for_each_block(const Scratch& scratch, int64_t head, int64_t begin, int64_t count, Body body) const {
    const Elem* q = scratch.q + head % group_size_ * kDepth * kMaxLastQ;
    const float* s = scratch.s;
    const float scale = scale_;
    for (int64_t block = 0; block < count; block += kBlockKeys) {
      const int64_t keys = min(kBlockKeys, count - block);
      prefetch_keys(head, begin + block + kTileKeys, keys);
      gemm_lanes<Dot, kDepth, false>(keys, kRowVecs, kDepth, scratch.k + block * kDepth, q, scratch.s, nullptr);
      const int64_t keys_after = num_keys_ - 1 - begin - block;  // row i before the last sees keys up to keys_after - i
      if (keys_after >= keys - 1 + kMaxLastQ - 1) {
        body(block, keys, [=](int64_t key, int v) { return load(s + key * kMaxLastQ + v * kLanes) * scale; });
      } else {
        body(block, keys, [=](int64_t key, int v) {
          const VecI row = lane_numbers() + v * kLanes;
          const VecF x = load(s + key * kMaxLastQ + v * kLanes) * scale;
          return row <= static_cast<int32_t>(keys_after - key) ? x : splat(-kInfinity);
        });
      }
    }
  }

  const SelectParams& p_;
  int64_t rows_, num_keys_, group_size_, num_splits_;
  float scale_;
};

template <typename T, int kHeadDim>
void run(const SelectParams& params) {
  const SelectScores<T, kHeadDim> kernel(params);
  parallel_tasks(kernel.num_tasks(), kernel.scratch_bytes(),
                 [&](int64_t task, std::byte* scratch) { kernel.normalizer_task(task, scratch); });
  for (int64_t head = 0; head < params.shape.num_heads; ++head) kernel.merge_normalizers(head);
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
