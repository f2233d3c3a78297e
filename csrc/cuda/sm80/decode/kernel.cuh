// Decode attention on Ampere and later: a few rows per sequence against pages of 16-bit or int8 keys and values.
//
// Grid: one CTA per (sequence, block of rows, split of the keys, kv head); rows are all query heads of the kv head at
// all positions. Heads are neighbours in the grid, as their keys are in memory. The number of splits follows from the
// cache's capacity; which keys a split takes, in whole tiles of 64, from the sequence's length on the device. Splits
// without keys leave a marker. Warps: 4. A warp holds one tile of rows, 16 or, of int8 pages, 8 (float_pages.cuh,
// int8_pages.cuh), and takes 16 keys of a tile at a time, with an online softmax of its own. With one tile of rows (the
// usual case) each warp takes a quarter of the keys; with two, warps pair up; with three or four, each takes all keys
// for its own rows. What warps have of the same rows is merged at the end. Shared memory: kStages tiles of K and V in
// flight, with scales; places of the keys of the tiles to come, looked up one tile before they are copied, since that
// waits for global memory; the rows; operands of the bias (bias.cuh).
#pragma once

#include <cmath>

#include "cuda/sm80/decode/bias.cuh"
#include "cuda/sm80/decode/float_pages.cuh"
#include "cuda/sm80/decode/int8_pages.cuh"

namespace qwen_sparse::sm80::decode {

using cuda::Location;

template <typename T, typename C, int kHeadDim, bool kHasBias>
class Cta {
  using Shared = SharedMemory<C, kHeadDim, kHasBias>;
  using Bias = std::conditional_t<kHasBias, KeyBias<T, kHeadDim>, NoBias>;
  static constexpr bool kIsInt8 = Shared::kIsInt8;
  using Warp = std::conditional_t<kIsInt8, Int8Pages<T, kHeadDim, kHasBias>, FloatPages<T, kHeadDim>>;
  static constexpr int kTileRows = Shared::kTileRows;
  static constexpr int kStages = Shared::kStages;
  static constexpr int kRowBytes = Shared::kRowBytes;
  static constexpr int kPieces = kRowBytes / 16;          // of a key
  static constexpr int kRowsAtOnce = kThreads / kPieces;  // that all threads copy with one instruction each
  static_assert(kThreads == 2 * kTileKeys, "a thread looks after one key or value of a tile");

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
        batch_(blockIdx.x / p_.shape.num_kv_heads / args.num_splits / args.row_blocks),
        scale_(scale_of(p_, batch_)),
        bias_(p_.bias, kv_head_, scale_, shared.bias),
        warp_rows_(args) {
    const int64_t block = blockIdx.x / p_.shape.num_kv_heads / args.num_splits;
    first_row_ = static_cast<int>(block % args.row_blocks) * args.row_tiles * kTileRows;
    num_rows_ = min(args.row_tiles * kTileRows, args.num_rows - first_row_);
    const int64_t seqlen_q = p_.shape.seqlen_q;
    int64_t seqlen_k = p_.seqlens_k[batch_];
    if (seqlen_k < seqlen_q) seqlen_k = seqlen_q;
    if (seqlen_k > args.capacity) seqlen_k = args.capacity;
    past_ = static_cast<int32_t>(seqlen_k - seqlen_q);

    // of the tiles that any row of the block attends, an equal part
    const int32_t last_position = position_of(first_row_ + num_rows_ - 1);
    first_position_ = position_of(first_row_);
    key_end_ = max(last_position + 1, 0);
    all_after_ = key_before(last_position);
    const int32_t begin = (key_before(first_position_) + 1) / kTileKeys, end = cuda::ceil_div(key_end_, kTileKeys);
    const int32_t tiles = max(cuda::ceil_div(end - begin, args.num_splits), kMinSplitTiles);
    first_tile_ = begin + split_ * tiles;
    num_tiles_ = min(tiles, end - first_tile_);
    key_limit_ = min(key_end_, first_key(num_tiles_));
    next_key_ = first_key(0) + static_cast<int32_t>(threadIdx.x % kTileKeys);
    next_page_ = next_key_ / args.page_size;
    next_row_ = next_key_ % args.page_size;
#pragma unroll
    for (int half = 0; half < Warp::kLaneRows; ++half) {
      const int row = row_tile_ * kTileRows + half * 8 + lane_ / 4;
      const int32_t position = row < num_rows_ ? position_of(first_row_ + row) : -1;
      rows_.last_key[half] = position;
      rows_.key_before[half] = key_before(position);
      rows_.max[half] = -INFINITY;
      rows_.sum[half] = 0.0f;
    }
  }

