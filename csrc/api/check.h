// Argument checks of the torch-facing layer: each states the op, the argument, the rule and the value.
//
// std::invalid_argument reaches Python as ValueError.
#pragma once

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "api/device.h"
#include "params.h"

namespace qwen_sparse::api {

using OptionalTensor = std::optional<Tensor>;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <typename... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (!condition) fail(op, parts...);
}

std::string shape_of(const Tensor& tensor);
const char* name_of(ScalarType dtype);

// One dimension of an expected shape: its name, and its size unless any is fine.
struct Dim {
  static constexpr int64_t kAny = -1;
  const char* name;
  int64_t size = kAny;
};

// Shape and a contiguous last dimension.
void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<Dim> dims);
void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype);
// float32, bfloat16 or float16
DType check_float_dtype(const char* op, const char* name, const Tensor& tensor);
// The same, unless the backend's attention kernels take 16-bit types only.
DType check_attention_dtype(const char* op, const char* name, const Tensor& tensor, const Device& device);
// No two elements at one address.
void check_writable(const char* op, const char* name, const Tensor& tensor);
void check_head_dim(const char* op, int64_t head_dim);
// `second` is given iff `first` is.
void check_together(const char* op, const char* first_name, bool first, const char* second_name, bool second);

// q [seqlen_q, num_heads, head_dim] and k, v [seqlen_k, num_kv_heads, head_dim] of one attention call.
AttentionShape check_qkv(const char* op, const char* q_name, const Tensor& q, const Tensor& k, const Tensor* v);
int64_t check_chunk_len(const char* op, int64_t chunk_len);
// Words of a bitmap with one bit per block group of seqlen_k keys.
int64_t group_words(int64_t seqlen_k);
int64_t check_window(const char* op, std::optional<int64_t> window);
float check_softmax_scale(const char* op, double softmax_scale);
// Strictly increasing indexes in [0, seqlen_k), then -1.
// Their values are checked where the host can read them.
void check_indexes(const char* op, const char* name, const Tensor& indexes, int64_t num_heads, int64_t seqlen_k,
                   const Device& device);

// float64 [head_dim / 2] and int64 [num_rows]
const double* check_inv_freq(const char* op, const Tensor& inv_freq, int64_t head_dim);
const int64_t* check_positions(const char* op, const Tensor& positions, int64_t num_rows);

// The key bias of quantize and dequantize (positions given) or of decode (positions == nullptr).
RotatedBias check_bias(const char* op, const OptionalTensor& k_bias, const OptionalTensor* positions,
                       const OptionalTensor& inv_freq, double attention_factor, int64_t num_rows, int64_t num_kv_heads,
                       int64_t head_dim);

// k_cache and v_cache [num_pages, page_size, num_kv_heads, head_dim], int8 or of dtype `dtype` (that of `dtype_of`).
void check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache, ScalarType dtype, const char* dtype_of,
                  int64_t head_dim);
// float32 [num_pages, page_size, num_kv_heads] beside int8 caches, none beside others.
void check_scales(const char* op, const Tensor& k_cache, const OptionalTensor& k_scale, const OptionalTensor& v_scale);

Rows rows_of(const Tensor& tensor);
Pages pages_of(const Tensor& cache);
MutablePages mutable_pages_of(Tensor& cache);

}  // namespace qwen_sparse::api
