// Selection of block groups: which groups of 16 keys each block of 64 rows attends (docs/block-groups.md).
//
// First the means of every 16 keys of a kv head, rounded to the dtype of k. Then a task takes 16 blocks of one head,
// whose 64 pooled rows are the lanes of the products of lanes.h: lane 16 s + i is the quarter s of block i, so that the
// mean over a block's quarters is a sum of vectors, and the blocks of a vector are its lanes. Scores of all groups are
// kept (256 bytes a group) until the rows' log-sum-exp is known; then come the shares, 32 groups to a word of the
// bitmap.
#include "cpu/isa/arena.h"
#include "cpu/isa/few_rows.h"
#include "cpu/isa/lanes.h"
#include "cpu/parallel.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int64_t kQuarters = kBlockM / kGroupKeys;   // pooled rows of a block
constexpr int64_t kTaskBlocks = kBlockM / kQuarters;  // blocks of a task: its pooled rows fill the lanes
constexpr int kRowVecs = kBlockM / kLanes;            // of all lanes
constexpr int kBlockVecs = kTaskBlocks / kLanes;      // of one quarter of every block
constexpr int64_t kTileGroups = 192;                  // staged at once: 96 KiB at head_dim 128, as in select.cpp

static_assert(kTaskBlocks == 16 && kQuarters == 4, "lane 16 s + i is quarter s of block i");

// The mean of `count` rows.
template <int kHeadDim, typename T, typename RowOf>
QWEN_SPARSE_INLINE void pool(int64_t count, RowOf row_of, T* out) {
  VecF sum[kHeadDim / kLanes];
  QWEN_SPARSE_UNROLL
  for (int d = 0; d < kHeadDim / kLanes; ++d) sum[d] = VecF{};
  for (int64_t i = 0; i < count; ++i) {
    const T* row = row_of(i);
    QWEN_SPARSE_UNROLL
    for (int d = 0; d < kHeadDim / kLanes; ++d) sum[d] += load(row + d * kLanes);
  }
  const float factor = 1.0f / static_cast<float>(count);
  QWEN_SPARSE_UNROLL
  for (int d = 0; d < kHeadDim / kLanes; ++d) store(out + d * kLanes, sum[d] * factor);
}

template <typename T, int kHeadDim>
class SelectGroups {
  using Dot = typename DotFor<T>::type;
  using Elem = typename Dot::Elem;
  static constexpr int64_t kDepth = kHeadDim / Dot::kPair;

 public:
  explicit SelectGroups(const SelectGroupsParams& params)
      : p_(params),
        past_(params.shape.seqlen_k - params.shape.seqlen_q),
        group_size_(params.shape.num_heads / params.shape.num_kv_heads),
        num_groups_(ceil_div(params.shape.seqlen_k, kGroupKeys)),
        blocks_(params.shape),
        scale_(params.softmax_scale * kLog2E) {}

  int64_t num_pool_tasks() const { return p_.shape.num_kv_heads * ceil_div(num_groups_, kTileGroups); }
  int64_t num_tasks() const { return p_.shape.num_heads * ceil_div(blocks_.count, kTaskBlocks); }

  size_t scratch_bytes() const {
    Arena arena(nullptr);
    Scratch scratch(arena, num_groups_);
    return arena.used();
  }

  void pool_task(int64_t task) const {
    const int64_t splits = ceil_div(num_groups_, kTileGroups);
    const int64_t kv_head = task / splits, begin = task % splits * kTileGroups;
    const T* k = static_cast<const T*>(p_.k.data) + kv_head * p_.k.head_stride;
    for (int64_t group = begin; group < min(begin + kTileGroups, num_groups_); ++group) {
      const T* first = k + group * kGroupKeys * p_.k.row_stride;
      pool<kHeadDim>(
          min(kGroupKeys, p_.shape.seqlen_k - group * kGroupKeys),
          [=](int64_t i) { return first + i * p_.k.row_stride; }, pooled_key(kv_head, group));
    }
  }

  // The last blocks first: they see most keys.
  void run_task(int64_t task, std::byte* memory) const {
    const int64_t per_head = ceil_div(blocks_.count, kTaskBlocks);
    const int64_t head = task % p_.shape.num_heads;
    Arena arena(memory);
    const Scratch scratch(arena, num_groups_);
    Blocks blocks;
    blocks.first = blocks_.first + (per_head - 1 - task / p_.shape.num_heads) * kTaskBlocks;
    blocks.count = min(kTaskBlocks, blocks_.first + blocks_.count - blocks.first);
    blocks.num_groups = min(num_groups_, (blocks.first + blocks.count) * kQuarters);
    pool_rows(blocks, head, scratch);
    score(blocks, head, scratch);
    choose(blocks, head, scratch);
  }

 private:
  static constexpr int64_t kMoreRows = 31;  // that multiply() writes behind the last group, on tiles

  struct Blocks {
    int64_t first, count, num_groups;  // num_groups: that some of them see
  };

