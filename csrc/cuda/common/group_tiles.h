// The key tiles that a row tile visits when its blocks attend groups of 16 keys: four groups each, from anywhere in the
// keys of a stage.
//
// A group that both blocks of the row tile attend comes in a tile of such groups; one that one block attends alone
// comes in a tile that the other block passes over. So no row is multiplied with keys that its block does not attend,
// and every group is copied once. The three kinds of tiles take turns, as far as there are any, so that at tiles of one
// block alone both blocks have work within few tiles.
//
// A warp advances the cursor. Together its lanes read 32 words of each block's bitmap (16384 keys), a batch ahead, and
// split them into bits by kind; what takes one group after the other is done by lane 0 in shared memory.
#pragma once

#include "cuda/common/prefill.h"
#include "cuda/common/ptx.h"

namespace qwen_sparse::cuda {

constexpr int kTileGroups = 4;

struct GroupTile {
  // First key of each, ascending. Where there are fewer than four: seqlen_k, which no row sees and where copies find
  // nothing, so that the tile has zeros there.
  int32_t groups[kTileGroups];
  int32_t count;  // keys of the groups; 0: there are no more tiles
  Stage stage;
  Use use[2];  // by block of the row tile

#ifdef __CUDACC__
  __device__ bool begins_before(int32_t row, bool) const { return groups[0] < row; }
  // Whether it is one run of keys.
  __device__ bool is_run() const {
    return count == kTileGroups * kGroupKeys && groups[kTileGroups - 1] - groups[0] == count - kGroupKeys;
  }
#endif
};

#ifdef __CUDACC__

// In shared memory; all lanes of a warp call each function together.
class GroupTiles {
  static constexpr int32_t kKeys = static_cast<int32_t>(kGroupKeys);
  static constexpr int32_t kRows = static_cast<int32_t>(kBlockM);
  static constexpr unsigned kAllLanes = 0xffffffffu;

 public:
  using Tile = GroupTile;
  static constexpr int kTileKeys = kTileGroups * kKeys;
  static constexpr int kThreads = 32;
  static constexpr bool kWaitsForCopies = true;

  __device__ void start(const PrefillArgs& args, const RowTile& rows) {
    if (lane() == 0) {
      const AttentionParams& p = args.p;
      first_row_ = rows.first;
      num_keys_ = static_cast<int32_t>(p.shape.seqlen_k);
      num_words_ = static_cast<int32_t>(p.group_words);
      int32_t keys[kNumStages + 1];
      rows.stage_borders(args, rows.end, keys);
#pragma unroll
      for (int i = 0; i <= kNumStages; ++i) borders_[i] = ceil_div(keys[i], kKeys);
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int32_t end = rows.has_rows(b) ? max(0, min(rows.block(b) + kRows, rows.end)) : 0;
        end_[b] = ceil_div(end, kKeys);
        const int64_t block = rows.head * args.blocks.count + rows.block(b) / kRows - args.blocks.first;
        bitmap_[b] = p.block_groups + (end > 0 ? block * p.group_words : 0);
      }
#pragma unroll
      for (int kind = 0; kind < kNumKinds; ++kind) occupied_[kind] = num_pending_[kind] = 0;
      turn_ = 0;
      now_ = Batch{kInter, 0};
      next_ = first_batch(kInter, 0);
    }
    __syncwarp();
    fetch(next_);
  }

  // The next tile that a row attends, for lane 0; all lanes get its count, 0 when there is none, and its stage.
  __device__ GroupTile next() {
    for (;;) {
      GroupTile tile{};
      if (lane() == 0) take_tile(tile);
      tile.count = __shfl_sync(kAllLanes, tile.count, 0);
      tile.stage = static_cast<Stage>(now_.stage);
      if (tile.count > 0 || !next_batch()) return tile;
    }
  }

 private:
  enum Kind : int { kBoth, kFirst, kSecond, kNumKinds };  // the blocks that attend a group

  // 32 words of the bitmaps, as far as they are of a stage.
  struct Batch {
    int32_t stage;  // kNumStages: there are no more
    int32_t word;
  };

  __device__ static int lane() { return threadIdx.x % 32; }

  // Bits [begin, end) of a word, as far as it has them.
  __device__ static uint32_t bits_between(int32_t begin, int32_t end) {
    begin = max(begin, 0);
    end = min(end, 32);
    return begin < end ? 0xffffffffu >> (32 - (end - begin)) << begin : 0;
  }

