#include "cpu/head_index.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace qwen_sparse::cpu {
namespace {

int64_t count_valid(const int32_t* indexes, int64_t size) { return std::find(indexes, indexes + size, -1) - indexes; }

std::vector<SlashRun> merge_slashes(const int32_t* slashes, int64_t count) {
  std::vector<SlashRun> runs;
  for (int64_t i = count - 1; i >= 0; --i) {
    if (!runs.empty() && runs.back().lo - slashes[i] <= kBlockM) {
      runs.back().lo = slashes[i];
    } else {
      runs.push_back({slashes[i], slashes[i]});
    }
  }
  return runs;
}

std::vector<uint64_t> coverage_bitmap(const std::vector<SlashRun>& runs, int64_t seqlen_k) {
  const int64_t num_bits = seqlen_k + kBlockM;
  std::vector<uint64_t> bits((num_bits + 63) / 64, 0);
  for (const SlashRun& run : runs) {
    const int64_t end = std::min(run.hi + kBlockM, num_bits);
    for (int64_t d = run.lo; d < end;) {
      const int64_t in_word = d % 64;
      const int64_t count = std::min<int64_t>(64 - in_word, end - d);
      bits[d / 64] |= (~uint64_t{0} >> (64 - count)) << in_word;
      d += count;
    }
  }
  return bits;
}

int64_t bytes_per_element(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void gather_rows(const Rows& rows, int64_t head, const int32_t* indexes, int64_t count, int64_t head_dim,
                 int64_t element_bytes, std::byte* out) {
  const std::byte* first = static_cast<const std::byte*>(rows.data) + head * rows.head_stride * element_bytes;
  const int64_t row_bytes = head_dim * element_bytes;
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(out + i * row_bytes, first + indexes[i] * rows.row_stride * element_bytes, row_bytes);
  }
}

}  // namespace

HeadIndexes::HeadIndexes(const AttentionParams& params) {
  const int64_t num_heads = params.shape.num_heads, head_dim = params.shape.head_dim;
  const int64_t element_bytes = bytes_per_element(params.dtype);
  runs_.resize(num_heads);
  covered_.resize(num_heads);
  column_kv_.resize(num_heads);
  views_.resize(num_heads);
  for (int64_t head = 0; head < num_heads; ++head) {  // allocated here, where a failure can still be thrown
    const int32_t* columns = params.vertical_indexes + head * params.num_vertical;
    const int32_t* slashes = params.slash_indexes + head * params.num_slash;
    const int64_t num_columns = count_valid(columns, params.num_vertical);
    const int64_t bytes = num_columns * head_dim * element_bytes;
    runs_[head] = merge_slashes(slashes, count_valid(slashes, params.num_slash));
    covered_[head] = coverage_bitmap(runs_[head], params.shape.seqlen_k);
    column_kv_[head].reset(new std::byte[2 * bytes]);
    views_[head] = {runs_[head].data(),
                    static_cast<int64_t>(runs_[head].size()),
                    columns,
                    num_columns,
                    covered_[head].data(),
                    column_kv_[head].get(),
                    column_kv_[head].get() + bytes};
  }
  parallel_tasks(num_heads, 0, [&](int64_t head, std::byte*) {
    const HeadIndexView& view = views_[head];
    const int64_t kv_head = head / (num_heads / params.shape.num_kv_heads);
    std::byte* k = column_kv_[head].get();
    std::byte* v = k + view.num_columns * head_dim * element_bytes;
    gather_rows(params.k, kv_head, view.columns, view.num_columns, head_dim, element_bytes, k);
    gather_rows(params.v, kv_head, view.columns, view.num_columns, head_dim, element_bytes, v);
  });
}

}  // namespace qwen_sparse::cpu
