// Registration only: op schemas and their implementations.
#include <torch/csrc/stable/library.h>

#include "api/ops.h"

namespace api = qwen_sparse::api;

// The simulator (tests/ptxsim) registers the same ops, run by the CUDA kernels, under another name.
#ifndef QWEN_SPARSE_OP_NAMESPACE
#define QWEN_SPARSE_OP_NAMESPACE qwen_sparse
#endif
#define QWEN_SPARSE_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define QWEN_SPARSE_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

QWEN_SPARSE_LIBRARY(QWEN_SPARSE_OP_NAMESPACE, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, int? window)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "vertical_slash_attention(Tensor q, Tensor k, Tensor v, Tensor vertical_indexes, Tensor slash_indexes,"
      " float softmax_scale) -> (Tensor out, Tensor lse, Tensor attended)");
  m.def(
      "dual_chunk_attention(Tensor q_intra, Tensor q_succ, Tensor q_inter, Tensor k, Tensor v, int chunk_len,"
      " Tensor? vertical_indexes, Tensor? slash_indexes, Tensor? block_groups, float softmax_scale)"
      " -> (Tensor out, Tensor lse, Tensor attended)");
  m.def(
      "block_group_attention(Tensor q, Tensor k, Tensor v, Tensor block_groups, float softmax_scale)"
      " -> (Tensor out, Tensor lse, Tensor attended)");
  m.def(
      "select_block_groups(Tensor q, Tensor k, Tensor thresholds, float softmax_scale, Tensor? q_succ,"
      " Tensor? q_inter, int? chunk_len) -> (Tensor block_groups, Tensor kept)");
  m.def(
      "select_vertical_slash(Tensor q, Tensor k, int[] vertical_size, int[] slash_size, int last_q,"
      " float softmax_scale, Tensor? q_succ, Tensor? q_inter, int? chunk_len)"
      " -> (Tensor vertical_indexes, Tensor slash_indexes)");
  m.def(
      "vertical_slash_scores(Tensor q, Tensor k, int last_q, float softmax_scale, Tensor? q_succ, Tensor? q_inter,"
      " int? chunk_len) -> (Tensor vertical_scores, Tensor slash_scores)");
  m.def("top_indexes(Tensor scores, int[] sizes, int num_forced) -> Tensor");
  m.def(
      "rotary(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, float attention_factor)"
      " -> (Tensor q_out, Tensor k_out)");
  m.def(
      "rotary_dual_chunk(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, float attention_factor,"
      " int chunk_size, int chunk_len, int critical_rows) -> (Tensor q_intra, Tensor q_succ, Tensor q_inter,"
      " Tensor k_out, Tensor q_succ_critical, Tensor q_inter_critical)");
  m.def(
      "quantize_kv(Tensor k, Tensor v, Tensor? k_bias, Tensor? positions, Tensor? inv_freq, float attention_factor)"
      " -> (Tensor k_int8, Tensor k_scale, Tensor v_int8, Tensor v_scale)");
  m.def(
      "dequantize_kv(Tensor k, Tensor k_scale, Tensor v, Tensor v_scale, Tensor? k_bias, Tensor? positions,"
      " Tensor? inv_freq, float attention_factor, ScalarType dtype) -> (Tensor k_out, Tensor v_out)");
  m.def(
      "store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping,"
      " Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? k_bias, Tensor? positions, Tensor? inv_freq,"
      " float attention_factor) -> ()");
  m.def(
      "gather_kv(Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor? k_scale, Tensor? v_scale, Tensor? k_bias,"
      " Tensor? inv_freq, float attention_factor, int? chunk_len, Tensor(a!) k_out, Tensor(b!) v_out) -> ()");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seqlens_k,"
      " Tensor? k_scale, Tensor? v_scale, Tensor? k_bias, Tensor? inv_freq, float attention_factor, Tensor? q_succ,"
      " Tensor? q_inter, int? chunk_len, float softmax_scale, Tensor? scale_factors, int? window)"
      " -> (Tensor out, Tensor lse)");
}

namespace {

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("attention", TORCH_BOX(&api::attention));
  m.impl("vertical_slash_attention", TORCH_BOX(&api::vertical_slash_attention));
  m.impl("dual_chunk_attention", TORCH_BOX(&api::dual_chunk_attention));
  m.impl("block_group_attention", TORCH_BOX(&api::block_group_attention));
  m.impl("select_block_groups", TORCH_BOX(&api::select_block_groups));
  m.impl("select_vertical_slash", TORCH_BOX(&api::select_vertical_slash));
  m.impl("vertical_slash_scores", TORCH_BOX(&api::vertical_slash_scores));
  m.impl("top_indexes", TORCH_BOX(&api::top_indexes));
  m.impl("rotary", TORCH_BOX(&api::rotary));
  m.impl("rotary_dual_chunk", TORCH_BOX(&api::rotary_dual_chunk));
  m.impl("quantize_kv", TORCH_BOX(&api::quantize_kv));
  m.impl("dequantize_kv", TORCH_BOX(&api::dequantize_kv));
  m.impl("store_kv", TORCH_BOX(&api::store_kv));
  m.impl("gather_kv", TORCH_BOX(&api::gather_kv));
  m.impl("decode_attention", TORCH_BOX(&api::decode_attention));
}

}  // namespace

QWEN_SPARSE_LIBRARY_IMPL(QWEN_SPARSE_OP_NAMESPACE, CPU, m) { implement(m); }
QWEN_SPARSE_LIBRARY_IMPL(QWEN_SPARSE_OP_NAMESPACE, CUDA, m) { implement(m); }
