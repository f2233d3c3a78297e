// Decode attention on Ampere and later: a few rows per sequence against pages of 16-bit or int8 keys and values.
//
// Grid: one CTA per (sequence, block of up to 64 rows, split of the keys, kv head); rows are all query heads of the kv
// head at all positions. Heads are neighbours in the grid, as their keys are in memory. The number of splits follows
// from the cache's capacity; which keys a split takes, in whole tiles of 64, from the sequence's length on the device.
// Splits without keys leave a marker. Warps: 4. A warp holds 16 rows and takes 16 keys of a tile at a time, with an
// online softmax of its own. With one tile of rows (the usual case) each warp takes a quarter of the keys; with two,
// warps pair up; with three or four, each takes all keys for its own rows. What warps have of the same rows is merged
// at the end. Shared memory: kStages tiles of K and V in flight, with scales; places of the keys of the tiles to come,
// looked up one tile before they are copied, since that waits for global memory; the rows; operands of the bias
// (bias.cuh).
//
// Keys of a warp's 16: 8 after the middle of the tile, and the 8 that mirror them before it, in reverse. That is what
// the bias product wants, and costs nothing elsewhere, as matrices are loaded row by row. int8: 16 bytes of a key take
// the place of 8 16-bit elements in ldmatrix, so a lane receives 4 consecutive channels of a key; the rows are held in
// the same order, which a sum over channels does not mind. Of a value it receives channels 2g and 2g + 1 of two keys;
// one product takes the even and one the odd channels. The key's scale meets the score, the value's scale meets the
// weight. These weights are split into high and low bfloat16 parts, which keeps 16 bits of them, for two products:
// float16 could not hold them, and rounded to bfloat16 once, a row that attends one key has up to 1.9 times PyTorch's
// error, since the scale is rounded as well as the result. The second product costs 4 to 7 % of the instructions of the
// loop over parts of tiles (head_dim 128: 648 to 678 in sm_80 code, with a bias 721 to 754).
#pragma once

#include <cmath>

#include "cuda/common/attention.h"
#include "cuda/sm80/decode/bias.cuh"
#include "cuda/sm80/decode/int8.cuh"

namespace qwen_sparse::sm80::decode {

using cuda::Location;

// cuda::swizzled for rows of bytes; of the short ones, two share 128 bytes.
template <int kRowBytes>
__device__ __forceinline__ int swizzled_bytes(int row, int piece) {
  if constexpr (kRowBytes == 64) return row * kRowBytes + ((piece ^ (row >> 1 & 3)) << 4);
  return cuda::swizzled<kRowBytes / 2>(row, piece);
}

template <typename T, typename C, int kHeadDim, bool kHasBias>
class Cta {
  using Shared = SharedMemory<C, kHeadDim, kHasBias>;
  using Bias = std::conditional_t<kHasBias, KeyBias<T, kHeadDim>, NoBias>;
  static constexpr bool kIsInt8 = Shared::kIsInt8;
  using V = std::conditional_t<kIsInt8, cuda::BFloat16, T>;  // values and weights as multiplied
  static constexpr int kStages = Shared::kStages;
  static constexpr int kRowBytes = Shared::kRowBytes;
  static constexpr int kPieces = kRowBytes / 16;          // of a key
  static constexpr int kRowsAtOnce = kThreads / kPieces;  // that all threads copy with one instruction each
  static constexpr int kSteps = kHeadDim / 16;            // of QK^T

