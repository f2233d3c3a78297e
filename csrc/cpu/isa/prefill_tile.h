// The inner kernel of prefill attention: a block of 64 query rows against a tile of up to kTileKeys keys, with the rows
// in vector lanes.
//
//   S^T = K Q^T              [keys, 64]      K element by element against Q^T [head_dim][64]
//   P^T = 2^(S^T - m)                        online softmax in base 2; m and l are vectors of 64 rows
//   O^T = O^T c + V^T P^T    [head_dim, 64]  V element by element against P^T [keys][64]
//
// A tile is the rows of its keys and values copied (and widened) one after the other. Maximum, sum and correction of a
// row stay in its lane: no horizontal reductions. O is transposed back once per block.
#pragma once

#include "cpu/isa/lanes.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int kTileKeys = 64;  // P^T is 16 KiB: it stays in L1 while V streams past
constexpr int kPadV = 16;      // a row stride that is a power of two would put a column of V in few cache sets

// The values of kPair consecutive keys as left operand: [head_dim] elements.
template <typename Dot, typename T>
QWEN_SPARSE_INLINE void stage_values(const T* row, [[maybe_unused]] const T* next, int64_t head_dim,
                                     typename Dot::Elem* out) {
  if constexpr (Dot::kPair == 2) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const VecU low = __builtin_convertvector(load_as<VecH>(row + d), VecU);
      const VecU pair = low | (__builtin_convertvector(load_as<VecH>(next + d), VecU) << 16);
      memcpy(out + d, &pair, sizeof(pair));
    }
  } else {
    for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load(row + d));
  }
}

// Running softmax of one block of rows, a row per lane.
struct LaneState {
  float* m;  // [kBlockM] running maximum of the scaled base-2 scores
  float* l;  // [kBlockM] running sum
  float* o;  // [head_dim][kBlockM] running output, not yet divided by l
};

QWEN_SPARSE_INLINE void reset(const LaneState& state, int64_t head_dim) {
  for (int64_t r = 0; r < kBlockM; r += kLanes) store(state.m + r, splat(-kInfinity));
  for (int64_t r = 0; r < kBlockM; r += kLanes) store(state.l + r, VecF{});
  for (int64_t i = 0; i < head_dim * kBlockM; i += kLanes) store(state.o + i, VecF{});
}

// Which keys a row attends: lower < position <= upper. [kBlockM] each.
struct LaneLimits {
  const int32_t* lower;
  const int32_t* upper;
};

// Scores [count][kBlockM] (unscaled) of kVecs vectors of lanes to weights, in place; updates m and l and writes the
// factor by which the output so far shrinks. With kMasked, keys outside `limits` do not count.
template <bool kMasked, int kVecs>
QWEN_SPARSE_INLINE void softmax_lanes(int64_t count, float* s, float scale, const int32_t* positions, LaneLimits limits,
                                      float* m, float* l, float* factor) {
  VecF highest[kVecs];
  QWEN_SPARSE_UNROLL
  for (int v = 0; v < kVecs; ++v) highest[v] = load(m + v * kLanes);
  for (int64_t j = 0; j < count; ++j) {
    QWEN_SPARSE_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      float* p = s + j * kBlockM + v * kLanes;
      VecF x = load(p) * scale;
      if constexpr (kMasked) {
        const VecI position = VecI{} + positions[j];
        const VecI kept = (position > load_as<VecI>(limits.lower + v * kLanes)) &
                          (position <= load_as<VecI>(limits.upper + v * kLanes));
        x = kept ? x : splat(-kInfinity);
        store(p, x);
      }
      highest[v] = vmax(highest[v], x);
    }
  }
  VecF sum[kVecs];
  QWEN_SPARSE_UNROLL
  for (int v = 0; v < kVecs; ++v) {
    const VecF old = load(m + v * kLanes);
    store(m + v * kLanes, highest[v]);
    highest[v] = highest[v] == -kInfinity ? VecF{} : highest[v];  // nothing attended yet: every weight is 2^-inf
    const VecF shrink = exp2_nonpositive(old - highest[v]);
    store(factor + v * kLanes, shrink);
    sum[v] = load(l + v * kLanes) * shrink;
  }
  for (int64_t j = 0; j < count; ++j) {
    QWEN_SPARSE_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      float* p = s + j * kBlockM + v * kLanes;
      const VecF weight = kMasked ? exp2_nonpositive(load(p) - highest[v]) : exp2_clamped(load(p) * scale - highest[v]);
      store(p, weight);
      sum[v] += weight;
    }
  }
  QWEN_SPARSE_UNROLL
  for (int v = 0; v < kVecs; ++v) store(l + v * kLanes, sum[v]);
}

