#pragma once

#include <cstdint>

namespace qwen_sparse::cpu {

// For each head, the indexes of its sizes[head] highest scores, ascending, padded with -1 to `width`.
// scores [num_heads, num_keys]: the first num_forced entries count as infinite, NaN as -infinite. Equal scores go to
// the lower index. sizes [num_heads], not negative; indexes [num_heads, width], width >= min(size, num_keys).
void top_indexes(const float* scores, int64_t num_heads, int64_t num_keys, int64_t num_forced, const int64_t* sizes,
                 int64_t width, int32_t* indexes);

}  // namespace qwen_sparse::cpu