 public:
  __device__ Cta(const Args& args, Shared& shared)
      : args_(args),
        p_(args.p),
        shared_(shared),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        row_warps_(args.row_tiles == 1   ? 1
                   : args.row_tiles == 2 ? 2
                                         : 4),
        row_tile_(warp_ % row_warps_),
        kv_head_(static_cast<int>(blockIdx.x % p_.shape.num_kv_heads)),
        split_(static_cast<int>(blockIdx.x / p_.shape.num_kv_heads % args.num_splits)),
        bias_(p_.bias, kv_head_, shared.bias) {
    const int64_t block = blockIdx.x / p_.shape.num_kv_heads / args.num_splits;
    batch_ = block / args.row_blocks;
    first_row_ = static_cast<int>(block % args.row_blocks) * args.row_tiles * kTileRows;
    num_rows_ = min(args.row_tiles * kTileRows, args.num_rows - first_row_);
    const int64_t seqlen_q = p_.shape.seqlen_q;
    int64_t seqlen_k = p_.seqlens_k[batch_];
    if (seqlen_k < seqlen_q) seqlen_k = seqlen_q;
    if (seqlen_k > args.capacity) seqlen_k = args.capacity;
    past_ = static_cast<int32_t>(seqlen_k - seqlen_q);
    scale_ = p_.softmax_scale * cuda::kLog2E;  // so that scores are in base 2
    if (p_.scale_factors != nullptr) {
      const float factor = p_.scale_factors[batch_];
      scale_ *= isfinite(factor) ? factor : NAN;  // an infinite one would look like rows that attend nothing
    }

    // of the tiles that any row of the block attends, an equal part
    const int32_t first_position = position_of(first_row_);
    key_end_ = max(position_of(first_row_ + num_rows_ - 1) + 1, 0);
    const int32_t lowest = static_cast<int32_t>(max(int64_t{first_position} - p_.window + 1, int64_t{0}));
    const int32_t begin = lowest / kTileKeys, end = cuda::ceil_div(key_end_, kTileKeys);
    const int32_t tiles = max(cuda::ceil_div(end - begin, args.num_splits), kMinSplitTiles);
    first_tile_ = begin + split_ * tiles;
    num_tiles_ = min(tiles, end - first_tile_);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_tile_ * kTileRows + half * 8 + lane_ / 4;
      const int32_t position = row < num_rows_ ? position_of(first_row_ + row) : -1;
      last_key_[half] = position;
      key_before_[half] = static_cast<int32_t>(max(position - p_.window, int64_t{-1}));
    }
  }

  __device__ void run() {
    if (num_tiles_ <= 0) return mark_empty();
    for (int i = threadIdx.x; i < kStages * kTileKeys; i += kThreads) {
      place(i / kTileKeys, i % kTileKeys) = look_up(i / kTileKeys, i % kTileKeys);
    }
    __syncthreads();
    for (int tile = 0; tile < kStages - 1; ++tile) {
      if (tile < num_tiles_) copy_tile(tile);
      ptx::commit_copies();
    }
    if constexpr (kHasBias) {
      bias_.make_operand();
      bias_.turn(first_key(0) % args_.chunk_len);
    }
    const bool has_rows = row_tile_ < args_.row_tiles;
    for (int tile = 0; tile < num_tiles_; ++tile) {
      ptx::wait_copies<kStages - 2>();
      __syncthreads();  // the tile is here; nobody reads the one before any more
      if (tile + kStages - 1 < num_tiles_) copy_tile(tile + kStages - 1);
      ptx::commit_copies();
      if (first_key(tile) >= chunk_end_) load_rows(first_key(tile));
      if constexpr (kHasBias) {
        for (int i = warp_; i < args_.row_tiles * (kSteps / 2); i += kNumWarps) {
          bias_.make_rows(i % (kSteps / 2), shared_.rows()[i / (kSteps / 2)]);
        }
        __syncthreads();  // the left operands of all rows are here; nobody reads the turned bias any more
        bias_.turn(first_key(tile + 1) % args_.chunk_len);
      }
      Location later;
      if (threadIdx.x < kTileKeys) later = look_up(tile + kStages, threadIdx.x);
      if (has_rows) {
        for (int part = warp_ / row_warps_; part < kTileKeys / kWarpKeys; part += kNumWarps / row_warps_) {
          attend(tile, part);
        }
      }
      if (threadIdx.x < kTileKeys) place(tile + kStages, threadIdx.x) = later;
    }
    merge();
  }

 private:
  __device__ int32_t position_of(int row) const { return past_ + row / args_.group_size; }
  __device__ int32_t first_key(int tile) const { return (first_tile_ + tile) * kTileKeys; }
  __device__ Location& place(int tile, int i) { return shared_.places[tile % Shared::kPlaces][i]; }

  // Index of the row's result in [batch, seqlen_q, num_heads].
  __device__ int64_t output_of(int row) const {
    return (batch_ * p_.shape.seqlen_q + row / args_.group_size) * p_.shape.num_heads + kv_head_ * args_.group_size +
           row % args_.group_size;
  }

  __device__ void mark_empty() {
    for (int i = threadIdx.x; i < num_rows_; i += kThreads) {
      args_.partial_lse[output_of(first_row_ + i) * args_.num_splits + split_] = -INFINITY;
    }
  }