template <int kVecs>
QWEN_SPARSE_INLINE void softmax_lanes(int64_t count, int64_t r, float* s, float scale, const int32_t* positions,
                                      LaneLimits limits, const LaneState& state, float* factor) {
  if (limits.lower == nullptr) {
    softmax_lanes<false, kVecs>(count, s + r, scale, nullptr, {}, state.m + r, state.l + r, factor + r);
  } else {
    softmax_lanes<true, kVecs>(count, s + r, scale, positions, {limits.lower + r, limits.upper + r}, state.m + r,
                               state.l + r, factor + r);
  }
}

// The weights as right operand of V^T P^T: fp32 as they are; bf16 rounded, two keys to an element, in place.
template <typename Dot>
QWEN_SPARSE_INLINE const typename Dot::Elem* weights_in_lanes(float* s, [[maybe_unused]] int64_t count) {
  if constexpr (Dot::kPair == 2) {
    for (int64_t j = 0; j < count; j += 2) {
      for (int64_t r = 0; r < kBlockM; r += kLanes) {
        const auto pair = Dot::round_pair(load(s + j * kBlockM + r), load(s + (j + 1) * kBlockM + r));
        memcpy(s + j / 2 * kBlockM + r, &pair, sizeof(pair));
      }
    }
  }
  return reinterpret_cast<const typename Dot::Elem*>(s);
}

// One tile: `count` keys (even), of which those past the real ones have position INT32_MAX and need a mask.
// limits.lower is null when every row attends every key.
template <typename Dot, int kHeadDim>
void attend_tile(int64_t count, int64_t vecs, const typename Dot::Elem* q, const typename Dot::Elem* k,
                 const typename Dot::Elem* v, float scale, const int32_t* positions, LaneLimits limits, float* s,
                 const LaneState& state) {
  gemm_lanes<Dot, kHeadDim / Dot::kPair, false>(count, vecs, kHeadDim / Dot::kPair, k, q, s, nullptr);
  float factor[kBlockM];
  int64_t r = 0;
  for (; r + kGemmVecs * kLanes <= vecs * kLanes; r += kGemmVecs * kLanes) {
    softmax_lanes<kGemmVecs>(count, r, s, scale, positions, limits, state, factor);
  }
  for (; r < vecs * kLanes; r += kLanes) softmax_lanes<1>(count, r, s, scale, positions, limits, state, factor);
  gemm_lanes<Dot, kHeadDim + kPadV, true>(kHeadDim, vecs, count / Dot::kPair, v, weights_in_lanes<Dot>(s, count),
                                          state.o, factor);
}

// Divides by the sums, turns rows back into rows and writes them; a row that attended nothing gives zeros.
template <typename T, typename RowOf>
QWEN_SPARSE_INLINE void write_rows(const LaneState& state, int64_t rows, int64_t head_dim, RowOf row_of) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const VecF l = load(state.l + r);
    const VecF inverse = l == 0.0f ? VecF{} : 1.0f / l;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      VecF block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(state.o + (d + i) * kBlockM + r) * inverse;
      transpose(block);
      for (int i = 0; i < kLanes && r + i < rows; ++i) store(row_of(r + i) + d, block[i]);
    }
  }
}

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
