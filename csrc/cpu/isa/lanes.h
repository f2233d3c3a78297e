// Products with 64 query rows in vector lanes: what prefill attention and selection are made of.
//
// The left operand is read one element at a time and broadcast, so keys and values need no transposition and may come
// from anywhere; only queries are transposed, once per block. One micro-kernel with 6 x 4 accumulators (AVX-512; 6 x 2
// otherwise) does both Q K^T and P V: 10 loads for 24 multiply-adds.
#pragma once

#include "cpu/isa/vec.h"
#ifdef QWEN_SPARSE_TILES
#include "cpu/amx/tiles.h"
#endif

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int kVecsPerBlock = kBlockM / kLanes;
constexpr int kGemmRows = 6;  // 6 x 4 of 32 registers with AVX-512, 6 x 2 of 16 otherwise
constexpr int kGemmVecs = kLanes == 16 ? 4 : 2;

static_assert(kVecsPerBlock % kGemmVecs == 0, "full blocks use the widest micro-kernel only");

// How products are formed: from fp32 elements, or (AVX512_BF16) from pairs of bf16 that vdpbf16ps multiplies and adds.
struct Fp32Dot {
  using Elem = float;
  static constexpr int kPair = 1;
  using Vec = VecF;
  using Raw = VecF;  // kLanes elements on their way through a transposition
  QWEN_SPARSE_INLINE Vec broadcast(Elem a) { return splat(a); }
  QWEN_SPARSE_INLINE Vec read(const Elem* p) { return load(p); }
  QWEN_SPARSE_INLINE VecF fma(Vec a, Vec b, VecF c) { return a * b + c; }
};

#ifdef __AVX512BF16__
struct Bf16Dot {
  using Elem = uint32_t;  // two consecutive bf16 along the summed dimension
  static constexpr int kPair = 2;
  using Vec = __m512i;
  using Raw = VecU;
  QWEN_SPARSE_INLINE Vec broadcast(Elem a) { return _mm512_set1_epi32(static_cast<int>(a)); }
  QWEN_SPARSE_INLINE Vec read(const Elem* p) { return _mm512_loadu_si512(p); }
  QWEN_SPARSE_INLINE VecF fma(Vec a, Vec b, VecF c) {
    return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  // Lane by lane: `low` and `high`, rounded, as the two halves of one element.
  QWEN_SPARSE_INLINE Vec round_pair(VecF low, VecF high) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);  // 16 low ones, then 16 high ones
    const VecU order = {0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005, 0x00160006, 0x00170007,
                        0x00180008, 0x00190009, 0x001a000a, 0x001b000b, 0x001c000c, 0x001d000d, 0x001e000e, 0x001f000f};
    return _mm512_permutexvar_epi16((__m512i)order, both);
  }
};
#endif

#ifdef QWEN_SPARSE_TILES
// Pairs of bf16, which tiles multiply.
struct TileDot {
  using Elem = uint32_t;
  static constexpr int kPair = 2;
  using Raw = VecU;
};
#endif

template <typename T>
struct DotFor {
  using type = Fp32Dot;
};
#if defined(QWEN_SPARSE_TILES)
template <>
struct DotFor<bf16> {
  using type = TileDot;
};
#elif defined(__AVX512BF16__)
template <>
struct DotFor<bf16> {
  using type = Bf16Dot;
};
#endif

// C [kRows][kVecs lanes] = (C * factor) + A B, or A B when factor is null. B and C have kBlockM columns. A(i, k) is
// a[i * lda + k], or a[k * lda + i] when kColumnMajorA.
template <typename Dot, int kRows, int kVecs, int kLda, bool kColumnMajorA>
QWEN_SPARSE_INLINE void gemm_lanes_registers(const typename Dot::Elem* a, const typename Dot::Elem* b, int64_t depth,
                                             float* c, const float* factor) {
  VecF acc[kRows][kVecs];
  QWEN_SPARSE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    QWEN_SPARSE_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      acc[r][v] = factor == nullptr ? VecF{} : load(c + r * kBlockM + v * kLanes) * load(factor + v * kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename Dot::Vec lanes[kVecs];
    QWEN_SPARSE_UNROLL
    for (int v = 0; v < kVecs; ++v) lanes[v] = Dot::read(b + k * kBlockM + v * kLanes);
    QWEN_SPARSE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const typename Dot::Vec element = Dot::broadcast(kColumnMajorA ? a[k * kLda + r] : a[r * kLda + k]);
      QWEN_SPARSE_UNROLL
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Dot::fma(element, lanes[v], acc[r][v]);
    }
  }
  QWEN_SPARSE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    QWEN_SPARSE_UNROLL
    for (int v = 0; v < kVecs; ++v) store(c + r * kBlockM + v * kLanes, acc[r][v]);
  }
}

