// Builds the index structures of common/head_index.h, and counts what they attend.
//
// merge_slashes   one CTA per head: lengths of both lists, runs by a prefix sum over run starts
// fill_covered    one thread per word of a head's bitmap: binary search for the first run that reaches it
// find_open       one column of a block per thread
// gather_columns  16 bytes of a column's key or value per thread
// count_attended  one CTA per (64-row block, head): closed form for runs, one term per column; or a population count
// per
//                 word of groups
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/common/head_index.h"

namespace qwen_sparse::cuda {
namespace {

constexpr int kThreads = 256;

// Number of entries before the first that is not in [0, seqlen_k). All threads get the result.
__device__ int32_t valid_length(const int32_t* indexes, int64_t size, int64_t seqlen_k) {
  using Reduce = cub::BlockReduce<int32_t, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  __shared__ int32_t result;
  int32_t first = static_cast<int32_t>(size);
  for (int64_t i = threadIdx.x; i < first; i += kThreads) {
    if (indexes[i] < 0 || indexes[i] >= seqlen_k) first = static_cast<int32_t>(i);
  }
  const int32_t least = Reduce(storage).Reduce(first, [](int32_t a, int32_t b) { return a < b ? a : b; });
  if (threadIdx.x == 0) result = least;
  __syncthreads();
  const int32_t length = result;
  __syncthreads();
  return length;
}

__global__ void __launch_bounds__(kThreads) merge_slashes(AttentionParams p, HeadIndexes indexes) {
  using Scan = cub::BlockScan<int32_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  const int64_t head = blockIdx.x;
  const int32_t* slashes = p.slash_indexes + head * p.num_slash;
  SlashRun* runs = indexes.runs + head * p.num_slash;
  const int32_t num_columns =
      valid_length(p.vertical_indexes + head * p.num_vertical, p.num_vertical, p.shape.seqlen_k);
  const int32_t count = valid_length(slashes, p.num_slash, p.shape.seqlen_k);
  int32_t num_runs = 0;
  for (int32_t base = 0; base < count; base += kThreads) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x);
    const bool valid = i < count;
    const bool starts = valid && (i == 0 || slashes[i] - slashes[i - 1] > kBlockM);
    const bool ends = valid && (i == count - 1 || slashes[i + 1] - slashes[i] > kBlockM);
    int32_t run, starts_here;
    Scan(storage).InclusiveSum(starts ? 1 : 0, run, starts_here);
    run += num_runs - 1;
    if (starts) runs[run].lo = slashes[i];
    if (ends) runs[run].hi = slashes[i];
    num_runs += starts_here;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    indexes.num_runs[head] = num_runs;
    indexes.num_columns[head] = num_columns;
  }
}

__global__ void __launch_bounds__(kThreads) fill_covered(AttentionParams p, HeadIndexes indexes) {
  const int64_t head = blockIdx.y;
  const int64_t word = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (word >= indexes.covered_words) return;
  const SlashRun* runs = indexes.runs + head * p.num_slash;
  const int32_t num_runs = indexes.num_runs[head];
  const int64_t first = word * 32, last = first + 31;
  int32_t low = 0, high = num_runs;  // the first run with hi + 63 >= first
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (runs[middle].hi + kBlockM - 1 >= first) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  uint32_t bits = 0;
  for (int32_t run = low; run < num_runs && runs[run].lo <= last; ++run) {
    const int64_t begin = runs[run].lo > first ? runs[run].lo - first : 0;
    const int64_t end = runs[run].hi + kBlockM - 1 < last ? runs[run].hi + kBlockM - 1 - first : 31;
    if (end >= begin) bits |= (0xffffffffu >> (31 - (end - begin))) << begin;
  }
  indexes.covered[head * indexes.covered_words + word] = bits;
}

__global__ void __launch_bounds__(kThreads) find_open(AttentionParams p, HeadIndexes indexes) {
  const int64_t head = blockIdx.z;
  const int64_t column = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const int32_t block = static_cast<int32_t>((indexes.first_block + blockIdx.x) * kBlockM);
  bool open = false;
  if (column < indexes.num_columns[head]) {
    open = !is_covered(indexes.covered + head * indexes.covered_words, indexes.covered_words, block,
                       p.vertical_indexes[head * p.num_vertical + column]);
  }
  const uint32_t bits = __ballot_sync(0xffffffffu, open);
  const int64_t half = column / 32;  // of a word
  if (threadIdx.x % 32 == 0 && half < 2 * int64_t{indexes.open_words}) {
    const int64_t words = (head * indexes.num_blocks + blockIdx.x) * indexes.open_words;
    reinterpret_cast<uint32_t*>(indexes.open_columns + words)[half] = bits;
  }
}

