// The key tiles that a row tile visits when its blocks attend groups of 16 keys: four groups each, from anywhere in the
// keys of a stage.
//
// A group that both blocks of the row tile attend comes in a tile of such groups; one that one block attends alone
// comes in a tile that the other block passes over. So no row is multiplied with keys that its block does not attend,
// and every group is copied once. The three kinds of tiles take turns, as far as there are any, so that at tiles of one
// block alone both blocks have work within few tiles.
//
// A warp advances the cursor. Together its lanes read 16 words of each block's bitmap (8192 keys), a batch ahead, and
// write the first keys of their groups to lists, one for each kind; a tile is the next four of a list.
#pragma once

#include "cuda/common/prefill.h"
#include "cuda/common/ptx.h"

namespace qwen_sparse::cuda {

constexpr int kTileGroups = 4;

struct alignas(16) GroupTile {  // moved 16 bytes at a time
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
  static constexpr int kBatchWords = 16;
  static constexpr int kLaneGroups = kBatchWords;  // 32 groups a word, for 32 lanes
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
      for (int kind = 0; kind < kNumKinds; ++kind) next_entry_[kind] = last_entry_[kind] = 0;
      turn_ = 0;
      now_ = Batch{kInter, 0};
      next_ = first_batch(kInter, 0);
    }
    __syncwarp();
    fetch(next_);
  }

  // The next tile that a row attends; its count is 0 when there is none.
  __device__ GroupTile next() {
    for (;;) {
      __syncwarp();
      // Behind the last batch of a stage any number of groups makes a tile.
      const int least = next_.stage != now_.stage ? 1 : kTileGroups;
      uint32_t ready = 0;  // kinds
#pragma unroll
      for (int kind = 0; kind < kNumKinds; ++kind) {
        if (last_entry_[kind] - next_entry_[kind] >= least) ready |= 1u << kind;
      }
      if (ready != 0) return take_tile(ready);
      if (!next_batch()) return GroupTile{};
    }
  }

 private:
  enum Kind : int { kBoth, kFirst, kSecond, kNumKinds };  // the blocks that attend a group

  // Words of the bitmaps, as far as they are of a stage.
  struct Batch {
    int32_t stage;  // kNumStages: there are no more
    int32_t word;
  };

  // Numbers by kind, of at most 10 bits each, and sums of such.
  static constexpr int kPackedBits = 10;
  static constexpr int kMaxEntries = kBatchWords * 32 + 2 * kNumKinds * (kTileGroups - 1);
  static_assert(kMaxEntries < 1 << kPackedBits, "positions in the lists are packed");
  __device__ static int unpack(uint32_t packed, int kind) {
    return packed >> kind * kPackedBits & ((1u << kPackedBits) - 1);
  }

  __device__ static int lane() { return threadIdx.x % 32; }

  // Bits [begin, end) of a lane's groups, as far as it has them.
  __device__ static uint32_t bits_between(int32_t begin, int32_t end) {
    begin = max(begin, 0);
    end = min(end, kLaneGroups);
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

  // One word per lane, those of both blocks.
  __device__ void fetch(Batch batch) {
    if (batch.stage == kNumStages) return;
    const int b = lane() / kBatchWords;
    const int32_t word = batch.word + lane() % kBatchWords;
    const bool inside = word < num_words_ && end_[b] > 0;
    ptx::copy_async_4(ptx::shared_address(&fetched_[b][lane() % kBatchWords]), bitmap_[b] + (inside ? word : 0),
                      inside ? 4 : 0);
    ptx::commit_copies();
  }

  // The lists of the next batch, behind what is left of these. False if there is none.
  __device__ bool next_batch() {
    const Batch batch = next_;
    if (batch.stage == kNumStages) return false;
    ptx::wait_copies<0>();
    __syncwarp();
    const int32_t first = batch.word * 32 + lane() * kLaneGroups;  // the lane's groups, 16 bits of a word
    uint32_t bits[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int32_t end = min(borders_[batch.stage + 1], end_[b]);
      bits[b] = fetched_[b][lane() / 2] >> lane() % 2 * kLaneGroups;
      bits[b] &= bits_between(borders_[batch.stage] - first, end - first);
    }
    const uint32_t both = bits[0] & bits[1];
    const uint32_t counts =
        __popc(both) | __popc(bits[0] ^ both) << kPackedBits | __popc(bits[1] ^ both) << 2 * kPackedBits;
    uint32_t sums = counts;  // of the lanes up to this one
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t before = __shfl_up_sync(kAllLanes, sums, distance);
      if (lane() >= distance) sums += before;
    }
    const uint32_t totals = __shfl_sync(kAllLanes, sums, 31);
    uint32_t begins = 0, lefts = 0;  // of each list, and entries that it had left
    int entries = 0;
#pragma unroll
    for (int kind = 0; kind < kNumKinds; ++kind) {
      const int left = last_entry_[kind] - next_entry_[kind];
      begins |= entries << kind * kPackedBits;
      lefts |= left << kind * kPackedBits;
      entries = round_up(entries + left + unpack(totals, kind), kTileGroups);
    }
    const uint32_t ends = begins + lefts + totals;
    // Lane 3 k + i moves the i-th entry that list k had left, and fills the i-th place behind its end.
    const int kind = min(lane() / (kTileGroups - 1), kNumKinds - 1), entry = lane() - kind * (kTileGroups - 1);
    const bool moves = entry < unpack(lefts, kind);
    const int32_t moved = moves ? list_[next_entry_[kind] + entry] : 0;
    const Batch after = first_batch(batch.stage, batch.word + kBatchWords);
    __syncwarp();  // nobody reads what changes now
    if (moves) list_[unpack(begins, kind) + entry] = moved;
    if (entry < round_up(unpack(ends, kind), kTileGroups) - unpack(ends, kind)) {
      list_[unpack(ends, kind) + entry] = num_keys_;
    }
    uint32_t positions = begins + lefts + sums - counts;
    for (uint32_t left = bits[0] | bits[1]; left != 0; left &= left - 1) {
      const int group = __ffs(static_cast<int>(left)) - 1;
      const int shift = ((both >> group & 1) != 0      ? kBoth
                         : (bits[0] >> group & 1) != 0 ? kFirst
                                                       : kSecond) *
                        kPackedBits;
      list_[positions >> shift & ((1u << kPackedBits) - 1)] = (first + group) * kKeys;
      positions += 1u << shift;
    }
    if (lane() < kNumKinds) {
      next_entry_[lane()] = unpack(begins, lane());
      last_entry_[lane()] = unpack(ends, lane());
    }
    if (lane() == 0) {
      now_ = batch;
      next_ = after;
    }
    fetch(after);
    return true;
  }

  // Of the kind whose turn it is, or of the first after it that is ready.
  __device__ GroupTile take_tile(uint32_t ready) {
    const int turn = turn_;
    int kind = turn + __ffs(static_cast<int>((ready | ready << kNumKinds) >> turn)) - 1;
    if (kind >= kNumKinds) kind -= kNumKinds;
    const int entry = next_entry_[kind], count = min(last_entry_[kind] - entry, kTileGroups);
    const int4 groups = *reinterpret_cast<const int4*>(list_ + entry);
    GroupTile tile{{groups.x, groups.y, groups.z, groups.w}, count * kKeys, static_cast<Stage>(now_.stage), {}};
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const bool before_rows = tile.groups[kTileGroups - 1] + kKeys - 1 <= first_row_ + b * kRows;
      tile.use[b] = kind == (b == 0 ? kSecond : kFirst) ? Use::kNone : before_rows ? Use::kFull : Use::kPartial;
    }
    __syncwarp();  // nobody reads what changes now
    if (lane() == 0) {
      next_entry_[kind] = entry + count;
      turn_ = kind + 1 == kNumKinds ? 0 : kind + 1;
    }
    return tile;
  }

  const uint32_t* bitmap_[2];  // of each block
  int32_t num_words_, num_keys_;
  int32_t first_row_;
  int32_t borders_[kNumStages + 1];  // a stage's groups are [borders_[stage], borders_[stage + 1])
  int32_t end_[2];                   // behind the last group that rows of a block see
  Batch now_, next_;
  uint32_t fetched_[2][kBatchWords];  // words of the next batch
  // Of this batch: first keys of groups, by kind. Each list begins a tile, and is filled up to one.
  alignas(16) int32_t list_[kMaxEntries];
  int32_t next_entry_[kNumKinds], last_entry_[kNumKinds];  // of each list, what is left
  int32_t turn_;                                           // kind
};

#endif

}  // namespace qwen_sparse::cuda
