// Selection on Ampere and later: vertical and slash scores, what 64 rows attend summed over columns and along
// diagonals, in two passes over the keys. The 64 x n weights exist only in registers, 16 keys at a time.
//
// Grid: one CTA per (split of the keys, kv head), with one warp per query head of the group (of half of it, or a third,
// if there are more than 8). At 1M keys, 28/4 heads and head_dim 128 a pass then reads the keys once, 1 GB; with a CTA
// per head it would ask L2 for 7 GB, which at 5 TB/s takes as long as an A100's products.
// Warps: a warp holds all 64 rows of its head, Q included (128 registers at head_dim 128), so every sum is its own: no
// barrier but the one per tile, no Q in shared memory, and each key is read from there for 64 rows of products. Of the
// keys' 8-column blocks a lane sees one element per 8 rows and keeps a running sum for each diagonal of 8 x 8 blocks:
// adding a block of weights moves each of them to the next row block's register, where its next block will meet it, so
// that diagonals cost one addition per weight, like columns. Per 8 keys, one diagonal of blocks is complete; shuffles
// turn it into diagonals.
// Shared memory: two tiles of K, 32 KiB at head_dim 128; the next arrives while one is used.
// Sums are taken in an order that depends on the split's length alone.
#pragma once

#include <cmath>

#include "cuda/common/attention.h"
#include "cuda/common/ptx.h"
#include "cuda/sm80/select/config.h"

namespace qwen_sparse::sm80::select {

namespace ptx = cuda::ptx;

constexpr float kLowest = -3.4e38f;  // finite, so that -inf minus a maximum is never NaN
constexpr int kRowBlocks = kRows / 8;
constexpr int kStepBlocks = kStepKeys / 8;
constexpr unsigned kAllLanes = 0xffffffffu;

template <int kHeadDim>
struct SharedMemory {
  alignas(256) uint8_t k[2][kTileKeys * kHeadDim * 2];
};

// The keys' products with a warp's rows, step by step. Lane (g, t) = (lane / 4, lane % 4) holds the elements
// [r][n][e] at row 8r + g and key 8n + 2t + e of the step. Row 63 is the last row of the prompt.
template <typename T, int kHeadDim>
class Split {
  static constexpr int kPieces = kHeadDim / 8;  // of 16 bytes in a row
  static constexpr int kMTiles = kRows / 16;

 public:
  struct Scores {
    float values[kMTiles][kStepBlocks][4];

    __device__ __forceinline__ float& at(int r, int n, int e) { return values[r / 2][n][r % 2 * 2 + e]; }

