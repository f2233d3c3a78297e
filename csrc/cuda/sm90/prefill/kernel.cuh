// Prefill attention on Hopper: dense or over a sparse set, plain or dual-chunk, one online softmax.
//
// Grid: persistent CTAs, one per SM. Work items are 128-row tiles of a head, taken from a counter in the order of
// `item_rows`: sections of heads that L2 can hold, in them the last rows of the prompt first, heads of a row tile next
// to each other.
// Warpgroups: 0 is the producer: one of its threads (for block groups a warp, which reads bitmaps together) takes work
// items, walks their key tiles and has the copy engine (TMA) fetch Q, K and V. 1 and 2 are consumers, each with one
// 64-row block: QK^T and PV by wgmma, accumulators and weights in registers. QK^T of a tile is started together with PV
// of the tile before, and the softmax of the tile runs under that PV. At tiles that both attend, the consumers take
// turns at starting products, so that one computes weights while the other multiplies; a tile that its block does not
// attend, a consumer passes over without waiting for the other one, as far as the stages reach (docs/hopper-kernel.md).
// Shared memory: Q; stages of K and V, each with the description of its tile (Slot); barriers.
//
// Barriers: full ones count the producer's arrival and the bytes of a copy, empty ones the warps of both consumers. A
// slot's description is written before k_full completes and read until k_empty does.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/common/attention.h"
#include "cuda/common/ptx.h"
#include "cuda/common/softmax.h"
#include "cuda/sm90/barrier.h"
#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/wgmma.h"

namespace qwen_sparse::sm90::prefill {

namespace ptx = cuda::ptx;
using cuda::Use;

template <typename Tile>
struct Slot {
  Tile tile;       // no keys: the rows attend none
  RowTile rows;    // set where a row tile starts
  uint32_t flags;  // of SlotFlag
};

enum SlotFlag : uint32_t {
  kStartsRows = 1,   // first tile of a row tile
  kEndsRows = 2,     // last
  kStartsStage = 4,  // first tile of a stage of dual-chunk attention: Q changes
  kEndsStage = 8,    // last
  kEndsWork = 16,    // behind the last row tile; nothing else is set
};

template <int kHeadDim, typename Tiles>
struct SharedMemory {
  using C = Config<kHeadDim, Tiles>;
  alignas(kSwizzleBytes) uint8_t q[C::kQBytes];
  alignas(kSwizzleBytes) uint8_t k[C::kStages][C::kTileBytes];
  alignas(kSwizzleBytes) uint8_t v[C::kStages][C::kTileBytes];
  Slot<typename Tiles::Tile> slots[C::kStages];
  RowTile rows;  // the producer's; in registers they would spill
  Tiles tiles;
  Barrier k_full[C::kStages], k_empty[C::kStages];
  Barrier v_full[C::kStages], v_empty[C::kStages];
  Barrier q_full, q_empty;
  Barrier turn[kNumConsumers];  // of a consumer, to start products; counts the warps of the other one

  __device__ void init_barriers() {
    constexpr int kConsumerWarps = kNumConsumers * 4;
    for (int i = 0; i < C::kStages; ++i) {
      k_full[i].init(1);
      v_full[i].init(1);
      k_empty[i].init(kConsumerWarps);
      v_empty[i].init(kConsumerWarps);
    }
    q_full.init(1);
    q_empty.init(kConsumerWarps);
    for (Barrier& barrier : turn) barrier.init(4);
    fence_barriers();
  }
};

// A position in the ring of stages. `phase` is the parity of the visit: what waits for a full barrier gives it, what
// waits for an empty one gives its opposite, so that the first visit does not wait.
struct Cursor {
  int index = 0;
  uint32_t phase = 0;
  int32_t steps = 0;  // that led here

  template <int kStages>
  __device__ __forceinline__ void advance() {
    ++steps;
    if (++index == kStages) {
      index = 0;
      phase ^= 1;
    }
  }
};

// Row tile of work item `item`.
__device__ __forceinline__ RowTile item_rows(const Args& args, int32_t item) {
  const auto row_tiles = static_cast<int32_t>(args.common.tiles.count);
  const int32_t section = item / (row_tiles * args.heads_per_section);
  const int32_t rest = item - section * row_tiles * args.heads_per_section;
  const int32_t number = row_tiles - 1 - rest / args.heads_per_section;
  return RowTile(args.common, number, section * args.heads_per_section + rest % args.heads_per_section);
}

// Tiles::kThreads threads, of which the first acts.
template <int kHeadDim, typename Tiles>
class Producer {
  using C = Config<kHeadDim, Tiles>;
  using Shared = SharedMemory<kHeadDim, Tiles>;
  using Tile = typename Tiles::Tile;