  struct Scratch {
    Scratch(Arena& arena, int64_t num_groups)
        : rows(arena.take<T>(3 * kBlockM * kHeadDim)),
          q(arena.take<Elem>(kDepth * kBlockM)),
          k(arena.take<Elem>(kTileGroups * kDepth)),
          m(arena.take<float>(kBlockM)),
          l(arena.take<float>(kBlockM)),
          share(arena.take<float>(kBlockM)),
          s(arena.take<float>((num_groups + kMoreRows) * kBlockM)) {}
    T* rows;       // [3 rotations][kBlockM lanes][kHeadDim], pooled
    Elem *q, *k;   // operands
    float *m, *l;  // [kBlockM] maximum and sum of each lane, in base 2
    float* share;  // [kBlockM] part of its block's mean that a lane is; 0 where it has no rows
    float* s;      // [num_groups][kBlockM] scores, unscaled
  };

  T* pooled_key(int64_t kv_head, int64_t group) const {
    return static_cast<T*>(p_.workspace) + (kv_head * num_groups_ + group) * kHeadDim;
  }

  // Rows of the call in the quarter that is `lane`.
  void rows_of(const Blocks& blocks, int64_t lane, int64_t& begin, int64_t& count) const {
    const int64_t first = (blocks.first + lane % kTaskBlocks) * kBlockM + lane / kTaskBlocks * kGroupKeys;
    begin = max(first, past_);
    count = max<int64_t>(0, min(first + kGroupKeys, p_.shape.seqlen_k) - begin);
  }

  void pool_rows(const Blocks& blocks, int64_t head, const Scratch& scratch) const {
    const Rows* rotations[3] = {&p_.q_intra, &p_.q_succ, &p_.q_inter};
    float quarters[kTaskBlocks] = {};
    for (int64_t lane = 0; lane < kBlockM; ++lane) {
      int64_t begin, count;
      rows_of(blocks, lane, begin, count);
      quarters[lane % kTaskBlocks] += count > 0 ? 1.0f : 0.0f;
      for (int rotation = 0; rotation < (p_.chunk_len == 0 ? 1 : 3); ++rotation) {
        T* out = scratch.rows + (rotation * kBlockM + lane) * kHeadDim;
        if (count == 0) {
          memset(out, 0, kHeadDim * sizeof(T));
          continue;
        }
        const Rows& q = *rotations[rotation];
        const T* first = static_cast<const T*>(q.data) + (begin - past_) * q.row_stride + head * q.head_stride;
        pool<kHeadDim>(count, [&](int64_t i) { return first + i * q.row_stride; }, out);
      }
    }
    for (int64_t lane = 0; lane < kBlockM; ++lane) {
      int64_t begin, count;
      rows_of(blocks, lane, begin, count);
      scratch.share[lane] = count > 0 ? 1.0f / quarters[lane % kTaskBlocks] : 0.0f;
    }
  }

  // Scores of all groups, and each lane's maximum and sum.
  void score(const Blocks& blocks, int64_t head, const Scratch& scratch) const {
    for (int64_t i = 0; i < kBlockM; ++i) scratch.m[i] = kLowest;
    for (int64_t i = 0; i < kBlockM; ++i) scratch.l[i] = 0.0f;
    const int64_t chunk_groups = p_.chunk_len == 0 ? blocks.num_groups : p_.chunk_len / kGroupKeys;
    for (int64_t begin = 0; begin < blocks.num_groups;) {
      const int64_t key_chunk = begin / chunk_groups;
      const int64_t chunk_end = min(blocks.num_groups, (key_chunk + 1) * chunk_groups);
      stage_queries_in_lanes<Dot, T>(
          kBlockM, kHeadDim,
          [&](int64_t lane) {
            const int64_t row_chunk = chunk_of((blocks.first + lane % kTaskBlocks) * kBlockM, p_.chunk_len);
            const int rotation = p_.chunk_len == 0 ? 0 : rotation_for(row_chunk, key_chunk);
            return scratch.rows + (rotation * kBlockM + lane) * kHeadDim;
          },
          scratch.q);
      for (; begin < chunk_end; begin += kTileGroups) {
        const int64_t count = min(kTileGroups, chunk_end - begin);
        for (int64_t i = 0; i < count; ++i) {
          stage_key<Dot>(static_cast<const T*>(pooled_key(head / group_size_, begin + i)), kHeadDim,
                         scratch.k + i * kDepth);
        }
        float* s = scratch.s + begin * kBlockM;
        multiply(count, scratch.k, scratch.q, s);
        update_sums(blocks, begin, count, scratch);
      }
      begin = chunk_end;
    }
  }

  // s [count][kBlockM] = k q; some rows behind them may be overwritten.
  static void multiply(int64_t count, const Elem* k, const Elem* q, float* s) {
#ifdef QWEN_SPARSE_TILES
    if constexpr (Dot::kPair == 2) {
      gemm_on_tiles<kDepth>(count, k, q, s);
    } else
#endif
    {
      gemm_lanes<Dot, kDepth, false>(count, kRowVecs, kDepth, k, q, s, nullptr);
    }
  }