  // The batch that begins with `word` of `stage`, or the first one after it if the stage has no such word.
  __device__ Batch first_batch(int32_t stage, int32_t word) const {
    while (stage < kNumStages && max(word * 32, borders_[stage]) >= borders_[stage + 1]) {
      ++stage;
      word = borders_[stage] / 32;
    }
    return Batch{stage, word};
  }

  __device__ void fetch(Batch batch) {
    if (batch.stage == kNumStages) return;
    const int32_t word = batch.word + lane();
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const bool inside = word < num_words_ && end_[b] > 0;
      ptx::copy_async_4(ptx::shared_address(&fetched_[b][lane()]), bitmap_[b] + (inside ? word : 0), inside ? 4 : 0);
    }
    ptx::commit_copies();
  }

  // False if there is none.
  __device__ bool next_batch() {
    const Batch batch = next_;
    if (batch.stage == kNumStages) return false;
    ptx::wait_copies<0>();
    const int32_t first = (batch.word + lane()) * 32;  // group
    uint32_t bits[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int32_t end = min(borders_[batch.stage + 1], end_[b]);
      bits[b] = fetched_[b][lane()] & bits_between(borders_[batch.stage] - first, end - first);
    }
    const uint32_t both = bits[0] & bits[1];
    const uint32_t by_kind[kNumKinds] = {both, bits[0] ^ both, bits[1] ^ both};
    const Batch after = first_batch(batch.stage, batch.word + 32);
    __syncwarp();  // nobody reads what changes now
#pragma unroll
    for (int kind = 0; kind < kNumKinds; ++kind) {
      bits_[kind][lane()] = by_kind[kind];
      const uint32_t occupied = __ballot_sync(kAllLanes, by_kind[kind] != 0);
      if (lane() == 0) occupied_[kind] = occupied;
    }
    if (lane() == 0) {
      now_ = batch;
      next_ = after;
    }
    fetch(after);
    __syncwarp();
    return true;
  }

  // A tile of the kind whose turn it is, or of the first after it that fills one; behind the last batch of a stage any
  // number of groups does. Leaves `tile` as it is if there is none.
  __device__ void take_tile(GroupTile& tile) {
    const bool ends_stage = next_.stage != now_.stage;
#pragma unroll 1
    for (int i = 0; i < kNumKinds; ++i) {
      const int kind = turn_;
      turn_ = kind + 1 == kNumKinds ? 0 : kind + 1;
      const int count = collect(kind);
      if (count < kTileGroups && (count == 0 || !ends_stage)) continue;
      num_pending_[kind] = 0;
      tile.count = count * kKeys;
#pragma unroll
      for (int group = 0; group < kTileGroups; ++group) {
        tile.groups[group] = group < count ? pending_[kind][group] : num_keys_;
      }
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const bool before_rows = tile.groups[kTileGroups - 1] + kKeys - 1 <= first_row_ + b * kRows;
        tile.use[b] = kind == (b == 0 ? kSecond : kFirst) ? Use::kNone : before_rows ? Use::kFull : Use::kPartial;
      }
      return;
    }
  }

  // Moves groups of the batch to the pending ones until these fill a tile. Returns the number of pending ones.
  __device__ int collect(int kind) {
    uint32_t occupied = occupied_[kind];
    int count = num_pending_[kind];
    while (count < kTileGroups && occupied != 0) {
      const int word = __ffs(static_cast<int>(occupied)) - 1;
      const int32_t first = (now_.word + word) * 32;
      uint32_t bits = bits_[kind][word];
      do {
        pending_[kind][count++] = (first + __ffs(static_cast<int>(bits)) - 1) * kKeys;
        bits &= bits - 1;
      } while (count < kTileGroups && bits != 0);
      bits_[kind][word] = bits;
      if (bits == 0) occupied &= occupied - 1;
    }
    occupied_[kind] = occupied;
    num_pending_[kind] = count;
    return count;
  }

  const uint32_t* bitmap_[2];  // of each block
  int32_t num_words_, num_keys_;
  int32_t first_row_;
  int32_t borders_[kNumStages + 1];  // a stage's groups are [borders_[stage], borders_[stage + 1])
  int32_t end_[2];                   // behind the last group that rows of a block see
  Batch now_, next_;
  uint32_t fetched_[2][32];                  // words of the next batch
  uint32_t bits_[kNumKinds][32];             // of this batch: groups that are left, by kind
  uint32_t occupied_[kNumKinds];             // words in which some are left
  int32_t pending_[kNumKinds][kTileGroups];  // first keys of groups that did not fill a tile yet
  int32_t num_pending_[kNumKinds];
  int32_t turn_;  // kind
};

#endif

}  // namespace qwen_sparse::cuda
