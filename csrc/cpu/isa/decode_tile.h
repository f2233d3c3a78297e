// The pieces of decode on one tile: up to kTileKeys keys of one kv head against a few query rows.
//
//   S = Q K^T    K transposed so that lanes are keys. int8 keys stay integers: query rows are 16-bit fixed point, two
//                channels are multiplied and added per 32-bit lane, and the key's scale meets the finished score
//   S += bias    from sums and differences around the middle of the tile
//   P = 2^(S-m)  online softmax in base 2; the value's scale meets the weight
//   O += P V     V read and converted where it lies, once per block of rows
//
// Decode reads each key once, so what costs is work per key that the few rows cannot share: shuffles and conversions.
#pragma once

#include "cpu/isa/few_rows.h"
#include "cpu/isa/trig.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int kTileKeys = 128;
typedef int16_t VecS __attribute__((vector_size(kLanes * 4)));
typedef int16_t VecNarrow __attribute__((vector_size(kLanes * 2)));

constexpr int kHalfTile = kTileKeys / 2;

QWEN_SPARSE_INLINE int64_t round_up_to_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// End of the tile that starts at key `begin`: kTileKeys keys, cut at `end` and at the chunk border.
QWEN_SPARSE_INLINE int64_t tile_end(int64_t begin, int64_t end, int64_t chunk_len) {
  end = min(end, begin + kTileKeys);
  return chunk_len == 0 ? end : min(end, (begin / chunk_len + 1) * chunk_len);
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

// Divides by the sum, converts and writes one row; a row that attended nothing gives zeros.
template <typename T>
QWEN_SPARSE_INLINE void write_row(const float* o, float l, int64_t head_dim, T* out) {
  const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
  for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load(o + d) * inverse);
}

// Rows that one pass of a product takes; their accumulators fill the registers.
constexpr int kMaxBlockRows = kLanes == 16 ? 8 : 6;

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

template <bool kCondition, typename A, typename B>
struct Choose {
  using type = A;
};
template <typename A, typename B>
struct Choose<false, A, B> {
  using type = B;
};

// Calls body(first_row, Int<num_rows>) for blocks of nearly equal size: 7 rows are 4 + 3 and not 6 + 1 where registers
// end at 6, since few rows have too few accumulators to hide the latency of a multiply-add.
template <typename Body>
QWEN_SPARSE_INLINE void for_row_blocks(int64_t rows, Body body) {
  const int64_t blocks = ceil_div(rows, kMaxBlockRows);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = rows * b / blocks;
    switch (rows * (b + 1) / blocks - first) {
      case 1:
        body(first, Int<1>{});
        break;
      case 2:
        body(first, Int<2>{});
        break;
      case 3:
        body(first, Int<3>{});
        break;
      case 4:
        body(first, Int<4>{});
        break;
      case 5:
        body(first, Int<5>{});
        break;
      case 6:
        body(first, Int<6>{});
        break;
      case 7:
        body(first, Int<7>{});
        break;
      case 8:
        body(first, Int<8>{});
        break;
    }
  }
}

struct FloatProduct {
  using Elem = float;
  using Vec = VecF;
  QWEN_SPARSE_INLINE Vec broadcast(Elem a) { return splat(a); }
  QWEN_SPARSE_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
};

// Each lane is two int16: their products with the other side's two are added to c.
struct Int16Product {
  using Elem = int32_t;
  using Vec = VecI;
  QWEN_SPARSE_INLINE Vec broadcast(Elem a) { return a - Vec{}; }
  QWEN_SPARSE_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512BW__)
    return c + (VecI)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return c + (VecI)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return c + (VecI)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return c + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
  }
};

