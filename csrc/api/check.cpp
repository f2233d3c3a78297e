#include "api/check.h"

#include <cmath>

namespace qwen_sparse::api {
namespace {

std::string expected_shape(std::initializer_list<Dim> dims) {
  std::ostringstream text;
  const auto list = [&](auto&& write) {
    text << "[";
    const char* separator = "";
    for (const Dim& dim : dims) {
      text << separator;
      write(dim);
      separator = ", ";
    }
    text << "]";
  };
  list([&](const Dim& dim) { text << dim.name; });
  text << " = ";
  list([&](const Dim& dim) {
    if (dim.size == Dim::kAny) {
      text << "*";
    } else {
      text << dim.size;
    }
  });
  return text.str();
}

}  // namespace

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i == 0 ? "" : ", ") << tensor.size(i);
  text << "]";
  return text.str();
}

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<Dim> dims) {
  bool matches = tensor.dim() == static_cast<int64_t>(dims.size());
  int64_t i = 0;
  for (const Dim& dim : dims) {
    matches = matches && (dim.size == Dim::kAny || tensor.size(i) == dim.size);
    ++i;
  }
  check(matches, op, name, " must have shape ", expected_shape(dims), ", got ", shape_of(tensor));
  const int64_t last = tensor.dim() - 1;
  check(tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1, op, name,
        " must be contiguous in its last dimension, got stride ", tensor.stride(last));
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  check(tensor.scalar_type() == dtype, op, name, " must have dtype ", name_of(dtype), ", got ",
        name_of(tensor.scalar_type()));
}

DType check_float_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(op, name, " must have dtype float32, bfloat16 or float16, got ", name_of(tensor.scalar_type()));
  }
}

DType check_attention_dtype(const char* op, const char* name, const Tensor& tensor, const Device& device) {
  const DType dtype = check_float_dtype(op, name, tensor);
  check(dtype != DType::kFloat32 || device.backend().float32_attention, op, name,
        " must have dtype bfloat16 or float16 on a GPU, got float32");
  return dtype;
}

void check_writable(const char* op, const char* name, const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    check(tensor.size(i) <= 1 || tensor.stride(i) != 0, op, name,
          " is written to and must not be expanded, got stride 0 in dimension ", i, " of ", shape_of(tensor));
  }
}

void check_head_dim(const char* op, int64_t head_dim) {
  check(head_dim == 64 || head_dim == 128, op, "head_dim must be 64 or 128, got ", head_dim);
}

void check_together(const char* op, const char* first_name, bool first, const char* second_name, bool second) {
  check(first == second, op, first_name, " and ", second_name, " must be given together, got only ",
        first ? first_name : second_name);
}

AttentionShape check_qkv(const char* op, const char* q_name, const Tensor& q, const Tensor& k, const Tensor* v) {
  check_shape(op, q_name, q, {{"seqlen_q"}, {"num_heads"}, {"head_dim"}});
  check_float_dtype(op, q_name, q);
  AttentionShape shape;
  shape.seqlen_q = q.size(0);
  shape.num_heads = q.size(1);
  shape.head_dim = q.size(2);
  check_head_dim(op, shape.head_dim);
  check_shape(op, "k", k, {{"seqlen_k"}, {"num_kv_heads"}, {"head_dim", shape.head_dim}});
  check_dtype(op, "k", k, q.scalar_type());
  shape.seqlen_k = k.size(0);
  shape.num_kv_heads = k.size(1);
  check(shape.num_kv_heads > 0 && shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0, op, "num_heads of ",
        q_name, " must be a positive multiple of num_kv_heads of k, got ", shape.num_heads, " and ",
        shape.num_kv_heads);
  check(shape.seqlen_k < INT32_MAX - 1024 && shape.seqlen_q < INT32_MAX - 1024, op,
        "seqlen_q and seqlen_k must be below 2^31 - 1024, got ", shape.seqlen_q, " and ", shape.seqlen_k);
  if (v != nullptr) {
    check_shape(op, "v", *v,
                {{"seqlen_k", shape.seqlen_k}, {"num_kv_heads", shape.num_kv_heads}, {"head_dim", shape.head_dim}});
    check_dtype(op, "v", *v, q.scalar_type());
  }
  return shape;
}

int64_t check_chunk_len(const char* op, int64_t chunk_len) {
  check(chunk_len > 0 && chunk_len % kBlockM == 0, op, "chunk_len must be a positive multiple of ", kBlockM, ", got ",
        chunk_len);
  return chunk_len;
}

int64_t group_words(int64_t seqlen_k) { return (seqlen_k + 32 * kGroupKeys - 1) / (32 * kGroupKeys); }

int64_t check_window(const char* op, std::optional<int64_t> window) {
  if (!window.has_value()) return kNoWindow;
  check(*window > 0, op, "window must be positive or None, got ", *window);
  return *window < kNoWindow ? *window : kNoWindow;
}

float check_softmax_scale(const char* op, double softmax_scale) {
  const auto scale = static_cast<float>(softmax_scale);
  check(std::isfinite(scale), op, "softmax_scale must be finite in float32, got ", softmax_scale);
  return scale;
}

