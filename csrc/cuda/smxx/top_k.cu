// Top-k by radix selection: three histograms of the scores' ordered bits (11, 11, 10) fix the k-th highest score, then
// indexes are written in order behind those of the tiles before.
//
// Grid of every kernel: (tiles of 16384 keys, heads), so that few heads still use the whole GPU.
// add_histogram<d>  counts digit d of the scores that have the threshold's digits before d; integer atomics only, whose
//                   result does not depend on order
// count_selected    how many scores of the tile lie above the threshold, and how many are equal to it
// write_selected    sums the counts of the tiles before; a scan over the tile places its indexes
// Each kernel first finds the digit that the histogram of the one before decides, every CTA for itself: reading 8 KiB
// again costs less than another launch.
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/common/launch.h"
#include "cuda/kernels.h"

namespace qwen_sparse::smxx {
namespace {

constexpr int kThreads = 512;
constexpr int kTileKeys = 16384;
constexpr int kItems = 4;  // scores of a thread at once
constexpr int kStepKeys = kThreads * kItems;
constexpr int kMaxHeads = 256;  // of one launch, whose sizes travel as an argument
constexpr int kNumDigits = 3;
constexpr int kNumBins = 1 << 11;
constexpr int kBinsPerThread = kNumBins / kThreads;
constexpr uint32_t kInfinityBits = 0x7f800000;

static_assert(kTileKeys % kStepKeys == 0, "a tile is whole steps");

__host__ __device__ constexpr int digit_shift(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }

// What is known of a head's threshold, the count-th highest score.
struct Threshold {
  uint32_t value;    // its first digits, then zeros
  int32_t num_ties;  // how many of the scores with these digits belong to the `count` highest
};

struct Counts {
  int32_t above, equal;
};

struct Args {
  const float* scores;  // [num_heads, num_keys], as all below from the launch's first head on
  int64_t num_keys, width, num_forced;
  int32_t* indexes;          // [num_heads, width]
  unsigned* histograms;      // [kMaxHeads, kNumDigits, kNumBins]
  Threshold* thresholds;     // [kMaxHeads, kNumDigits]: with digits up to this one
  Counts* tile_counts;       // [kMaxHeads, num_tiles]
  int32_t sizes[kMaxHeads];  // at most num_keys
};

struct Workspace {
  int64_t num_tiles, num_heads;
  unsigned* histograms;
  Threshold* thresholds;
  Counts* tile_counts;

  Workspace(const TopIndexesParams& p, cuda::Arena& arena)
      : num_tiles(cuda::ceil_div<int64_t>(p.num_keys, kTileKeys)),
        num_heads(p.num_heads < kMaxHeads ? p.num_heads : kMaxHeads),
        histograms(arena.take<unsigned>(num_heads * kNumDigits * kNumBins)),
        thresholds(arena.take<Threshold>(num_heads * kNumDigits)),
        tile_counts(arena.take<Counts>(num_heads * num_tiles)) {}
};

// An unsigned number in the order of the scores, equal for equal ones; NaN as -infinity.
__device__ __forceinline__ uint32_t ordered_bits(float score) {
  const uint32_t bits = __float_as_uint(score);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > kInfinityBits) return 0x80000000u - kInfinityBits;
  return (bits >> 31) != 0 ? 0x80000000u - magnitude : 0x80000000u + magnitude;
}

// The scores of a CTA's tile, kStepKeys at a time.
class Tile {
 public:
  __device__ explicit Tile(const Args& args)
      : scores_(args.scores + blockIdx.y * args.num_keys),
        num_forced_(args.num_forced),
        begin_(int64_t{blockIdx.x} * kTileKeys),
        end_(begin_ + kTileKeys < args.num_keys ? begin_ + kTileKeys : args.num_keys) {}

  __device__ int64_t begin() const { return begin_; }
  __device__ int64_t end() const { return end_; }

  // The ordered bits of the keys first, first + kStride, ...; 0, which is less than any score's, past the end. All
  // loads are under way before the first is used.
  template <int kStride>
  __device__ __forceinline__ void load(int64_t first, uint32_t (&scores)[kItems]) const {
    float values[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      values[i] = first + i * kStride < end_ ? __ldg(scores_ + first + i * kStride) : 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t key = first + i * kStride;
      scores[i] = key >= end_ ? 0 : key < num_forced_ ? 0x80000000u + kInfinityBits : ordered_bits(values[i]);
    }
  }

