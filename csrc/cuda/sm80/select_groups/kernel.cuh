// Selection of block groups on Ampere and later, from pooled rows and pooled keys, in two passes over the keys: each
// row's log-sum-exp, then the shares of attention, of which only comparisons with the threshold remain.
//
// Grid: one CTA per (kv head, split of the keys, eight warps' worth of rows). A warp takes 16 blocks of one head, whose
// 64 pooled rows are left operands in its registers (128 of them at head_dim 128) for as long as their rotation lasts.
// Quarter s of the 16 blocks is the s-th of four mma tiles, so that a block's mean is a sum of four registers of one
// lane, and a lane knows all of the bits that it sets. Warps of a CTA are heads of one group, then row tiles: they read
// the same pooled keys. Shared memory: two windows of 64 pooled keys (32 KiB at head_dim 128); the next arrives while
// one is used. A window is two words of a bitmap; where a border of chunks cuts it, its parts are multiplied one after
// the other. Sums are taken in an order that depends on the split alone, and splits depend on the prompt's length
// alone.
#pragma once

#include <cmath>

#include "cuda/common/attention.h"
#include "cuda/common/ptx.h"
#include "cuda/sm80/select_groups/config.h"

namespace qwen_sparse::sm80::select_groups {

namespace ptx = cuda::ptx;

constexpr float kLowest = -3.4e38f;  // finite, so that -inf minus a maximum is never NaN
constexpr int kStepBlocks = kStepGroups / 8;
constexpr unsigned kAllLanes = 0xffffffffu;

template <int kHeadDim>
struct SharedMemory {
  alignas(256) uint8_t k[2][kWindowGroups * kHeadDim * 2];
};

// The pooled keys' products with a warp's pooled rows, step by step. Lane (g, t) = (lane / 4, lane % 4) holds the
// elements [s][n][2 h + e] at quarter s of block g + 8 h and group 8 n + 2 t + e of the step.
template <typename T, int kHeadDim>
class Split {
  static constexpr int kPieces = kHeadDim / 8;  // of 16 bytes in a row

 public:
  using Scores = float[kQuarters][kStepBlocks][4];

  // 16 groups, of which [begin, end) count.
  struct Step {
    int32_t first, begin, end;
    bool masked;  // some rows do not see some of them, or they do not all count
  };

  __device__ Split(const Args& args, SharedMemory<kHeadDim>& shared) : args_(args), shared_(shared) {
    const int warp = threadIdx.x / 32;
    const int group_size = static_cast<int>(args.p.shape.num_heads / args.p.shape.num_kv_heads);
    const int units = group_size * args.num_tiles;  // of work for a warp
    const int first_unit = static_cast<int>(blockIdx.x) % args.ctas_per_kv_head * kWarps;
    const int rest = static_cast<int>(blockIdx.x) / args.ctas_per_kv_head;
    split_ = rest % args.num_splits;
    kv_head_ = rest / args.num_splits;
    has_rows_ = first_unit + warp < units;
    const int unit = min(first_unit + warp, units - 1);
    tile_ = args.num_tiles - 1 - unit / group_size;
    head_ = kv_head_ * group_size + unit % group_size;
    const int last_tile = args.num_tiles - 1 - first_unit / group_size;  // of the CTA: sees most
    begin_ = split_ * kSplitGroups;
    end_ = min(begin_ + kSplitGroups, args.tile_groups(last_tile));
    limit_ = has_rows_ ? min(end_, args.tile_groups(tile_)) : begin_;
  }

