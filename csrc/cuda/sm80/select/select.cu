// Selection scores for sm_80 and later: two passes over the keys (kernel.cuh), each followed by a small kernel that
// joins what the splits of the keys left.
//
// merge_normalizers  one CTA per head: a row's log-sum-exp over all splits, 16 threads per row
// add_overruns       one thread per diagonal that crosses from one split to the next
#include "cuda/common/ptx.h"
#include "cuda/common/types.h"
#include "cuda/kernels.h"
#include "cuda/sm80/select/launch.h"

namespace qwen_sparse::sm80 {
namespace select {
namespace {

constexpr int kSlices = 16;
constexpr int kOverrunThreads = 256;

__global__ void __launch_bounds__(kRows* kSlices) merge_normalizers(const __grid_constant__ Args args) {
  __shared__ float partial[kSlices][kRows];
  const int row = threadIdx.x % kRows, slice = threadIdx.x / kRows;
  const float* split_lse = args.split_lse + int64_t{blockIdx.x} * args.num_splits * kRows + row;
  float highest = -3.4e38f;
  for (int64_t split = slice; split < args.num_splits; split += kSlices) {
    highest = fmaxf(highest, split_lse[split * kRows]);
  }
  partial[slice][row] = highest;
  __syncthreads();
  for (int i = 0; i < kSlices; ++i) highest = fmaxf(highest, partial[i][row]);
  __syncthreads();
  float sum = 0.0f;
  for (int64_t split = slice; split < args.num_splits; split += kSlices) {
    sum += cuda::ptx::exp2(split_lse[split * kRows] - highest);
  }
  partial[slice][row] = sum;
  __syncthreads();
  if (slice != 0) return;
  for (int i = 1; i < kSlices; ++i) sum += partial[i][row];
  const bool votes = row >= kRows - args.p.shape.seqlen_q;
  args.lse[blockIdx.x * kRows + row] = votes ? highest + log2f(sum) : INFINITY;
}

__global__ void __launch_bounds__(kOverrunThreads) add_overruns(const __grid_constant__ Args args) {
  const int64_t i = int64_t{blockIdx.x} * kOverrunThreads + threadIdx.x;
  const int64_t splits = args.num_splits - 1;  // nothing comes after the last
  const int64_t head = i / kRows / splits, split = i / kRows % splits;
  const int64_t key = (split + 1) * kSplitKeys + i % kRows;  // that the last row meets on the diagonal
  if (head >= args.p.shape.num_heads || key >= args.p.shape.seqlen_k) return;
  args.p.slash_scores[(head + 1) * args.p.shape.seqlen_k - 1 - key] +=
      args.overruns[(head * args.num_splits + split) * kRows + i % kRows];
}

}  // namespace
}  // namespace select

int64_t select_workspace(const SelectParams& p) {
  cuda::Arena arena(nullptr);
  select::Args(p, arena);
  return arena.used();
}

void select_scores(const SelectParams& p, Launch launch) {
  if (p.shape.num_heads == 0 || p.shape.seqlen_k == 0 || p.shape.seqlen_q == 0) return;
  const auto check_rows = [](const char* name, const Rows& rows) {
    cuda::check_alignment("select_vertical_slash", name, rows, 2);
  };
  check_rows("q", p.q_intra);
  check_rows("k", p.k);
  if (p.chunk_len > 0) {
    check_rows("q_succ", p.q_succ);
    check_rows("q_inter", p.q_inter);
  }
  const cuda::DeviceGuard guard(launch.device);
  cuda::Arena arena(p.workspace);
  const select::Args args(p, arena);
  const auto heads = static_cast<unsigned>(p.shape.num_heads);
  cuda::dispatch_float16_bits(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool narrow = p.shape.head_dim == 64;
    narrow ? select::launch_normalizers<T, 64>(args, launch.stream)
           : select::launch_normalizers<T, 128>(args, launch.stream);
    select::merge_normalizers<<<dim3(heads), select::kRows * select::kSlices, 0, launch.stream>>>(args);
    cuda::check(cudaGetLastError(), "select merge_normalizers");
    narrow ? select::launch_scores<T, 64>(args, launch.stream) : select::launch_scores<T, 128>(args, launch.stream);
  });
  if (args.num_splits == 1) return;
  const int64_t overruns = p.shape.num_heads * (args.num_splits - 1) * select::kRows;
  const auto ctas = static_cast<unsigned>(cuda::ceil_div<int64_t>(overruns, select::kOverrunThreads));
  select::add_overruns<<<dim3(ctas), select::kOverrunThreads, 0, launch.stream>>>(args);
  cuda::check(cudaGetLastError(), "select add_overruns");
}

}  // namespace qwen_sparse::sm80