 private:
  const float* scores_;
  int64_t num_forced_, begin_, end_;
};

// The threshold with digits up to `digit`, for all threads; digit < 0: none yet. The head's size must not be 0.
__device__ Threshold find_threshold(const Args& args, int digit) {
  const int head = static_cast<int>(blockIdx.y);
  if (digit < 0) return {0, args.sizes[head]};
  using Scan = cub::BlockScan<int32_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ Threshold result;
  const Threshold before = digit == 0 ? Threshold{0, args.sizes[head]} : args.thresholds[head * kNumDigits + digit - 1];
  // Thread 0 has the highest bins.
  const int first_bin = kNumBins - kBinsPerThread * (static_cast<int>(threadIdx.x) + 1);
  const unsigned* histogram = args.histograms + (head * kNumDigits + digit) * kNumBins + first_bin;
  int32_t bins[kBinsPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    bins[i] = static_cast<int32_t>(histogram[i]);
    sum += bins[i];
  }
  int32_t above;
  Scan(storage).ExclusiveSum(sum, above);
  if (above < before.num_ties && before.num_ties <= above + sum) {
    int bin = kBinsPerThread - 1;
    for (; above + bins[bin] < before.num_ties; --bin) above += bins[bin];
    result = {before.value | static_cast<uint32_t>(first_bin + bin) << digit_shift(digit), before.num_ties - above};
    if (blockIdx.x == 0) args.thresholds[head * kNumDigits + digit] = result;
  }
  __syncthreads();
  return result;
}

template <int kDigit>
__global__ void __launch_bounds__(kThreads) add_histogram(const __grid_constant__ Args args) {
  __shared__ unsigned counts[kNumBins];
  const int head = static_cast<int>(blockIdx.y);
  if (args.sizes[head] == 0) return;
  for (int bin = threadIdx.x; bin < kNumBins; bin += kThreads) counts[bin] = 0;
  const uint32_t value = find_threshold(args, kDigit - 1).value;
  __syncthreads();
  constexpr int kShift = digit_shift(kDigit);
  constexpr int kShiftBefore = kDigit == 0 ? 0 : digit_shift(kDigit - 1);
  constexpr uint32_t kMask = kDigit == 2 ? (1u << 10) - 1 : (1u << 11) - 1;
  const Tile tile(args);
  for (int64_t begin = tile.begin(); begin < tile.end(); begin += kStepKeys) {
    uint32_t scores[kItems];
    tile.load<kThreads>(begin + threadIdx.x, scores);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (kDigit == 0 || scores[i] >> kShiftBefore == value >> kShiftBefore) {
        atomicAdd(&counts[scores[i] >> kShift & kMask], 1u);
      }
    }
  }
  __syncthreads();
  unsigned* histogram = args.histograms + (head * kNumDigits + kDigit) * kNumBins;
  for (int bin = threadIdx.x; bin < kNumBins; bin += kThreads) {
    if (counts[bin] != 0) atomicAdd(&histogram[bin], counts[bin]);
  }
}

// Two counts below 2 ** 31 as one number.
__device__ __forceinline__ unsigned long long packed(int32_t above, int32_t equal) {
  return static_cast<unsigned long long>(above) << 32 | static_cast<unsigned>(equal);
}

__device__ __forceinline__ Counts unpacked(unsigned long long counts) {
  return {static_cast<int32_t>(counts >> 32), static_cast<int32_t>(counts & 0xffffffffu)};
}

__global__ void __launch_bounds__(kThreads) count_selected(const __grid_constant__ Args args) {
  using Reduce = cub::BlockReduce<unsigned long long, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  const int head = static_cast<int>(blockIdx.y);
  if (args.sizes[head] == 0) return;
  const uint32_t value = find_threshold(args, kNumDigits - 1).value;
  const Tile tile(args);
  int32_t above = 0, equal = 0;
  for (int64_t begin = tile.begin(); begin < tile.end(); begin += kStepKeys) {
    uint32_t scores[kItems];
    tile.load<kThreads>(begin + threadIdx.x, scores);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      above += scores[i] > value;
      equal += scores[i] == value;
    }
  }
  const unsigned long long counts = Reduce(storage).Sum(packed(above, equal));
  if (threadIdx.x == 0) args.tile_counts[int64_t{head} * gridDim.x + blockIdx.x] = unpacked(counts);
}