#ifdef __AVX512BW__
// The same result in one instruction. Not every CPU with AVX-512 has it, and intrinsics would need its compiler flag.
struct VnniProduct : Int16Product {
  QWEN_SPARSE_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    asm("vpdpwssd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
};
#endif

// c [kRows, kVecs vectors] (+)= a [kRows, depth] times rows of vectors: right(i, v) is the v-th vector of row i.
template <typename Product, int kRows, int kVecs, typename Right>
QWEN_SPARSE_INLINE void multiply_registers(const typename Product::Elem* a, int64_t lda, int64_t depth, Right right,
                                           typename Product::Elem* c, int64_t ldc, bool accumulate) {
  using Vec = typename Product::Vec;
  Vec acc[kRows][kVecs];
  QWEN_SPARSE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    QWEN_SPARSE_UNROLL
    for (int v = 0; v < kVecs; ++v) acc[r][v] = accumulate ? load_as<Vec>(c + r * ldc + v * kLanes) : Vec{};
  }
  for (int64_t i = 0; i < depth; ++i) {
    Vec columns[kVecs];
    QWEN_SPARSE_UNROLL
    for (int v = 0; v < kVecs; ++v) columns[v] = right(i, v);
    QWEN_SPARSE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec row = Product::broadcast(a[r * lda + i]);
      QWEN_SPARSE_UNROLL
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Product::multiply_add(row, columns[v], acc[r][v]);
    }
  }
  QWEN_SPARSE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    QWEN_SPARSE_UNROLL
    for (int v = 0; v < kVecs; ++v) memcpy(c + r * ldc + v * kLanes, &acc[r][v], sizeof(Vec));
  }
}

// Columns in steps of as many vectors as the registers allow for kRows rows: right(column, i, v).
template <typename Product, int kRows, typename Right>
QWEN_SPARSE_INLINE void multiply(const typename Product::Elem* a, int64_t lda, int64_t depth, int64_t columns,
                                 Right right, typename Product::Elem* c, int64_t ldc, bool accumulate) {
  constexpr int kVecs = kRows <= kMaxBlockRows / 2 ? (kLanes == 16 || kRows <= 2 ? 4 : 2) : 2;
  int64_t j = 0;
  for (; j + kVecs * kLanes <= columns; j += kVecs * kLanes) {
    multiply_registers<Product, kRows, kVecs>(
        a, lda, depth, [&](int64_t i, int v) __attribute__((always_inline)) { return right(j, i, v); }, c + j, ldc,
        accumulate);
  }
  for (; j < columns; j += kLanes) {
    multiply_registers<Product, kRows, 1>(
        a, lda, depth, [&](int64_t i, int v) __attribute__((always_inline)) { return right(j, i, v); }, c + j, ldc,
        accumulate);
  }
}

// Keys as the right operand: packed[key / kLanes][element][key % kLanes], for whole groups of kLanes keys.
template <int kHeadDim>
QWEN_SPARSE_INLINE void pack_keys(const int8_t* const* rows, int64_t count, int32_t* packed) {
  for (int64_t key = 0; key < count; key += kLanes, packed += kHeadDim / 2 * kLanes) {
    for (int d = 0; d < kHeadDim; d += 4 * kLanes) {
      VecU block[kLanes];
      QWEN_SPARSE_UNROLL
      for (int i = 0; i < kLanes; ++i) block[i] = load_as<VecU>(rows[key + i] + d);
      transpose(block);
      QWEN_SPARSE_UNROLL
      for (int i = 0; i < kLanes; ++i) {  // channels 0 and 2 of four, then 1 and 3
        const VecS bytes = (VecS)block[i];
        const VecS even = (bytes << 8) >> 8, odd = bytes >> 8;
        int32_t* out = packed + (d / 2 + 2 * i) * kLanes;
        memcpy(out, &even, sizeof(even));
        memcpy(out + kLanes, &odd, sizeof(odd));
      }
    }
  }
}
template <int kHeadDim>
QWEN_SPARSE_INLINE void pack_keys(const bf16* const* rows, int64_t count, float* packed) {
  for (int64_t key = 0; key < count; key += kLanes, packed += kHeadDim * kLanes) {
    for (int d = 0; d < kHeadDim; d += 2 * kLanes) {
      VecU block[kLanes];
      QWEN_SPARSE_UNROLL
      for (int i = 0; i < kLanes; ++i) block[i] = load_as<VecU>(rows[key + i] + d);
      transpose(block);
      QWEN_SPARSE_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        store(packed + (d + 2 * i) * kLanes, (VecF)(block[i] << 16));
        store(packed + (d + 2 * i + 1) * kLanes, (VecF)(block[i] & 0xffff0000u));
      }
    }
  }
}
template <int kHeadDim, typename C>
QWEN_SPARSE_INLINE void pack_keys(const C* const* rows, int64_t count, float* packed) {
  for (int64_t key = 0; key < count; key += kLanes, packed += kHeadDim * kLanes) {
    for (int d = 0; d < kHeadDim; d += kLanes) {
      VecF block[kLanes];
      QWEN_SPARSE_UNROLL
      for (int i = 0; i < kLanes; ++i) block[i] = load(rows[key + i] + d);
      transpose(block);
      QWEN_SPARSE_UNROLL
      for (int i = 0; i < kLanes; ++i) store(packed + (d + i) * kLanes, block[i]);
    }
  }
}

