// Decode attention over a paged cache.
#include <algorithm>
#include <cmath>

#include "api/ops.h"

namespace qwen_sparse::api {
namespace {

Rows decode_rows(const Tensor& q) { return {q.const_data_ptr(), q.stride(1), q.stride(2)}; }

void check_pages(const char* op, const DecodeParams& params, const Tensor& block_table, const Tensor& seqlens_k,
                 int64_t num_pages) {
  const auto* seqlens = static_cast<const int32_t*>(seqlens_k.const_data_ptr());
  const auto* table = static_cast<const int32_t*>(block_table.const_data_ptr());
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t capacity = block_table.size(1) * params.page_size;
    check(seqlens[b] >= params.shape.seqlen_q && seqlens[b] <= capacity, op,
          "seqlens_k must lie in [seqlen_q = ", params.shape.seqlen_q, ", max_pages * page_size = ", capacity,
          "], got ", seqlens[b], " at [", b, "]");
    for (int64_t i = 0; i * params.page_size < seqlens[b]; ++i) {
      const int32_t page = table[b * params.block_table_stride + i];
      check(page >= 0 && page < num_pages, op, "block_table must lie in [0, num_pages = ", num_pages, "), got ", page,
            " at [", b, ", ", i, "]");
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                            const Tensor& block_table, const Tensor& seqlens_k,
                                            const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                                            const OptionalTensor& k_bias, const OptionalTensor& inv_freq,
                                            double attention_factor, const OptionalTensor& q_succ,
                                            const OptionalTensor& q_inter, std::optional<int64_t> chunk_len,
                                            double softmax_scale, const OptionalTensor& scale_factors,
                                            std::optional<int64_t> window) {
  constexpr const char* kOp = "decode_attention";
  DecodeParams params;
  AttentionShape& shape = params.shape;
  const Device device = check_device(kOp, {{"q", q},
                                           {"k_cache", k_cache},
                                           {"v_cache", v_cache},
                                           {"block_table", block_table},
                                           {"seqlens_k", seqlens_k},
                                           {"k_scale", k_scale},
                                           {"v_scale", v_scale},
                                           {"k_bias", k_bias},
                                           {"inv_freq", inv_freq},
                                           {"q_succ", q_succ},
                                           {"q_inter", q_inter},
                                           {"scale_factors", scale_factors}});
  check_shape(kOp, "q", q, {{"batch"}, {"seqlen_q"}, {"num_heads"}, {"head_dim"}});
  params.dtype = check_attention_dtype(kOp, "q", q, device);
  params.batch = q.size(0);
  shape.seqlen_q = q.size(1);
  shape.num_heads = q.size(2);
  shape.head_dim = q.size(3);
  check_head_dim(kOp, shape.head_dim);
  // rows of all sequences are addressed with one stride
  const auto check_rows = [&](const char* name, const Tensor& rows) {
    check_shape(kOp, name, rows,
                {{"batch", params.batch},
                 {"seqlen_q", shape.seqlen_q},
                 {"num_heads", shape.num_heads},
                 {"head_dim", shape.head_dim}});
    check_dtype(kOp, name, rows, q.scalar_type());
    check(params.batch <= 1 || rows.numel() == 0 || rows.stride(0) == shape.seqlen_q * rows.stride(1), kOp, name,
          " must have evenly spaced rows over batch and seqlen_q, got strides ", rows.stride(0), " and ",
          rows.stride(1));
  };
  check_rows("q", q);

  check_caches(kOp, k_cache, v_cache, q.scalar_type(), "q", shape.head_dim);
  const bool is_int8 = k_cache.scalar_type() == ScalarType::Char;
  params.cache_dtype = is_int8 ? DType::kInt8 : params.dtype;
  const int64_t num_pages = k_cache.size(0);
  params.num_pages = num_pages;
  params.page_size = k_cache.size(1);
  shape.num_kv_heads = k_cache.size(2);
  check(shape.num_kv_heads > 0 && shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0, kOp,
        "num_heads of q must be a positive multiple of num_kv_heads of k_cache, got ", shape.num_heads, " and ",
        shape.num_kv_heads);
  check(shape.num_heads / shape.num_kv_heads <= kMaxDecodeRows, kOp, "num_heads / num_kv_heads must be at most ",
        kMaxDecodeRows, ", got ", shape.num_heads / shape.num_kv_heads);
  check_shape(kOp, "block_table", block_table, {{"batch", params.batch}, {"max_pages"}});
  check_dtype(kOp, "block_table", block_table, ScalarType::Int);
  check_shape(kOp, "seqlens_k", seqlens_k, {{"batch", params.batch}});
  check_dtype(kOp, "seqlens_k", seqlens_k, ScalarType::Int);
  params.block_table_stride = block_table.stride(0);
  if (device.is_host()) check_pages(kOp, params, block_table, seqlens_k, num_pages);

  check_scales(kOp, k_cache, k_scale, v_scale);
  if (is_int8) {
    params.k_scale = pages_of(*k_scale);
    params.v_scale = pages_of(*v_scale);
  } else {
    check(!k_bias.has_value(), kOp, "k_bias must be given for int8 caches only");
  }
  params.bias = check_bias(kOp, k_bias, nullptr, inv_freq, attention_factor, 0, shape.num_kv_heads, shape.head_dim);

  check_together(kOp, "q_succ", q_succ.has_value(), "chunk_len", chunk_len.has_value());
  check_together(kOp, "q_inter", q_inter.has_value(), "chunk_len", chunk_len.has_value());
  if (chunk_len.has_value()) {
    params.chunk_len = check_chunk_len(kOp, *chunk_len);
    check_rows("q_succ", *q_succ);
    check_rows("q_inter", *q_inter);
    params.q_succ = decode_rows(*q_succ);
    params.q_inter = decode_rows(*q_inter);
  }
  params.q_intra = decode_rows(q);
  params.k = pages_of(k_cache);
  params.v = pages_of(v_cache);
  params.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  params.seqlens_k = static_cast<const int32_t*>(seqlens_k.const_data_ptr());
  if (device.is_host()) {
    for (int64_t b = 0; b < params.batch; ++b) {
      shape.seqlen_k = std::max<int64_t>(shape.seqlen_k, params.seqlens_k[b]);
    }
  } else {
    shape.seqlen_k = block_table.size(1) * params.page_size;
  }
  params.window = check_window(kOp, window);
  params.softmax_scale = check_softmax_scale(kOp, softmax_scale);
  if (scale_factors.has_value()) {
    check_shape(kOp, "scale_factors", *scale_factors, {{"batch", params.batch}});
    check_dtype(kOp, "scale_factors", *scale_factors, ScalarType::Float);
    params.scale_factors = static_cast<const float*>(scale_factors->const_data_ptr());
    for (int64_t b = 0; device.is_host() && b < params.batch; ++b) {
      check(std::isfinite(params.scale_factors[b]), kOp, "scale_factors must be finite, got ", params.scale_factors[b],
            " at [", b, "]");
    }
  }

  Tensor out = empty(q, {params.batch, shape.seqlen_q, shape.num_heads, shape.head_dim}, q.scalar_type());
  Tensor lse = empty(q, {params.batch, shape.seqlen_q, shape.num_heads}, ScalarType::Float);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (out.numel() == 0) return {out, lse};
  Workspace workspace(q, device.backend().decode_workspace(params));
  workspace.attach(params);
  device.backend().decode_attention(params, device.launch());
  return {out, lse};
}

}  // namespace qwen_sparse::api
