#include "cpu/top_k.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/parallel.h"

namespace qwen_sparse::cpu {

void top_indexes(float* scores, int64_t num_heads, int64_t num_keys, int64_t num_forced, const int64_t* sizes,
                 int64_t width, int32_t* indexes) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto run_head = [&](int64_t head, std::byte* scratch) {
    float* score = scores + head * num_keys;
    std::fill(score, score + std::min(num_forced, num_keys), kInfinity);
    std::replace_if(score, score + num_keys, [](float x) { return std::isnan(x); }, -kInfinity);
    auto* order = reinterpret_cast<int32_t*>(scratch);
    std::iota(order, order + num_keys, 0);
    const int64_t count = std::min(sizes[head], num_keys);
    std::nth_element(order, order + count, order + num_keys,
                     [score](int32_t a, int32_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; });
    std::sort(order, order + count);
    int32_t* out = indexes + head * width;
    std::copy(order, order + count, out);
    std::fill(out + count, out + width, -1);
  };
  parallel_tasks(num_heads, num_keys * sizeof(int32_t), run_head);
}

}  // namespace qwen_sparse::cpu