  __device__ Location look_up(int tile, int i) const {
    const int32_t key = first_key(tile) + i;
    if (tile >= num_tiles_ || key >= key_end_) return {-1, 0};
    const int32_t page = p_.block_table[batch_ * p_.block_table_stride + key / args_.page_size];
    return cuda::locate(page, key % args_.page_size, p_.num_pages);
  }

  // Keys that do not exist become zeros, since even with weight 0 a NaN would show.
  __device__ void copy_tile(int tile) {
    auto& stage = shared_.stages[tile % kStages];
    const int piece = threadIdx.x % kPieces;
#pragma unroll
    for (int i = 0; i < kTileKeys / kRowsAtOnce; ++i) {
      const int row = threadIdx.x / kPieces + i * kRowsAtOnce;
      const Location from = place(tile, row);
      const int at = swizzled_bytes<kRowBytes>(row, piece);
      ptx::copy_async_16(ptx::shared_address(stage.k + at), address<C>(p_.k, from) + piece * (16 / sizeof(C)),
                         from.exists() ? 16 : 0);
      ptx::copy_async_16(ptx::shared_address(stage.v + at), address<C>(p_.v, from) + piece * (16 / sizeof(C)),
                         from.exists() ? 16 : 0);
    }
    if constexpr (kIsInt8) {
      const bool of_k = threadIdx.x < kTileKeys;
      const int row = threadIdx.x % kTileKeys;
      const Location from = place(tile, row);
      float* scale = of_k ? shared_.k_scale[tile % kStages] : shared_.v_scale[tile % kStages];
      ptx::copy_async_4(ptx::shared_address(scale + row), address<float>(of_k ? p_.k_scale : p_.v_scale, from),
                        from.exists() ? 4 : 0);
    }
  }

  template <typename Element>
  __device__ const Element* address(const Pages& pages, const Location& place) const {
    return cuda::address<Element>(pages, place.exists() ? place : Location{0, 0}, kv_head_);
  }