  __device__ void run() {
    if (num_tiles_ <= 0) return mark_empty();
    Location places[kStages];
#pragma unroll
    for (int tile = 0; tile < kStages; ++tile) places[tile] = look_up();
#pragma unroll
    for (int tile = 0; tile < kStages - 1; ++tile) note(tile, places[tile]);
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kStages - 1; ++tile) {
      if (tile < num_tiles_) copy_tile(tile, places[tile]);
      ptx::commit_copies();
    }
    Location next = places[kStages - 1];
    __syncthreads();  // nobody reads the first places any more
    note(kStages - 1, next);
    [[maybe_unused]] int32_t position = first_key(0) % args_.chunk_len;  // of the tile's first key in its chunk
    if constexpr (kHasBias) {
      bias_.make_operand();
      bias_.turn(position);
    }
    const bool has_rows = row_tile_ < args_.row_tiles;
    for (int tile = 0; tile < num_tiles_; ++tile) {
      ptx::wait_copies<kStages - 2>();
      __syncthreads();  // the tile is here; nobody reads the one before any more
      if (tile + kStages - 1 < num_tiles_) copy_tile(tile + kStages - 1, next);
      ptx::commit_copies();
      if (first_key(tile) >= chunk_end_) load_rows(first_key(tile));
      if constexpr (kHasBias) {
        constexpr int kSteps = kHeadDim / 32;
        for (int i = warp_; i < args_.row_tiles * kSteps; i += kNumWarps) {
          bias_.make_rows(i % kSteps, shared_.rows()[i / kSteps]);
        }
        __syncthreads();  // the left operands of all rows are here; nobody reads the turned bias any more
        position = position + kTileKeys == args_.chunk_len ? 0 : position + kTileKeys;
        bias_.turn(position);
      }
      next = look_up();
      if (has_rows) {
        const int32_t first = first_key(tile);
        if (is_whole(tile) && first + kTileKeys - 1 <= first_position_ && first > all_after_) {
          attend(tile, [](int, auto&) {});
        } else {
          attend(tile, [&](int part, auto& s) { rows_.mask(part, first, shared_.exists[tile % Shared::kExists], s); });
        }
      }
      note(tile + kStages, next);
    }
    merge();
  }

 private:
  __device__ int32_t position_of(int row) const { return past_ + row / args_.group_size; }
  __device__ int32_t key_before(int32_t position) const {
    return static_cast<int32_t>(max(position - p_.window, int64_t{-1}));
  }
  __device__ int32_t first_key(int tile) const { return (first_tile_ + tile) * kTileKeys; }

  // Factor of the scores of sequence `batch`, in base 2.
  __device__ static float scale_of(const DecodeParams& p, int64_t batch) {
    const float scale = p.softmax_scale * cuda::kLog2E;
    if (p.scale_factors == nullptr) return scale;
    const float factor = p.scale_factors[batch];
    return scale * (isfinite(factor) ? factor : NAN);  // an infinite one would look like rows that attend nothing
  }

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

  // Where the thread's key of the next tile lies: the first half of the CTA looks after keys, the second after values.
  __device__ Location look_up() {
    Location place = {-1, 0};
    if (next_key_ < key_limit_) {
      const int32_t page = p_.block_table[batch_ * p_.block_table_stride + next_page_];
      place = cuda::locate(page, next_row_, p_.num_pages);
    }
    next_key_ += kTileKeys;
    for (next_row_ += kTileKeys; next_row_ >= args_.page_size; next_row_ -= args_.page_size) ++next_page_;
    return place;
  }

  // What the CTA needs to know of the place.
  __device__ void note(int tile, const Location& place) {
    const int of_v = threadIdx.x / kTileKeys;
    const int64_t elements = offset(of_v == 0 ? p_.k : p_.v, place);
    shared_.places[tile % Shared::kPlaces][of_v][threadIdx.x % kTileKeys] =
        place.exists() ? elements * static_cast<int64_t>(sizeof(C)) : -1;
    const uint32_t exists = __ballot_sync(0xffffffffu, place.exists());
    if (of_v == 0 && lane_ == 0) shared_.exists[tile % Shared::kExists][warp_] = exists;
  }

  __device__ int64_t offset(const Pages& pages, const Location& place) const {
    return place.page * pages.page_stride + place.row * pages.row_stride + kv_head_ * pages.head_stride;
  }

