// Prefill attention on Ampere and later: dense or over a sparse set, plain or dual-chunk, one online softmax.
//
// Grid: one CTA per (128-row tile, head), longest first: the last rows of the prompt come first, heads that share keys
// are neighbours. The hardware hands CTAs out in this order as others finish, which is what a persistent loop over a
// work counter would do; without asynchronous copies across tiles (Hopper's TMA) such a loop has nothing to overlap.
// Warps: 4 x 32 rows; warps 0 and 1 hold the tile's first 64-row block, 2 and 3 the second. A warp skips a key tile
// that its block does not attend, and masks it only where it is partly attended. Shared memory: Q, one tile of K, one
// of V. V of a tile arrives during QK^T, K of the next (and Q, at the border of a dual-chunk stage) during softmax and
// PV. 64 KiB at head_dim 128, so two CTAs share an SM.
#pragma once

#include "cuda/common/attention.h"
#include "cuda/common/ptx.h"
#include "cuda/common/softmax.h"
#include "cuda/sm80/prefill/config.h"

namespace qwen_sparse::sm80::prefill {

namespace ptx = cuda::ptx;
using cuda::RowTile;
using cuda::swizzled;
using cuda::Use;

// What a CTA works on is in shared memory too, since registers are what this kernel is short of.
template <int kHeadDim, typename Tiles>
struct SharedMemory {
  alignas(256) uint8_t q[kTileRows * kHeadDim * 2];
  alignas(256) uint8_t k[kTileKeys * kHeadDim * 2];
  alignas(256) uint8_t v[kTileKeys * kHeadDim * 2];
  RowTile rows;
  typename Tiles::Tile tiles[2];
  Tiles cursor;
};

template <typename T, int kHeadDim, typename Tiles>
class Cta {
  using Tile = typename Tiles::Tile;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kPieces = kHeadDim / 8;            // of 16 bytes in a row
  static constexpr int kRowsAtOnce = kThreads / kPieces;  // that all threads copy with one instruction each
  static constexpr int kMTiles = kWarpRows / 16;
  static constexpr int kKeyTiles8 = kTileKeys / 8;
  static constexpr int kDimTiles8 = kHeadDim / 8;
  static_assert(kRowsAtOnce % 8 == 0, "rows that a thread copies are swizzled alike");
  using Shared = SharedMemory<kHeadDim, Tiles>;

 public:
  __device__ Cta(const Args& args, Shared& shared) : args_(args), p_(args.p), shared_(shared) {}

  __device__ void run() {
    start();
    __syncthreads();
    const RowTile& rows = shared_.rows;
    const int32_t warp_first = rows.first + warp() * kWarpRows;
    const bool has_rows = warp_first < rows.end && warp_first + kWarpRows > rows.begin;
    if (shared_.tiles[0].count > 0) {
      copy_q(shared_.tiles[0].stage);
      copy_rows(p_.k, args_.indexes.column_k, shared_.tiles[0], shared_.k);
      ptx::commit_copies();
    }
    for (int parity = 0; shared_.tiles[parity].count > 0; parity ^= 1) {
      const Tile& tile = shared_.tiles[parity];
      const Tile& next = shared_.tiles[parity ^ 1];
      ptx::wait_copies<0>();
      __syncthreads();                                            // K and Q are here; nobody reads V any more
      if constexpr (Tiles::kWaitsForCopies) advance(parity ^ 1);  // which would otherwise wait for V too
      copy_rows(p_.v, args_.indexes.column_v, tile, shared_.v);
      ptx::commit_copies();
      if constexpr (!Tiles::kWaitsForCopies) advance(parity ^ 1);
      const bool attends =
          has_rows && tile.use[block()] != Use::kNone && tile.begins_before(warp_first + kWarpRows, p_.causal);
      float s[kMTiles][kKeyTiles8][4];
      if (attends) multiply_qk(s);
      ptx::wait_copies<0>();
      __syncthreads();  // V and the next tile's description are here; nobody reads K and Q any more
      if (next.count > 0) {
        if (next.stage != tile.stage) copy_q(next.stage);
        copy_rows(p_.k, args_.indexes.column_k, next, shared_.k);
        ptx::commit_copies();
      }
      if (attends) {
        if (args_.negate) negate(s);
        update_softmax(tile, s);
        multiply_pv(s);
      }
    }
    if (has_rows) store();
  }