 public:
  __device__ Producer(const Args& args, Shared& shared) : args_(args), shared_(shared) {}

  __device__ void run() {
    for (;;) {
      const int32_t item = next_item();
      if (item >= args_.num_items) break;
      if (acts()) shared_.rows = item_rows(args_, item);
      synchronize();
      shared_.tiles.start(args_.common, shared_.rows);
      Tile tile = shared_.tiles.next();
      if (tile.count == 0) emit(tile, kStartsRows | kEndsRows);
      uint32_t starts = kStartsRows | kStartsStage;
      while (tile.count > 0) {
        const Tile next = shared_.tiles.next();
        const bool ends_rows = next.count == 0, ends_stage = ends_rows || next.stage != tile.stage;
        emit(tile, starts | (ends_rows ? kEndsRows : 0) | (ends_stage ? kEndsStage : 0));
        starts = ends_stage ? kStartsStage : 0;
        tile = next;
      }
    }
    if (!acts()) return;
    shared_.k_empty[at_.index].wait(at_.phase ^ 1);
    shared_.slots[at_.index].flags = kEndsWork;
    shared_.k_full[at_.index].arrive();
  }

 private:
  __device__ static bool acts() { return Tiles::kThreads == 1 || threadIdx.x == 0; }
  __device__ static void synchronize() {
    if constexpr (Tiles::kThreads > 1) __syncwarp();
  }

  __device__ int32_t next_item() {
    int32_t item;
    if (acts()) item = atomicAdd(args_.next_tile, 1);
    if constexpr (Tiles::kThreads > 1) item = __shfl_sync(0xffffffffu, item, 0);
    return item;
  }

  // For the thread that acts: which it is, a warp asks the instruction that tells the compiler that it is one alone,
  // since copies of several lanes would be loops.
  __device__ void emit(const Tile& tile, uint32_t flags) {
    if constexpr (Tiles::kThreads > 1) {
      if (cute::elect_one_sync()) fill_stage(tile, flags);
      __syncwarp();
    } else {
      fill_stage(tile, flags);
    }
    if ((flags & kStartsStage) != 0) q_phase_ ^= 1;
    at_.template advance<C::kStages>();
  }

  __device__ void fill_stage(const Tile& tile, uint32_t flags) {
    const int stage = at_.index;
    auto& slot = shared_.slots[stage];
    shared_.k_empty[stage].wait(at_.phase ^ 1);
    slot.tile = tile;
    if ((flags & kStartsRows) != 0) slot.rows = shared_.rows;
    slot.flags = flags;
    fetch_tile(tile, Operand::kKeys, shared_.k_full[stage], shared_.k[stage]);
    if ((flags & kStartsStage) != 0) {
      shared_.q_empty.wait(q_phase_ ^ 1);
      shared_.q_full.arrive_and_expect(C::kQBytes);
      const AttentionShape& shape = args_.common.p.shape;
      const auto past = static_cast<int32_t>(shape.seqlen_k - shape.seqlen_q);
      fetch(args_.q[tile.stage], shared_.q_full, shared_.q, shared_.rows.first - past, shared_.rows.head);
    }
    shared_.v_empty[stage].wait(at_.phase ^ 1);
    fetch_tile(tile, Operand::kValues, shared_.v_full[stage], shared_.v[stage]);
  }

  enum class Operand { kKeys, kValues };

  __device__ void fetch_tile(const Tile& tile, Operand operand, Barrier& full, uint8_t* to) {
    if (tile.count == 0) return full.arrive();
    full.arrive_and_expect(C::kTileBytes);
    fetch_keys(tile, operand, full, to);
  }

