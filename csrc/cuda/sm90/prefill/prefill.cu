// Prefill attention on Hopper: tensor maps, the order of the work, the instantiation.
#include <algorithm>

#include "cuda/common/types.h"
#include "cuda/kernels.h"
#include "cuda/sm90/prefill/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace qwen_sparse::sm90 {
namespace {

// Of the divisors of num_kv_heads, the most heads whose keys and values take at most 0.6 of L2 together, and their
// query heads: the CTAs that run at the same time walk the keys of few heads in the same order, so that one reads from
// memory and the others from L2.
int heads_per_section(const AttentionShape& shape, int device) {
  const int64_t l2 = cuda::device_attribute(cudaDevAttrL2CacheSize, device);
  const int64_t head_bytes = shape.seqlen_k * shape.head_dim * 2 * 2;
  int64_t kv_heads = shape.num_kv_heads;
  while (kv_heads > 1 && (shape.num_kv_heads % kv_heads != 0 || kv_heads * head_bytes > l2 * 6 / 10)) --kv_heads;
  return static_cast<int>(kv_heads * (shape.num_heads / shape.num_kv_heads));
}

template <typename T, int kHeadDim>
void run(prefill::Args& args, int ctas, cudaStream_t stream) {
  switch (args.common.p.key_set) {
    case KeySet::kAll:
      return prefill::launch<T, kHeadDim, prefill::DenseTiles>(args, ctas, stream);
    case KeySet::kVerticalSlash:
      return prefill::launch<T, kHeadDim, prefill::SparseTiles>(args, ctas, stream);
    case KeySet::kBlockGroups:
      return prefill::launch<T, kHeadDim, prefill::GroupTiles>(args, ctas, stream);
  }
}

}  // namespace

void prefill_attention(const cuda::PrefillArgs& common, int32_t* next_tile, Launch launch) {
  const AttentionParams& p = common.p;
  const AttentionShape& shape = p.shape;
  const int tile_keys = p.key_set == KeySet::kAll ? prefill::kDenseTileKeys : prefill::kSparseTileKeys;
  const auto map = [&](const char* name, const Rows& rows, int64_t num_rows, int64_t num_heads, int box_rows) {
    return tensor_map(name, rows, p.dtype, num_rows, num_heads, shape.head_dim, box_rows);
  };
  prefill::Args args{common};
  const bool dual_chunk = p.chunk_len > 0;
  const Rows* q[cuda::kNumStages] = {dual_chunk ? &p.q_inter : nullptr, dual_chunk ? &p.q_succ : nullptr, &p.q_intra};
  for (int stage = 0; stage < cuda::kNumStages; ++stage) {
    if (q[stage] == nullptr) continue;
    args.q[stage] = map("q", *q[stage], shape.seqlen_q, shape.num_heads, prefill::kTileRows);
  }
  args.k = map("k", p.k, shape.seqlen_k, shape.num_kv_heads, tile_keys);
  args.v = map("v", p.v, shape.seqlen_k, shape.num_kv_heads, tile_keys);
  if (p.key_set == KeySet::kVerticalSlash && p.num_vertical > 0) {
    const Rows k{common.indexes.column_k, shape.head_dim, p.num_vertical * shape.head_dim};
    const Rows v{common.indexes.column_v, shape.head_dim, p.num_vertical * shape.head_dim};
    args.column_k = map("columns of k", k, p.num_vertical, shape.num_heads, tile_keys);
    args.column_v = map("columns of v", v, p.num_vertical, shape.num_heads, tile_keys);
  }
  if (p.key_set == KeySet::kBlockGroups) {
    args.group_k = tensor_map("groups of k", p.k, p.dtype, shape.seqlen_k, shape.num_kv_heads, shape.head_dim,
                              kGroupKeys, /*box_panels=*/1);
    args.group_v = map("groups of v", p.v, shape.seqlen_k, shape.num_kv_heads, kGroupKeys);
  }
  args.next_tile = next_tile;
  args.num_items = static_cast<int32_t>(common.tiles.count * shape.num_heads);
  args.heads_per_section = heads_per_section(shape, launch.device);
  cuda::check(cudaMemsetAsync(next_tile, 0, sizeof(*next_tile), launch.stream), "prefill attention");
  const int ctas = std::min(args.num_items, cuda::device_attribute(cudaDevAttrMultiProcessorCount, launch.device));
  cuda::dispatch_float16_bits(p.dtype, [&](auto type) {
    using T = decltype(type);
    shape.head_dim == 64 ? run<T, 64>(args, ctas, launch.stream) : run<T, 128>(args, ctas, launch.stream);
  });
}

}  // namespace qwen_sparse::sm90