void check_indexes(const char* op, const char* name, const Tensor& indexes, int64_t num_heads, int64_t seqlen_k,
                   const Device& device) {
  check_shape(op, name, indexes, {{"num_heads", num_heads}, {"size"}});
  check_dtype(op, name, indexes, ScalarType::Int);
  check(indexes.is_contiguous(), op, name, " must be contiguous");
  if (!device.is_host()) return;
  const auto* data = static_cast<const int32_t*>(indexes.const_data_ptr());
  const int64_t size = indexes.size(1);
  for (int64_t head = 0; head < num_heads; ++head) {
    const int32_t* row = data + head * size;
    bool padded = false;
    for (int64_t i = 0; i < size; ++i) {
      if (row[i] == -1) {
        padded = true;
        continue;
      }
      check(row[i] >= 0 && row[i] < seqlen_k, op, name, " must lie in [0, seqlen_k = ", seqlen_k,
            ") or be -1 for padding, got ", row[i], " at [", head, ", ", i, "]");
      check(!padded && (i == 0 || row[i] > row[i - 1]), op, name, " must be strictly increasing, padding last, got ",
            row[i], " after ", i == 0 ? -1 : row[i - 1], " at [", head, ", ", i, "]");
    }
  }
}

const double* check_inv_freq(const char* op, const Tensor& inv_freq, int64_t head_dim) {
  check_shape(op, "inv_freq", inv_freq, {{"head_dim / 2", head_dim / 2}});
  check_dtype(op, "inv_freq", inv_freq, ScalarType::Double);
  return static_cast<const double*>(inv_freq.const_data_ptr());
}

const int64_t* check_positions(const char* op, const Tensor& positions, int64_t num_rows) {
  check_shape(op, "positions", positions, {{"n", num_rows}});
  check_dtype(op, "positions", positions, ScalarType::Long);
  return static_cast<const int64_t*>(positions.const_data_ptr());
}

RotatedBias check_bias(const char* op, const OptionalTensor& k_bias, const OptionalTensor* positions,
                       const OptionalTensor& inv_freq, double attention_factor, int64_t num_rows, int64_t num_kv_heads,
                       int64_t head_dim) {
  RotatedBias bias;
  if (!k_bias.has_value()) return bias;
  check_shape(op, "k_bias", *k_bias, {{"num_kv_heads", num_kv_heads}, {"head_dim", head_dim}});
  check_dtype(op, "k_bias", *k_bias, ScalarType::Float);
  check(k_bias->is_contiguous(), op, "k_bias must be contiguous");
  check(inv_freq.has_value(), op, "inv_freq must be given with k_bias, got None");
  bias.data = static_cast<const float*>(k_bias->const_data_ptr());
  bias.inv_freq = check_inv_freq(op, *inv_freq, head_dim);
  bias.attention_factor = attention_factor;
  if (positions != nullptr) {
    check(positions->has_value(), op, "positions must be given with k_bias, got None");
    bias.positions = check_positions(op, **positions, num_rows);
  }
  return bias;
}

void check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache, ScalarType dtype, const char* dtype_of,
                  int64_t head_dim) {
  const ScalarType cache_dtype = k_cache.scalar_type();
  check(cache_dtype == ScalarType::Char || cache_dtype == dtype, op, "k_cache must have dtype ", name_of(dtype),
        " (that of ", dtype_of, ") or int8, got ", name_of(cache_dtype));
  check_shape(op, "k_cache", k_cache, {{"num_pages"}, {"page_size"}, {"num_kv_heads"}, {"head_dim", head_dim}});
  check(k_cache.size(1) > 0, op, "page_size of k_cache must be positive, got ", k_cache.size(1));
  check_shape(op, "v_cache", v_cache,
              {{"num_pages", k_cache.size(0)},
               {"page_size", k_cache.size(1)},
               {"num_kv_heads", k_cache.size(2)},
               {"head_dim", head_dim}});
  check_dtype(op, "v_cache", v_cache, cache_dtype);
}

void check_scales(const char* op, const Tensor& k_cache, const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  check_together(op, "k_scale", k_scale.has_value(), "v_scale", v_scale.has_value());
  check(k_scale.has_value() == (k_cache.scalar_type() == ScalarType::Char), op,
        "k_scale and v_scale must be given for int8 caches and no others");
  if (!k_scale.has_value()) return;
  for (const auto& [name, scale] : {std::pair{"k_scale", &*k_scale}, std::pair{"v_scale", &*v_scale}}) {
    check_shape(op, name, *scale,
                {{"num_pages", k_cache.size(0)}, {"page_size", k_cache.size(1)}, {"num_kv_heads", k_cache.size(2)}});
    check_dtype(op, name, *scale, ScalarType::Float);
  }
}

Rows rows_of(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }

Pages pages_of(const Tensor& cache) {
  return {cache.const_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

MutablePages mutable_pages_of(Tensor& cache) {
  return {cache.mutable_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

}  // namespace qwen_sparse::api