  __device__ void fetch_keys(const cuda::KeyTile& tile, Operand operand, Barrier& full, uint8_t* to) {
    const bool keys = operand == Operand::kKeys;
    const CUtensorMap& map = tile.is_columns ? (keys ? args_.column_k : args_.column_v) : (keys ? args_.k : args_.v);
    fetch(map, full, to, tile.first, tile.is_columns ? shared_.rows.head : shared_.rows.kv_head);
  }

  // Keys in panels like those of other tiles, since a product takes all 64 of them; values group after group, which are
  // one copy each, since a product takes 16 of them.
  __device__ void fetch_keys(const cuda::GroupTile& tile, Operand operand, Barrier& full, uint8_t* to) {
    constexpr int kKeys = static_cast<int>(kGroupKeys);
    const int32_t head = shared_.rows.kv_head;
    if (operand == Operand::kValues) {
#pragma unroll
      for (int group = 0; group < cuda::kTileGroups; ++group) {
        fetch(args_.group_v, full, to + group * kKeys * C::kRowBytes, tile.groups[group], head);
      }
    } else if (tile.is_run()) {
      fetch(args_.k, full, to, tile.groups[0], head);
    } else {
#pragma unroll
      for (int group = 0; group < cuda::kTileGroups; ++group) {
#pragma unroll
        for (int panel = 0; panel < kHeadDim / kPanelColumns; ++panel) {
          const int row = panel * C::kTileKeys + group * kKeys;  // in shared memory
          fetch(args_.group_k, full, to + row * kPanelRowBytes, tile.groups[group], head, panel);
        }
      }
    }
  }

  __device__ static void fetch(const CUtensorMap& map, Barrier& full, void* to, int32_t row, int32_t head,
                               int panel = 0) {
    constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full), kHint, to, 0, row, panel, head);
  }

  const Args& args_;
  Shared& shared_;
  Cursor at_;
  uint32_t q_phase_ = 0;
};

// A warpgroup.
template <typename T, int kHeadDim, typename Tiles>
class Consumer {
  using C = Config<kHeadDim, Tiles>;
  using Shared = SharedMemory<kHeadDim, Tiles>;
  static constexpr int kTileKeys = C::kTileKeys;
  static constexpr int kKeys8 = kTileKeys / 8;
  static constexpr int kDims8 = kHeadDim / 8;
  static constexpr int kSteps = kHeadDim / 16;  // of QK^T
  static constexpr int kQPanelBytes = kTileRows * kPanelRowBytes;
  static constexpr int kPanelBytes = kTileKeys * kPanelRowBytes;
  // Of values: from panel to panel, and from 16 keys to the next.
  static constexpr int kVPanelBytes = C::kValuesByGroup ? 16 * kPanelRowBytes : kPanelBytes;
  static constexpr int kVStepBytes = C::kValuesByGroup ? 16 * C::kRowBytes : 16 * kPanelRowBytes;

 public:
  __device__ Consumer(const Args& args, Shared& shared)
      : args_(args.common), shared_(shared), block_(threadIdx.x / 128 - 1), turn_phase_(block_ == 0 ? 1 : 0) {
    at_.index = C::kStages - 1;  // so that the first step leads to stage 0
    at_.phase = 1;
  }

  __device__ void run() {
    for (;;) {
      flags_ = 0;
      softmax_ = {};
#pragma unroll
      for (int d = 0; d < kDims8; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[d][i] = 0.0f;
      }
      while (seek(INT32_MAX)) attend();  // as far as it takes
      if ((flags_ & kEndsWork) != 0) return;
      store();
    }
  }

 private:
  // Goes on to the next tile of the row tile that this block attends, but not beyond step `limit`. False if there is
  // none. Tiles in between are given back; their values must have arrived by then, or a fast warpgroup could give back
  // the stage's next values too before the slow one is done with these.
  __device__ bool seek(int32_t limit) {
    while ((flags_ & kEndsRows) == 0 && at_.steps < limit) {
      at_.template advance<C::kStages>();
      shared_.k_full[at_.index].wait(at_.phase);
      const auto& slot = shared_.slots[at_.index];
      flags_ = slot.flags;
      if ((flags_ & kEndsWork) != 0) return false;
      if ((flags_ & kStartsRows) != 0) rows_ = slot.rows;
      if ((flags_ & kStartsStage) != 0) receive_q();
      if (slot.tile.use[block_] != Use::kNone) return true;
      if (!C::kQInRegisters && (flags_ & kEndsStage) != 0) release(shared_.q_empty);
      release(shared_.k_empty[at_.index]);
      shared_.v_full[at_.index].wait(at_.phase);
      release(shared_.v_empty[at_.index]);
    }
    return false;
  }

