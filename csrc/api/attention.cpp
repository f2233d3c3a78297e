// Prefill attention: dense or over a sparse set, plain or dual-chunk.
#include "api/ops.h"

namespace qwen_sparse::api {
namespace {

struct Outputs {
  Tensor out, lse, attended;
};

Outputs run(const Device& device, AttentionParams& params, const Tensor& q) {
  const AttentionShape& shape = params.shape;
  Outputs outputs{empty(q, {shape.seqlen_q, shape.num_heads, shape.head_dim}, q.scalar_type()),
                  empty(q, {shape.seqlen_q, shape.num_heads}, ScalarType::Float),
                  zeros(q, {shape.num_heads}, ScalarType::Long)};
  params.out = outputs.out.mutable_data_ptr();
  params.lse = static_cast<float*>(outputs.lse.mutable_data_ptr());
  params.attended = static_cast<int64_t*>(outputs.attended.mutable_data_ptr());
  Workspace workspace(q, device.backend().attention_workspace(params));
  workspace.attach(params);
  device.backend().attention(params, device.launch());
  return outputs;
}

AttentionParams common_params(const char* op, const char* q_name, const Tensor& q, const Tensor& k, const Tensor& v,
                              double softmax_scale, const Device& device) {
  AttentionParams params;
  params.shape = check_qkv(op, q_name, q, k, &v);
  params.dtype = check_attention_dtype(op, q_name, q, device);
  params.q_intra = rows_of(q);
  params.k = rows_of(k);
  params.v = rows_of(v);
  params.softmax_scale = check_softmax_scale(op, softmax_scale);
  return params;
}

void set_indexes(const char* op, AttentionParams& params, const Tensor& vertical, const Tensor& slash,
                 const Device& device) {
  check_indexes(op, "vertical_indexes", vertical, params.shape.num_heads, params.shape.seqlen_k, device);
  check_indexes(op, "slash_indexes", slash, params.shape.num_heads, params.shape.seqlen_k, device);
  params.key_set = KeySet::kVerticalSlash;
  params.vertical_indexes = static_cast<const int32_t*>(vertical.const_data_ptr());
  params.slash_indexes = static_cast<const int32_t*>(slash.const_data_ptr());
  params.num_vertical = vertical.size(1);
  params.num_slash = slash.size(1);
}

void set_block_groups(const char* op, AttentionParams& params, const Tensor& block_groups) {
  const AttentionShape& shape = params.shape;
  params.group_words = group_words(shape.seqlen_k);
  check_shape(op, "block_groups", block_groups,
              {{"num_heads", shape.num_heads},
               {"num_blocks", RowBlocks(shape).count},
               {"ceil(seqlen_k / 512)", params.group_words}});
  check_dtype(op, "block_groups", block_groups, ScalarType::Int);
  check(block_groups.is_contiguous(), op, "block_groups must be contiguous");
  params.key_set = KeySet::kBlockGroups;
  params.block_groups = static_cast<const uint32_t*>(block_groups.const_data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale,
                                     bool causal, std::optional<int64_t> window) {
  const Device device = check_device("attention", {{"q", q}, {"k", k}, {"v", v}});
  AttentionParams params = common_params("attention", "q", q, k, v, softmax_scale, device);
  params.causal = causal;
  params.window = check_window("attention", window);
  Outputs outputs = run(device, params, q);
  return {outputs.out, outputs.lse};
}

std::tuple<Tensor, Tensor, Tensor> vertical_slash_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                            const Tensor& vertical_indexes, const Tensor& slash_indexes,
                                                            double softmax_scale) {
  constexpr const char* kOp = "vertical_slash_attention";
  const Device device = check_device(
      kOp, {{"q", q}, {"k", k}, {"v", v}, {"vertical_indexes", vertical_indexes}, {"slash_indexes", slash_indexes}});
  AttentionParams params = common_params(kOp, "q", q, k, v, softmax_scale, device);
  set_indexes(kOp, params, vertical_indexes, slash_indexes, device);
  Outputs outputs = run(device, params, q);
  return {outputs.out, outputs.lse, outputs.attended};
}

std::tuple<Tensor, Tensor, Tensor> dual_chunk_attention(const Tensor& q_intra, const Tensor& q_succ,
                                                        const Tensor& q_inter, const Tensor& k, const Tensor& v,
                                                        int64_t chunk_len, const OptionalTensor& vertical_indexes,
                                                        const OptionalTensor& slash_indexes,
                                                        const OptionalTensor& block_groups, double softmax_scale) {
  constexpr const char* kOp = "dual_chunk_attention";
  const Device device = check_device(kOp, {{"q_intra", q_intra},
                                           {"q_succ", q_succ},
                                           {"q_inter", q_inter},
                                           {"k", k},
                                           {"v", v},
                                           {"vertical_indexes", vertical_indexes},
                                           {"slash_indexes", slash_indexes},
                                           {"block_groups", block_groups}});
  AttentionParams params = common_params(kOp, "q_intra", q_intra, k, v, softmax_scale, device);
  const AttentionShape& shape = params.shape;
  for (const auto& [name, q] : {std::pair{"q_succ", &q_succ}, std::pair{"q_inter", &q_inter}}) {
    check_shape(kOp, name, *q,
                {{"seqlen_q", shape.seqlen_q}, {"num_heads", shape.num_heads}, {"head_dim", shape.head_dim}});
    check_dtype(kOp, name, *q, q_intra.scalar_type());
  }
  params.q_succ = rows_of(q_succ);
  params.q_inter = rows_of(q_inter);
  params.chunk_len = check_chunk_len(kOp, chunk_len);
  check_together(kOp, "vertical_indexes", vertical_indexes.has_value(), "slash_indexes", slash_indexes.has_value());
  check(!vertical_indexes.has_value() || !block_groups.has_value(), kOp,
        "block_groups must not be given together with vertical_indexes and slash_indexes");
  if (vertical_indexes.has_value()) set_indexes(kOp, params, *vertical_indexes, *slash_indexes, device);
  if (block_groups.has_value()) set_block_groups(kOp, params, *block_groups);
  Outputs outputs = run(device, params, q_intra);
  return {outputs.out, outputs.lse, outputs.attended};
}

std::tuple<Tensor, Tensor, Tensor> block_group_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                         const Tensor& block_groups, double softmax_scale) {
  constexpr const char* kOp = "block_group_attention";
  const Device device = check_device(kOp, {{"q", q}, {"k", k}, {"v", v}, {"block_groups", block_groups}});
  AttentionParams params = common_params(kOp, "q", q, k, v, softmax_scale, device);
  set_block_groups(kOp, params, block_groups);
  Outputs outputs = run(device, params, q);
  return {outputs.out, outputs.lse, outputs.attended};
}

}  // namespace qwen_sparse::api