// Counts of the tiles before this CTA's, for all threads.
__device__ Counts counts_before(const Args& args) {
  using Reduce = cub::BlockReduce<unsigned long long, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  __shared__ Counts result;
  const Counts* tiles = args.tile_counts + int64_t{blockIdx.y} * gridDim.x;
  unsigned long long sum = 0;
  for (unsigned tile = threadIdx.x; tile < blockIdx.x; tile += kThreads) {
    sum += packed(tiles[tile].above, tiles[tile].equal);
  }
  sum = Reduce(storage).Sum(sum);
  if (threadIdx.x == 0) result = unpacked(sum);
  __syncthreads();
  return result;
}

__global__ void __launch_bounds__(kThreads) write_selected(const __grid_constant__ Args args) {
  using Scan = cub::BlockScan<unsigned, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  const int head = static_cast<int>(blockIdx.y);
  int32_t* out = args.indexes + head * args.width;
  const int32_t size = args.sizes[head];
  for (int64_t i = size + int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.width; i += gridDim.x * kThreads) {
    out[i] = -1;
  }
  if (size == 0) return;
  const Threshold threshold = args.thresholds[head * kNumDigits + kNumDigits - 1];
  Counts before = counts_before(args);
  const Tile tile(args);
  for (int64_t begin = tile.begin(); begin < tile.end(); begin += kStepKeys) {
    const int64_t first = begin + threadIdx.x * kItems;
    uint32_t scores[kItems];
    tile.load<1>(first, scores);
    unsigned counts = 0;  // above the threshold in the high half, equal to it in the low one
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      counts += scores[i] > threshold.value ? 1u << 16 : scores[i] == threshold.value;
    }
    unsigned preceding, total;
    Scan(storage).ExclusiveSum(counts, preceding, total);
    __syncthreads();
    int32_t above = before.above + static_cast<int32_t>(preceding >> 16);
    int32_t equal = before.equal + static_cast<int32_t>(preceding & 0xffffu);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool is_above = scores[i] > threshold.value, is_equal = scores[i] == threshold.value;
      if (is_above || (is_equal && equal < threshold.num_ties)) {
        out[above + min(equal, threshold.num_ties)] = static_cast<int32_t>(first + i);
      }
      above += is_above;
      equal += is_equal;
    }
    before.above += static_cast<int32_t>(total >> 16);
    before.equal += static_cast<int32_t>(total & 0xffffu);
  }
}

}  // namespace

int64_t top_indexes_workspace(const TopIndexesParams& p) {
  cuda::Arena arena(nullptr);
  Workspace(p, arena);
  return arena.used();
}

void top_indexes(const TopIndexesParams& p, Launch launch) {
  if (p.num_heads == 0 || p.width == 0) return;
  const cuda::DeviceGuard guard(launch.device);
  cuda::Arena arena(p.workspace);
  const Workspace workspace(p, arena);
  for (int64_t first = 0; first < p.num_heads; first += kMaxHeads) {
    const int64_t heads = p.num_heads - first < kMaxHeads ? p.num_heads - first : kMaxHeads;
    Args args{};
    args.scores = p.scores + first * p.num_keys;
    args.num_keys = p.num_keys;
    args.width = p.width;
    args.num_forced = p.num_forced;
    args.indexes = p.indexes + first * p.width;
    args.histograms = workspace.histograms;
    args.thresholds = workspace.thresholds;
    args.tile_counts = workspace.tile_counts;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t size = p.sizes[first + head];
      args.sizes[head] = static_cast<int32_t>(size < p.num_keys ? size : p.num_keys);
    }
    cuda::check(cudaMemsetAsync(args.histograms, 0, heads * kNumDigits * kNumBins * sizeof(unsigned), launch.stream),
                "top_indexes");
    const dim3 grid(static_cast<unsigned>(workspace.num_tiles), static_cast<unsigned>(heads));
    const auto run = [&](auto kernel, const char* name) {
      kernel<<<grid, kThreads, 0, launch.stream>>>(args);
      cuda::check(cudaGetLastError(), name);
    };
    run(add_histogram<0>, "top_indexes add_histogram<0>");
    run(add_histogram<1>, "top_indexes add_histogram<1>");
    run(add_histogram<2>, "top_indexes add_histogram<2>");
    run(count_selected, "top_indexes count_selected");
    run(write_selected, "top_indexes write_selected");
  }
}

}  // namespace qwen_sparse::smxx