 private:
  __device__ void start() {
    if (threadIdx.x >= Tiles::kThreads) return;
    if (threadIdx.x == 0) {
      const auto num_heads = static_cast<unsigned>(p_.shape.num_heads);
      const int64_t number = args_.tiles.count - 1 - blockIdx.x / num_heads;
      shared_.rows = RowTile(args_, number, static_cast<int32_t>(blockIdx.x % num_heads));
    }
    if (Tiles::kThreads > 1) __syncwarp();
    shared_.cursor.start(args_, shared_.rows);
    advance(0);
  }

  __device__ void advance(int parity) {
    if (threadIdx.x >= Tiles::kThreads) return;
    const Tile tile = shared_.cursor.next();
    if (threadIdx.x == 0) shared_.tiles[parity] = tile;
  }

  // Rows outside of the call become zeros.
  __device__ void copy_q(cuda::Stage stage) {
    const Rows& q = stage == cuda::kIntra ? p_.q_intra : stage == cuda::kSucc ? p_.q_succ : p_.q_inter;
    const int64_t past = p_.shape.seqlen_k - p_.shape.seqlen_q;
    const int piece = threadIdx.x % kPieces;
    const T* head = static_cast<const T*>(q.data) + shared_.rows.head * q.head_stride + piece * 8;
#pragma unroll 1
    for (int row = threadIdx.x / kPieces; row < kTileRows; row += kRowsAtOnce) {
      const int32_t position = shared_.rows.first + row;
      const bool inside = position >= shared_.rows.begin && position < shared_.rows.end;
      ptx::copy_async_16(ptx::shared_address(shared_.q + swizzled<kHeadDim>(row, piece)),
                         head + (inside ? position - past : int64_t{0}) * q.row_stride, inside ? 16 : 0);
    }
  }

  // A tile of keys or values; rows past its end become zeros, since even with weight 0 a NaN would show.
  __device__ void copy_rows(const Rows& rows, const void* columns, const cuda::KeyTile& tile, uint8_t* to) {
    const int piece = threadIdx.x % kPieces;
    const T* base;
    int64_t stride;
    if (tile.is_columns) {
      stride = kHeadDim;
      base = static_cast<const T*>(columns) + (shared_.rows.head * p_.num_vertical + tile.first) * stride;
    } else {
      stride = rows.row_stride;
      base = static_cast<const T*>(rows.data) + shared_.rows.kv_head * rows.head_stride + tile.first * stride;
    }
    int row = threadIdx.x / kPieces;
    const T* from = base + piece * 8 + row * stride;
    uint32_t address = ptx::shared_address(to + swizzled<kHeadDim>(row, piece));
#pragma unroll 2  // more would need registers that hold scores and sums now
    for (int i = 0; i < kTileKeys / kRowsAtOnce; ++i) {
      ptx::copy_async_16(address, row < tile.count ? from : base, row < tile.count ? 16 : 0);
      row += kRowsAtOnce;
      from += kRowsAtOnce * stride;
      address += kRowsAtOnce * kRowBytes;
    }
  }

  __device__ void copy_rows(const Rows& rows, const void*, const cuda::GroupTile& tile, uint8_t* to) {
    const int piece = threadIdx.x % kPieces;
    const T* head = static_cast<const T*>(rows.data) + shared_.rows.kv_head * rows.head_stride + piece * 8;
    const auto num_keys = static_cast<int32_t>(p_.shape.seqlen_k);
    int row = threadIdx.x / kPieces;
    uint32_t address = ptx::shared_address(to + swizzled<kHeadDim>(row, piece));
#pragma unroll 2
    for (int i = 0; i < kTileKeys / kRowsAtOnce; ++i) {
      const int32_t position = tile.groups[row / kGroupKeys] + row % static_cast<int>(kGroupKeys);
      const bool inside = position < num_keys;
      ptx::copy_async_16(address, head + (inside ? position : int64_t{0}) * rows.row_stride, inside ? 16 : 0);
      row += kRowsAtOnce;
      address += kRowsAtOnce * kRowBytes;
    }
  }