    // `value` where the key lies after the row. `slack`: row 0 less the step's first key, at this lane's g and t.
    __device__ __forceinline__ void mask(int32_t slack, float value) {
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
        for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (8 * n + e - 8 * r > slack) at(r, n, e) = value;
          }
        }
      }
    }
  };

  __device__ Split(const Args& args, SharedMemory<kHeadDim>& shared)
      : args_(args),
        shared_(shared),
        lane_(threadIdx.x % 32),
        num_keys_(static_cast<int32_t>(args.p.shape.seqlen_k)),
        num_rows_(static_cast<int32_t>(args.p.shape.seqlen_q)) {
    const int warp = threadIdx.x / 32;
    const int group_size = static_cast<int>(args.p.shape.num_heads / args.p.shape.num_kv_heads);
    const int ctas_per_split = static_cast<int>(args.p.shape.num_kv_heads) * args.ctas_per_group;
    split_ = static_cast<int>(blockIdx.x) / ctas_per_split;
    kv_head_ = static_cast<int>(blockIdx.x) % ctas_per_split / args.ctas_per_group;
    const int member = static_cast<int>(blockIdx.x) % args.ctas_per_group * args.heads_per_cta + warp;
    has_head_ = member < group_size;
    head_ = kv_head_ * group_size + member;
    begin_ = split_ * kSplitKeys;
    end_ = min(num_keys_ - begin_, kSplitKeys) + begin_;
    last_chunk_ = (num_keys_ - 1) / args.chunk_len;
  }

  __device__ bool has_head() const { return has_head_; }
  __device__ int head() const { return head_; }
  __device__ int row_in_block() const { return lane_ / 4; }
  __device__ int key_in_block() const { return lane_ % 4 * 2; }
  __device__ int64_t partial() const { return (int64_t{head_} * args_.num_splits + split_) * kRows; }

  // Calls body(key, scores, masked, slack) for each step of a warp that has a head: unscaled scores of the 16 keys from
  // `key` on, some of which rows do not see if `masked`.
  template <typename Body>
  __device__ __forceinline__ void for_each_step(Body body) {
    copy_keys(begin_, 0);
    int32_t loaded_chunk = -1;
    int parity = 0;
    for (int32_t tile = begin_; tile < end_; tile += kTileKeys, parity ^= 1) {
      ptx::wait_copies<0>();
      __syncthreads();  // this tile is here; nobody reads the one before any more
      if (end_ - tile > kTileKeys) copy_keys(tile + kTileKeys, parity ^ 1);
      if (!has_head_) continue;
      const int32_t chunk = tile / args_.chunk_len;
      if (chunk != loaded_chunk) load_q(chunk);
      loaded_chunk = chunk;
#pragma unroll 1
      for (int step = 0; step < kTileKeys; step += kStepKeys) {
        Scores scores;
        multiply(shared_.k[parity], step, scores);
        const int32_t keys_after_row_0 = num_keys_ - kRows - (tile + step);
        body(tile + step, scores, keys_after_row_0 < kStepKeys - 1, keys_after_row_0 + row_in_block() - key_in_block());
      }
    }
  }

 private:
  // Keys past the end become zeros; no row sees them.
  __device__ __forceinline__ void copy_keys(int32_t tile, int parity) {
    const Rows& k = args_.p.k;
    const T* head = static_cast<const T*>(k.data) + kv_head_ * k.head_stride;
#pragma unroll 4
    for (int i = threadIdx.x; i < kTileKeys * kPieces; i += blockDim.x) {
      const int row = i / kPieces, piece = i % kPieces;
      const bool inside = row < end_ - tile;
      ptx::copy_async_16(ptx::shared_address(shared_.k[parity] + cuda::swizzled<kHeadDim>(row, piece)),
                         head + int64_t{inside ? tile + row : tile} * k.row_stride + piece * 8, inside ? 16 : 0);
    }
    ptx::commit_copies();
  }

  // The rows as left operands, in the rotation with which each meets the keys of `chunk`. Rows before the first voting
  // one repeat it: their scores are finite where the others' are, and a normalizer of +inf makes their weights 0.
  __device__ __forceinline__ void load_q(int32_t chunk) {
    const SelectParams& p = args_.p;
    const int32_t border = last_chunk_ * args_.chunk_len;  // 64 rows lie in the last chunk and the one before it
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
      const int32_t row = max(8 * r + row_in_block() - (kRows - num_rows_), 0);
      const int32_t row_chunk = num_keys_ - num_rows_ + row >= border ? last_chunk_ : last_chunk_ - 1;
      const Rows& q = chunk >= row_chunk ? p.q_intra : chunk == row_chunk - 1 ? p.q_succ : p.q_inter;
      const T* data = static_cast<const T*>(q.data) + row * q.row_stride + head_ * q.head_stride + key_in_block();
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        q_[d / 2][r / 2][d % 2 * 2 + r % 2] = *reinterpret_cast<const uint32_t*>(data + d * 8);
      }
    }
  }

  __device__ __forceinline__ void multiply(const uint8_t* tile, int step, Scores& scores) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores.values[m][n][i] = 0.0f;
      }
    }
    const int matrix = lane_ / 8;
    const uint32_t address =
        ptx::shared_address(tile + cuda::swizzled<kHeadDim>(step + matrix / 2 * 8 + lane_ % 8, matrix % 2));
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t k[4];
      ptx::load_matrices(address ^ (d << 5), 0, k);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        ptx::mma<T>(scores.values[m][0], q_[d][m], k[0], k[1]);
        ptx::mma<T>(scores.values[m][1], q_[d][m], k[2], k[3]);
      }
    }
  }

  const Args& args_;
  SharedMemory<kHeadDim>& shared_;
  const int lane_;
  const int32_t num_keys_, num_rows_;
  int split_, kv_head_, head_;
  bool has_head_;
  int32_t begin_, end_;  // keys of the split
  int32_t last_chunk_;   // of the last row
  uint32_t q_[kHeadDim / 16][kMTiles][4];
};

