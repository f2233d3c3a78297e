// What selections and decode share: a few query rows against all keys, the keys split into fixed ranges.
//
// Rows may stand in different dual-chunk chunks; a tile of keys lies in one. The splits do not depend on the number of
// threads, so results do not either.
#pragma once

#include "cpu/isa/arena.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr float kLowest = -3.4e38f;  // finite, so that -inf minus a maximum is never NaN

QWEN_SPARSE_INLINE VecI lane_numbers() {
  VecI lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// Which rotation a row in `row_chunk` uses for keys in `key_chunk`: 0 intra, 1 succ, 2 inter. Keys of later chunks are
// masked, whatever their score.
QWEN_SPARSE_INLINE int rotation_for(int64_t row_chunk, int64_t key_chunk) {
  const int64_t chunks_back = row_chunk - key_chunk;
  return chunks_back <= 0 ? 0 : (chunks_back == 1 ? 1 : 2);
}

QWEN_SPARSE_INLINE int64_t chunk_of(int64_t position, int64_t chunk_len) {
  return chunk_len == 0 ? 0 : floor_div(position, chunk_len);
}

// Calls body(first_row, num_rows, rotation) for each run of rows that meets `key_chunk` with the same rotation.
template <typename Body>
QWEN_SPARSE_INLINE void for_each_rotation(const int64_t* row_chunks, int64_t rows, int64_t key_chunk, Body body) {
  for (int64_t begin = 0; begin < rows;) {
    const int rotation = rotation_for(row_chunks[begin], key_chunk);
    int64_t end = begin + 1;
    while (end < rows && rotation_for(row_chunks[end], key_chunk) == rotation) ++end;
    body(begin, end - begin, rotation);
    begin = end;
  }
}

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
