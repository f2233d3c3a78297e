// Paged keys and values to contiguous ones: the workspace that prefill attention reads.
//
// int8 is scaled on the way and keys get their rotated bias back. With R_t the rotation to position t, the bias at
// position j0 + t is R_t (R_j0 b): R_j0 b is formed once per segment of up to kSegment keys, and the table of R_t, for
// t < kSegment, once per call, so that a key costs two multiply-adds per element and no trigonometry.
#include "cpu/isa/trig.h"
#include "cpu/parallel.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int64_t kSegment = 64;

// R_t for t < kSegment, unscaled.
struct RotationTable {
  Rotation<float> at[kSegment];

  RotationTable(const RotatedBias& bias, int64_t half_dim) {
    for (int64_t t = 0; t < kSegment; ++t) at[t] = Rotation<float>(t, bias.inv_freq, half_dim, 1.0);
  }
};

template <typename T>
struct Source {
  const T* row;  // of the first key
  int64_t stride;
  const float* scale;  // null unless T is int8
  int64_t scale_stride;
};

template <typename C>
Source<C> source_of(const Pages& values, const Pages& scales, int64_t page, int64_t row, int64_t head) {
  const C* data = static_cast<const C*>(values.data);
  const float* scale = static_cast<const float*>(scales.data);
  return {data + page * values.page_stride + row * values.row_stride + head * values.head_stride, values.row_stride,
          scale == nullptr ? nullptr
                           : scale + page * scales.page_stride + row * scales.row_stride + head * scales.head_stride,
          scales.row_stride};
}

// out[r] = x[r] (scaled) + R_r bias, for the rows of a segment; bias is null for none.
template <typename C, typename T>
void gather_rows(const Source<C>& source, const float* bias, const RotationTable* table, int64_t num_rows,
                 int64_t head_dim, T* out, int64_t out_stride) {
  const int64_t half = head_dim / 2;
  for (int64_t r = 0; r < num_rows; ++r) {
    const C* x = source.row + r * source.stride;
    T* y = out + r * out_stride;
    if constexpr (sizeof(C) == 1) {
      const float scale = source.scale[r * source.scale_stride];
      for (int64_t i = 0; i < half; i += kLanes) {
        VecF first = load(x + i) * scale, second = load(x + half + i) * scale;
        if (bias != nullptr) {
          const VecF cos = load(table->at[r].cos + i), sin = load(table->at[r].sin + i);
          first += load(bias + i) * cos - load(bias + half + i) * sin;
          second += load(bias + half + i) * cos + load(bias + i) * sin;
        }
        store(y + i, first);
        store(y + half + i, second);
      }
    } else {
      memcpy(y, x, head_dim * sizeof(T));
    }
  }
}

// Keys [begin, end): in one page and, under dual-chunk attention, one chunk.
template <typename C, typename T>
void gather_segment(const GatherParams& p, const RotationTable* table, int64_t begin, int64_t end) {
  const int64_t page = p.block_table[begin / p.page_size], row = begin % p.page_size;
  const int64_t position = p.chunk_len == 0 ? begin : begin % p.chunk_len;
  Rotation<float> rotation;
  if (table != nullptr) {
    rotation = Rotation<float>(position, p.bias.inv_freq, p.head_dim / 2, p.bias.attention_factor);
  }
  for (int64_t head = 0; head < p.num_kv_heads; ++head) {
    float bias[2 * kMaxHalfDim];
    if (table != nullptr) rotate_row(p.bias.data + head * p.head_dim, p.head_dim, rotation, bias);
    T* k_out = static_cast<T*>(p.k_out) + begin * p.k_out_stride + head * p.head_dim;
    T* v_out = static_cast<T*>(p.v_out) + begin * p.v_out_stride + head * p.head_dim;
    gather_rows(source_of<C>(p.k, p.k_scale, page, row, head), table == nullptr ? nullptr : bias, table, end - begin,
                p.head_dim, k_out, p.k_out_stride);
    gather_rows(source_of<C>(p.v, p.v_scale, page, row, head), nullptr, nullptr, end - begin, p.head_dim, v_out,
                p.v_out_stride);
  }
}

template <typename C, typename T>
void run(const GatherParams& p, const RotationTable* table) {
  parallel_tasks(ceil_div(p.num_keys, p.page_size), 0, [&](int64_t task, std::byte*) {
    const int64_t end = min(p.num_keys, (task + 1) * p.page_size);
    for (int64_t begin = task * p.page_size; begin < end;) {
      int64_t stop = min(end, begin + kSegment);
      if (p.chunk_len != 0) stop = min(stop, (begin / p.chunk_len + 1) * p.chunk_len);
      gather_segment<C, T>(p, table, begin, stop);
      begin = stop;
    }
  });
}

}  // namespace

void gather_kv(const GatherParams& params) {
  dispatch_float(params.dtype, [&](auto type) {
    using T = decltype(type);
    if (params.cache_dtype != DType::kInt8) return run<T, T>(params, nullptr);
    if (params.bias.data == nullptr) return run<int8_t, T>(params, nullptr);
    const RotationTable table(params.bias, params.head_dim / 2);
    run<int8_t, T>(params, &table);
  });
}

}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