// Pass 1: each row's log-sum-exp over the split. A lane keeps a maximum and a sum for the keys that it sees.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kMaxWarps * 32) normalizer_kernel(const __grid_constant__ Args args) {
  __shared__ SharedMemory<kHeadDim> shared;
  Split<T, kHeadDim> split(args, shared);
  const float scale = args.p.softmax_scale * cuda::kLog2E;
  float highest[kRowBlocks], sum[kRowBlocks];
#pragma unroll
  for (int r = 0; r < kRowBlocks; ++r) {
    highest[r] = kLowest;
    sum[r] = 0.0f;
  }
  split.for_each_step([&](int32_t, auto& scores, bool masked, int32_t slack) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < 2 * kStepBlocks; ++i)
        scores.at(r, i / 2, i % 2) *= scale;  // first: the scale may be negative
    }
    if (masked) scores.mask(slack, -INFINITY);
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
      const float old = highest[r];
#pragma unroll
      for (int i = 0; i < 2 * kStepBlocks; ++i) highest[r] = fmaxf(highest[r], scores.at(r, i / 2, i % 2));
      sum[r] *= ptx::exp2(old - highest[r]);
#pragma unroll
      for (int i = 0; i < 2 * kStepBlocks; ++i) sum[r] += ptx::exp2(scores.at(r, i / 2, i % 2) - highest[r]);
    }
  });
  if (!split.has_head()) return;
#pragma unroll
  for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, highest[r], lanes);
      const float both = fmaxf(highest[r], other);
      sum[r] *= ptx::exp2(highest[r] - both);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], lanes);
      highest[r] = both;
    }
    if (threadIdx.x % 4 == 0) {  // -inf if the row sees none of the keys
      args.split_lse[split.partial() + 8 * r + split.row_in_block()] = highest[r] + log2f(sum[r]);
    }
  }
}

// Sums each of 16 values, four per lane, over the 8 lanes that differ in g. Lane (g, t) gets value [g / 2 % 2][t][g %
// 2] of [2][4][2], where [n][t][e] are the values x[n][e] of the lanes with t.
__device__ __forceinline__ float sum_over_rows(const float (&x)[kStepBlocks][2]) {
  const bool odd = threadIdx.x & 4, second = threadIdx.x & 8;
  float y[kStepBlocks];
#pragma unroll
  for (int n = 0; n < kStepBlocks; ++n) {
    y[n] = (odd ? x[n][1] : x[n][0]) + __shfl_xor_sync(kAllLanes, odd ? x[n][0] : x[n][1], 4);
  }
  const float sum = (second ? y[1] : y[0]) + __shfl_xor_sync(kAllLanes, second ? y[0] : y[1], 8);
  return sum + __shfl_xor_sync(kAllLanes, sum, 16);
}

// The running sums of a warp's diagonals.
class Diagonals {
 public:
  __device__ Diagonals() : t_(threadIdx.x % 4), g_(threadIdx.x % 32 / 4) {
    // After rotation, lane (g, t) holds the columns (g - 2t - e) % 8 of row g. Even ones lie in the registers e = 0.
    const int first_lane = threadIdx.x & 28;
    even_lane_ = first_lane + ((g_ / 2 - t_) & 3);
    odd_lane_ = first_lane + (((g_ + 1) / 2 - t_ - 1) & 3);
  }

  // Adds weights(r), those of the row blocks r with a block of keys, to element `e`. Returns the diagonal of blocks
  // that is complete with them, that of the last row block.
  template <typename Weights>
  __device__ __forceinline__ float add(int e, Weights weights) {
    const float complete = running_[kRowBlocks - 1][e] + weights(kRowBlocks - 1);
#pragma unroll
    for (int r = kRowBlocks - 1; r > 0; --r) running_[r][e] = running_[r - 1][e] + weights(r - 1);
    return complete;
  }

