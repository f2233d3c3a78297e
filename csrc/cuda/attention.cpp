// Prefill attention: index structures, the kernel of the architecture, the count of attended pairs.
#include <algorithm>
#include <cmath>

#include "cuda/arch.h"
#include "cuda/common/attention.h"
#include "cuda/common/prefill.h"
#include "cuda/kernels.h"

namespace qwen_sparse::cuda {
namespace {

// Scratch memory of a call, the same whichever kernel runs.
struct Scratch {
  HeadIndexes indexes;
  int32_t* next_tile;

  explicit Scratch(const AttentionParams& p) {
    Arena arena(p.workspace);
    if (p.key_set == KeySet::kVerticalSlash) indexes = HeadIndexes(p, arena);
    next_tile = arena.take<int32_t>(1);
    bytes = arena.used();
  }
  int64_t bytes;
};

}  // namespace

int64_t attention_workspace(const AttentionParams& p) {
  AttentionParams counted = p;
  counted.workspace = nullptr;
  return Scratch(counted).bytes;
}

void attention(const AttentionParams& p, Launch launch) {
  if (p.shape.seqlen_q == 0) return;
  const auto check_rows = [](const char* name, const Rows& rows) { check_alignment("attention", name, rows, 2); };
  check_rows("q", p.q_intra);
  check_rows("k", p.k);
  check_rows("v", p.v);
  if (p.chunk_len > 0) {
    check_rows("q_succ", p.q_succ);
    check_rows("q_inter", p.q_inter);
  }
  const DeviceGuard guard(launch.device);
  const Scratch scratch(p);
  if (p.key_set == KeySet::kVerticalSlash) build_head_indexes(p, scratch.indexes, launch.stream);
  const float scale = std::max(std::abs(p.softmax_scale) * kLog2E, 1e-30f);
  const auto window = static_cast<int32_t>(std::min<int64_t>(p.window, INT32_MAX / 2));
  const PrefillArgs args{p, scale, p.softmax_scale < 0.0f, window, scratch.indexes, RowTiles(p), RowBlocks(p.shape)};
  const bool on_hopper = uses_sm90(launch.device) && p.shape.seqlen_k > 0;  // there are no tensor maps of no keys
#ifdef QWEN_SPARSE_SM90
  if (on_hopper) sm90::prefill_attention(args, scratch.next_tile, launch);
#endif
  if (!on_hopper) sm80::prefill_attention(args, launch);
  if (p.attended != nullptr) count_attended(p, scratch.indexes, launch.stream);
}

}  // namespace qwen_sparse::cuda
