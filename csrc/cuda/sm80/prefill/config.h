// Tile sizes of the Ampere prefill kernel.
#pragma once

#include "cuda/common/group_tiles.h"
#include "cuda/common/key_tiles.h"
#include "cuda/common/prefill.h"

namespace qwen_sparse::sm80::prefill {

using Args = cuda::PrefillArgs;

constexpr int kTileRows = cuda::kTileRows;  // 64 rows alone would ask L2 for 5 TB/s on an A100
constexpr int kTileKeys = 64;
constexpr int kNumWarps = 4;  // 32 rows each: with 16, reading K and V from shared memory takes as long as the products
constexpr int kThreads = kNumWarps * 32;
constexpr int kWarpRows = kTileRows / kNumWarps;
using KeyTiles = cuda::KeyTiles<kTileKeys>;  // dense and vertical-slash
using GroupTiles = cuda::GroupTiles;         // block groups
constexpr int kCtasPerSm = 2;                // the softmax of one overlaps the products of the other

}  // namespace qwen_sparse::sm80::prefill
