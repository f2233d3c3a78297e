// Top-k by selection: the k-th highest score is found with a histogram of the scores' leading bits, refined for the
// scores of the decisive bin only; one pass then collects indexes, which come out ascending.
#include "cpu/top_k.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/parallel.h"

namespace qwen_sparse::cpu {
namespace {

constexpr int kDigitBits[] = {11, 11, 10};  // of an ordered score, highest first; 2048 counters stay in L1
constexpr int kMaxDigits = 1 << 11;

constexpr int32_t kInfinityBits = 0x7f800000;

// An unsigned number in the order of the scores, equal for equal ones; NaN as -infinity. All in integers, which the
// compiler vectorises.
uint32_t ordered_bits(float score) {
  int32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const int32_t magnitude = bits & 0x7fffffff;
  const int32_t value = bits < 0 ? -magnitude : magnitude;
  return static_cast<uint32_t>(magnitude > kInfinityBits ? -kInfinityBits : value) ^ 0x80000000u;
}

struct Threshold {
  uint32_t value;    // the count-th highest
  int64_t num_ties;  // how many of the scores equal to it belong to the `count` highest
};

// 0 < count <= num_scores. `candidates` has room for num_scores.
Threshold find_threshold(const uint32_t* scores, int64_t num_scores, int64_t count, uint32_t* candidates) {
  uint32_t value = 0;
  int shift = 32;
  for (const int bits : kDigitBits) {
    shift -= bits;
    const uint32_t mask = (1u << bits) - 1;
    int32_t histogram[kMaxDigits] = {};
    for (int64_t i = 0; i < num_scores; ++i) ++histogram[scores[i] >> shift & mask];
    uint32_t digit = mask;
    for (; histogram[digit] < count; --digit) count -= histogram[digit];
    value |= digit << shift;
    int64_t num_candidates = 0;
    for (int64_t i = 0; num_candidates < histogram[digit]; ++i) {  // no branch on the score: it would be guessed wrong
      const uint32_t score = scores[i];
      candidates[num_candidates] = score;
      num_candidates += (score >> shift & mask) == digit;
    }
    scores = candidates;
    num_scores = num_candidates;
  }
  return {value, count};
}

}  // namespace

void top_indexes(const TopIndexesParams& p) {
  const int64_t num_keys = p.num_keys;
  const auto run_head = [&](int64_t head, std::byte* scratch) {
    const int64_t count = std::min(p.sizes[head], num_keys);
    int32_t* out = p.indexes + head * p.width;
    std::fill(out + count, out + p.width, -1);
    if (count == 0) return;
    auto* ordered = reinterpret_cast<uint32_t*>(scratch);
    for (int64_t i = 0; i < num_keys; ++i) ordered[i] = ordered_bits(p.scores[head * num_keys + i]);
    std::fill(ordered, ordered + std::min(p.num_forced, num_keys),
              ordered_bits(std::numeric_limits<float>::infinity()));
    auto [lowest, num_ties] = find_threshold(ordered, num_keys, count, ordered + num_keys);
    for (int64_t i = 0, taken = 0; taken < count; ++i) {
      out[taken] = static_cast<int32_t>(i);
      taken += ordered[i] >= lowest;
      if (ordered[i] == lowest && --num_ties == 0) ++lowest;
    }
  };
  parallel_tasks(p.num_heads, 2 * num_keys * sizeof(uint32_t), run_head);
}

}  // namespace qwen_sparse::cpu