// A query row in fixed point, as pack_keys orders channels: row = (high + low / kLowUnit) * result, |high| <= 32767.
// `low` may be null. The error without it is 2^-16 of the row's largest channel, of bf16's own 2^-9; with it, 2^-32.
constexpr float kLowUnit = 65534.0f;
template <int kHeadDim>
QWEN_SPARSE_INLINE float to_fixed_point(const float* row, int32_t* high, int32_t* low) {
  constexpr float kRound = 12582912.0f;  // as in exp2_nonpositive
  VecF largest{}, sum{};
  for (int d = 0; d < kHeadDim; d += kLanes) {
    const VecF x = load(row + d);
    largest = vmax(largest, vmax(x, -x));
    sum += x;
  }
  const float unit = reduce_max(largest) / 32767.0f;
  const float inverse = unit == 0.0f ? 0.0f : 1.0f / unit;
  int16_t digits[2][kHeadDim];
  for (int d = 0; d < kHeadDim; d += kLanes) {
    const VecF x = load(row + d) * inverse;
    const VecF whole = (x + kRound) - kRound;
    const VecI digit[2] = {__builtin_convertvector(whole, VecI), __builtin_convertvector((x - whole) * kLowUnit, VecI)};
    for (int lane = 0; lane < kLanes; ++lane) {
      const int at = (d + lane) / 4 * 4 + ((d + lane) % 2) * 2 + (d + lane) % 4 / 2;
      for (int i = 0; i < 2; ++i) digits[i][at] = static_cast<int16_t>(digit[i][lane]);
    }
  }
  memcpy(high, digits[0], sizeof(digits[0]));
  if (low != nullptr) memcpy(low, digits[1], sizeof(digits[1]));
  return unit + 0.0f * reduce_sum(sum);  // a NaN or infinity in the row shows in its scores
}

// Requests the cache line at p, without waiting for it: the hardware's own prefetching does not keep up with rows of
// one or two lines. Requests are spread over both products, one line per few multiply-adds.
template <typename C>
QWEN_SPARSE_INLINE void prefetch(const C* p) {
  __builtin_prefetch(p, 0, 3);
}

// Scores [rows, kTileKeys] of packed keys, raw: floats, or sums of int16 products. Requests the keys that
// `next` points to.
template <typename Product, int kElems, typename C>
QWEN_SPARSE_INLINE void score_keys(int64_t rows, int64_t columns, const C* const* next, const typename Product::Elem* q,
                                   const typename Product::Elem* packed, typename Product::Elem* s) {
  constexpr int kLineVecs = 32 / kLanes;  // packed vectors that hold as much as a line of int8 or 16-bit keys
  const auto key = [&](int64_t column, int64_t i, int v) __attribute__((always_inline)) {
    if (v % kLineVecs == 0) {
      const int64_t line = (column / kLanes + v) / kLineVecs * kElems + i;
      prefetch(next[line % kTileKeys] + line / kTileKeys * (64 / sizeof(C)));
    }
    return load_as<typename Product::Vec>(packed + ((column / kLanes + v) * kElems + i) * kLanes);
  };
  for_row_blocks(
      rows, [&](int64_t first, auto size) __attribute__((always_inline)) {
        multiply<Product, decltype(size)::value>(q + first * kElems, kElems, kElems, columns, key,
                                                 s + first * kTileKeys, kTileKeys, false);
      });
}

// o [rows, kHeadDim] += weights [rows, count] times the value rows; `next` as in pack_keys.
template <int kHeadDim, typename C>
QWEN_SPARSE_INLINE void add_values(int64_t rows, int64_t count, const float* weights, const C* const* values,
                                   const C* const* next, float* o) {
  const auto value = [&](int64_t column, int64_t i, int v) __attribute__((always_inline)) {
    if (v * kLanes * sizeof(C) % 64 == 0) prefetch(next[i] + column + v * kLanes);
    return load(values[i] + column + v * kLanes);
  };
  for_row_blocks(
      rows, [&](int64_t first, auto size) __attribute__((always_inline)) {
        multiply<FloatProduct, decltype(size)::value>(weights + first * kTileKeys, kTileKeys, count, kHeadDim, value,
                                                      o + first * kHeadDim, kHeadDim, true);
      });
}

