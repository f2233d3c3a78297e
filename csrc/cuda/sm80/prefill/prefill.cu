// Prefill attention for sm_80 and later: index structures, the kernel, the count of attended pairs.
#include <algorithm>
#include <cmath>

#include "cuda/common/attention.h"
#include "cuda/common/types.h"
#include "cuda/kernels.h"
#include "cuda/sm80/prefill/launch.h"

namespace qwen_sparse::sm80 {

int64_t attention_workspace(const AttentionParams& p) {
  cuda::Arena arena(nullptr);
  if (p.sparse) cuda::HeadIndexes(p, arena);
  return arena.used();
}

void attention(const AttentionParams& p, Launch launch) {
  if (p.shape.seqlen_q == 0) return;
  const auto check_rows = [](const char* name, const Rows& rows) { cuda::check_alignment("attention", name, rows, 2); };
  check_rows("q", p.q_intra);
  check_rows("k", p.k);
  check_rows("v", p.v);
  if (p.chunk_len > 0) {
    check_rows("q_succ", p.q_succ);
    check_rows("q_inter", p.q_inter);
  }
  const cuda::DeviceGuard guard(launch.device);
  cuda::Arena arena(p.workspace);
  const cuda::HeadIndexes indexes = p.sparse ? cuda::HeadIndexes(p, arena) : cuda::HeadIndexes();
  if (p.sparse) cuda::build_head_indexes(p, indexes, launch.stream);
  const float scale = std::max(std::abs(p.softmax_scale) * cuda::kLog2E, 1e-30f);
  const prefill::Args args{p, scale, p.softmax_scale < 0.0f, indexes, prefill::RowTiles(p)};
  cuda::dispatch_float16_bits(p.dtype, [&](auto type) {
    using T = decltype(type);
    p.shape.head_dim == 64 ? prefill::launch<T, 64>(args, launch.stream) : prefill::launch<T, 128>(args, launch.stream);
  });
  if (p.attended != nullptr) cuda::count_attended(p, indexes, launch.stream);
}

}  // namespace qwen_sparse::sm80
