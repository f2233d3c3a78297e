// Tile sizes and shared memory of the Ampere prefill kernel.
#pragma once

#include <cstdint>

#include "cuda/common/head_index.h"

namespace qwen_sparse::sm80::prefill {

constexpr int kBlockRows = 64;  // rows of a vertical-slash block
constexpr int kTileRows = 128;  // two blocks share what they load: 64 rows alone would ask L2 for 5 TB/s on an A100
constexpr int kTileKeys = 64;
constexpr int kNumWarps = 4;  // 32 rows each: with 16, reading K and V from shared memory takes as long as the products
constexpr int kThreads = kNumWarps * 32;
constexpr int kWarpRows = kTileRows / kNumWarps;
constexpr int kCtasPerSm = 2;  // the softmax of one overlaps the products of the other

static_assert(kBlockRows == kBlockM, "blocks are those of the definition");

// Rows of a call cut into tiles that never straddle a chunk border, so that a tile has one row of stages. Without
// dual-chunk attention there is one endless chunk.
struct RowTiles {
  int64_t chunk_len;
  int64_t per_chunk;
  int64_t first;  // number of the tile that holds the call's first row
  int64_t count;

  explicit RowTiles(const AttentionParams& p)
      : chunk_len(p.chunk_len > 0 ? p.chunk_len : int64_t{1} << 40),
        per_chunk(cuda::ceil_div<int64_t>(chunk_len, kTileRows)),
        first(number_of(p.shape.seqlen_k - p.shape.seqlen_q)),
        count(number_of(p.shape.seqlen_k - 1) - first + 1) {}

  int64_t number_of(int64_t row) const {
    const int64_t chunk = cuda::floor_div(row, chunk_len);
    return chunk * per_chunk + (row - chunk * chunk_len) / kTileRows;
  }
};

struct Args {
  AttentionParams p;
  // |softmax_scale| log2(e), kept above 0 so that it times -infinity is -infinity; scores change sign where the scale
  // does.
  float scale_log2;
  bool negate;
  cuda::HeadIndexes indexes;
  RowTiles tiles;
};

}  // namespace qwen_sparse::sm80::prefill