// The largest lane, in log2(kLanes) rounds.
QWEN_SPARSE_INLINE float largest_lane(VecF v) {
  QWEN_SPARSE_UNROLL
  for (int width = kLanes; width > 1; width /= 2) v = vmax(interleave_low(v, v), interleave_high(v, v));
  return v[0];
}

// A row's weights [columns] as int16 relative to the largest, two keys to an element; returns what one unit stands for.
// The error is 2^-16 of the tile's largest weight, of results in 16 bits 2^-9 at best.
QWEN_SPARSE_INLINE float to_int16_weights(const float* weights, int64_t columns, int32_t* pairs) {
  VecF largest{}, sum{};
  for (int64_t j = 0; j < columns; j += kLanes) {
    largest = vmax(largest, load(weights + j));
    sum += load(weights + j);
  }
  const float unit = largest_lane(largest) / 32767.0f;
  const float inverse = unit == 0.0f ? 0.0f : 1.0f / unit;
  for (int64_t j = 0; j < columns; j += kLanes) {
    const VecI rounded = __builtin_convertvector(load(weights + j) * inverse + 0.5f, VecI);
    const auto narrow = __builtin_convertvector(rounded, VecNarrow);
    memcpy(pairs + j / 2, &narrow, sizeof(narrow));
  }
  return unit + 0.0f * reduce_sum(sum);  // a NaN or infinity among the weights shows in the result
}

// Channels d to d + 2 kLanes of two value rows: lane by lane, a channel of both rows as int16. Which channel stands in
// which lane is undone by `in_order`.
QWEN_SPARSE_INLINE void pair_values(const int8_t* first, const int8_t* second, VecI (&pairs)[2]) {
#if defined(__AVX512BW__)
  const __m256i a = load_as<__m256i>(first), b = load_as<__m256i>(second);
  pairs[0] = (VecI)_mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(a, b));
  pairs[1] = (VecI)_mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(a, b));
#elif defined(__AVX2__)
  const __m128i a = load_as<__m128i>(first), b = load_as<__m128i>(second);
  pairs[0] = (VecI)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
  pairs[1] = (VecI)_mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
#else
  for (int v = 0; v < 2; ++v) {
    const VecI a = load_bytes(first + v * kLanes), b = load_bytes(second + v * kLanes);
    pairs[v] = (b << 16) | (a & 0xffff);
  }
#endif
}

// Sums of pair_values' products with their channels in order.
QWEN_SPARSE_INLINE void in_order([[maybe_unused]] VecI (&sums)[2]) {
#if defined(__AVX512BW__)  // unpacking went by halves of 16 bytes: 0-7 and 16-23, 8-15 and 24-31
  const VecI a = sums[0], b = sums[1];
  sums[0] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  sums[1] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#endif
}

// o [rows, kHeadDim] += int16 weights [rows, 2 num_pairs] times their units times int8 values, exact in between: 128
// products of 127 and 32767 fit. `next` as in score_keys.
template <typename Product, int kHeadDim>
QWEN_SPARSE_INLINE void add_int8_values(int64_t rows, int64_t num_pairs, const int32_t* weights, const float* units,
                                        const int8_t* const* values, const int8_t* const* next, float* o) {
  static_assert(kTileKeys * 127 * 32767LL < INT32_MAX, "the sums of a tile fit 32 bits");
  for_row_blocks(
      rows, [&](int64_t first, auto size) __attribute__((always_inline)) {
        constexpr int kRows = decltype(size)::value;
        const int32_t* block = weights + first * (kTileKeys / 2);
        for (int d = 0; d < kHeadDim; d += 2 * kLanes) {
          VecI acc[kRows][2] = {};
          for (int64_t i = 0; i < num_pairs; ++i) {
            if (d % 64 == 0) {
              prefetch(next[2 * i] + d);
              prefetch(next[2 * i + 1] + d);
            }
            VecI pairs[2];
            pair_values(values[2 * i] + d, values[2 * i + 1] + d, pairs);
            QWEN_SPARSE_UNROLL
            for (int r = 0; r < kRows; ++r) {
              const VecI weight = Product::broadcast(block[r * (kTileKeys / 2) + i]);
              acc[r][0] = Product::multiply_add(weight, pairs[0], acc[r][0]);
              acc[r][1] = Product::multiply_add(weight, pairs[1], acc[r][1]);
            }
          }
          QWEN_SPARSE_UNROLL
          for (int r = 0; r < kRows; ++r) {
            in_order(acc[r]);
            float* out = o + (first + r) * kHeadDim + d;
            for (int v = 0; v < 2; ++v) {
              const VecF sum = __builtin_convertvector(acc[r][v], VecF) * units[first + r];
              store(out + v * kLanes, load(out + v * kLanes) + sum);
            }
          }
        }
      });
}

