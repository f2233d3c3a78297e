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

constexpr int kHalfTile = kTileKeys / 2;
constexpr int64_t kScoreColumns = 64;  // keys of one step of q . k: their packed form stays in the first-level cache

// Tiles are computed in whole groups of keys.
constexpr int kKeyGroup = 2 * kLanes;
QWEN_SPARSE_INLINE int64_t round_up_to_groups(int64_t n) { return (n + kKeyGroup - 1) / kKeyGroup * kKeyGroup; }

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

// Softmax of one block of rows over some keys.
struct SoftmaxState {
  float* m;  // [rows] maximum of the scaled base-2 scores
  float* l;  // [rows] sum
  float* o;  // [rows, head_dim] output, not yet divided by l
};

// Online softmax of one tile: per row, [kMaxDecodeRows] each.
struct TileSoftmax {
  float* top;         // largest score of the tile; -inf: nothing attended
  float* base;        // weights are 2^(score - base)
  float* correction;  // factor of everything summed before this tile
  float* scale;       // factor of this tile's sums: 2^(base - new maximum)
};

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

// Keys, which start `offset` after `rows`, as the right operand: packed[key / kLanes][element][key % kLanes], for whole
// groups of kLanes keys.
template <int kHeadDim, typename Next>
QWEN_SPARSE_INLINE void pack_keys(const int8_t* const* rows, int64_t offset, int64_t count, int32_t* packed,
                                  Next& next) {
  for (int64_t key = 0; key < count; key += kLanes, packed += kHeadDim / 2 * kLanes) {
    next.request(kLanes / 4);
    for (int d = 0; d < kHeadDim; d += 4 * kLanes) {
      VecU block[kLanes];
      QWEN_SPARSE_UNROLL
      for (int i = 0; i < kLanes; ++i) block[i] = load_as<VecU>(rows[key + i] + offset + d);
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
template <int kHeadDim, typename Next>
QWEN_SPARSE_INLINE void pack_keys(const bf16* const* rows, int64_t offset, int64_t count, float* packed, Next& next) {
  for (int64_t key = 0; key < count; key += kLanes, packed += kHeadDim * kLanes) {
    next.request(kLanes / 4);
    for (int d = 0; d < kHeadDim; d += 2 * kLanes) {
      VecU block[kLanes];
      QWEN_SPARSE_UNROLL
      for (int i = 0; i < kLanes; ++i) block[i] = load_as<VecU>(rows[key + i] + offset + d);
      transpose(block);
      QWEN_SPARSE_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        store(packed + (d + 2 * i) * kLanes, (VecF)(block[i] << 16));
        store(packed + (d + 2 * i + 1) * kLanes, (VecF)(block[i] & 0xffff0000u));
      }
    }
  }
}
template <int kHeadDim, typename C, typename Next>
QWEN_SPARSE_INLINE void pack_keys(const C* const* rows, int64_t offset, int64_t count, float* packed, Next& next) {
  for (int64_t key = 0; key < count; key += kLanes, packed += kHeadDim * kLanes) {
    next.request(kLanes / 4);
    for (int d = 0; d < kHeadDim; d += kLanes) {
      VecF block[kLanes];
      QWEN_SPARSE_UNROLL
      for (int i = 0; i < kLanes; ++i) block[i] = load(rows[key + i] + offset + d);
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
  int32_t digits[2][kHeadDim];
  for (int d = 0; d < kHeadDim; d += kLanes) {
    const VecF x = load(row + d) * inverse;
    const VecF whole = (x + kRound) - kRound;
    const VecI digit[2] = {__builtin_convertvector(whole, VecI), __builtin_convertvector((x - whole) * kLowUnit, VecI)};
    memcpy(digits[0] + d, &digit[0], sizeof(VecI));
    memcpy(digits[1] + d, &digit[1], sizeof(VecI));
  }
  for (int i = 0; i < 2; ++i) {
    int32_t* pairs = i == 0 ? high : low;
    for (int d = 0; pairs != nullptr && d < kHeadDim; d += 4) {
      const int32_t* four = digits[i] + d;
      pairs[d / 2] = (four[0] & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(four[2]) << 16);
      pairs[d / 2 + 1] = (four[1] & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(four[3]) << 16);
    }
  }
  return unit + 0.0f * reduce_sum(sum);  // a NaN or infinity in the row shows in its scores
}

// Consecutive keys of some neighbouring heads: where they lie for the first of these. The last key repeats up to
// kTileKeys.
template <typename C>
struct Tile {
  int64_t first, count, num_heads;
  const C **k, **v;  // [kTileKeys]
};

// Asks for the rows of a later tile, without waiting for them, in the order in which they lie in memory: all heads of a
// key, then the next key. A core that reads lines in order gets 1.5 times the bandwidth of one that reads every second
// or fourth line (one head of each key). Requests are spread over the work on a tile: a core has few in flight.
template <int kHeadDim, typename C>
class Ahead {
 public:
  // The part-th of num_parts of the tile's rows. The strides are those of heads.
  Ahead(const Tile<C>& tile, int64_t part, int64_t num_parts, int64_t k_stride, int64_t v_stride)
      : tile_(tile),
        row_(tile.count * part / num_parts),
        end_(tile.count * (part + 1) / num_parts),
        k_stride_(k_stride),
        v_stride_(v_stride) {}

  // Keys and values of the next `count` (key, head) pairs.
  void request(int64_t count) {
    for (; count > 0 && row_ < end_; --count) {
      const C* k = tile_.k[row_] + head_ * k_stride_;
      const C* v = tile_.v[row_] + head_ * v_stride_;
      QWEN_SPARSE_UNROLL
      for (int d = 0; d < kHeadDim; d += 64 / sizeof(C)) __builtin_prefetch(k + d);
      QWEN_SPARSE_UNROLL
      for (int d = 0; d < kHeadDim; d += 64 / sizeof(C)) __builtin_prefetch(v + d);
      if (++head_ == tile_.num_heads) {
        head_ = 0;
        ++row_;
      }
    }
  }

 private:
  Tile<C> tile_;
  int64_t row_, end_, head_ = 0, k_stride_, v_stride_;
};

// Scores [rows, kTileKeys] of packed keys, raw: floats, or sums of int16 products.
template <typename Product, int kElems, typename Next>
QWEN_SPARSE_INLINE void score_keys(int64_t rows, int64_t columns, const typename Product::Elem* q,
                                   const typename Product::Elem* packed, typename Product::Elem* s, Next& next) {
  for (int64_t j = 0; j < columns; j += kScoreColumns) {
    const auto key = [&](int64_t column, int64_t i, int v) __attribute__((always_inline)) {
      return load_as<typename Product::Vec>(packed + (((j + column) / kLanes + v) * kElems + i) * kLanes);
    };
    next.request(kScoreColumns / 4);
    for_row_blocks(
        rows, [&](int64_t first, auto size) __attribute__((always_inline)) {
          multiply<Product, decltype(size)::value>(q + first * kElems, kElems, kElems, min(columns - j, kScoreColumns),
                                                   key, s + first * kTileKeys + j, kTileKeys, false);
        });
  }
}

// o [rows, kHeadDim] += weights [rows, count] times the value rows, which start `offset` after `values`.
template <int kHeadDim, typename C>
QWEN_SPARSE_INLINE void add_values(int64_t rows, int64_t count, const float* weights, const C* const* values,
                                   int64_t offset, float* o) {
  const auto value = [&](int64_t column, int64_t i, int v) __attribute__((always_inline)) {
    return load(values[i] + offset + column + v * kLanes);
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

// o [rows, kHeadDim] = o times correction plus int16 weights [rows, columns] (scores_to_pairs) times int8 values times
// scale times unit, exact in between: 128 products of 127 and 32767 fit.
template <typename Product, int kHeadDim, typename Next>
QWEN_SPARSE_INLINE void add_int8_values(int64_t rows, int64_t columns, const int32_t* weights,
                                        const TileSoftmax& softmax, float unit, const int8_t* const* values,
                                        int64_t offset, float* o, Next& next) {
  static_assert(kTileKeys * 127 * 32767LL < INT32_MAX, "the sums of a tile fit 32 bits");
  for_row_blocks(
      rows, [&](int64_t first, auto size) __attribute__((always_inline)) {
        constexpr int kRows = decltype(size)::value;
        constexpr int kVecs = kRows <= kMaxBlockRows / 3 ? 4 : 2;
        const int32_t* block = weights + first * (kTileKeys / 2);
        for (int d = 0; d < kHeadDim; d += kVecs * kLanes) {
          VecI acc[kRows][kVecs] = {};
          for (int64_t j = 0; j < columns; j += kKeyGroup) {
            next.request(kVecs * kLanes * kKeyGroup / (2 * kHeadDim));
            for (int64_t i = 0; i < kLanes; ++i) {
              VecI pairs[kVecs / 2][2];
              QWEN_SPARSE_UNROLL
              for (int v = 0; v < kVecs / 2; ++v) {
                const int64_t channel = offset + d + v * 2 * kLanes;
                pair_values(values[j + i] + channel, values[j + kLanes + i] + channel, pairs[v]);
              }
              QWEN_SPARSE_UNROLL
              for (int r = 0; r < kRows; ++r) {
                const VecI weight = Product::broadcast(block[r * (kTileKeys / 2) + j / 2 + i]);
                QWEN_SPARSE_UNROLL
                for (int v = 0; v < kVecs; ++v) {
                  acc[r][v] = Product::multiply_add(weight, pairs[v / 2][v % 2], acc[r][v]);
                }
              }
            }
          }
          QWEN_SPARSE_UNROLL
          for (int r = 0; r < kRows; ++r) {
            float* out = o + (first + r) * kHeadDim + d;
            const float scale = softmax.scale[first + r] * unit, correction = softmax.correction[first + r];
            QWEN_SPARSE_UNROLL
            for (int v = 0; v < kVecs; v += 2) {
              VecI sums[2] = {acc[r][v], acc[r][v + 1]};
              in_order(sums);
              for (int i = 0; i < 2; ++i) {
                float* to = out + (v + i) * kLanes;
                store(to, load(to) * correction + __builtin_convertvector(sums[i], VecF) * scale);
              }
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

// The largest of a row's scores [columns], after those outside `limits` were removed (kMasked).
template <bool kMasked>
QWEN_SPARSE_INLINE VecF largest_scores(float* s, int64_t columns, RowLimits limits, const int32_t* positions) {
  VecF largest = splat(-kInfinity), nan{};
  for (int64_t j = 0; j < columns; j += kLanes) {
    VecF x = load(s + j);
    if constexpr (kMasked) {
      const VecI position = load_as<VecI>(positions + j);
      x = ((position <= limits.upper) & (position > limits.lower)) ? x : splat(-kInfinity);
      store(s + j, x);
      nan = x == x ? nan : x;
    }
    largest = vmax(largest, x);
  }
  if constexpr (kMasked) largest += reduce_sum(nan);  // a NaN must not be lost among -inf: it is a key attended
  return largest;
}

// From the tile's largest scores to its factors; m [rows] becomes the maximum so far. With kOwnBase, weights are
// relative to the tile's own maximum and not to m. Works on whole vectors of rows.
template <bool kOwnBase>
QWEN_SPARSE_INLINE void advance(int64_t rows, const TileSoftmax& tile, float* m) {
  const VecF lowest = splat(-3e38f);  // instead of -inf, so that differences are numbers
  for (int64_t r = 0; r < rows; r += kLanes) {
    const VecF top = load(tile.top + r), old = load(m + r);
    const VecF updated = ((top <= old) | (old != old)) ? old : top;  // a NaN replaces, and stays
    const VecF new_m = vmax(lowest, updated), base = kOwnBase ? vmax(lowest, top) : new_m;
    store(tile.base + r, base);
    store(tile.correction + r, exp2_nonpositive(vmax(lowest, old) - new_m));
    store(tile.scale + r, exp2_nonpositive(base - new_m));
    store(m + r, updated);
  }
}

// Weights of one row in place of its scores, times the values' scales if there are any; returns their sum without
// those.
template <bool kScaled>
QWEN_SPARSE_INLINE VecF scores_to_weights(float* s, int64_t columns, const float* scales, float base) {
  VecF sum{};
  for (int64_t j = 0; j < columns; j += kLanes) {
    const VecF weight = exp2_clamped(load(s + j) - base);
    sum += weight;
    store(s + j, kScaled ? weight * load(scales + j) : weight);
  }
  return sum;
}

// The same as int16: scales are those of to_fixed_scales, weights at most 1. pairs[i]: keys j and j + kLanes, where
// keys are taken in groups of kKeyGroup. The error is 2^-16 of the tile's largest weight, of results in 16 bits 2^-9 at
// best.
QWEN_SPARSE_INLINE VecF scores_to_pairs(const float* s, int64_t columns, const float* scales, float base,
                                        int32_t* pairs) {
  constexpr float kRound = 12582912.0f;  // as in exp2_normal
  VecF sum{};
  for (int64_t j = 0; j < columns; j += kKeyGroup) {
    const VecF first = exp2_clamped(load(s + j) - base), second = exp2_clamped(load(s + j + kLanes) - base);
    sum += first + second;
    const VecI low = (VecI)(first * load(scales + j) + kRound),
               high = (VecI)(second * load(scales + j + kLanes) + kRound);
    const VecI pair = (low & 0xffff) | (high << 16);
    memcpy(pairs + j / 2, &pair, sizeof(pair));
  }
  return sum;
}

// Scales [kTileKeys] relative to the largest, whose place 32767 takes; returns what one unit stands for.
QWEN_SPARSE_INLINE float to_fixed_scales(float* scales) {
  VecU largest{};
  for (int j = 0; j < kTileKeys; j += kLanes) {
    const VecU bits = load_as<VecU>(scales + j) & 0x7fffffff;  // ordered like the floats, and a NaN above all
    largest = bits > largest ? bits : largest;
  }
  QWEN_SPARSE_UNROLL
  for (int width = kLanes; width > 1; width /= 2) {
    const VecU a = interleave_low(largest, largest), b = interleave_high(largest, largest);
    largest = a > b ? a : b;
  }
  const float unit = ((VecF)largest)[0] / 32767.0f;
  const float inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
  for (int j = 0; j < kTileKeys; j += kLanes) store(scales + j, load(scales + j) * inverse);
  return unit;
}

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