__global__ void __launch_bounds__(kThreads) gather_columns(AttentionParams p, HeadIndexes indexes) {
  const int64_t head = blockIdx.y;
  const int64_t row_pieces = p.shape.head_dim * 2 / 16;
  const int64_t piece = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t column = piece / (2 * row_pieces);
  if (column >= p.num_vertical) return;
  const bool is_v = piece / row_pieces % 2 == 1;
  const int64_t offset = piece % row_pieces;
  const Rows& rows = is_v ? p.v : p.k;
  const int64_t kv_head = head / (p.shape.num_heads / p.shape.num_kv_heads);
  uint4 x = make_uint4(0, 0, 0, 0);  // behind the last column: weight 0 times a NaN would be a NaN
  if (column < indexes.num_columns[head]) {
    const int64_t key = p.vertical_indexes[head * p.num_vertical + column];
    const char* in = static_cast<const char*>(rows.data) + (key * rows.row_stride + kv_head * rows.head_stride) * 2;
    x = reinterpret_cast<const uint4*>(in)[offset];
  }
  char* out = static_cast<char*>(is_v ? indexes.column_v : indexes.column_k);
  reinterpret_cast<uint4*>(out)[(head * p.num_vertical + column) * row_pieces + offset] = x;
}

// Pairs of the rows [first_row, last_row] with the keys [begin, end) that causality leaves.
__device__ int64_t count_pairs(int64_t first_row, int64_t last_row, int64_t begin, int64_t end, bool causal) {
  if (end <= begin) return 0;
  const int64_t rows = last_row - first_row + 1;
  if (!causal) return rows * (end - begin);
  // Row r sees min(end, r + 1) - begin keys: growing from row `begin` on, constant from row end - 1 on.
  const int64_t growing_first = first_row > begin ? first_row : begin;
  const int64_t growing_last = last_row < end - 1 ? last_row : end - 1;
  int64_t pairs = 0;
  if (growing_last >= growing_first) {
    const int64_t n = growing_last - growing_first + 1;
    pairs += n * (growing_first - begin + 1) + n * (n - 1) / 2;
  }
  const int64_t constant_first = first_row > end ? first_row : end;
  if (last_row >= constant_first) pairs += (last_row - constant_first + 1) * (end - begin);
  return pairs;
}

__global__ void __launch_bounds__(kThreads) count_sparse(AttentionParams p, HeadIndexes indexes) {
  using Reduce = cub::BlockReduce<unsigned long long, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  const int64_t head = blockIdx.y;
  const int64_t past = p.shape.seqlen_k - p.shape.seqlen_q;
  const int64_t block = (floor_div(past, kBlockM) + blockIdx.x) * kBlockM;
  const int64_t first_row = block > past ? block : past;
  const int64_t last_row = (block + kBlockM < p.shape.seqlen_k ? block + kBlockM : p.shape.seqlen_k) - 1;
  const SlashRun* runs = indexes.runs + head * p.num_slash;
  unsigned long long pairs = 0;
  for (int32_t i = threadIdx.x; i < indexes.num_runs[head]; i += kThreads) {
    const int64_t begin = block - runs[i].hi, end = block - runs[i].lo + kBlockM;
    pairs += count_pairs(first_row, last_row, begin > 0 ? begin : 0, end, true);
  }
  const int32_t* columns = p.vertical_indexes + head * p.num_vertical;
  const uint32_t* covered = indexes.covered + head * indexes.covered_words;
  for (int32_t i = threadIdx.x; i < indexes.num_columns[head]; i += kThreads) {
    const int32_t column = columns[i];
    if (column > last_row || is_covered(covered, indexes.covered_words, static_cast<int32_t>(block), column)) continue;
    pairs += last_row - (first_row > column ? first_row : column) + 1;
  }
  const unsigned long long sum = Reduce(storage).Sum(pairs);
  if (threadIdx.x == 0) atomicAdd(reinterpret_cast<unsigned long long*>(p.attended) + head, sum);
}