  // Whether all keys of the tile lie somewhere.
  __device__ bool is_whole(int tile) const {
    const uint32_t(&exists)[2] = shared_.exists[tile % Shared::kExists];
    return (exists[0] & exists[1]) == ~0u;
  }

  // `place`: what look_up gave for the tile. Keys that do not exist become zeros, since even with weight 0 a NaN would
  // show; a copy that may have to do so takes three times the instructions.
  __device__ void copy_tile(int tile, const Location& place) {
    if (is_whole(tile)) {
      copy_rows(tile, [](uint32_t to, const uint8_t* pages, int64_t from) { ptx::copy_async_16(to, pages + from); });
    } else {
      copy_rows(tile, [](uint32_t to, const uint8_t* pages, int64_t from) {
        ptx::copy_async_16(to, pages + (from < 0 ? 0 : from), from < 0 ? 0 : 16);
      });
    }
    if constexpr (kIsInt8) {
      const bool of_k = threadIdx.x < kTileKeys;
      float* scale = of_k ? shared_.k_scale[tile % kStages] : shared_.v_scale[tile % kStages];
      const Pages& pages = of_k ? p_.k_scale : p_.v_scale;
      ptx::copy_async_4(ptx::shared_address(scale + threadIdx.x % kTileKeys),
                        static_cast<const float*>(pages.data) + (place.exists() ? offset(pages, place) : 0),
                        place.exists() ? 4 : 0);
    }
  }

  template <typename Copy>
  __device__ void copy_rows(int tile, const Copy& copy) {
    const auto& places = shared_.places[tile % Shared::kPlaces];
    auto& stage = shared_.stages[tile % kStages];
    const int piece = threadIdx.x % kPieces;
    const uint8_t* k = static_cast<const uint8_t*>(p_.k.data) + piece * 16;
    const uint8_t* v = static_cast<const uint8_t*>(p_.v.data) + piece * 16;
#pragma unroll
    for (int i = 0; i < kTileKeys / kRowsAtOnce; ++i) {
      const int row = threadIdx.x / kPieces + i * kRowsAtOnce;
      const int at = swizzled_bytes<kRowBytes>(row, piece);
      copy(ptx::shared_address(stage.k + at), k, places[0][row]);
      copy(ptx::shared_address(stage.v + at), v, places[1][row]);
    }
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
    if (row_tile_ < args_.row_tiles) warp_rows_.load(shared_.rows()[row_tile_], scale_);
  }

  // The warp's keys of a tile. `mask` (part, scores): scores of keys not attended become -infinity.
  template <typename Mask>
  __device__ void attend(int tile, const Mask& mask) {
    for (int part = warp_ / row_warps_; part < kTileKeys / kWarpKeys; part += kNumWarps / row_warps_) {
      warp_rows_.attend(
          shared_, tile % kStages, part, shared_.rows()[row_tile_], bias_, [&](auto& s) { mask(part, s); }, rows_);
    }
  }

  // What the warps have of each row, into the workspace.
  __device__ void merge() {
    ptx::wait_copies<0>();
    __syncthreads();
    auto& merge = shared_.merge;
#pragma unroll
    for (int half = 0; half < Warp::kLaneRows; ++half) {
      const int row = half * 8 + lane_ / 4;
      float sum = rows_.sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane_ % 4 == 0) {
        merge.max[warp_][row] = rows_.max[half];
        merge.sum[warp_][row] = sum;
      }
    }
    warp_rows_.store(merge.out[warp_]);
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
  const int64_t batch_;
  const float scale_;  // of the sequence's scores
  Bias bias_;
  int first_row_, num_rows_;  // of the block
  int32_t past_;              // position of the sequence's first row
  int32_t key_end_;           // no row of the block attends this key or later ones
  int32_t first_position_;    // the block's rows all attend the keys up to this one
  int32_t all_after_;         // and after this one
  int32_t first_tile_, num_tiles_;
  int32_t key_limit_;                        // the split's keys end here
  int32_t next_key_, next_page_, next_row_;  // that the thread looks up next
  int64_t chunk_end_ = 0;                    // first key for which the rows have to be loaded anew
  Warp warp_rows_;
  LaneRows<Warp::kLaneRows> rows_;
};

template <typename T, typename C, int kHeadDim, bool kHasBias>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) decode_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(256) uint8_t memory[];
  using Shared = SharedMemory<C, kHeadDim, kHasBias>;
  Cta<T, C, kHeadDim, kHasBias>(args, *reinterpret_cast<Shared*>(memory)).run();
}

}  // namespace qwen_sparse::sm80::decode
