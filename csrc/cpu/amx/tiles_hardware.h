// Tile operations as instructions. Inline assembly and not the intrinsics: GCC's tile load does not say that it reads
// memory, and the "memory" clobbers also keep tile and vector instructions in the order in which they are interleaved.
#pragma once

#include "cpu/isa/vec.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

class TileScope {
 public:
  TileScope() {
    const TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileScope() { asm volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <int kTile>
QWEN_SPARSE_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// `stride`: bytes from a row to the next.
template <int kTile>
QWEN_SPARSE_INLINE void load_tile(const void* p, int64_t stride = kRowBytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}

// A load that does not fill the first-level cache when it misses there.
template <int kTile>
QWEN_SPARSE_INLINE void load_tile_streaming(const void* p) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(kRowBytes), "i"(kTile) : "memory");
}

template <int kTile>
QWEN_SPARSE_INLINE void store_tile(void* p, int64_t stride = kRowBytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}

// C[m][n] += sum over i of A[m][i] B[i / 2][n][i % 2]: A is [16][32] bf16, B [16][16][2] bf16, C [16][16] float32.
template <int kC, int kA, int kB>
QWEN_SPARSE_INLINE void dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