  // The rows' rotations for the chunk of `key`, into shared memory and registers; those past the last become zeros.
  __device__ void load_rows(int32_t key) {
    const int32_t chunk = key / args_.chunk_len;
    chunk_end_ = (chunk + int64_t{1}) * args_.chunk_len;
    for (int i = threadIdx.x; i < args_.row_tiles * kTileRows * (kHeadDim / 8); i += kThreads) {
      const int row = i / (kHeadDim / 8), piece = i % (kHeadDim / 8);
      uint4 x = make_uint4(0, 0, 0, 0);
      if (row < num_rows_) {
        const int32_t chunks_back = max(position_of(first_row_ + row), 0) / args_.chunk_len - chunk;
        const Rows& q = chunks_back <= 0 ? p_.q_intra : chunks_back == 1 ? p_.q_succ : p_.q_inter;
        const int64_t q_row = batch_ * p_.shape.seqlen_q + (first_row_ + row) / args_.group_size;
        const int64_t head = kv_head_ * args_.group_size + (first_row_ + row) % args_.group_size;
        x = *reinterpret_cast<const uint4*>(static_cast<const T*>(q.data) + q_row * q.row_stride +
                                            head * q.head_stride + piece * 8);
      }
      *reinterpret_cast<uint4*>(shared_.rows()[row / kTileRows].q[row % kTileRows] + piece * 16) = x;
    }
    __syncthreads();
    if (row_tile_ >= args_.row_tiles) return;
    const uint8_t* upper = shared_.rows()[row_tile_].q[lane_ / 4];
    const uint8_t* lower = shared_.rows()[row_tile_].q[lane_ / 4 + 8];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      // channels 4t to 4t + 3 of 16, or as mma has it 2t, 2t + 1, 2t + 8, 2t + 9
      const int at = step * 32 + lane_ % 4 * (kIsInt8 ? 8 : 4);
      const int next = at + (kIsInt8 ? 4 : 16);
      q_[step][0] = *reinterpret_cast<const uint32_t*>(upper + at);
      q_[step][1] = *reinterpret_cast<const uint32_t*>(lower + at);
      q_[step][2] = *reinterpret_cast<const uint32_t*>(upper + next);
      q_[step][3] = *reinterpret_cast<const uint32_t*>(lower + next);
    }
  }

  // Where in the tile key `i` of group `n` lies: 8 after the middle, 8 before it.
  __device__ static int key_offset(int part, int n, int i) {
    return n == 0 ? kTileKeys / 2 + part * 8 + i : kTileKeys / 2 - 1 - part * 8 - i;
  }

  // 16 rows, 16 keys of a tile.
  __device__ void attend(int tile, int part) {
    const auto& stage = shared_.stages[tile % kStages];
    float s[2][4] = {};
    multiply_qk(stage.k, part, s);
    if constexpr (kIsInt8) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[n][i] *= shared_.k_scale[tile % kStages][key_offset(part, n, lane_ % 4 * 2 + i % 2)];
        }
      }
    }
    if constexpr (kHasBias) {
      float bias[2][4];
      bias_.multiply(shared_.rows()[row_tile_], part, bias[0], bias[1]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] += bias[n][i];
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int offset = key_offset(part, n, lane_ % 4 * 2 + e);
        const bool exists = place(tile, offset).exists();
        const int32_t key = first_key(tile) + offset;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool attended = exists && key <= last_key_[half] && key > key_before_[half];
          s[n][2 * half + e] = attended ? s[n][2 * half + e] * scale_ : -INFINITY;
        }
      }
    }
    update_softmax(s);
    if constexpr (kIsInt8) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[n][i] *= shared_.v_scale[tile % kStages][key_offset(part, n, lane_ % 4 * 2 + i % 2)];
        }
      }
    }
    multiply_pv(stage.v, part, s);
  }

  __device__ void multiply_qk(const uint8_t* tile, int part, float (&s)[2][4]) {
    const int key = key_offset(part, lane_ / 16, lane_ % 8);
    const uint32_t address = ptx::shared_address(tile + swizzled_bytes<kRowBytes>(key, lane_ / 8 % 2));
    if constexpr (kIsInt8) {
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        uint32_t k[4];
        ptx::load_matrices(address ^ (step << 4), 0, k);
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // keys of group i / 2, step i % 2
          ptx::mma<T>(s[i / 2], q_[step + i % 2], widen<T, 0, 1>(k[i]), widen<T, 2, 3>(k[i]));
        }
      }
    } else {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t k[4];
        ptx::load_matrices(address ^ (step << 5), 0, k);
        ptx::mma<T>(s[0], q_[step], k[0], k[1]);
        ptx::mma<T>(s[1], q_[step], k[2], k[3]);
      }
    }
  }

  // Scores to weights, in place; what was summed before is scaled to the new maxima.
  __device__ void update_softmax(float (&s)[2][4]) {
    float shrink[2];
    bool changed = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = max_[half];
#pragma unroll
      for (int n = 0; n < 2; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      const float base = highest == -INFINITY ? 0.0f : highest;
      shrink[half] = ptx::exp2(max_[half] - base);
      changed = changed || max_[half] != highest;
      max_[half] = highest;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight = ptx::exp2(s[n][2 * half + e] - base);
          s[n][2 * half + e] = weight;
          sum += weight;
        }
      }
      sum_[half] = sum_[half] * shrink[half] + sum;
    }
    if (!__any_sync(0xffffffffu, changed)) return;
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[d][i] *= shrink[i / 2];
    }
  }

  __device__ void multiply_pv(const uint8_t* tile, int part, const float (&s)[2][4]) {
    uint32_t weights[4], low_parts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float first = s[i / 2][i % 2 * 2], second = s[i / 2][i % 2 * 2 + 1];
      if constexpr (kIsInt8) {
        cuda::split(first, second, weights[i], low_parts[i]);
      } else {
        weights[i] = cuda::pack<V>(first, second);
      }
    }
    const int key = key_offset(part, lane_ / 8 % 2, lane_ % 8);
    const uint32_t address = ptx::shared_address(tile + swizzled_bytes<kRowBytes>(key, lane_ / 16));
