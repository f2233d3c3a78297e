// Keys and values on their way into pages, int8 or not, and out of them.
#include "api/ops.h"

namespace qwen_sparse::api {
namespace {

template <typename Params>
void check_kv(const char* op, Params& params, const Tensor& k, const Tensor& v) {
  check_shape(op, "k", k, {{"n"}, {"num_kv_heads"}, {"head_dim"}});
  params.num_rows = k.size(0);
  params.num_kv_heads = k.size(1);
  params.head_dim = k.size(2);
  check_head_dim(op, params.head_dim);
  check_shape(op, "v", v,
              {{"n", params.num_rows}, {"num_kv_heads", params.num_kv_heads}, {"head_dim", params.head_dim}});
  check_dtype(op, "v", v, k.scalar_type());
  params.k = rows_of(k);
  params.v = rows_of(v);
}

// Caches, and whether they are int8, beside rows [n, num_kv_heads, head_dim] outside of them.
bool check_pages(const char* op, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k_scale,
                 const OptionalTensor& v_scale, const OptionalTensor& k_bias, const char* rows_name,
                 const Tensor& rows) {
  check_caches(op, k_cache, v_cache, rows.scalar_type(), rows_name, rows.size(2));
  check(k_cache.size(2) == rows.size(1), op, "k_cache must have num_kv_heads = ", rows.size(1), " (that of ", rows_name,
        "), got ", k_cache.size(2));
  check_scales(op, k_cache, k_scale, v_scale);
  const bool is_int8 = k_scale.has_value();
  check(is_int8 || !k_bias.has_value(), op, "k_bias must be given for int8 caches only");
  return is_int8;
}

// A contiguous tensor of rows as one page.
MutablePages page_of(Tensor& rows) { return {rows.mutable_data_ptr(), 0, rows.stride(0), rows.stride(1)}; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_kv(const Tensor& k, const Tensor& v, const OptionalTensor& k_bias,
                                                       const OptionalTensor& positions, const OptionalTensor& inv_freq,
                                                       double attention_factor) {
  constexpr const char* kOp = "quantize_kv";
  const Device device =
      check_device(kOp, {{"k", k}, {"v", v}, {"k_bias", k_bias}, {"positions", positions}, {"inv_freq", inv_freq}});
  StoreParams params;
  check_kv(kOp, params, k, v);
  params.dtype = check_float_dtype(kOp, "k", k);
  params.bias = check_bias(kOp, k_bias, &positions, inv_freq, attention_factor, params.num_rows, params.num_kv_heads,
                           params.head_dim);
  const auto values = [&] {
    return empty(k, {params.num_rows, params.num_kv_heads, params.head_dim}, ScalarType::Char);
  };
  const auto scales = [&] { return empty(k, {params.num_rows, params.num_kv_heads}, ScalarType::Float); };
  Tensor k_out = values(), v_out = values(), k_scale = scales(), v_scale = scales();
  params.cache_dtype = DType::kInt8;
  params.num_pages = 1;
  params.page_size = params.num_rows;
  params.k_cache = page_of(k_out);
  params.v_cache = page_of(v_out);
  params.k_scale = page_of(k_scale);
  params.v_scale = page_of(v_scale);
  device.backend().store_kv(params, device.launch());
  return {k_out, k_scale, v_out, v_scale};
}

std::tuple<Tensor, Tensor> dequantize_kv(const Tensor& k, const Tensor& k_scale, const Tensor& v, const Tensor& v_scale,
                                         const OptionalTensor& k_bias, const OptionalTensor& positions,
                                         const OptionalTensor& inv_freq, double attention_factor, ScalarType dtype) {
  constexpr const char* kOp = "dequantize_kv";
  const Device device = check_device(kOp, {{"k", k},
                                           {"k_scale", k_scale},
                                           {"v", v},
                                           {"v_scale", v_scale},
                                           {"k_bias", k_bias},
                                           {"positions", positions},
                                           {"inv_freq", inv_freq}});
  DequantizeParams params;
  check_kv(kOp, params, k, v);
  check_dtype(kOp, "k", k, ScalarType::Char);
  for (const auto& [name, scale] : {std::pair{"k_scale", &k_scale}, std::pair{"v_scale", &v_scale}}) {
    check_shape(kOp, name, *scale, {{"n", params.num_rows}, {"num_kv_heads", params.num_kv_heads}});
    check_dtype(kOp, name, *scale, ScalarType::Float);
  }
  params.k_scale = rows_of(k_scale);
  params.v_scale = rows_of(v_scale);
  params.bias = check_bias(kOp, k_bias, &positions, inv_freq, attention_factor, params.num_rows, params.num_kv_heads,
                           params.head_dim);
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kOp,
        "dtype must be float32, bfloat16 or float16, got ", name_of(dtype));
  const auto values = [&] { return empty(k, {params.num_rows, params.num_kv_heads, params.head_dim}, dtype); };
  Tensor k_out = values(), v_out = values();
  params.dtype = check_float_dtype(kOp, "dtype", k_out);
  params.k_out = k_out.mutable_data_ptr();
  params.v_out = v_out.mutable_data_ptr();
  device.backend().dequantize_kv(params, device.launch());
  return {k_out, v_out};
}

void store_kv(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping,
              OptionalTensor k_scale, OptionalTensor v_scale, const OptionalTensor& k_bias,
              const OptionalTensor& positions, const OptionalTensor& inv_freq, double attention_factor) {
  constexpr const char* kOp = "store_kv";
  const Device device = check_device(kOp, {{"k", k},
                                           {"v", v},
                                           {"k_cache", k_cache},
                                           {"v_cache", v_cache},
                                           {"slot_mapping", slot_mapping},
                                           {"k_scale", k_scale},
                                           {"v_scale", v_scale},
                                           {"k_bias", k_bias},
                                           {"positions", positions},
                                           {"inv_freq", inv_freq}});
  StoreParams params;
  check_kv(kOp, params, k, v);
  params.dtype = check_float_dtype(kOp, "k", k);
  const bool is_int8 = check_pages(kOp, k_cache, v_cache, k_scale, v_scale, k_bias, "k", k);
  params.cache_dtype = is_int8 ? DType::kInt8 : params.dtype;
  params.num_pages = k_cache.size(0);
  params.page_size = k_cache.size(1);
  params.bias = check_bias(kOp, k_bias, &positions, inv_freq, attention_factor, params.num_rows, params.num_kv_heads,
                           params.head_dim);

  check_shape(kOp, "slot_mapping", slot_mapping, {{"n", params.num_rows}});
  check_dtype(kOp, "slot_mapping", slot_mapping, ScalarType::Long);
  params.slot_mapping = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  const int64_t num_slots = params.num_pages * params.page_size;
  for (int64_t i = 0; device.is_host() && i < params.num_rows; ++i) {
    check(params.slot_mapping[i] >= 0 && params.slot_mapping[i] < num_slots, kOp,
          "slot_mapping must lie in [0, num_pages * page_size = ", num_slots, "), got ", params.slot_mapping[i],
          " at [", i, "]");
  }
  check_writable(kOp, "k_cache", k_cache);
  check_writable(kOp, "v_cache", v_cache);
  params.k_cache = mutable_pages_of(k_cache);
  params.v_cache = mutable_pages_of(v_cache);
  if (is_int8) {
    check_writable(kOp, "k_scale", *k_scale);
    check_writable(kOp, "v_scale", *v_scale);
    params.k_scale = mutable_pages_of(*k_scale);
    params.v_scale = mutable_pages_of(*v_scale);
  }
  device.backend().store_kv(params, device.launch());
}

void gather_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table, const OptionalTensor& k_scale,
               const OptionalTensor& v_scale, const OptionalTensor& k_bias, const OptionalTensor& inv_freq,
               double attention_factor, std::optional<int64_t> chunk_len, Tensor k_out, Tensor v_out) {
  constexpr const char* kOp = "gather_kv";
  const Device device = check_device(kOp, {{"k_cache", k_cache},
                                           {"v_cache", v_cache},
                                           {"block_table", block_table},
                                           {"k_scale", k_scale},
                                           {"v_scale", v_scale},
                                           {"k_bias", k_bias},
                                           {"inv_freq", inv_freq},
                                           {"k_out", k_out},
                                           {"v_out", v_out}});
  GatherParams params;
  check_shape(kOp, "k_out", k_out, {{"n"}, {"num_kv_heads"}, {"head_dim"}});
  params.dtype = check_float_dtype(kOp, "k_out", k_out);
  params.num_keys = k_out.size(0);
  params.num_kv_heads = k_out.size(1);
  params.head_dim = k_out.size(2);
  check_head_dim(kOp, params.head_dim);
  check_shape(kOp, "v_out", v_out,
              {{"n", params.num_keys}, {"num_kv_heads", params.num_kv_heads}, {"head_dim", params.head_dim}});
  check_dtype(kOp, "v_out", v_out, k_out.scalar_type());
  for (const auto& [name, out] : {std::pair{"k_out", &k_out}, std::pair{"v_out", &v_out}}) {
    check(out->stride(1) == params.head_dim || params.num_kv_heads <= 1, kOp, name,
          " must have contiguous rows, got a head stride of ", out->stride(1));
    check_writable(kOp, name, *out);
  }

  const bool is_int8 = check_pages(kOp, k_cache, v_cache, k_scale, v_scale, k_bias, "k_out", k_out);
  params.cache_dtype = is_int8 ? DType::kInt8 : params.dtype;
  params.page_size = k_cache.size(1);
  params.num_pages = k_cache.size(0);
  params.bias = check_bias(kOp, k_bias, nullptr, inv_freq, attention_factor, 0, params.num_kv_heads, params.head_dim);
  if (chunk_len.has_value()) params.chunk_len = check_chunk_len(kOp, *chunk_len);

  check_shape(kOp, "block_table", block_table, {{"num_pages"}});
  check_dtype(kOp, "block_table", block_table, ScalarType::Int);
  const int64_t pages_read = (params.num_keys + params.page_size - 1) / params.page_size;
  check(block_table.size(0) >= pages_read, kOp, "block_table must have at least ceil(n / page_size) = ", pages_read,
        " entries, got ", block_table.size(0));
  params.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  for (int64_t i = 0; device.is_host() && i < pages_read; ++i) {
    check(params.block_table[i] >= 0 && params.block_table[i] < k_cache.size(0), kOp,
          "block_table must lie in [0, num_pages = ", k_cache.size(0), "), got ", params.block_table[i], " at [", i,
          "]");
  }
  params.k = pages_of(k_cache);
  params.v = pages_of(v_cache);
  if (is_int8) {
    params.k_scale = pages_of(*k_scale);
    params.v_scale = pages_of(*v_scale);
  }
  params.k_out = k_out.mutable_data_ptr();
  params.v_out = v_out.mutable_data_ptr();
  params.k_out_stride = k_out.stride(0);
  params.v_out_stride = v_out.stride(0);
  device.backend().gather_kv(params, device.launch());
}

}  // namespace qwen_sparse::api
