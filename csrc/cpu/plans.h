// How the CPU kernels divide their work; shared by them and by what sizes their scratch memory.
#pragma once

#include "params.h"

namespace qwen_sparse::cpu {

constexpr int64_t kSelectSplit = 4096;              // keys per task of the selection
constexpr int64_t kSelectPartials = 3 * kMaxLastQ;  // floats of workspace per task
constexpr int64_t kDecodeSplit = 1024;              // keys per task of decode
constexpr int64_t kBiasTable = 64;                  // key positions of half a decode tile

struct DecodePlan {
  int64_t num_kv_heads, group_size, rows_per_task, row_blocks, num_splits, num_tasks;
  int64_t floats_per_head;  // m, l, o of each (row, head) pair of one task and kv head
  int64_t bias_table_size;  // floats, 0 without a bias

  explicit DecodePlan(const DecodeParams& p)
      : num_kv_heads(p.shape.num_kv_heads),
        group_size(p.shape.num_heads / p.shape.num_kv_heads),
        rows_per_task(p.shape.seqlen_q < kMaxDecodeRows / group_size ? p.shape.seqlen_q : kMaxDecodeRows / group_size),
        row_blocks((p.shape.seqlen_q + rows_per_task - 1) / rows_per_task),
        num_splits((p.shape.seqlen_k + kDecodeSplit - 1) / kDecodeSplit),
        num_tasks(p.batch * row_blocks * num_splits),
        floats_per_head(rows_per_task * group_size * (p.shape.head_dim + 2)),
        bias_table_size(p.bias.data == nullptr ? 0 : p.shape.head_dim * kBiasTable) {}

  int64_t workspace_size() const { return bias_table_size + num_tasks * num_kv_heads * floats_per_head; }
};

}  // namespace qwen_sparse::cpu