  // Whether the warp's rows see keys of the split: of what they do not, nothing is written.
  __device__ bool sees_keys() const { return limit_ > begin_; }
  __device__ int head() const { return head_; }
  __device__ int tile() const { return tile_; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int block_in_tile(int half) { return lane() / 4 + 8 * half; }
  __device__ static int group_in_step() { return lane() % 4 * 2; }
  __device__ int64_t tile_of_all() const { return int64_t{head_} * args_.num_tiles + tile_; }
  __device__ int64_t partial() const { return tile_of_all() * args_.num_splits + split_; }
  // Number of the first quarter of the lane's block `half`.
  __device__ int32_t block_quarter(int half) const {
    return args_.tile_quarter(tile_) + block_in_tile(half) * kQuarters;
  }

  // Calls on_step(step, unscaled scores) for each step of groups that the warp's rows see, and on_window(first group)
  // behind the steps of each window.
  template <typename OnStep, typename OnWindow>
  __device__ __forceinline__ void for_each(OnStep on_step, OnWindow on_window) {
    copy_keys(begin_, 0);
    int32_t loaded_chunk = -1;
    int parity = 0;
    for (int32_t window = begin_; window < end_; window += kWindowGroups, parity ^= 1) {
      ptx::wait_copies<0>();
      __syncthreads();  // this window is here; nobody reads the one before any more
      if (window + kWindowGroups < end_) copy_keys(window + kWindowGroups, parity ^ 1);
      const int32_t end = min(window + kWindowGroups, limit_);
      if (window >= end) continue;
      for (int32_t begin = window; begin < end;) {
        const int32_t chunk = begin / args_.chunk_groups;
        const int32_t part_end = min(end, (chunk + 1) * args_.chunk_groups);
        if (chunk != loaded_chunk) load_q(chunk);
        loaded_chunk = chunk;
#pragma unroll 1
        for (int32_t first = window + (begin - window) / kStepGroups * kStepGroups; first < part_end;
             first += kStepGroups) {
          Step step{first, begin, part_end};
          const int32_t last = first + kStepGroups - 1;
          step.masked = first < begin || last >= part_end || last > args_.tile_quarter(tile_);
          Scores scores;
          multiply(shared_.k[parity], first - window, scores);
          on_step(step, scores);
        }
        begin = part_end;
      }
      on_window(window);
    }
  }

  // Calls hide(score) for the elements whose rows do not see the group, or whose groups do not count.
  template <typename Hide>
  __device__ __forceinline__ void for_each_hidden(const Step& step, Scores& scores, Hide hide) const {
    const int32_t first = step.first + group_in_step();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int s = 0; s < kQuarters; ++s) {
        const int32_t end = min(block_quarter(half) + s + 1, step.end);
#pragma unroll
        for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int32_t group = first + 8 * n + e;
            if (group < step.begin || group >= end) hide(scores[s][n][2 * half + e]);
          }
        }
      }
    }
  }

 private:
  // Groups past the end become zeros; no row sees them.
  __device__ __forceinline__ void copy_keys(int32_t window, int parity) {
    const T* head = static_cast<const T*>(args_.pooled_k) + int64_t{kv_head_} * args_.num_groups * kHeadDim;
#pragma unroll 4
    for (int i = threadIdx.x; i < kWindowGroups * kPieces; i += kWarps * 32) {
      const int row = i / kPieces, piece = i % kPieces;
      const bool inside = window + row < end_;
      ptx::copy_async_16(ptx::shared_address(shared_.k[parity] + cuda::swizzled<kHeadDim>(row, piece)),
                         head + int64_t{inside ? window + row : 0} * kHeadDim + piece * 8, inside ? 16 : 0);
    }
    ptx::commit_copies();
  }

  // The rows as left operands, in the rotation with which each meets the keys of `chunk`. Blocks behind the last repeat
  // it; no result of theirs is used.
  __device__ __forceinline__ void load_q(int32_t chunk) {
    const auto num_quarters = static_cast<int32_t>(args_.blocks.count) * kQuarters;
    const int32_t first = tile_ * kRows;  // from the call's first block on
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t block_chunk = block_quarter(half) / args_.chunk_groups;
      const int rotation = max(0, min(block_chunk - chunk, 2));
      const T* rows = static_cast<const T*>(args_.pooled_q[rotation]) + int64_t{head_} * num_quarters * kHeadDim;
      const int32_t quarter = min(first + block_in_tile(half) * kQuarters, num_quarters - kQuarters);
#pragma unroll
      for (int s = 0; s < kQuarters; ++s) {
        const T* row = rows + int64_t{quarter + s} * kHeadDim + group_in_step();
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d) {
          q_[d / 2][s][d % 2 * 2 + half] = *reinterpret_cast<const uint32_t*>(row + d * 8);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(const uint8_t* window, int step, Scores& scores) {
#pragma unroll
    for (int s = 0; s < kQuarters; ++s) {
#pragma unroll
      for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[s][n][i] = 0.0f;
      }
    }
    const int matrix = lane() / 8;
    const uint32_t address =
        ptx::shared_address(window + cuda::swizzled<kHeadDim>(step + matrix / 2 * 8 + lane() % 8, matrix % 2));
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t k[4];
      ptx::load_matrices(address ^ (d << 5), 0, k);
#pragma unroll
      for (int s = 0; s < kQuarters; ++s) {
        ptx::mma<T>(scores[s][0], q_[d][s], k[0], k[1]);
        ptx::mma<T>(scores[s][1], q_[d][s], k[2], k[3]);
      }
    }
  }

  const Args& args_;
  SharedMemory<kHeadDim>& shared_;
  int split_, kv_head_, head_, tile_;
  bool has_rows_;
  int32_t begin_, end_;  // groups of the split that the CTA's rows see
  int32_t limit_;        // and those that the warp's rows see end here
  uint32_t q_[kHeadDim / 16][kQuarters][4];
};

// Pass 1: each row's log-sum-exp over the split. A lane keeps a maximum and a sum for the groups that it sees.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kWarps * 32) normalizer_kernel(const __grid_constant__ Args args) {
  __shared__ SharedMemory<kHeadDim> shared;
  Split<T, kHeadDim> split(args, shared);
  const float scale = args.p.softmax_scale * cuda::kLog2E;
  float highest[kQuarters][2], sum[kQuarters][2];