template <typename Dot, int kVecs, int kLda, bool kColumnMajorA>
QWEN_SPARSE_INLINE void gemm_lanes_panel(int64_t rows, const typename Dot::Elem* a, const typename Dot::Elem* b,
                                         int64_t depth, float* c, const float* factor) {
  constexpr int kNextRow = kColumnMajorA ? 1 : kLda;
  int64_t r = 0;
  for (; r + kGemmRows <= rows; r += kGemmRows) {
    gemm_lanes_registers<Dot, kGemmRows, kVecs, kLda, kColumnMajorA>(a + r * kNextRow, b, depth, c + r * kBlockM,
                                                                     factor);
  }
  if (r + 4 <= rows) {
    gemm_lanes_registers<Dot, 4, kVecs, kLda, kColumnMajorA>(a + r * kNextRow, b, depth, c + r * kBlockM, factor);
    r += 4;
  }
  if (r + 2 <= rows) {
    gemm_lanes_registers<Dot, 2, kVecs, kLda, kColumnMajorA>(a + r * kNextRow, b, depth, c + r * kBlockM, factor);
    r += 2;
  }
  if (r < rows) {
    gemm_lanes_registers<Dot, 1, kVecs, kLda, kColumnMajorA>(a + r * kNextRow, b, depth, c + r * kBlockM, factor);
  }
}

// The same for any number of rows and the first `vecs` vectors of lanes.
template <typename Dot, int kLda, bool kColumnMajorA>
void gemm_lanes(int64_t rows, int64_t vecs, int64_t depth, const typename Dot::Elem* a, const typename Dot::Elem* b,
                float* c, const float* factor) {
  int64_t v = 0;
  for (; v + kGemmVecs <= vecs; v += kGemmVecs) {
    gemm_lanes_panel<Dot, kGemmVecs, kLda, kColumnMajorA>(rows, a, b + v * kLanes, depth, c + v * kLanes,
                                                          factor == nullptr ? nullptr : factor + v * kLanes);
  }
  for (; v < vecs; ++v) {
    gemm_lanes_panel<Dot, 1, kLda, kColumnMajorA>(rows, a, b + v * kLanes, depth, c + v * kLanes,
                                                  factor == nullptr ? nullptr : factor + v * kLanes);
  }
}

#ifdef QWEN_SPARSE_TILES
// C [rows][kBlockM] = A B on tiles, `rows` rounded up to 32: A has kDepth elements a row, B kBlockM.
template <int kDepth>
void gemm_on_tiles(int64_t rows, const uint32_t* a, const uint32_t* b, float* c) {
  constexpr int64_t kStrideA = kDepth * sizeof(*a), kStrideBC = kBlockM * sizeof(*b);
  const TileScope tiles;
  for (int64_t r = 0; r < rows; r += 32) {
    for (int64_t lane = 0; lane < kBlockM; lane += 32) {
      zero_tile<0>();
      zero_tile<1>();
      zero_tile<2>();
      zero_tile<3>();
      for (int64_t k = 0; k < kDepth; k += 16) {
        load_tile<4>(a + r * kDepth + k, kStrideA);
        load_tile<6>(b + k * kBlockM + lane, kStrideBC);
        dot_bf16<0, 4, 6>();
        load_tile<7>(b + k * kBlockM + lane + 16, kStrideBC);
        dot_bf16<1, 4, 7>();
        load_tile<5>(a + (r + 16) * kDepth + k, kStrideA);
        dot_bf16<2, 5, 6>();
        dot_bf16<3, 5, 7>();
      }
      float* out = c + r * kBlockM + lane;
      store_tile<0>(out, kStrideBC);
      store_tile<1>(out + 16, kStrideBC);
      store_tile<2>(out + 16 * kBlockM, kStrideBC);
      store_tile<3>(out + 16 * kBlockM + 16, kStrideBC);
    }
  }
}
#endif

// Q^T [head_dim / kPair][kBlockM] of `rows` query rows; the other lanes are zero.
template <typename Dot, typename T, typename RowOf>
QWEN_SPARSE_INLINE void stage_queries_in_lanes(int64_t rows, int64_t head_dim, RowOf row_of, typename Dot::Elem* out) {
  using Vec = typename Dot::Raw;
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t d = 0; d < head_dim / Dot::kPair; d += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        if constexpr (Dot::kPair == 2) {
          block[i] = r + i < rows ? load_as<Vec>(reinterpret_cast<const uint32_t*>(row_of(r + i)) + d) : Vec{};
        } else {
          block[i] = r + i < rows ? load(row_of(r + i) + d) : Vec{};
        }
      }
      transpose(block);
      for (int i = 0; i < kLanes; ++i) memcpy(out + (d + i) * kBlockM + r, &block[i], sizeof(Vec));
    }
  }
}

// One key as left operand: [head_dim / kPair] elements.
template <typename Dot, typename T>
QWEN_SPARSE_INLINE void stage_key(const T* row, int64_t head_dim, typename Dot::Elem* out) {
  if constexpr (Dot::kPair == 2) {
    memcpy(out, row, head_dim * sizeof(T));
  } else {
    for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load(row + d));
  }
}

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
