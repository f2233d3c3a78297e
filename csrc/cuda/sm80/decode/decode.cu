// Decode attention for sm_80 and later: how the work is divided, the kernel over splits of the keys, their merging.
//
// Nothing here depends on what lies on the device, so a call can be captured in a CUDA graph and replayed with other
// lengths and pages.
#include <algorithm>

#include "cuda/common/types.h"
#include "cuda/kernels.h"
#include "cuda/sm80/decode/launch.h"

namespace qwen_sparse::sm80 {
namespace {

using decode::Args;

// The most splits of each task, whatever the device.
int64_t max_splits(const DecodeParams& p) {
  const int64_t most_tiles = cuda::ceil_div<int64_t>(p.shape.seqlen_k, decode::kMinSplitTiles * decode::kTileKeys);
  const int64_t most_ctas = decode::kMaxCtas / std::max<int64_t>(p.batch * p.shape.num_kv_heads, 1);
  return std::max<int64_t>(1, std::min({most_tiles, most_ctas, int64_t{decode::kMaxSplits}}));
}

// CTAs run in waves of `slots`, each over a split's tiles one after the other; the fewest splits that need at most 1 %
// more steps than the best choice would. 2^20 keys of 4 kv heads on 132 SMs: 99 splits, three CTAs on every SM.
int64_t choose_splits(int64_t tasks, int64_t tiles, int64_t slots, int64_t most) {
  const auto steps = [&](int64_t splits) {
    return cuda::ceil_div(tasks * splits, slots) * cuda::ceil_div(tiles, splits);
  };
  int64_t best = steps(1);
  for (int64_t splits = 2; splits <= most; ++splits) best = std::min(best, steps(splits));
  int64_t splits = 1;
  while (steps(splits) * 100 > best * 101) ++splits;
  return splits;
}

void take_partials(const DecodeParams& p, int64_t num_splits, cuda::Arena& arena, Args& args) {
  const int64_t partials = p.batch * p.shape.seqlen_q * p.shape.num_heads * num_splits;
  args.partial_lse = arena.take<float>(partials);
  args.partial_out = arena.take<float>(partials * p.shape.head_dim);
}

template <typename T, typename C, int kHeadDim, bool kHasBias>
void run(Args& args, Launch launch) {
  using Shared = decode::SharedMemory<C, kHeadDim, kHasBias>;
  const DecodeParams& p = args.p;
  const int limit = cuda::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, launch.device);
  constexpr int kTileRows = decode::kTileRows<C>;
  args.row_tiles = std::min(cuda::ceil_div(args.num_rows, kTileRows), decode::kMaxRowTiles);
  while (args.row_tiles > 1 && Shared::bytes(args.row_tiles) > limit) --args.row_tiles;
  args.row_blocks = cuda::ceil_div(args.num_rows, args.row_tiles * kTileRows);

  constexpr int kReserved = 1024;  // by the system, of each CTA's shared memory
  const int per_sm = cuda::device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, launch.device);
  const int ctas_per_sm = std::min(per_sm / (Shared::bytes(args.row_tiles) + kReserved), decode::kCtasPerSm);
  const int64_t slots =
      int64_t{cuda::device_attribute(cudaDevAttrMultiProcessorCount, launch.device)} * std::max(ctas_per_sm, 1);
  const int64_t tasks = p.batch * p.shape.num_kv_heads * args.row_blocks;
  const int64_t tiles = cuda::ceil_div<int64_t>(p.shape.seqlen_k, decode::kTileKeys);
  args.num_splits = static_cast<int32_t>(choose_splits(tasks, tiles, slots, max_splits(p)));
  cuda::Arena arena(p.workspace);
  take_partials(p, args.num_splits, arena, args);
  decode::launch_splits<T, C, kHeadDim, kHasBias>(args, launch.stream);
  decode::combine(args, launch.stream);
}

template <typename T, int kHeadDim>
void run(Args& args, Launch launch) {
  if (args.p.cache_dtype != DType::kInt8) return run<T, T, kHeadDim, false>(args, launch);
  args.p.bias.data == nullptr ? run<T, int8_t, kHeadDim, false>(args, launch)
                              : run<T, int8_t, kHeadDim, true>(args, launch);
}

}  // namespace

int64_t decode_workspace(const DecodeParams& p) {
  cuda::Arena arena(nullptr);
  Args args;
  take_partials(p, max_splits(p), arena, args);
  return arena.used();
}

void decode_attention(const DecodeParams& p, Launch launch) {
  const cuda::DeviceGuard guard(launch.device);
  if (p.batch * p.shape.seqlen_q * p.shape.num_heads == 0) return;
  const auto check_rows = [](const char* name, const Rows& q) {
    cuda::check_alignment("decode_attention", name, q, 2);
  };
  check_rows("q", p.q_intra);
  if (p.chunk_len > 0) {
    check_rows("q_succ", p.q_succ);
    check_rows("q_inter", p.q_inter);
  }
  const int64_t cache_bytes = p.cache_dtype == DType::kInt8 ? 1 : 2;
  cuda::check_alignment("decode_attention", "k_cache", p.k, cache_bytes);
  cuda::check_alignment("decode_attention", "v_cache", p.v, cache_bytes);

  // positions of keys, rounded up to a tile, are 32-bit
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(std::min<int64_t>(x, INT32_MAX - 2 * 4096)); };
  Args args;
  args.p = p;
  args.capacity = narrow(p.shape.seqlen_k);
  args.group_size = static_cast<int32_t>(p.shape.num_heads / p.shape.num_kv_heads);
  args.num_rows = static_cast<int32_t>(p.shape.seqlen_q * args.group_size);
  args.page_size = narrow(p.page_size);
  args.chunk_len = p.chunk_len > 0 ? narrow(p.chunk_len) : INT32_MAX;
  cuda::dispatch_float16_bits(p.dtype, [&](auto type) {
    using T = decltype(type);
    p.shape.head_dim == 64 ? run<T, 64>(args, launch) : run<T, 128>(args, launch);
  });
}

}  // namespace qwen_sparse::sm80
