// int8 quantisation of keys and values.
#include "api/ops.h"
#include "cpu/kernels.h"

namespace qwen_sparse::api {
namespace {

void check_kv(const char* op, QuantizeParams& params, const Tensor& k, const Tensor& v) {
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

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_kv(const Tensor& k, const Tensor& v, const OptionalTensor& k_bias,
                                                       const OptionalTensor& positions, const OptionalTensor& inv_freq,
                                                       double attention_factor) {
  constexpr const char* kOp = "quantize_kv";
  QuantizeParams params;
  check_kv(kOp, params, k, v);
  params.dtype = check_float_dtype(kOp, "k", k);
  params.bias = check_bias(kOp, k_bias, &positions, inv_freq, attention_factor, params.num_rows, params.num_kv_heads,
                           params.head_dim);
  const auto values = [&] {
    return empty_like_rows(k, {params.num_rows, params.num_kv_heads, params.head_dim}, ScalarType::Char);
  };
  const auto scales = [&] { return empty_like_rows(k, {params.num_rows, params.num_kv_heads}, ScalarType::Float); };
  Tensor k_out = values(), v_out = values(), k_scale = scales(), v_scale = scales();
  params.k_out = k_out.mutable_data_ptr();
  params.v_out = v_out.mutable_data_ptr();
  params.k_scale_out = static_cast<float*>(k_scale.mutable_data_ptr());
  params.v_scale_out = static_cast<float*>(v_scale.mutable_data_ptr());
  cpu::kernels().quantize_kv(params);
  return {k_out, k_scale, v_out, v_scale};
}

std::tuple<Tensor, Tensor> dequantize_kv(const Tensor& k, const Tensor& k_scale, const Tensor& v, const Tensor& v_scale,
                                         const OptionalTensor& k_bias, const OptionalTensor& positions,
                                         const OptionalTensor& inv_freq, double attention_factor, ScalarType dtype) {
  constexpr const char* kOp = "dequantize_kv";
  QuantizeParams params;
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
  const auto values = [&] {
    return empty_like_rows(k, {params.num_rows, params.num_kv_heads, params.head_dim}, dtype);
  };
  Tensor k_out = values(), v_out = values();
  params.dtype = check_float_dtype(kOp, "dtype", k_out);
  params.k_out = k_out.mutable_data_ptr();
  params.v_out = v_out.mutable_data_ptr();
  cpu::kernels().dequantize_kv(params);
  return {k_out, v_out};
}

}  // namespace qwen_sparse::api
