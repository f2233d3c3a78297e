// RoPE of queries and keys, with all rotations of dual-chunk attention from one read of q.
#include "cpu/isa/trig.h"
#include "cpu/parallel.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

constexpr int64_t kRowsPerTask = 16;

template <typename T>
class Rotary {
 public:
  explicit Rotary(const RotaryParams& params)
      : p_(params),
        half_dim_(params.head_dim / 2),
        inter_(rotation(min(2 * params.chunk_len - 1, params.chunk_size))) {}

  void run_task(int64_t task) const {
    const int64_t end = min(p_.num_rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) run_row(row);
  }

 private:
  Rotation<float> rotation(int64_t position) const {
    return Rotation<float>(position, p_.inv_freq, half_dim_, p_.attention_factor);
  }

  void run_row(int64_t row) const {
    const int64_t position = p_.positions[row];
    const int64_t in_chunk = p_.chunk_len == 0 ? position : position - floor_div(position, p_.chunk_len) * p_.chunk_len;
    const Rotation<float> intra = rotation(in_chunk);
    rotate_heads(p_.q, row, p_.num_heads, intra, p_.q_out, row);
    rotate_heads(p_.k, row, p_.num_kv_heads, intra, p_.k_out, row);
    if (p_.chunk_len == 0) return;
    rotate_heads(p_.q, row, p_.num_heads, rotation(min(in_chunk + p_.chunk_len, p_.chunk_size)), p_.q_succ_out, row);
    rotate_heads(p_.q, row, p_.num_heads, inter_, p_.q_inter_out, row);
    const int64_t critical = row - (p_.num_rows - p_.critical_rows);
    if (critical < 0) return;
    rotate_heads(p_.q, row, p_.num_heads, rotation(in_chunk + p_.chunk_len), p_.q_succ_critical_out, critical);
    rotate_heads(p_.q, row, p_.num_heads, rotation(in_chunk + p_.chunk_size), p_.q_inter_critical_out, critical);
  }

  void rotate_heads(const Rows& x, int64_t row, int64_t num_heads, const Rotation<float>& rotation, void* out,
                    int64_t out_row) const {
    const T* in = static_cast<const T*>(x.data) + row * x.row_stride;
    T* to = static_cast<T*>(out) + out_row * num_heads * p_.head_dim;
    for (int64_t head = 0; head < num_heads; ++head) {
      rotate_row(in + head * x.head_stride, p_.head_dim, rotation, to + head * p_.head_dim);
    }
  }

  const RotaryParams& p_;
  int64_t half_dim_;
  Rotation<float> inter_;
};

}  // namespace

void rotary(const RotaryParams& params) {
  dispatch_float(params.dtype, [&](auto type) {
    const Rotary<decltype(type)> kernel(params);
    parallel_tasks(ceil_div(params.num_rows, kRowsPerTask), 0,
                   [&](int64_t task, std::byte*) { kernel.run_task(task); });
  });
}

}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
