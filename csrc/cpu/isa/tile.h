// The inner kernel of all attention on CPUs: a block of query rows against a tile of up to kBlockN keys.
//
//   S = Q K^T        Q broadcast element by element against K packed [head_dim][kBlockN]
//   P = 2^(S - m)    online softmax in base 2, running maximum m and sum l per row
//   O = O c + P V    P broadcast against V packed [keys][head_dim]
//
// Both products are one register-blocked micro-kernel: kGemmRows x kGemmVecs accumulators, with kGemmVecs loads and
// kGemmRows broadcasts per step. Keys of a tile may come from anywhere; packing gathers them.
#pragma once

#include <cstddef>

#include "cpu/isa/vec.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int kBlockN = 128;  // keys per tile: a packed fp32 K tile is 64 KiB at head_dim 128, half of it in L1
constexpr int kGemmRows = 6;  // 6 x 4 of 32 registers with AVX-512, 6 x 2 of 16 otherwise
constexpr int kGemmVecs = kLanes == 16 ? 4 : 2;

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

template <typename T>
struct DotFor {
  using type = Fp32Dot;
};
#ifdef __AVX512BF16__
template <>
struct DotFor<bf16> {
  using type = Bf16Dot;
};
#endif

template <typename Dot, int kRows, int kVecs>
QWEN_SPARSE_INLINE void gemm_registers(const typename Dot::Elem* a, int64_t lda, const typename Dot::Elem* b,
                                       int64_t ldb, float* c, int64_t ldc, int64_t depth, bool accumulate) {
  VecF acc[kRows][kVecs];
  QWEN_SPARSE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    QWEN_SPARSE_UNROLL
    for (int v = 0; v < kVecs; ++v) acc[r][v] = accumulate ? load(c + r * ldc + v * kLanes) : VecF{};
  }
  for (int64_t i = 0; i < depth; ++i) {
    typename Dot::Vec columns[kVecs];
    QWEN_SPARSE_UNROLL
    for (int v = 0; v < kVecs; ++v) columns[v] = Dot::read(b + i * ldb + v * kLanes);
    QWEN_SPARSE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const typename Dot::Vec row = Dot::broadcast(a[r * lda + i]);
      QWEN_SPARSE_UNROLL
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Dot::fma(row, columns[v], acc[r][v]);
    }
  }
  QWEN_SPARSE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    QWEN_SPARSE_UNROLL
    for (int v = 0; v < kVecs; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
  }
}

template <typename Dot, int kVecs>
QWEN_SPARSE_INLINE void gemm_columns(int64_t rows, const typename Dot::Elem* a, int64_t lda,
                                     const typename Dot::Elem* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
                                     bool accumulate) {
  int64_t r = 0;
  for (; r + kGemmRows <= rows; r += kGemmRows) {
    gemm_registers<Dot, kGemmRows, kVecs>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, accumulate);
  }
  for (; r + 2 <= rows; r += 2) {
    gemm_registers<Dot, 2, kVecs>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, accumulate);
  }
  if (r < rows) gemm_registers<Dot, 1, kVecs>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, accumulate);
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; columns is a multiple of kLanes; depth counts Elems.
template <typename Dot>
void gemm(int64_t rows, int64_t columns, int64_t depth, const typename Dot::Elem* a, int64_t lda,
          const typename Dot::Elem* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + kGemmVecs * kLanes <= columns; j += kGemmVecs * kLanes) {
    gemm_columns<Dot, kGemmVecs>(rows, a, lda, b + j, ldb, c + j, ldc, depth, accumulate);
  }
  for (; j < columns; j += kLanes) {
    gemm_columns<Dot, 1>(rows, a, lda, b + j, ldb, c + j, ldc, depth, accumulate);
  }
}

QWEN_SPARSE_INLINE int64_t round_up_to_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Query rows as the left operand: fp32, or bf16 pairs as they are.
template <typename Dot, typename T>
QWEN_SPARSE_INLINE void stage_query_row(const T* row, int64_t head_dim, typename Dot::Elem* out) {
  if constexpr (Dot::kPair == 2) {
    memcpy(out, row, head_dim * sizeof(T));
  } else {
    for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load(row + d));
  }
}