__global__ void __launch_bounds__(kThreads) count_groups(AttentionParams p, int64_t first_block) {
  using Reduce = cub::BlockReduce<unsigned long long, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  const int64_t head = blockIdx.y;
  const int64_t past = p.shape.seqlen_k - p.shape.seqlen_q;
  const int64_t block = (first_block + blockIdx.x) * kBlockM;
  const int64_t first_row = block > past ? block : past;
  const int64_t last_row = (block + kBlockM < p.shape.seqlen_k ? block + kBlockM : p.shape.seqlen_k) - 1;
  const uint32_t* bitmap = p.block_groups + (head * gridDim.x + blockIdx.x) * p.group_words;
  constexpr int64_t kWordKeys = 32 * kGroupKeys;
  unsigned long long pairs = 0;
  for (int64_t word = threadIdx.x; word < p.group_words && word * kWordKeys <= last_row; word += kThreads) {
    uint32_t bits = bitmap[word];
    if ((word + 1) * kWordKeys <= first_row + 1) {  // every row sees all of its keys
      pairs += __popc(bits) * kGroupKeys * (last_row - first_row + 1);
      continue;
    }
    for (; bits != 0; bits &= bits - 1) {
      const int64_t key = word * kWordKeys + (__ffs(static_cast<int>(bits)) - 1) * kGroupKeys;
      pairs += count_pairs(first_row, last_row, key, key + kGroupKeys, true);
    }
  }
  const unsigned long long sum = Reduce(storage).Sum(pairs);
  if (threadIdx.x == 0) atomicAdd(reinterpret_cast<unsigned long long*>(p.attended) + head, sum);
}

__global__ void count_dense(AttentionParams p) {
  const int64_t head = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (head >= p.shape.num_heads) return;
  const int64_t past = p.shape.seqlen_k - p.shape.seqlen_q;
  int64_t pairs = count_pairs(past, p.shape.seqlen_k - 1, 0, p.shape.seqlen_k, p.causal);
  // Keys at or before p - window, for rows p >= window.
  const int64_t first = past > p.window ? past : p.window;
  if (first < p.shape.seqlen_k) {
    const int64_t n = p.shape.seqlen_k - first;
    pairs -= n * (first - p.window + 1) + n * (n - 1) / 2;
  }
  p.attended[head] = pairs;
}

dim3 grid(int64_t items, int64_t heads) {
  return dim3(static_cast<unsigned>(ceil_div<int64_t>(items, kThreads)), static_cast<unsigned>(heads));
}

}  // namespace

void build_head_indexes(const AttentionParams& p, const HeadIndexes& indexes, cudaStream_t stream) {
  const int64_t heads = p.shape.num_heads;
  merge_slashes<<<dim3(static_cast<unsigned>(heads)), kThreads, 0, stream>>>(p, indexes);
  check(cudaGetLastError(), "merge_slashes");
  fill_covered<<<grid(indexes.covered_words, heads), kThreads, 0, stream>>>(p, indexes);
  check(cudaGetLastError(), "fill_covered");
  if (p.num_vertical == 0) return;
  const dim3 columns(static_cast<unsigned>(indexes.num_blocks),
                     static_cast<unsigned>(ceil_div<int64_t>(p.num_vertical, kThreads)), static_cast<unsigned>(heads));
  find_open<<<columns, kThreads, 0, stream>>>(p, indexes);
  check(cudaGetLastError(), "find_open");
  gather_columns<<<grid(p.num_vertical * 2 * (p.shape.head_dim * 2 / 16), heads), kThreads, 0, stream>>>(p, indexes);
  check(cudaGetLastError(), "gather_columns");
}

void count_attended(const AttentionParams& p, const HeadIndexes& indexes, cudaStream_t stream) {
  if (p.key_set == KeySet::kAll) {
    count_dense<<<dim3(static_cast<unsigned>(ceil_div<int64_t>(p.shape.num_heads, kThreads))), kThreads, 0, stream>>>(
        p);
    return check(cudaGetLastError(), "count_dense");
  }
  const RowBlocks blocks(p.shape);
  const dim3 ctas(static_cast<unsigned>(blocks.count), static_cast<unsigned>(p.shape.num_heads));
  if (p.key_set == KeySet::kBlockGroups) {
    count_groups<<<ctas, kThreads, 0, stream>>>(p, blocks.first);
    return check(cudaGetLastError(), "count_groups");
  }
  count_sparse<<<ctas, kThreads, 0, stream>>>(p, indexes);
  check(cudaGetLastError(), "count_sparse");
}

}  // namespace qwen_sparse::cuda
