// The tile operations that the AMX kernels are made of: on the unit, or in plain vector code with the same bits.
//
// Every tile is 16 rows of 64 bytes. All eight registers have that shape, so a thread configures them once per task
// and releases them at its end: other users of the unit (oneDNN) find it as they left it, and a context switch saves
// no tiles.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kRowBytes = 64;
constexpr int64_t kTileBytes = kTileRows * kRowBytes;

// What ldtilecfg reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes};
  uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows};
};

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA

#ifdef QWEN_SPARSE_EMULATED_TILES
#include "cpu/amx/tiles_emulated.h"
#else
#include "cpu/amx/tiles_hardware.h"
#endif