  // The tile at hand and those after it, PV one tile behind QK^T. Ends where the next tile is so far away that it could
  // not arrive before the stage of values that are still needed is free.
  __device__ void attend() {
    constexpr int32_t kReach = C::kStages - 1;
    Cursor values = at_;  // the first ones that are still needed
    {
      float scores[kKeys8][4];
      const bool shared_tile = starts_turn();
      cute::warpgroup_arrive();
      multiply_qk(scores);
      cute::warpgroup_commit_batch();
      ends_turn(shared_tile);
      cute::warpgroup_wait<0>();
      fence_registers(scores);
      softmax(scores);
      rescale();
      pack(scores);
    }
    bool more = seek(values.steps + kReach);
    while (more) {
      float scores[kKeys8][4];
      const Cursor current = at_;
      const bool shared_tile = starts_turn();
      fence_registers(out_);
      fence_registers(weights_);
      cute::warpgroup_arrive();
      multiply_qk(scores);
      cute::warpgroup_commit_batch();
      shared_.v_full[values.index].wait(values.phase);
      cute::warpgroup_arrive();
      multiply_pv(values.index);
      cute::warpgroup_commit_batch();
      ends_turn(shared_tile);
      cute::warpgroup_wait<1>();
      fence_registers(scores);
      softmax(scores);
      // Between softmax and wait also because of the compiler: its assembler moves a wait up as far as the last branch.
      more = seek(values.steps + kReach);
      cute::warpgroup_wait<0>();
      fence_registers(out_);
      fence_registers(weights_);
      release(shared_.v_empty[values.index]);
      rescale();
      pack(scores);
      values = current;
    }
    shared_.v_full[values.index].wait(values.phase);
    fence_registers(out_);
    fence_registers(weights_);
    cute::warpgroup_arrive();
    multiply_pv(values.index);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    fence_registers(out_);
    fence_registers(weights_);
    release(shared_.v_empty[values.index]);
  }

