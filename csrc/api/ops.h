// The ops as bindings.cpp registers them: check, fill in params, run the kernel. Python names and docstrings are in
// python/qwen_sparse/kernels/ops.py.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "api/check.h"

namespace qwen_sparse::api {

// (out, lse)
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale,
                                     bool causal, std::optional<int64_t> window);

// (out, lse, attended): attended is int64 [num_heads], the number of (row, key) pairs.
std::tuple<Tensor, Tensor, Tensor> vertical_slash_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                            const Tensor& vertical_indexes, const Tensor& slash_indexes,
                                                            double softmax_scale);

std::tuple<Tensor, Tensor, Tensor> dual_chunk_attention(const Tensor& q_intra, const Tensor& q_succ,
                                                        const Tensor& q_inter, const Tensor& k, const Tensor& v,
                                                        int64_t chunk_len, const OptionalTensor& vertical_indexes,
                                                        const OptionalTensor& slash_indexes,
                                                        const OptionalTensor& block_groups, double softmax_scale);

std::tuple<Tensor, Tensor, Tensor> block_group_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                         const Tensor& block_groups, double softmax_scale);

// (block_groups, kept)
std::tuple<Tensor, Tensor> select_block_groups(const Tensor& q, const Tensor& k, const Tensor& thresholds,
                                               double softmax_scale, const OptionalTensor& q_succ,
                                               const OptionalTensor& q_inter, std::optional<int64_t> chunk_len);

std::tuple<Tensor, Tensor> select_vertical_slash(const Tensor& q, const Tensor& k,
                                                 const std::vector<int64_t>& vertical_size,
                                                 const std::vector<int64_t>& slash_size, int64_t last_q,
                                                 double softmax_scale, const OptionalTensor& q_succ,
                                                 const OptionalTensor& q_inter, std::optional<int64_t> chunk_len);
std::tuple<Tensor, Tensor> vertical_slash_scores(const Tensor& q, const Tensor& k, int64_t last_q, double softmax_scale,
                                                 const OptionalTensor& q_succ, const OptionalTensor& q_inter,
                                                 std::optional<int64_t> chunk_len);
// The selection's last step alone; ops.py does not wrap it.
Tensor top_indexes(const Tensor& scores, const std::vector<int64_t>& sizes, int64_t num_forced);

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& inv_freq,
                                  double attention_factor);

// (q_intra, q_succ, q_inter, k, q_succ_critical, q_inter_critical)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rotary_dual_chunk(
    const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& inv_freq, double attention_factor,
    int64_t chunk_size, int64_t chunk_len, int64_t critical_rows);

// (k_int8, k_scale, v_int8, v_scale)
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_kv(const Tensor& k, const Tensor& v, const OptionalTensor& k_bias,
                                                       const OptionalTensor& positions, const OptionalTensor& inv_freq,
                                                       double attention_factor);

std::tuple<Tensor, Tensor> dequantize_kv(const Tensor& k, const Tensor& k_scale, const Tensor& v, const Tensor& v_scale,
                                         const OptionalTensor& k_bias, const OptionalTensor& positions,
                                         const OptionalTensor& inv_freq, double attention_factor, ScalarType dtype);

// Writes row i of k and v to slot slot_mapping[i] of the pages.
void store_kv(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping,
              OptionalTensor k_scale, OptionalTensor v_scale, const OptionalTensor& k_bias,
              const OptionalTensor& positions, const OptionalTensor& inv_freq, double attention_factor);

// Fills k_out and v_out with the first k_out.size(0) keys and values of the pages.
void gather_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table, const OptionalTensor& k_scale,
               const OptionalTensor& v_scale, const OptionalTensor& k_bias, const OptionalTensor& inv_freq,
               double attention_factor, std::optional<int64_t> chunk_len, Tensor k_out, Tensor v_out);

std::tuple<Tensor, Tensor> decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                            const Tensor& block_table, const Tensor& seqlens_k,
                                            const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                                            const OptionalTensor& k_bias, const OptionalTensor& inv_freq,
                                            double attention_factor, const OptionalTensor& q_succ,
                                            const OptionalTensor& q_inter, std::optional<int64_t> chunk_len,
                                            double softmax_scale, const OptionalTensor& scale_factors,
                                            std::optional<int64_t> window);

}  // namespace qwen_sparse::api