// One key's or value's elements: a plain pointer, or int8 with a scale.
struct Int8Row {
  const int8_t* data;
  float scale;
};
template <typename T>
QWEN_SPARSE_INLINE VecF load_at(const T* row, int64_t d) {
  return load(row + d);
}
QWEN_SPARSE_INLINE VecF load_at(Int8Row row, int64_t d) { return load(row.data + d) * row.scale; }

// K as the right operand: packed[d][key] for `count` keys, row_of(i) giving the i-th key's elements. Keys up to the
// next multiple of kLanes repeat the last one; their scores are masked later.
template <typename Dot, typename RowOf>
QWEN_SPARSE_INLINE void pack_k(int64_t count, int64_t head_dim, RowOf row_of, typename Dot::Elem* packed) {
  for (int64_t key = 0; key < count; key += kLanes) {
    decltype(row_of(0)) source[kLanes];
    for (int i = 0; i < kLanes; ++i) source[i] = row_of(min(key + i, count - 1));
    for (int64_t d = 0; d < head_dim / Dot::kPair; d += kLanes) {
      if constexpr (Dot::kPair == 2) {
        VecU block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load_as<VecU>(reinterpret_cast<const uint32_t*>(source[i]) + d);
        transpose(block);
        for (int i = 0; i < kLanes; ++i) memcpy(packed + (d + i) * kBlockN + key, &block[i], sizeof(VecU));
      } else {
        VecF block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load_at(source[i], d);
        transpose(block);
        for (int i = 0; i < kLanes; ++i) store(packed + (d + i) * kBlockN + key, block[i]);
      }
    }
  }
}

// V as the right operand: packed[key / kPair][d].
template <typename Dot, typename RowOf>
QWEN_SPARSE_INLINE void pack_v(int64_t count, int64_t head_dim, RowOf row_of, typename Dot::Elem* packed) {
  for (int64_t key = 0; key < count; key += Dot::kPair) {
    const auto row = row_of(key);
    typename Dot::Elem* out = packed + key / Dot::kPair * head_dim;
    if constexpr (Dot::kPair == 2) {
      const auto next = row_of(min(key + 1, count - 1));
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const VecU low = __builtin_convertvector(load_as<VecH>(row + d), VecU);
        const VecU high = __builtin_convertvector(load_as<VecH>(next + d), VecU);
        const VecU pair = key + 1 < count ? low | (high << 16) : low;
        memcpy(out + d, &pair, sizeof(pair));
      }
    } else {
      for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load_at(row, d));
    }
  }
}

// Which keys of a tile a row may attend: lower < position <= upper.
struct RowLimits {
  int32_t lower;
  int32_t upper;
};

// Running softmax of one block of rows.
struct SoftmaxState {
  float* m;  // [rows] running maximum of the scaled base-2 scores
  float* l;  // [rows] running sum
  float* o;  // [rows, head_dim] running output, not yet divided by l
};

QWEN_SPARSE_INLINE void reset(const SoftmaxState& state, int64_t rows, int64_t head_dim) {
  for (int64_t r = 0; r < rows; ++r) state.m[r] = -kInfinity;
  for (int64_t r = 0; r < rows; ++r) state.l[r] = 0.0f;
  for (int64_t i = 0; i < rows * head_dim; i += kLanes) store(state.o + i, VecF{});
}