#pragma unroll
    for (int piece = 0; piece < kPieces; piece += 2) {
      uint32_t v[4];  // [2 pieces][2 groups of keys]
      ptx::load_matrices_transposed(address ^ (piece << 4), 0, v);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kIsInt8) {
          const uint32_t even[2] = {widen<V, 0, 2>(v[2 * i]), widen<V, 0, 2>(v[2 * i + 1])};
          const uint32_t odd[2] = {widen<V, 1, 3>(v[2 * i]), widen<V, 1, 3>(v[2 * i + 1])};
          ptx::mma<V>(out_[2 * (piece + i)], weights, even[0], even[1]);
          ptx::mma<V>(out_[2 * (piece + i) + 1], weights, odd[0], odd[1]);
          ptx::mma<V>(out_[2 * (piece + i)], low_parts, even[0], even[1]);
          ptx::mma<V>(out_[2 * (piece + i) + 1], low_parts, odd[0], odd[1]);
        } else {
          ptx::mma<V>(out_[piece + i], weights, v[2 * i], v[2 * i + 1]);
        }
      }
    }
  }

  // What the warps have of each row, into the workspace.
  __device__ void merge() {
    ptx::wait_copies<0>();
    __syncthreads();
    auto& merge = shared_.merge;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 8 + lane_ / 4;
      float sum = sum_[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane_ % 4 == 0) {
        merge.max[warp_][row] = max_[half];
        merge.sum[warp_][row] = sum;
      }
      float* out = merge.out[warp_][row];
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; d += 2) {
        const float *x = out_[d] + 2 * half, *y = out_[d + 1] + 2 * half;
        if constexpr (kIsInt8) {  // even and odd channels of 16
          *reinterpret_cast<float4*>(out + d * 8 + lane_ % 4 * 4) = make_float4(x[0], y[0], x[1], y[1]);
        } else {
          *reinterpret_cast<float2*>(out + d * 8 + lane_ % 4 * 2) = make_float2(x[0], x[1]);
          *reinterpret_cast<float2*>(out + d * 8 + 8 + lane_ % 4 * 2) = make_float2(y[0], y[1]);
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_rows_ * (kHeadDim / 4); i += kThreads) {
      const int row = i / (kHeadDim / 4), d = i % (kHeadDim / 4) * 4;
      const int first_warp = row / kTileRows, tile_row = row % kTileRows;
      float highest = -INFINITY;
      for (int warp = first_warp; warp < kNumWarps; warp += row_warps_) {
        highest = fmaxf(highest, merge.max[warp][tile_row]);
      }
      float sum = 0.0f;
      float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int warp = first_warp; warp < kNumWarps; warp += row_warps_) {
        const float factor = ptx::exp2(merge.max[warp][tile_row] - (highest == -INFINITY ? 0.0f : highest));
        const float4 x = *reinterpret_cast<const float4*>(merge.out[warp][tile_row] + d);
        sum += merge.sum[warp][tile_row] * factor;
        out.x += x.x * factor;
        out.y += x.y * factor;
        out.z += x.z * factor;
        out.w += x.w * factor;
      }
      const int64_t partial = output_of(first_row_ + row) * args_.num_splits + split_;
      if (d == 0) args_.partial_lse[partial] = sum == 0.0f ? -INFINITY : highest + log2f(sum);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      *reinterpret_cast<float4*>(args_.partial_out + partial * kHeadDim + d) =
          make_float4(out.x * inverse, out.y * inverse, out.z * inverse, out.w * inverse);
    }
  }

  const Args& args_;
  const DecodeParams& p_;
  Shared& shared_;
  const int lane_, warp_;
  const int row_warps_;  // warps with different rows
  const int row_tile_;   // of this warp; args.row_tiles or more: it only copies
  const int kv_head_, split_;
  Bias bias_;
  int64_t batch_;
  int first_row_, num_rows_;  // of the block
  int32_t past_;              // position of the sequence's first row
  float scale_;               // of the sequence's scores
  int32_t key_end_;           // no row of the block attends this key or later ones
  int32_t first_tile_, num_tiles_;
  int32_t last_key_[2], key_before_[2];  // rows lane / 4 and lane / 4 + 8 attend key_before < key <= last_key
  int64_t chunk_end_ = 0;                // first key for which q_ has to be loaded anew
  uint32_t q_[kSteps][4];
  float out_[kHeadDim / 8][4] = {};
  float max_[2] = {-INFINITY, -INFINITY};
  float sum_[2] = {};
};

template <typename T, typename C, int kHeadDim, bool kHasBias>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) decode_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(256) uint8_t memory[];
  using Shared = SharedMemory<C, kHeadDim, kHasBias>;
  Cta<T, C, kHeadDim, kHasBias>(args, *reinterpret_cast<Shared*>(memory)).run();
}

}  // namespace qwen_sparse::sm80::decode
