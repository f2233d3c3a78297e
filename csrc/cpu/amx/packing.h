// Keys and values as right operands of tile products, made once per call and kv head.
//
//   K  [tile of 16 keys][step of 32 channels]  tiles: 16 channel pairs x 16 keys
//   V  [panel of 256 keys][16 channels]        128 pairs of keys x 16 channels x 2, of which any 16 pairs in a row are
//   a tile
//
// A tile of keys may be combined with any other in one step of the pipeline; two tiles of values that follow each other
// within a panel are one tile of 32 keys where they lie. Keys that fill the last tile are zeros.
#pragma once

#include "cpu/amx/weights.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int64_t kTileKeys = 16;
constexpr int64_t kPanelTiles = 16;
constexpr int64_t kPanelKeys = kPanelTiles * kTileKeys;
constexpr int64_t kHalfTile = kTileBytes / 2;           // 8 pairs of values
constexpr int64_t kPanelRow = kPanelTiles * kHalfTile;  // from 16 channels of a panel to the next 16
constexpr int64_t kPackAlignment = 4096;                // also what may be read behind the last panel

// Packed keys and values of one kv head, or of the columns of one head.
class PackedView {
 public:
  PackedView(std::byte* memory, int64_t num_keys, int64_t head_dim)
      : k_(memory), v_(memory + panels(num_keys) * panel_bytes(head_dim)), head_dim_(head_dim) {}

  static int64_t panels(int64_t num_keys) { return ceil_div(num_keys, kPanelKeys); }
  static int64_t panel_bytes(int64_t head_dim) { return kPanelKeys * head_dim * 2; }
  static int64_t bytes(int64_t num_keys, int64_t head_dim) {
    return 2 * panels(num_keys) * panel_bytes(head_dim) + kPackAlignment;
  }

  std::byte* keys(int64_t tile) const { return k_ + tile * kTileKeys * head_dim_ * 2; }
  // The tile's pairs for the first 16 channels; those for the next ones follow kPanelRow bytes apart.
  std::byte* values(int64_t tile) const {
    return v_ + tile / kPanelTiles * panel_bytes(head_dim_) + tile % kPanelTiles * kHalfTile;
  }

 private:
  std::byte *k_, *v_;
  int64_t head_dim_;
};

// The largest magnitude of what was packed, as the bits of a bf16 without its sign; not finite from 0x7f80 on.
class Magnitude {
 public:
  __attribute__((always_inline)) void add(RowU pairs) {
    const RowU low = pairs & 0x7fff, high = pairs >> 16 & 0x7fff;
    largest_ = low > largest_ ? low : largest_;
    largest_ = high > largest_ ? high : largest_;
  }
  uint32_t bits() const {
    uint32_t result = 0;
    for (int i = 0; i < kRowLanes; ++i) result = max<uint32_t>(result, largest_[i]);
    return result;
  }

 private:
  RowU largest_ = {};
};

// 16 x 16 numbers of 32 bits: columns become rows.
QWEN_SPARSE_INLINE void transpose_rows(const RowU (&rows)[16], std::byte* out) {
#ifdef __AVX512F__
  VecU block[16];
  for (int i = 0; i < 16; ++i) block[i] = (VecU)rows[i];
  transpose(block);
  for (int i = 0; i < 16; ++i) memcpy(out + i * kRowBytes, &block[i], kRowBytes);
#else
  for (int i = 0; i < 16; ++i) {
    RowU column;
    for (int j = 0; j < 16; ++j) column[j] = rows[j][i];
    memcpy(out + i * kRowBytes, &column, kRowBytes);
  }
#endif
}

// Packs one tile of keys: `count` of them (the rest are zeros), `stride` elements apart.
QWEN_SPARSE_INLINE void pack_keys(const bf16* k, int64_t stride, int64_t count, int64_t head_dim, std::byte* out,
                                  Magnitude& magnitude) {
  for (int64_t d = 0; d < head_dim; d += 32, out += kTileBytes) {
    RowU rows[16];
    for (int64_t i = 0; i < kTileKeys; ++i) {
      rows[i] = RowU{};
      if (i < count) memcpy(&rows[i], k + i * stride + d, kRowBytes);
      magnitude.add(rows[i]);
    }
    transpose_rows(rows, out);
  }
}

// Packs one tile of values.
QWEN_SPARSE_INLINE void pack_values(const bf16* v, int64_t stride, int64_t count, int64_t head_dim, std::byte* out,
                                    Magnitude& magnitude) {
  const auto widen = [](const bf16* p) {
    RowH x;
    memcpy(&x, p, sizeof(x));
    return __builtin_convertvector(x, RowU);
  };
  for (int64_t i = 0; i < kTileKeys; i += 2) {
    for (int64_t d = 0; d < head_dim; d += kRowLanes) {
      RowU pairs = {};
      if (i < count) pairs = widen(v + i * stride + d);
      if (i + 1 < count) pairs |= widen(v + (i + 1) * stride + d) << 16;
      magnitude.add(pairs);
      memcpy(out + d / kRowLanes * kPanelRow + i / 2 * kRowBytes, &pairs, kRowBytes);
    }
  }
}

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
