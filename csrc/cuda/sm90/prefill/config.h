// Tile sizes, shared memory and arguments of the Hopper prefill kernel.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "cuda/common/group_tiles.h"
#include "cuda/common/key_tiles.h"
#include "cuda/common/prefill.h"

namespace qwen_sparse::sm90::prefill {

using cuda::kTileRows;
using cuda::RowTile;

constexpr int kBlockRows = static_cast<int>(kBlockM);
constexpr int kNumConsumers = 2;  // warpgroups, one block of rows each
constexpr int kThreads = (1 + kNumConsumers) * 128;
// Registers per thread after setmaxnreg; 65536 / 384, rounded down to a multiple of 8, before.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;

static_assert(kTileRows == kNumConsumers * kBlockRows, "a warpgroup per block");
static_assert(128 * (kProducerRegisters + kNumConsumers * kConsumerRegisters) <= 65536, "registers of an SM");

constexpr int kMaxSharedBytes = 227 * 1024;

// Keys of a tile. Sparse: the granularity of slashes, so that a warpgroup skips whatever the other one alone attends;
// at 64 keys both operands of QK^T from shared memory would ask it for its full 128 bytes per cycle, so Q is held in
// registers. Dense: 128, which halves what a tile costs besides products; its scores leave no registers for Q.
constexpr int kSparseTileKeys = 64;
constexpr int kDenseTileKeys = 128;
using DenseTiles = cuda::KeyTiles<kDenseTileKeys>;
using SparseTiles = cuda::KeyTiles<kSparseTileKeys>;  // vertical-slash
using GroupTiles = cuda::GroupTiles;                  // block groups
static_assert(GroupTiles::kTileKeys == kSparseTileKeys, "both sparse kernels multiply alike");

template <int kHeadDim, typename Tiles>
struct Config {
  static constexpr int kTileKeys = Tiles::kTileKeys;
  static constexpr bool kQInRegisters = kTileKeys == kSparseTileKeys;
  static constexpr bool kValuesByGroup = std::is_same_v<Tiles, GroupTiles>;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kQBytes = kTileRows * kRowBytes;
  static constexpr int kTileBytes = kTileKeys * kRowBytes;
  // 227 KiB of shared memory, less Q and 3 KiB, in K and V tiles; more than 8 stages hide nothing more.
  static constexpr int kFit = (kMaxSharedBytes - 3072 - kQBytes) / (2 * kTileBytes);
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static_assert(kStages >= 2, "one tile arrives while another is multiplied");
};

struct Args {
  cuda::PrefillArgs common;
  CUtensorMap q[cuda::kNumStages];  // by stage of dual-chunk attention
  CUtensorMap k, v, column_k, column_v;
  CUtensorMap group_k, group_v;  // a panel of 16 keys; 16 values
  int32_t* next_tile;            // the next work item, zero at launch
  int32_t num_items;             // row tiles x heads
  int32_t heads_per_section;     // heads whose keys and values stay in L2 while their row tiles are worked on
};

}  // namespace qwen_sparse::sm90::prefill
