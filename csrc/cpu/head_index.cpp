#include "cpu/head_index.h"

#include <algorithm>

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

}  // namespace

HeadIndexes::HeadIndexes(const AttentionParams& params) {
  const int64_t num_heads = params.shape.num_heads;
  runs_.reserve(num_heads);
  covered_.reserve(num_heads);
  for (int64_t head = 0; head < num_heads; ++head) {
    const int32_t* columns = params.vertical_indexes + head * params.num_vertical;
    const int32_t* slashes = params.slash_indexes + head * params.num_slash;
    runs_.push_back(merge_slashes(slashes, count_valid(slashes, params.num_slash)));
    covered_.push_back(coverage_bitmap(runs_.back(), params.shape.seqlen_k));
    views_.push_back({runs_.back().data(), static_cast<int64_t>(runs_.back().size()), columns,
                      count_valid(columns, params.num_vertical), covered_.back().data()});
  }
}

}  // namespace qwen_sparse::cpu