#pragma unroll
  for (int s = 0; s < kQuarters; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[s][half] = kLowest;
      sum[s][half] = 0.0f;
    }
  }
  split.for_each(
      [&](const auto& step, auto& scores) {
#pragma unroll
        for (int s = 0; s < kQuarters; ++s) {
#pragma unroll
          for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[s][n][i] *= scale;  // first: the scale may be negative
          }
        }
        if (step.masked) split.for_each_hidden(step, scores, [](float& score) { score = -INFINITY; });
#pragma unroll
        for (int s = 0; s < kQuarters; ++s) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& most = highest[s][half];
            const float old = most;
#pragma unroll
            for (int i = 0; i < 2 * kStepBlocks; ++i) most = fmaxf(most, scores[s][i / 2][2 * half + i % 2]);
            sum[s][half] *= ptx::exp2(old - most);
#pragma unroll
            for (int i = 0; i < 2 * kStepBlocks; ++i) {
              sum[s][half] += ptx::exp2(scores[s][i / 2][2 * half + i % 2] - most);
            }
          }
        }
      },
      [](int32_t) {});
  if (!split.sees_keys()) return;
#pragma unroll
  for (int s = 0; s < kQuarters; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int lanes = 1; lanes <= 2; lanes *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, highest[s][half], lanes);
        const float both = fmaxf(highest[s][half], other);
        sum[s][half] *= ptx::exp2(highest[s][half] - both);
        sum[s][half] += __shfl_xor_sync(kAllLanes, sum[s][half], lanes);
        highest[s][half] = both;
      }
      if (threadIdx.x % 4 == 0) {  // -inf if the row sees none of the groups
        args.split_lse[split.partial() * kRows + split.block_in_tile(half) * kQuarters + s] =
            highest[s][half] + log2f(sum[s][half]);
      }
    }
  }
}

// Pass 2: the shares, bits of the groups that blocks attend, and the sum of their shares.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kWarps * 32) share_kernel(const __grid_constant__ Args args) {
  __shared__ SharedMemory<kHeadDim> shared;
  Split<T, kHeadDim> split(args, shared);
  const float scale = args.p.softmax_scale * cuda::kLog2E;
  float lse[kQuarters][2], least[2], kept[2] = {0.0f, 0.0f};
  uint64_t bits[2] = {0, 0};  // of the window
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t block = split.tile() * kTileBlocks + split.block_in_tile(half);
    const bool exists = block < args.blocks.count;
    least[half] = exists ? args.p.thresholds[split.head() * args.blocks.count + block] * kGroupRows : INFINITY;
#pragma unroll
    for (int s = 0; s < kQuarters; ++s) {
      lse[s][half] = args.lse[split.tile_of_all() * kRows + split.block_in_tile(half) * kQuarters + s];
    }
  }
  split.for_each(
      [&](const auto& step, auto& scores) {
#pragma unroll
        for (int s = 0; s < kQuarters; ++s) {
#pragma unroll
          for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[s][n][i] = ptx::exp2(fmaf(scores[s][n][i], scale, -lse[s][i / 2]));
          }
        }
        if (step.masked) split.for_each_hidden(step, scores, [](float& weight) { weight = 0.0f; });
        const int32_t first = step.first + split.group_in_step();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int32_t own = split.block_quarter(half);  // first group of the block's own keys
          uint32_t found = 0;
#pragma unroll
          for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int32_t group = first + 8 * n + e;
              float share = 0.0f;
#pragma unroll
              for (int s = 0; s < kQuarters; ++s) share += scores[s][n][2 * half + e];
              bool attended = !(share < least[half]) || group < kForcedGroups || group >= own - kQuarters;
              attended = attended && group < min(own + kQuarters, step.end) && group >= step.begin;
              if (attended) {
                found |= 1u << (8 * n + e);
                kept[half] += share;
              }
            }
          }
          bits[half] |= uint64_t{found} << (step.first % kWindowGroups + split.group_in_step());
        }
      },
      [&](int32_t window) {
        // A lane has two bits of eight; lane (g, t) writes word t % 2 of block g + 8 (t / 2).
        uint32_t word = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            auto part = static_cast<uint32_t>(bits[half] >> (32 * i));
            part |= __shfl_xor_sync(kAllLanes, part, 1);
            part |= __shfl_xor_sync(kAllLanes, part, 2);
            if (static_cast<int>(threadIdx.x % 4) == 2 * half + i) word = part;
          }
          bits[half] = 0;
        }
        const int64_t block = split.tile() * kTileBlocks + split.block_in_tile(threadIdx.x % 4 / 2);
        const int64_t number = window / 32 + threadIdx.x % 2;
        if (block < args.blocks.count && number < args.p.group_words) {
          args.p.block_groups[(split.head() * args.blocks.count + block) * args.p.group_words + number] = word;
        }
      });
  if (!split.sees_keys()) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    kept[half] += __shfl_xor_sync(kAllLanes, kept[half], 1);
    kept[half] += __shfl_xor_sync(kAllLanes, kept[half], 2);
    if (threadIdx.x % 4 == 0) {
      args.split_kept[split.partial() * kTileBlocks + split.block_in_tile(half)] = kept[half];
    }
  }
}

}  // namespace qwen_sparse::sm80::select_groups
