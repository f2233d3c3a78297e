// Rotary embedding, plain and dual-chunk.
#include "api/ops.h"

namespace qwen_sparse::api {
namespace {

Device check_rotary_device(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& inv_freq) {
  return check_device("rotary", {{"q", q}, {"k", k}, {"positions", positions}, {"inv_freq", inv_freq}});
}

RotaryParams common_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& positions,
                           const Tensor& inv_freq, double attention_factor) {
  RotaryParams params;
  check_shape(op, "q", q, {{"n"}, {"num_heads"}, {"head_dim"}});
  params.dtype = check_float_dtype(op, "q", q);
  params.num_rows = q.size(0);
  params.num_heads = q.size(1);
  params.head_dim = q.size(2);
  check_head_dim(op, params.head_dim);
  check_shape(op, "k", k, {{"n", params.num_rows}, {"num_kv_heads"}, {"head_dim", params.head_dim}});
  check_dtype(op, "k", k, q.scalar_type());
  params.num_kv_heads = k.size(1);
  params.q = rows_of(q);
  params.k = rows_of(k);
  params.positions = check_positions(op, positions, params.num_rows);
  params.inv_freq = check_inv_freq(op, inv_freq, params.head_dim);
  params.attention_factor = attention_factor;
  return params;
}

Tensor output_like(const Tensor& x, int64_t rows) { return empty(x, {rows, x.size(1), x.size(2)}, x.scalar_type()); }

}  // namespace

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& inv_freq,
                                  double attention_factor) {
  const Device device = check_rotary_device(q, k, positions, inv_freq);
  RotaryParams params = common_params("rotary", q, k, positions, inv_freq, attention_factor);
  Tensor q_out = output_like(q, params.num_rows);
  Tensor k_out = output_like(k, params.num_rows);
  params.q_out = q_out.mutable_data_ptr();
  params.k_out = k_out.mutable_data_ptr();
  device.backend().rotary(params, device.launch());
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rotary_dual_chunk(
    const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& inv_freq, double attention_factor,
    int64_t chunk_size, int64_t chunk_len, int64_t critical_rows) {
  const Device device = check_rotary_device(q, k, positions, inv_freq);
  RotaryParams params = common_params("rotary", q, k, positions, inv_freq, attention_factor);
  params.chunk_len = check_chunk_len("rotary", chunk_len);
  check(chunk_size >= chunk_len, "rotary", "chunk_size must be at least chunk_len = ", chunk_len, ", got ", chunk_size);
  check(critical_rows >= 0, "rotary", "critical_rows must not be negative, got ", critical_rows);
  params.chunk_size = chunk_size;
  params.critical_rows = critical_rows < params.num_rows ? critical_rows : params.num_rows;
  Tensor q_intra = output_like(q, params.num_rows);
  Tensor q_succ = output_like(q, params.num_rows);
  Tensor q_inter = output_like(q, params.num_rows);
  Tensor k_out = output_like(k, params.num_rows);
  Tensor q_succ_critical = output_like(q, params.critical_rows);
  Tensor q_inter_critical = output_like(q, params.critical_rows);
  params.q_out = q_intra.mutable_data_ptr();
  params.k_out = k_out.mutable_data_ptr();
  params.q_succ_out = q_succ.mutable_data_ptr();
  params.q_inter_out = q_inter.mutable_data_ptr();
  params.q_succ_critical_out = q_succ_critical.mutable_data_ptr();
  params.q_inter_critical_out = q_inter_critical.mutable_data_ptr();
  device.backend().rotary(params, device.launch());
  return {q_intra, q_succ, q_inter, k_out, q_succ_critical, q_inter_critical};
}

}  // namespace qwen_sparse::api