  __device__ void multiply_qk(float (&s)[kMTiles][kKeyTiles8][4]) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
      }
    }
    const int matrix = lane() / 8, row = lane() % 8;
    const uint32_t q_address =
        ptx::shared_address(shared_.q + swizzled<kHeadDim>(warp() * kWarpRows + matrix % 2 * 8 + row, matrix / 2));
    const uint32_t k_address = ptx::shared_address(shared_.k + swizzled<kHeadDim>(matrix / 2 * 8 + row, matrix % 2));
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t q[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) ptx::load_matrices(q_address ^ (d << 5), m * 16 * kRowBytes, q[m]);
#pragma unroll
      for (int n = 0; n < kKeyTiles8; n += 2) {
        uint32_t k[4];
        ptx::load_matrices(k_address ^ (d << 5), n * 8 * kRowBytes, k);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          ptx::mma<T>(s[m][n], q[m], k[0], k[1]);
          ptx::mma<T>(s[m][n + 1], q[m], k[2], k[3]);
        }
      }
    }
  }

  __device__ static void negate(float (&s)[kMTiles][kKeyTiles8][4]) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = -s[m][n][i];
      }
    }
  }

  // Scores to weights, in place; what was summed before is scaled to the new maxima.
  __device__ void update_softmax(const Tile& tile, float (&s)[kMTiles][kKeyTiles8][4]) {
    float shrink[kMTiles][2];
    bool changed = false;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      if (tile.use[block()] != Use::kFull)
        cuda::mask(args_, tile, block(), shared_.rows.head, row_position(m, 0), s[m]);
      changed |= softmax_[m].update(s[m], args_.scale_log2, shrink[m]);
    }
    if (!__any_sync(0xffffffffu, changed)) return;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int d = 0; d < kDimTiles8; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[m][d][i] *= shrink[m][i / 2];
      }
    }
  }

  __device__ void multiply_pv(const float (&s)[kMTiles][kKeyTiles8][4]) {
    const int matrix = lane() / 8, row = lane() % 8;
    const uint32_t v_address = ptx::shared_address(shared_.v + swizzled<kHeadDim>(matrix % 2 * 8 + row, matrix / 2));
#pragma unroll
    for (int j = 0; j < kTileKeys / 16; ++j) {
      uint32_t weights[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) cuda::pack_weights<T>(s[m][2 * j], s[m][2 * j + 1], weights[m]);
#pragma unroll
      for (int d = 0; d < kDimTiles8; d += 2) {
        uint32_t v[4];
        ptx::load_matrices_transposed(v_address ^ (d << 4), j * 16 * kRowBytes, v);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          ptx::mma<T>(out_[m][d], weights[m], v[0], v[1]);
          ptx::mma<T>(out_[m][d + 1], weights[m], v[2], v[3]);
        }
      }
    }
  }

  // Through the warp's own rows of shared Q, which nobody reads any more, so that 16 bytes are written at once.
  __device__ void store() {
    const int64_t past = p_.shape.seqlen_k - p_.shape.seqlen_q;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = softmax_[m].total(half);
        const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
        const int row = warp() * kWarpRows + m * 16 + half * 8 + lane() / 4;
#pragma unroll
        for (int d = 0; d < kDimTiles8; ++d) {
          *reinterpret_cast<uint32_t*>(shared_.q + swizzled<kHeadDim>(row, d) + lane() % 4 * 4) =
              cuda::pack<T>(out_[m][d][2 * half] * factor, out_[m][d][2 * half + 1] * factor);
        }
        const int32_t position = row_position(m, half);
        if (lane() % 4 == 0 && position >= shared_.rows.begin && position < shared_.rows.end) {
          p_.lse[(position - past) * p_.shape.num_heads + shared_.rows.head] =
              softmax_[m].lse(half, sum, args_.scale_log2);
        }
      }
    }
    __syncwarp();
    for (int i = lane(); i < kWarpRows * kPieces; i += 32) {
      const int row = warp() * kWarpRows + i / kPieces, piece = i % kPieces;
      const int32_t position = shared_.rows.first + row;
      if (position < shared_.rows.begin || position >= shared_.rows.end) continue;
      T* out =
          static_cast<T*>(p_.out) + ((position - past) * p_.shape.num_heads + shared_.rows.head) * kHeadDim + piece * 8;
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(shared_.q + swizzled<kHeadDim>(row, piece));
    }
  }

  // Read anew, since as members they would be two registers more than there are.
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ int block() const { return warp() / 2; }
  __device__ int32_t row_position(int m, int half) const {
    return shared_.rows.first + warp() * kWarpRows + m * 16 + half * 8 + lane() / 4;
  }

  const Args& args_;
  const AttentionParams& p_;
  Shared& shared_;

  float out_[kMTiles][kDimTiles8][4] = {};
  cuda::SoftmaxRows softmax_[kMTiles];
};

template <typename T, int kHeadDim, typename Tiles>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) attention_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(256) uint8_t memory[];
  Cta<T, kHeadDim, Tiles>(args, *reinterpret_cast<SharedMemory<kHeadDim, Tiles>*>(memory)).run();
}

}  // namespace qwen_sparse::sm80::prefill