QWEN_SPARSE_INLINE VecF reverse(VecF v) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(v, v, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#elif defined(__AVX2__)
  return __builtin_shufflevector(v, v, 7, 6, 5, 4, 3, 2, 1, 0);
#else
  return __builtin_shufflevector(v, v, 3, 2, 1, 0);
#endif
}

// Table of the bias: cos, then sin, of (t + 1/2) inv_freq times the attention factor, [head_dim / 2][kHalfTile] each.
//
// With the rotation centred between the two middle keys of a tile, a row's bias scores at distance t + 1/2 after and
// before it are E + O and E - O: E a sum of cosines, O of sines. So a product of half the size gives the whole tile.
// turned: [rows, head_dim], the coefficients of cos and of sin; sums: [2, rows, kHalfTile]
template <int kHeadDim>
QWEN_SPARSE_INLINE void add_bias(int64_t rows, const float* turned, const float* table, float* sums, float* s) {
  constexpr int kHalf = kHeadDim / 2;
  for (int part = 0; part < 2; ++part) {
    const float* values = table + part * kHalf * kHalfTile;
    const auto value = [&](int64_t column, int64_t i, int v) __attribute__((always_inline)) {
      return load(values + i * kHalfTile + column + v * kLanes);
    };
    for_row_blocks(
        rows, [&](int64_t first, auto size) __attribute__((always_inline)) {
          multiply<FloatProduct, decltype(size)::value>(turned + first * kHeadDim + part * kHalf, kHeadDim, kHalf,
                                                        kHalfTile, value, sums + (part * rows + first) * kHalfTile,
                                                        kHalfTile, false);
        });
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* middle = s + r * kTileKeys + kHalfTile;
    for (int t = 0; t < kHalfTile; t += kLanes) {
      const VecF even = load(sums + r * kHalfTile + t), odd = load(sums + (rows + r) * kHalfTile + t);
      store(middle + t, load(middle + t) + (even + odd));
      store(middle - t - kLanes, load(middle - t - kLanes) + reverse(even - odd));
    }
  }
}

// One row's scores [columns], scaled and in base 2, to weights in place; updates m and l (a sum per lane), rescales o.
// With kMasked, scores whose position lies outside `limits` do not count. With kScaled, a weight that is stored takes
// its value's scale with it.
template <bool kMasked, bool kScaled>
QWEN_SPARSE_INLINE void scores_to_weights(float* s, int64_t columns, const float* scales, RowLimits limits,
                                          const int32_t* positions, float& m, VecF& l, float* o, int64_t head_dim) {
  VecF row_max = splat(-kInfinity);
  for (int64_t j = 0; j < columns; j += kLanes) {
    VecF x = load(s + j);
    if constexpr (kMasked) {
      const VecI position = load_as<VecI>(positions + j);
      x = ((position <= limits.upper) & (position > limits.lower)) ? x : splat(-kInfinity);
      store(s + j, x);
    }
    row_max = vmax(row_max, x);
  }
  const float new_m = max(m, largest_lane(row_max));
  if (new_m == -kInfinity) {  // nothing attended so far
    for (int64_t j = 0; j < columns; j += kLanes) store(s + j, VecF{});
    return;
  }
  if (new_m != m) {
    const float correction = exp2_nonpositive(splat(m - new_m))[0];
    l *= correction;
    for (int64_t d = 0; d < head_dim; d += kLanes) store(o + d, load(o + d) * correction);
    m = new_m;
  }
  for (int64_t j = 0; j < columns; j += kLanes) {
    const VecF weight = exp2_nonpositive(load(s + j) - new_m);
    l += weight;
    store(s + j, kScaled ? weight * load(scales + j) : weight);
  }
}

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