  __device__ void receive_q() {
    shared_.q_full.wait(q_phase_);
    q_phase_ ^= 1;
    if constexpr (C::kQInRegisters) {
      const int row = block_ * kBlockRows + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16;
      const int piece = threadIdx.x % 32 / 16;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t panel = ptx::shared_address(shared_.q) + step / 4 * kQPanelBytes;
        ptx::load_matrices(panel + row * kPanelRowBytes + ((step % 4 * 2 + piece) ^ (row & 7)) * 16, 0, q_[step]);
      }
      release(shared_.q_empty);
    }
  }

  // Waits, at a tile that both warpgroups attend, until the other one has started its products of the last such tile.
  __device__ bool starts_turn() {
    const bool shared_tile = shared_.slots[at_.index].tile.use[1 - block_] != Use::kNone;
    if (shared_tile) {
      shared_.turn[block_].wait(turn_phase_);
      turn_phase_ ^= 1;
    }
    return shared_tile;
  }
  __device__ void ends_turn(bool shared_tile) {
    if (shared_tile) release(shared_.turn[1 - block_]);
  }

  __device__ void multiply_qk(float (&scores)[kKeys8][4]) {
    const Descriptor k(ptx::shared_address(shared_.k[at_.index]));
    const Descriptor q(ptx::shared_address(shared_.q) + block_ * kBlockRows * kPanelRowBytes);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const ScaleOut scale = step == 0 ? ScaleOut::Zero : ScaleOut::One;
      const uint64_t b = k.at(step / 4 * kPanelBytes + step % 4 * 32);
      if constexpr (C::kQInRegisters) {
        wgmma<T, Major::K>(scores, q_[step], b, scale);
      } else {
        wgmma<T, Major::K>(scores, q.at(step / 4 * kQPanelBytes + step % 4 * 32), b, scale);
      }
    }
  }

  __device__ void multiply_pv(int stage) {
    const Descriptor v(ptx::shared_address(shared_.v[stage]), kVPanelBytes);
#pragma unroll
    for (int j = 0; j < kTileKeys / 16; ++j) {
      wgmma<T, Major::MN>(out_, weights_[j], v.at(j * kVStepBytes));
    }
  }

  // Scores of the tile at hand to weights; its keys are given back.
  __device__ void softmax(float (&scores)[kKeys8][4]) {
    const auto& slot = shared_.slots[at_.index];
    if (args_.negate) {
#pragma unroll
      for (int n = 0; n < kKeys8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] = -scores[n][i];
      }
    }
    if (slot.tile.use[block_] != Use::kFull) cuda::mask(args_, slot.tile, block_, rows_.head, row_position(), scores);
    if (!C::kQInRegisters && (flags_ & kEndsStage) != 0) release(shared_.q_empty);
    release(shared_.k_empty[at_.index]);
    changed_ = __any_sync(0xffffffffu, softmax_.update(scores, args_.scale_log2, shrink_));
  }

  __device__ void rescale() {
    if (!changed_) return;
#pragma unroll
    for (int d = 0; d < kDims8; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[d][i] *= shrink_[i / 2];
    }
  }

  __device__ void pack(const float (&scores)[kKeys8][4]) {
#pragma unroll
    for (int j = 0; j < kTileKeys / 16; ++j) {
      cuda::pack_weights<T>(scores[2 * j], scores[2 * j + 1], weights_[j]);
    }
  }

  // The four lanes of a row trade columns, so that each writes 16 bytes.
  __device__ void store() {
    const AttentionParams& p = args_.p;
    const int64_t past = p.shape.seqlen_k - p.shape.seqlen_q;
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = softmax_.total(half);
      const float factor = total > 0.0f ? 1.0f / total : 0.0f;
      const int32_t position = row_position() + 8 * half;
      const bool inside = position >= rows_.begin && position < rows_.end;
      const int64_t row = (position - past) * p.shape.num_heads + rows_.head;
      if (lane == 0 && inside) p.lse[row] = softmax_.lse(half, total, args_.scale_log2);
      T* out = static_cast<T*>(p.out) + row * kHeadDim;
#pragma unroll
      for (int d = 0; d < kDims8; d += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = cuda::pack<T>(out_[d + i][2 * half] * factor, out_[d + i][2 * half + 1] * factor);
        }
        transpose(words, lane);
        if (inside)
          ptx::store(reinterpret_cast<uint4*>(out + (d + lane) * 8), {words[0], words[1], words[2], words[3]});
      }
    }
  }

  // Word i of lane j of a quad becomes word j of lane i.
  __device__ static void transpose(uint32_t (&words)[4], int lane) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const bool upper = (lane & step) != 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if ((i & step) != 0) continue;
        const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? words[i] : words[i + step], step);
        (upper ? words[i] : words[i + step]) = received;
      }
    }
  }

  // Arrives once per warp, when all its lanes are done.
  __device__ static void release(Barrier& barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier.arrive();
  }

  // Of the lane's first row; the second is 8 rows on.
  __device__ int32_t row_position() const {
    return rows_.block(block_) + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  }

  const cuda::PrefillArgs& args_;
  Shared& shared_;
  const int block_;
  Cursor at_;
  RowTile rows_;
  uint32_t flags_;  // of the slot at hand
  uint32_t q_phase_ = 0, turn_phase_;
  uint32_t q_[C::kQInRegisters ? kSteps : 1][4];
  float out_[kDims8][4];
  uint32_t weights_[kTileKeys / 16][4];
  cuda::SoftmaxRows softmax_;
  float shrink_[2];  // by which earlier weights are to be multiplied
  bool changed_;     // it is not 1 everywhere
};

template <typename T, int kHeadDim, typename Tiles>
__global__ void __launch_bounds__(kThreads, 1) attention_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(kSwizzleBytes) uint8_t memory[];
  auto& shared = *reinterpret_cast<SharedMemory<kHeadDim, Tiles>*>(memory);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x < Tiles::kThreads) Producer<kHeadDim, Tiles>(args, shared).run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    Consumer<T, kHeadDim, Tiles>(args, shared).run();
  }
}

}  // namespace qwen_sparse::sm90::prefill