  // The last group that each lane sees: causal by the last row of its quarter.
  VecI last_group(const Blocks& blocks, int v) const {
    const int quarter = v / kBlockVecs, first = v % kBlockVecs * kLanes;
    return (lane_numbers() + static_cast<int32_t>(blocks.first + first)) * static_cast<int32_t>(kQuarters) + quarter;
  }

  void update_sums(const Blocks& blocks, int64_t begin, int64_t count, const Scratch& scratch) const {
    const bool masked = begin + count - 1 > blocks.first * kQuarters;
    for (int v = 0; v < kRowVecs; ++v) {
      const VecI last = last_group(blocks, v);
      float* s = scratch.s + begin * kBlockM + v * kLanes;
      const VecF old_m = load(scratch.m + v * kLanes);
      VecF m = old_m;
      for (int64_t i = 0; i < count; ++i) {
        VecF x = load(s + i * kBlockM) * scale_;
        if (masked) x = last >= static_cast<int32_t>(begin + i) ? x : splat(-kInfinity);
        store(s + i * kBlockM, x);
        m = vmax(m, x);
      }
      VecF sum = load(scratch.l + v * kLanes) * exp2_nonpositive(old_m - m);
      for (int64_t i = 0; i < count; ++i) sum += exp2_nonpositive(load(s + i * kBlockM) - m);
      store(scratch.m + v * kLanes, m);
      store(scratch.l + v * kLanes, sum);
    }
  }

  // Bits, and what the groups hold.
  void choose(const Blocks& blocks, int64_t head, const Scratch& scratch) const {
    VecF lse[kRowVecs];  // + log2 of the number of quarters; infinite where a lane counts nothing
    for (int v = 0; v < kRowVecs; ++v) {
      for (int i = 0; i < kLanes; ++i) {
        const int64_t lane = v * kLanes + i;
        const float share = scratch.share[lane];
        lse[v][i] = share > 0.0f ? scratch.m[lane] + __builtin_log2f(scratch.l[lane] / share) : kInfinity;
      }
    }
    const int64_t first = head * blocks_.count + blocks.first - blocks_.first;
    for (int v = 0; v < kBlockVecs; ++v) {
      VecF least = splat(kInfinity);  // of an attended group's share
      for (int i = 0; i < kLanes && v * kLanes + i < blocks.count; ++i) {
        least[i] = p_.thresholds[first + v * kLanes + i] * static_cast<float>(kGroupKeys);
      }
      const VecI own = last_group(blocks, v);  // the first of each block
      VecF kept{};
      for (int64_t word = 0; word < p_.group_words; ++word) {
        VecI bits{};
        const int64_t begin = word * 32, end = min(begin + 32, blocks.num_groups);
        for (int64_t group = begin; group < end; ++group) {
          VecF share{};
          for (int quarter = 0; quarter < kQuarters; ++quarter) {
            const int of_quarter = quarter * kBlockVecs + v;
            share += exp2_nonpositive(load(scratch.s + group * kBlockM + of_quarter * kLanes) - lse[of_quarter]);
          }
          const auto number = static_cast<int32_t>(group);
          const VecI forced = (VecI{} + number < static_cast<int32_t>(kForcedGroups)) |
                              (VecI{} + number >= own - static_cast<int32_t>(kQuarters));
          const VecI seen = VecI{} + number < own + static_cast<int32_t>(kQuarters);
          const VecI attended = ((share < least ? VecI{} : VecI{} - 1) | forced) & seen;  // a NaN is attended
          bits |= attended & (VecI{} + static_cast<int32_t>(1u << (group - begin)));
          kept += attended ? share : VecF{};
        }
        for (int i = 0; i < kLanes && v * kLanes + i < blocks.count; ++i) {
          p_.block_groups[(first + v * kLanes + i) * p_.group_words + word] = static_cast<uint32_t>(bits[i]);
        }
      }
      for (int i = 0; i < kLanes && v * kLanes + i < blocks.count; ++i) p_.kept[first + v * kLanes + i] = kept[i];
    }
  }

  const SelectGroupsParams& p_;
  int64_t past_, group_size_, num_groups_;
  RowBlocks blocks_;
  float scale_;
};

template <typename T, int kHeadDim>
void run(const SelectGroupsParams& params) {
  const SelectGroups<T, kHeadDim> kernel(params);
  parallel_tasks(kernel.num_pool_tasks(), 0, [&](int64_t task, std::byte*) { kernel.pool_task(task); });
  parallel_tasks(kernel.num_tasks(), kernel.scratch_bytes(),
                 [&](int64_t task, std::byte* scratch) { kernel.run_task(task, scratch); });
}

}  // namespace

void select_groups(const SelectGroupsParams& params) {
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
