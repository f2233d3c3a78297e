// Selection: of vertical and slash indexes, scores by the kernel and then top-k; of block groups, in the kernel.
#include <algorithm>

#include "api/ops.h"

namespace qwen_sparse::api {
namespace {

Rows last_rows(const Tensor& q, int64_t rows) {
  Rows result = rows_of(q);
  const int64_t skipped = q.size(0) - rows;
  result.data = static_cast<const char*>(result.data) + skipped * result.row_stride * q.element_size();
  return result;
}

void check_sizes(const char* op, const char* name, const std::vector<int64_t>& sizes, int64_t num_heads) {
  check(static_cast<int64_t>(sizes.size()) == num_heads, op, name, " must hold num_heads = ", num_heads, " sizes, got ",
        sizes.size());
  for (const int64_t size : sizes) check(size >= 0, op, name, " must not be negative, got ", size);
}

struct Scores {
  Tensor vertical, slash;  // float32 [num_heads, seqlen_k]
};

Scores score(const char* op, const Device& device, const Tensor& q, const Tensor& k, int64_t last_q,
             double softmax_scale, const OptionalTensor& q_succ, const OptionalTensor& q_inter,
             std::optional<int64_t> chunk_len) {
  SelectParams params;
  params.shape = check_qkv(op, "q", q, k, nullptr);
  AttentionShape& shape = params.shape;
  check(last_q > 0 && last_q <= kMaxLastQ, op, "last_q must lie in [1, ", kMaxLastQ, "], got ", last_q);
  check(shape.seqlen_q > 0, op, "q must have at least one row, got shape ", shape_of(q));
  shape.seqlen_q = std::min(last_q, shape.seqlen_q);
  check(shape.seqlen_k >= shape.seqlen_q, op, "k must have at least as many rows as vote (", shape.seqlen_q, "), got ",
        shape.seqlen_k);
  check_together(op, "q_succ", q_succ.has_value(), "chunk_len", chunk_len.has_value());
  check_together(op, "q_inter", q_inter.has_value(), "chunk_len", chunk_len.has_value());

  params.dtype = check_attention_dtype(op, "q", q, device);
  params.q_intra = last_rows(q, shape.seqlen_q);
  params.k = rows_of(k);
  params.softmax_scale = check_softmax_scale(op, softmax_scale);
  if (chunk_len.has_value()) {
    params.chunk_len = check_chunk_len(op, *chunk_len);
    for (const auto& [name, rotated] : {std::pair{"q_succ", &*q_succ}, std::pair{"q_inter", &*q_inter}}) {
      check_shape(op, name, *rotated, {{"rows"}, {"num_heads", shape.num_heads}, {"head_dim", shape.head_dim}});
      check_dtype(op, name, *rotated, q.scalar_type());
      check(rotated->size(0) >= shape.seqlen_q, op, name, " must have at least as many rows as vote (", shape.seqlen_q,
            "), got ", rotated->size(0));
    }
    params.q_succ = last_rows(*q_succ, shape.seqlen_q);
    params.q_inter = last_rows(*q_inter, shape.seqlen_q);
  }

  Scores scores{empty(q, {shape.num_heads, shape.seqlen_k}, ScalarType::Float),
                empty(q, {shape.num_heads, shape.seqlen_k}, ScalarType::Float)};
  params.vertical_scores = static_cast<float*>(scores.vertical.mutable_data_ptr());
  params.slash_scores = static_cast<float*>(scores.slash.mutable_data_ptr());
  Workspace workspace(q, device.backend().select_workspace(params));
  workspace.attach(params);
  device.backend().select_scores(params, device.launch());
  return scores;
}

}  // namespace

Tensor top_indexes(const Tensor& scores, const std::vector<int64_t>& sizes, int64_t num_forced) {
  constexpr const char* kTopIndexes = "top_indexes";
  const Device device = check_device(kTopIndexes, {{"scores", scores}});
  check_shape(kTopIndexes, "scores", scores, {{"num_heads"}, {"num_keys"}});
  check_dtype(kTopIndexes, "scores", scores, ScalarType::Float);
  check(scores.is_contiguous(), kTopIndexes, "scores must be contiguous");
  check(num_forced >= 0, kTopIndexes, "num_forced must not be negative, got ", num_forced);
  const int64_t num_heads = scores.size(0), num_keys = scores.size(1);
  check(num_heads > 0, kTopIndexes, "scores must have at least one head, got shape ", shape_of(scores));
  check_sizes(kTopIndexes, "sizes", sizes, num_heads);
  const int64_t width = std::min(*std::max_element(sizes.begin(), sizes.end()), num_keys);
  Tensor indexes = empty(scores, {num_heads, width}, ScalarType::Int);
  TopIndexesParams params;
  params.scores = static_cast<const float*>(scores.const_data_ptr());
  params.num_heads = num_heads;
  params.num_keys = num_keys;
  params.num_forced = num_forced;
  params.sizes = sizes.data();
  params.width = width;
  params.indexes = static_cast<int32_t*>(indexes.mutable_data_ptr());
  Workspace workspace(scores, device.backend().top_indexes_workspace(params));
  workspace.attach(params);
  device.backend().top_indexes(params, device.launch());
  return indexes;
}

std::tuple<Tensor, Tensor> vertical_slash_scores(const Tensor& q, const Tensor& k, int64_t last_q, double softmax_scale,
                                                 const OptionalTensor& q_succ, const OptionalTensor& q_inter,
                                                 std::optional<int64_t> chunk_len) {
  constexpr const char* kOp = "vertical_slash_scores";
  const Device device = check_device(kOp, {{"q", q}, {"k", k}, {"q_succ", q_succ}, {"q_inter", q_inter}});
  Scores scores = score(kOp, device, q, k, last_q, softmax_scale, q_succ, q_inter, chunk_len);
  return {scores.vertical, scores.slash};
}

std::tuple<Tensor, Tensor> select_vertical_slash(const Tensor& q, const Tensor& k,
                                                 const std::vector<int64_t>& vertical_size,
                                                 const std::vector<int64_t>& slash_size, int64_t last_q,
                                                 double softmax_scale, const OptionalTensor& q_succ,
                                                 const OptionalTensor& q_inter, std::optional<int64_t> chunk_len) {
  constexpr const char* kOp = "select_vertical_slash";
  const Device device = check_device(kOp, {{"q", q}, {"k", k}, {"q_succ", q_succ}, {"q_inter", q_inter}});
  const int64_t num_heads = check_qkv(kOp, "q", q, k, nullptr).num_heads;
  check_sizes(kOp, "vertical_size", vertical_size, num_heads);
  check_sizes(kOp, "slash_size", slash_size, num_heads);
  const Scores scores = score(kOp, device, q, k, last_q, softmax_scale, q_succ, q_inter, chunk_len);
  return {top_indexes(scores.vertical, vertical_size, kNumForcedColumns),
          top_indexes(scores.slash, slash_size, kNumForcedDistances)};
}

std::tuple<Tensor, Tensor> select_block_groups(const Tensor& q, const Tensor& k, const Tensor& thresholds,
                                               double softmax_scale, const OptionalTensor& q_succ,
                                               const OptionalTensor& q_inter, std::optional<int64_t> chunk_len) {
  constexpr const char* kOp = "select_block_groups";
  const Device device =
      check_device(kOp, {{"q", q}, {"k", k}, {"thresholds", thresholds}, {"q_succ", q_succ}, {"q_inter", q_inter}});
  SelectGroupsParams params;
  params.shape = check_qkv(kOp, "q", q, k, nullptr);
  const AttentionShape& shape = params.shape;
  check(shape.seqlen_k >= shape.seqlen_q, kOp, "k must have at least as many rows as q (", shape.seqlen_q, "), got ",
        shape.seqlen_k);
  check_together(kOp, "q_succ", q_succ.has_value(), "chunk_len", chunk_len.has_value());
  check_together(kOp, "q_inter", q_inter.has_value(), "chunk_len", chunk_len.has_value());
  params.dtype = check_attention_dtype(kOp, "q", q, device);
  params.q_intra = rows_of(q);
  params.k = rows_of(k);
  params.softmax_scale = check_softmax_scale(kOp, softmax_scale);
  if (chunk_len.has_value()) {
    params.chunk_len = check_chunk_len(kOp, *chunk_len);
    for (const auto& [name, rotated] : {std::pair{"q_succ", &*q_succ}, std::pair{"q_inter", &*q_inter}}) {
      check_shape(kOp, name, *rotated,
                  {{"seqlen_q", shape.seqlen_q}, {"num_heads", shape.num_heads}, {"head_dim", shape.head_dim}});
      check_dtype(kOp, name, *rotated, q.scalar_type());
    }
    params.q_succ = rows_of(*q_succ);
    params.q_inter = rows_of(*q_inter);
  }
  const int64_t num_blocks = RowBlocks(shape).count;
  check_shape(kOp, "thresholds", thresholds, {{"num_heads", shape.num_heads}, {"num_blocks", num_blocks}});
  check_dtype(kOp, "thresholds", thresholds, ScalarType::Float);
  check(thresholds.is_contiguous(), kOp, "thresholds must be contiguous");
  params.thresholds = static_cast<const float*>(thresholds.const_data_ptr());
  params.group_words = group_words(shape.seqlen_k);

  Tensor block_groups = empty(q, {shape.num_heads, num_blocks, params.group_words}, ScalarType::Int);
  Tensor kept = empty(q, {shape.num_heads, num_blocks}, ScalarType::Float);
  if (num_blocks == 0) return {block_groups, kept};
  params.block_groups = static_cast<uint32_t*>(block_groups.mutable_data_ptr());
  params.kept = static_cast<float*>(kept.mutable_data_ptr());
  Workspace workspace(q, device.backend().select_groups_workspace(params));
  workspace.attach(params);
  device.backend().select_groups(params, device.launch());
  return {block_groups, kept};
}

}  // namespace qwen_sparse::api
