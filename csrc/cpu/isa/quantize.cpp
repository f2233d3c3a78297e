// Keys and values into pages and, from int8, back. int8 is symmetric, one scale per token and kv head, keys minus their
// rotated bias.
//
// Residuals, scales and rounding are computed in double, so that every instruction set stores the same bytes.
#include "cpu/isa/trig.h"
#include "cpu/parallel.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int64_t kRowsPerTask = 16;

typedef float VecHalfF __attribute__((vector_size(kDoubleLanes * 4)));

// NaN if either is, so that a NaN among the values reaches their scale.
QWEN_SPARSE_INLINE VecD vmax(VecD a, VecD b) { return (a > b) | (a != a) ? a : b; }

class BiasRotator {
 public:
  BiasRotator(const RotatedBias& bias, int64_t head_dim) : bias_(bias), head_dim_(head_dim) {}

  void set_row(int64_t row) {
    if (bias_.data == nullptr) return;
    rotation_ = Rotation<double>(bias_.positions[row], bias_.inv_freq, head_dim_ / 2, bias_.attention_factor);
  }

  // R b of one kv head; zeros without a bias.
  void rotated(int64_t head, double* out) const {
    const int64_t half = head_dim_ / 2;
    for (int64_t i = 0; i < half; ++i) {
      if (bias_.data == nullptr) {
        out[i] = out[half + i] = 0.0;
        continue;
      }
      const double first = bias_.data[head * head_dim_ + i], second = bias_.data[head * head_dim_ + half + i];
      out[i] = first * rotation_.cos[i] - second * rotation_.sin[i];
      out[half + i] = second * rotation_.cos[i] + first * rotation_.sin[i];
    }
  }

 private:
  const RotatedBias& bias_;
  int64_t head_dim_;
  Rotation<double> rotation_;
};

// x - bias to int8; returns the scale. bias: [head_dim], may be null.
template <typename T>
float quantize_row(const T* x, const double* bias, int64_t head_dim, int8_t* out) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: rounds to nearest even
  float values[2 * kMaxHalfDim];
  double residual[2 * kMaxHalfDim];
  for (int64_t d = 0; d < head_dim; d += kLanes) store(values + d, load(x + d));
  VecD largest{};
  for (int64_t d = 0; d < head_dim; d += kDoubleLanes) {
    VecD r = __builtin_convertvector(load_as<VecHalfF>(values + d), VecD);
    if (bias != nullptr) r -= load_as<VecD>(bias + d);
    memcpy(residual + d, &r, sizeof(r));
    largest = vmax(largest, vmax(r, -r));
  }
  double amax = largest[0];
  for (int lane = 1; lane < kDoubleLanes; ++lane) amax = amax > largest[lane] || amax != amax ? amax : largest[lane];
  const float scale = static_cast<float>(amax / 127.0);
  const double divisor = scale == 0.0f ? 1.0 : scale;
  for (int64_t d = 0; d < head_dim; ++d) {
    const double rounded = (residual[d] / divisor + kRound) - kRound;
    out[d] = static_cast<int8_t>(max(-127.0, min(127.0, rounded)));
  }
  return scale;
}

template <typename T>
QWEN_SPARSE_INLINE const T* row_of(const Rows& rows, int64_t row, int64_t head) {
  return static_cast<const T*>(rows.data) + row * rows.row_stride + head * rows.head_stride;
}

// Where a row goes.
struct Slot {
  int64_t page;
  int64_t row;

  template <typename T>
  T* in(const MutablePages& pages, int64_t head) const {
    return static_cast<T*>(pages.data) + page * pages.page_stride + row * pages.row_stride + head * pages.head_stride;
  }
};

template <typename T>
void quantize_heads(const StoreParams& p, int64_t row, const BiasRotator& bias, const Slot& slot) {
  double rotated[2 * kMaxHalfDim];
  for (int64_t head = 0; head < p.num_kv_heads; ++head) {
    bias.rotated(head, rotated);
    *slot.in<float>(p.k_scale, head) =
        quantize_row(row_of<T>(p.k, row, head), rotated, p.head_dim, slot.in<int8_t>(p.k_cache, head));
    *slot.in<float>(p.v_scale, head) =
        quantize_row(row_of<T>(p.v, row, head), nullptr, p.head_dim, slot.in<int8_t>(p.v_cache, head));
  }
}

template <typename T>
void copy_heads(const StoreParams& p, int64_t row, const Slot& slot) {
  for (int64_t head = 0; head < p.num_kv_heads; ++head) {
    memcpy(slot.in<T>(p.k_cache, head), row_of<T>(p.k, row, head), p.head_dim * sizeof(T));
    memcpy(slot.in<T>(p.v_cache, head), row_of<T>(p.v, row, head), p.head_dim * sizeof(T));
  }
}

template <typename T>
void store_task(const StoreParams& p, int64_t task) {
  BiasRotator bias(p.bias, p.head_dim);
  const int64_t end = min(p.num_rows, (task + 1) * kRowsPerTask);
  for (int64_t row = task * kRowsPerTask; row < end; ++row) {
    const int64_t index = p.slot_mapping == nullptr ? row : p.slot_mapping[row];
    const Slot slot{index / p.page_size, index % p.page_size};
    if (p.cache_dtype == DType::kInt8) {
      bias.set_row(row);
      quantize_heads<T>(p, row, bias, slot);
    } else {
      copy_heads<T>(p, row, slot);
    }
  }
}

template <typename T>
void dequantize_task(const DequantizeParams& p, int64_t task) {
  BiasRotator bias(p.bias, p.head_dim);
  double rotated[2 * kMaxHalfDim];
  float rotated_f[2 * kMaxHalfDim];
  const int64_t end = min(p.num_rows, (task + 1) * kRowsPerTask);
  for (int64_t row = task * kRowsPerTask; row < end; ++row) {
    bias.set_row(row);
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      const int64_t index = row * p.num_kv_heads + head;
      const float k_scale = *row_of<float>(p.k_scale, row, head), v_scale = *row_of<float>(p.v_scale, row, head);
      const int8_t *k = row_of<int8_t>(p.k, row, head), *v = row_of<int8_t>(p.v, row, head);
      T* k_out = static_cast<T*>(p.k_out) + index * p.head_dim;
      T* v_out = static_cast<T*>(p.v_out) + index * p.head_dim;
      bias.rotated(head, rotated);
      for (int64_t d = 0; d < p.head_dim; ++d) rotated_f[d] = static_cast<float>(rotated[d]);
      for (int64_t d = 0; d < p.head_dim; d += kLanes) {
        store(k_out + d, load(k + d) * k_scale + load(rotated_f + d));
        store(v_out + d, load(v + d) * v_scale);
      }
    }
  }
}

}  // namespace

void store_kv(const StoreParams& params) {
  dispatch_float(params.dtype, [&](auto type) {
    parallel_tasks(ceil_div(params.num_rows, kRowsPerTask), 0,
                   [&](int64_t task, std::byte*) { store_task<decltype(type)>(params, task); });
  });
}

void dequantize_kv(const DequantizeParams& params) {
  dispatch_float(params.dtype, [&](auto type) {
    parallel_tasks(ceil_div(params.num_rows, kRowsPerTask), 0,
                   [&](int64_t task, std::byte*) { dequantize_task<decltype(type)>(params, task); });
  });
}

}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
