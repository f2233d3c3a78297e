// Division of the work, tile sizes and shared memory of the Ampere decode kernel.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/launch.h"
#include "cuda/common/pages.h"

namespace qwen_sparse::sm80::decode {

constexpr int kTileKeys = 64;
constexpr int kWarpKeys = 16;  // keys that a warp takes at once
constexpr int kNumWarps = 4;
constexpr int kThreads = kNumWarps * 32;
constexpr int kMaxRowTiles = kNumWarps;
template <typename C>
constexpr int kTileRows = sizeof(C) == 1 ? 8 : 16;  // of one mma's 16: int8_pages.cuh holds each row in two parts
constexpr int kCtasPerSm = 3;                       // one computes while the others wait for their tiles
constexpr int kMinSplitTiles = 4;  // about as much as is in flight at once, so fewer would not finish sooner
constexpr int kMaxSplits = 256;
constexpr int kMaxCtas = 2048;  // bound for the workspace, whose size must not depend on the device

static_assert(kTileKeys == kNumWarps * kWarpKeys && kTileKeys == kBlockM, "chunk borders are borders of tiles");

// Rows are numbered row * group_size + head of the group, all of one sequence and kv head, and cut into blocks.
struct Args {
  DecodeParams p;
  int32_t capacity;  // as p.shape.seqlen_k
  int32_t group_size;
  int32_t num_rows;    // seqlen_q * group_size
  int32_t row_tiles;   // in a block
  int32_t row_blocks;  // that num_rows are cut into
  int32_t num_splits;
  int32_t page_size;
  int32_t chunk_len;   // without dual-chunk attention more than any position
  float* partial_lse;  // [batch * seqlen_q * num_heads, num_splits], base 2; -infinity: no keys, the result is not set
  float* partial_out;  // [batch * seqlen_q * num_heads, num_splits, head_dim]
};

// Left operand of the bias product, as the lanes of a warp hold it.
template <int kHeadDim>
struct BiasRows {
  uint4 operand[kHeadDim / 16][32];
};

template <int kHeadDim>
struct BiasTables {
  alignas(16) float turned[kHeadDim];   // the bias, rotated to the middle of the tile
  uint4 operand[kHeadDim / 16][4][32];  // right operand: two registers of high parts, two of low parts
};

struct Nothing {};

template <typename C, int kHeadDim, bool kHasBias>
struct SharedMemory {
  static constexpr bool kIsInt8 = sizeof(C) == 1;
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(C));
  static constexpr int kTileRows = decode::kTileRows<C>;
  // Three CTAs on an SM of an H200 (228 KiB), two of an A100 (164 KiB), one on the smaller cards of its generation (100
  // KiB): 8 KiB tiles (K and V, int8, 64 dims) four times, 16 KiB three times, 32 KiB twice.
  static constexpr int kStages = kRowBytes == 64 ? 4 : kRowBytes == 128 ? 3 : 2;
  static constexpr int kPlaces = kStages > 3 ? kStages - 1 : 2;  // tiles whose keys' places are known before the copy
  static constexpr int kExists = kStages < 4 ? 4 : 8;            // the tiles from that one to the one computed

  struct Stage {
    alignas(256) uint8_t k[kTileKeys * kRowBytes];
    alignas(256) uint8_t v[kTileKeys * kRowBytes];
  };
  struct Merge {  // at the end
    float max[kNumWarps][kTileRows];
    float sum[kNumWarps][kTileRows];
    float out[kNumWarps][kTileRows][kHeadDim + 8];
  };
  union {
    Stage stages[kStages];
    Merge merge;
  };
  static_assert(sizeof(Merge) <= kStages * sizeof(Stage), "merging needs no memory of its own");
  int64_t places[kPlaces][2][kTileKeys];  // bytes from the start of K and of V; negative: nowhere
  uint32_t exists[kExists][2];            // bits: keys that lie somewhere, before the middle of the tile and after
  alignas(16) float k_scale[kIsInt8 ? kStages : 1][kTileKeys];
  alignas(16) float v_scale[kIsInt8 ? kStages : 1][kTileKeys];
  std::conditional_t<kHasBias, BiasTables<kHeadDim>, Nothing> bias;

  struct Rows {
    alignas(16) uint8_t q[kTileRows][kHeadDim * 2 + 16];  // so that rows begin in different banks
    std::conditional_t<kHasBias, BiasRows<kHeadDim>, Nothing> bias;
  };
  // Args::row_tiles of them follow.
  __host__ __device__ Rows* rows() { return reinterpret_cast<Rows*>(this + 1); }

  static int bytes(int row_tiles) {
    return static_cast<int>(sizeof(SharedMemory)) + row_tiles * static_cast<int>(sizeof(Rows));
  }
};

}  // namespace qwen_sparse::sm80::decode
