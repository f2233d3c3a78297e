// The CPU's table of functions: kernels of the chosen instruction set.
#include "backend.h"

#include "cpu/kernels.h"
#include "cpu/plans.h"
#include "cpu/top_k.h"

namespace qwen_sparse::cpu {
namespace {

int64_t select_workspace(const SelectParams& p) {
  const int64_t num_splits = (p.shape.seqlen_k + kSelectSplit - 1) / kSelectSplit;
  return p.shape.num_heads * (num_splits + 1) * kSelectPartials * static_cast<int64_t>(sizeof(float));
}

// The pooled keys.
int64_t select_groups_workspace(const SelectGroupsParams& p) {
  const int64_t num_groups = (p.shape.seqlen_k + kGroupKeys - 1) / kGroupKeys;
  return p.shape.num_kv_heads * num_groups * p.shape.head_dim * (p.dtype == DType::kFloat32 ? 4 : 2);
}

int64_t decode_workspace(const DecodeParams& p) {
  return DecodePlan(p).workspace_size() * static_cast<int64_t>(sizeof(float));
}

template <typename Params>
int64_t no_workspace(const Params&) {
  return 0;
}

void attention(const AttentionParams& p, Launch) {
  if (p.key_set != KeySet::kVerticalSlash) return kernels().attention(p, nullptr);
  const HeadIndexes heads(p);
  kernels().attention(p, heads.views());
}

}  // namespace

const Backend& backend() {
  static const Backend table{
      /*float32_attention=*/true,
      [](const AttentionParams& p) { return kernels().attention_workspace(p); },
      select_workspace,
      select_groups_workspace,
      no_workspace<TopIndexesParams>,
      decode_workspace,
      attention,
      [](const SelectParams& p, Launch) { kernels().select_scores(p); },
      [](const SelectGroupsParams& p, Launch) { kernels().select_groups(p); },
      [](const TopIndexesParams& p, Launch) { top_indexes(p); },
      [](const RotaryParams& p, Launch) { kernels().rotary(p); },
      [](const StoreParams& p, Launch) { kernels().store_kv(p); },
      [](const DequantizeParams& p, Launch) { kernels().dequantize_kv(p); },
      [](const GatherParams& p, Launch) { kernels().gather_kv(p); },
      [](const DecodeParams& p, Launch) { kernels().decode_attention(p); },
  };
  return table;
}

}  // namespace qwen_sparse::cpu
