// What the prefill kernels of every architecture work on: rows cut into tiles, arguments.
#pragma once

#include <cstdint>

#include "cuda/common/head_index.h"

namespace qwen_sparse::cuda {

constexpr int kTileRows = 2 * kBlockM;  // two blocks of the definition share the keys that they load

enum Stage : int32_t { kInter, kSucc, kIntra, kNumStages };  // of dual-chunk attention: one rotation of Q each

enum class Use : int32_t { kNone, kPartial, kFull };  // how much of a tile of keys the rows of a block attend

// Rows of a call cut into tiles that never straddle a chunk border, so that a tile has one sequence of stages. Without
// dual-chunk attention there is one endless chunk.
struct RowTiles {
  int64_t chunk_len;
  int64_t per_chunk;
  int64_t first;  // number of the tile that holds the call's first row
  int64_t count;

  explicit RowTiles(const AttentionParams& p)
      : chunk_len(p.chunk_len > 0 ? p.chunk_len : int64_t{1} << 40),
        per_chunk(ceil_div<int64_t>(chunk_len, kTileRows)),
        first(number_of(p.shape.seqlen_k - p.shape.seqlen_q)),
        count(number_of(p.shape.seqlen_k - 1) - first + 1) {}

  int64_t number_of(int64_t row) const {
    const int64_t chunk = floor_div(row, chunk_len);
    return chunk * per_chunk + (row - chunk * chunk_len) / kTileRows;
  }
};

struct PrefillArgs {
  AttentionParams p;
  // |softmax_scale| log2(e), kept above 0 so that it times -infinity is -infinity; scores change sign where the scale
  // does.
  float scale_log2;
  bool negate;
  int32_t window;  // p.window, or a number that no distance reaches
  HeadIndexes indexes;
  RowTiles tiles;
  RowBlocks blocks;
};

// One row tile of one head.
struct RowTile {
  int32_t first;       // position of its first row
  int32_t begin, end;  // its rows that belong to the call
  int32_t chunk_begin;
  int32_t head, kv_head;

#ifdef __CUDACC__
  RowTile() = default;
  // `number`: from 0, of the call's tiles.
  __device__ RowTile(const PrefillArgs& args, int64_t number, int32_t head) : head(head) {
    const AttentionShape& shape = args.p.shape;
    const int64_t tile = args.tiles.first + number;
    const int64_t chunk = floor_div(tile, args.tiles.per_chunk);
    const int64_t chunk_first = chunk * args.tiles.chunk_len, chunk_end = chunk_first + args.tiles.chunk_len;
    const int64_t row = chunk_first + (tile - chunk * args.tiles.per_chunk) * kTileRows;
    const int64_t past = shape.seqlen_k - shape.seqlen_q;
    first = static_cast<int32_t>(row);
    begin = static_cast<int32_t>(max(row, past));
    end = static_cast<int32_t>(min(row + kTileRows, min(shape.seqlen_k, chunk_end)));
    chunk_begin = static_cast<int32_t>(max(chunk_first, int64_t{INT32_MIN / 2}));
    kv_head = head / static_cast<int32_t>(shape.num_heads / shape.num_kv_heads);
  }

  __device__ int32_t block(int b) const { return first + b * static_cast<int32_t>(kBlockM); }
  __device__ bool has_rows(int b) const { return begin < block(b) + static_cast<int32_t>(kBlockM) && end > block(b); }

  // Where the keys of each stage begin, and where the last ones end, of those before `limit`.
  __device__ void stage_borders(const PrefillArgs& args, int64_t limit, int32_t (&borders)[kNumStages + 1]) const {
    const int64_t keys[kNumStages + 1] = {0, chunk_begin - args.tiles.chunk_len, chunk_begin, limit};
#pragma unroll
    for (int i = 0; i <= kNumStages; ++i) {
      borders[i] = static_cast<int32_t>(max(int64_t{0}, min(keys[i], limit)));
    }
  }
#endif
};

}  // namespace qwen_sparse::cuda