  // From two completed diagonals of blocks, the 16 diagonals on which the last row meets the two blocks of keys that
  // completed them, in sum_over_rows' order; of each block the last key first, at [n][0][0].
  __device__ __forceinline__ float finish(const float (&complete)[kStepBlocks][2]) {
    float x[kStepBlocks][2];
#pragma unroll
    for (int n = 0; n < kStepBlocks; ++n) {
      const float even = __shfl_sync(kAllLanes, complete[n][0], even_lane_);
      const float odd = __shfl_sync(kAllLanes, complete[n][1], odd_lane_);
      const float rotated[2] = {g_ % 2 == 0 ? even : odd, g_ % 2 == 0 ? odd : even};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        // Diagonal row - column = 2t + e of the blocks begins, above its row 2t + e, in the blocks completed before.
        x[n][e] = g_ >= 2 * t_ + e ? rotated[e] : before_[e];
        before_[e] = rotated[e];
      }
    }
    return sum_over_rows(x);
  }

 private:
  int t_, g_, even_lane_, odd_lane_;
  float running_[kRowBlocks][2] = {};  // [r]: of the diagonal on which row block r meets the coming block of keys
  float before_[2] = {};
};

// Pass 2: weights, from the rows' log-sum-exp over all keys, and their sums.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kMaxWarps * 32) score_kernel(const __grid_constant__ Args args) {
  __shared__ SharedMemory<kHeadDim> shared;
  Split<T, kHeadDim> split(args, shared);
  const float scale = args.p.softmax_scale * cuda::kLog2E;
  const int32_t num_keys = static_cast<int32_t>(args.p.shape.seqlen_k);
  float lse[kRowBlocks];
#pragma unroll
  for (int r = 0; r < kRowBlocks; ++r) {
    lse[r] = split.has_head() ? args.lse[split.head() * kRows + 8 * r + split.row_in_block()] : 0.0f;
  }
  const int64_t first_score = split.head() * args.p.shape.seqlen_k;
  float* vertical = args.p.vertical_scores + first_score;
  float* slash = args.p.slash_scores + first_score;
  // This lane's value of sum_over_rows: as a key of the step, and as a key that the last row meets on the diagonal.
  const int lane = threadIdx.x % 32;
  const bool writes = lane < 16;
  const int block = lane / 8 % 2 * 8, in_block = lane % 4 * 2 + lane / 4 % 2;
  const int column = block + in_block, diagonal = block + 7 - in_block;
  Diagonals diagonals;
  split.for_each_step([&](int32_t key, auto& scores, bool masked, int32_t slack) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < 2 * kStepBlocks; ++i) {
        float& score = scores.at(r, i / 2, i % 2);
        score = ptx::exp2(fmaf(score, scale, -lse[r]));
      }
    }
    if (masked) scores.mask(slack, 0.0f);
    float columns[kStepBlocks][2], complete[kStepBlocks][2];
#pragma unroll
    for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        columns[n][e] = 0.0f;
#pragma unroll
        for (int r = 0; r < kRowBlocks; ++r) columns[n][e] += scores.at(r, n, e);
        complete[n][e] = diagonals.add(e, [&](int r) { return scores.at(r, n, e); });
      }
    }
    const float column_sum = sum_over_rows(columns);
    const float diagonal_sum = diagonals.finish(complete);
    if (writes && key + column < num_keys) vertical[key + column] = column_sum;
    if (writes && key + diagonal < num_keys) slash[num_keys - 1 - (key + diagonal)] = diagonal_sum;
  });
  if (!split.has_head()) return;
  float* overrun = args.overruns + split.partial();
#pragma unroll
  for (int key = 0; key < kRows; key += kStepKeys) {
    float complete[kStepBlocks][2];
#pragma unroll
    for (int i = 0; i < 2 * kStepBlocks; ++i) complete[i / 2][i % 2] = diagonals.add(i % 2, [](int) { return 0.0f; });
    const float diagonal_sum = diagonals.finish(complete);
    if (writes) overrun[key + diagonal] = diagonal_sum;
  }
}

}  // namespace qwen_sparse::sm80::select
