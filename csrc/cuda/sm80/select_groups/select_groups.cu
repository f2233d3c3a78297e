// Selection of block groups for sm_80 and later: pooled rows and keys, then two passes over them (kernel.cuh), each
// followed by a small kernel that joins what the splits of the keys left.
//
// pool               8 channels of a mean per thread
// merge_normalizers  one thread per pooled row: its log-sum-exp over all splits
// merge_kept         one thread per block
#include "cuda/common/ptx.h"
#include "cuda/common/types.h"
#include "cuda/common/vector.h"
#include "cuda/kernels.h"
#include "cuda/sm80/select_groups/launch.h"

namespace qwen_sparse::sm80 {
namespace select_groups {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 8;  // channels of 16 bytes

// The means of every 16 rows, [num_heads, num_groups, head_dim]; zeros where a group has no rows. `skipped`: rows of
// the first group that are not there.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pool(Rows rows, int64_t num_rows, int64_t skipped, int64_t num_groups, int head_dim, T* out) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int pieces = head_dim / kPiece;
  const int64_t group = thread / pieces, head = blockIdx.y;
  if (group >= num_groups) return;
  const auto channel = static_cast<int>(thread % pieces) * kPiece;
  const int64_t first = group * kGroupKeys - skipped;
  const T* in = static_cast<const T*>(rows.data) + head * rows.head_stride + channel;
  float sum[kPiece] = {};
  int count = 0;
#pragma unroll 8
  for (int i = 0; i < kGroupRows; ++i) {
    const int64_t row = first + i;
    if (row < 0 || row >= num_rows) continue;
    float values[kPiece];
    cuda::to_floats(cuda::Vector<T, kPiece>::load(in + row * rows.row_stride, true), values);
#pragma unroll
    for (int c = 0; c < kPiece; ++c) sum[c] += values[c];
    ++count;
  }
  const float factor = count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
#pragma unroll
  for (int c = 0; c < kPiece; ++c) sum[c] *= factor;
  cuda::from_floats<T>(sum).store(out + (head * num_groups + group) * head_dim + channel, true);
}

template <typename T>
void launch_pool(const Rows& rows, int64_t num_rows, int64_t num_heads, int64_t skipped, int64_t num_groups,
                 int64_t head_dim, void* out, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(cuda::ceil_div<int64_t>(num_groups * head_dim / kPiece, kThreads)),
                  static_cast<unsigned>(num_heads));
  pool<T><<<grid, kThreads, 0, stream>>>(rows, num_rows, skipped, num_groups, static_cast<int>(head_dim),
                                         static_cast<T*>(out));
  cuda::check(cudaGetLastError(), "select_groups pool");
}

__global__ void __launch_bounds__(kThreads) merge_normalizers(const __grid_constant__ Args args) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t tile_of_all = i / kRows;
  if (tile_of_all >= args.p.shape.num_heads * args.num_tiles) return;
  const auto row = static_cast<int>(i % kRows), tile = static_cast<int>(tile_of_all % args.num_tiles);
  const int splits = args.tile_splits(tile);
  const float* split_lse = args.split_lse + tile_of_all * args.num_splits * kRows + row;
  float highest = -3.4e38f, sum = 0.0f;
  for (int split = 0; split < splits; ++split) highest = fmaxf(highest, split_lse[split * kRows]);
  for (int split = 0; split < splits; ++split) sum += cuda::ptx::exp2(split_lse[split * kRows] - highest);
  const int32_t quarter = args.tile_quarter(tile) + row, block = row / kQuarters * kQuarters + args.tile_quarter(tile);
  const int32_t first = max(block, args.first_quarter()), end = min(block + kQuarters, args.end_quarter());
  const bool counts = quarter >= first && quarter < end;
  args.lse[i] = counts ? highest + log2f(sum * static_cast<float>(end - first)) : INFINITY;
}

__global__ void __launch_bounds__(kThreads) merge_kept(const __grid_constant__ Args args) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t head = i / args.blocks.count, block = i % args.blocks.count;
  if (head >= args.p.shape.num_heads) return;
  const auto tile = static_cast<int>(block / kTileBlocks);
  const float* split_kept =
      args.split_kept + (head * args.num_tiles + tile) * args.num_splits * kTileBlocks + block % kTileBlocks;
  float kept = 0.0f;
  for (int split = 0; split < args.tile_splits(tile); ++split) kept += split_kept[split * kTileBlocks];
  args.p.kept[i] = kept;
}

dim3 grid(int64_t items) { return dim3(static_cast<unsigned>(cuda::ceil_div<int64_t>(items, kThreads))); }

template <typename T, int kHeadDim>
void run(const Args& args, cudaStream_t stream) {
  const AttentionShape& shape = args.p.shape;
  launch_pool<T>(args.p.k, shape.seqlen_k, shape.num_kv_heads, 0, args.num_groups, kHeadDim, args.pooled_k, stream);
  const Rows* rotations[3] = {&args.p.q_intra, &args.p.q_succ, &args.p.q_inter};
  for (int i = 0; i < args.num_rotations; ++i) {
    launch_pool<T>(*rotations[i], shape.seqlen_q, shape.num_heads,
                   shape.seqlen_k - shape.seqlen_q - args.blocks.first * kBlockM, args.blocks.count * kQuarters,
                   kHeadDim, args.pooled_q[i], stream);
  }
  launch_normalizers<T, kHeadDim>(args, stream);
  merge_normalizers<<<grid(shape.num_heads * args.num_tiles * kRows), kThreads, 0, stream>>>(args);
  cuda::check(cudaGetLastError(), "select_groups merge_normalizers");
  launch_shares<T, kHeadDim>(args, stream);
  merge_kept<<<grid(shape.num_heads * args.blocks.count), kThreads, 0, stream>>>(args);
  cuda::check(cudaGetLastError(), "select_groups merge_kept");
}

}  // namespace
}  // namespace select_groups

int64_t select_block_groups_workspace(const SelectGroupsParams& p) {
  cuda::Arena arena(nullptr);
  select_groups::Args(p, arena);
  return arena.used();
}

void select_block_groups(const SelectGroupsParams& p, Launch launch) {
  if (p.shape.num_heads == 0 || p.shape.seqlen_q == 0) return;
  const auto check_rows = [](const char* name, const Rows& rows) {
    cuda::check_alignment("select_block_groups", name, rows, 2);
  };
  check_rows("q", p.q_intra);
  check_rows("k", p.k);
  if (p.chunk_len > 0) {
    check_rows("q_succ", p.q_succ);
    check_rows("q_inter", p.q_inter);
  }
  const cuda::DeviceGuard guard(launch.device);
  cuda::Arena arena(p.workspace);
  const select_groups::Args args(p, arena);
  // Words behind what a block sees.
  const int64_t words = p.shape.num_heads * args.blocks.count * p.group_words;
  cuda::check(cudaMemsetAsync(p.block_groups, 0, words * sizeof(uint32_t), launch.stream), "select_groups");
  cuda::dispatch_float16_bits(p.dtype, [&](auto type) {
    using T = decltype(type);
    p.shape.head_dim == 64 ? select_groups::run<T, 64>(args, launch.stream)
                           : select_groups::run<T, 128>(args, launch.stream);
  });
}

}  // namespace qwen_sparse::sm80