// One row's scores [columns] (unscaled) to weights, in place; updates m, l and rescales o. With kMasked, scores whose
// position lies outside `limits` do not count; positions past the tile's keys are INT32_MAX.
template <bool kMasked>
QWEN_SPARSE_INLINE void softmax_row(float* s, int64_t columns, float scale, RowLimits limits, const int32_t* positions,
                                    float& m, float& l, float* o, int64_t head_dim) {
  VecF row_max = splat(-kInfinity);
  for (int64_t j = 0; j < columns; j += kLanes) {
    VecF x = load(s + j) * scale;
    if constexpr (kMasked) {
      const VecI position = load_as<VecI>(positions + j);
      x = ((position <= limits.upper) & (position > limits.lower)) ? x : splat(-kInfinity);
    }
    store(s + j, x);
    row_max = vmax(row_max, x);
  }
  const float new_m = max(m, reduce_max(row_max));
  if (new_m == -kInfinity) {  // nothing attended so far
    for (int64_t j = 0; j < columns; j += kLanes) store(s + j, VecF{});
    return;
  }
  VecF sum{};
  for (int64_t j = 0; j < columns; j += kLanes) {
    const VecF weight = exp2_nonpositive(load(s + j) - new_m);
    store(s + j, weight);
    sum += weight;
  }
  if (new_m != m) {
    const float correction = exp2_nonpositive(splat(m - new_m))[0];
    l *= correction;
    for (int64_t d = 0; d < head_dim; d += kLanes) store(o + d, load(o + d) * correction);
    m = new_m;
  }
  l += reduce_sum(sum);
}

// The weights as left operand of P V. fp32: as they are; bf16: rounded in place, row by row.
template <typename Dot>
QWEN_SPARSE_INLINE const typename Dot::Elem* weights_operand(float* s, [[maybe_unused]] int64_t rows,
                                                             [[maybe_unused]] int64_t columns) {
#ifdef __AVX512BF16__
  if constexpr (Dot::kPair == 2) {
    auto* packed = reinterpret_cast<uint32_t*>(s);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        const __m256bh half = _mm512_cvtneps_pbh((__m512)load(s + r * kBlockN + j));
        memcpy(packed + (r * kBlockN + j) / 2, &half, sizeof(half));
      }
    }
    return packed;
  }
#endif
  return reinterpret_cast<const typename Dot::Elem*>(s);
}

// The second half of a tile: scores [rows, kBlockN] to weights, and the weights times V.
// limits: [rows] when masked (always when count is not a multiple of kLanes), else null.
template <typename Dot>
void attend_scores(int64_t rows, int64_t count, int64_t head_dim, float* s, const typename Dot::Elem* packed_v,
                   float scale, const RowLimits* limits, const int32_t* positions, const SoftmaxState& state) {
  const int64_t columns = round_up_to_lanes(count);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = s + r * kBlockN;
    float* o = state.o + r * head_dim;
    if (limits != nullptr) {
      softmax_row<true>(row, columns, scale, limits[r], positions, state.m[r], state.l[r], o, head_dim);
    } else {
      softmax_row<false>(row, columns, scale, {}, nullptr, state.m[r], state.l[r], o, head_dim);
    }
  }
  gemm<Dot>(rows, head_dim, ceil_div(count, Dot::kPair), weights_operand<Dot>(s, rows, columns), kBlockN / Dot::kPair,
            packed_v, head_dim, state.o, head_dim, true);
}

// Scores [rows, kBlockN] of query rows against one packed tile.
template <typename Dot>
QWEN_SPARSE_INLINE void score_tile(int64_t rows, int64_t count, int64_t head_dim, const typename Dot::Elem* q,
                                   const typename Dot::Elem* packed_k, float* s) {
  gemm<Dot>(rows, round_up_to_lanes(count), head_dim / Dot::kPair, q, head_dim / Dot::kPair, packed_k, kBlockN, s,
            kBlockN, false);
}

QWEN_SPARSE_INLINE float natural_lse(float m, float l) {
  return l > 0.0f ? (m + __builtin_log2f(l)) * kLn2 : (l == 0.0f ? -kInfinity : l);
}

// Divides by the sum, converts and writes one row; a row that attended nothing gives zeros.
template <typename T>
QWEN_SPARSE_INLINE void write_row(const float* o, float l, int64_t head_dim, T* out) {
  const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
  for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load(o + d) * inverse);
}

// Hands out 64-byte aligned pieces of a thread's scratch memory; with a null base it only counts.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    const uintptr_t piece = base_ + used_;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
