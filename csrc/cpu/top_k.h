#pragma once

#include "params.h"

namespace qwen_sparse::cpu {

void top_indexes(const TopIndexesParams& params);

}  // namespace qwen_sparse::cpu
