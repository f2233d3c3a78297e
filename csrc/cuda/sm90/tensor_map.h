// Tensor maps: what the copy engine (TMA) needs to know of a tensor.
#pragma once

#include <cuda.h>

#include "cuda/common/launch.h"

namespace qwen_sparse::sm90 {

// A map of [num_rows, num_heads, head_dim] 16-bit elements for boxes of `box_rows` rows of one head, which arrive in
// shared memory as panels of 64 columns (wgmma.h). Coordinates: column within a panel (0), row, panel (0), head. Rows
// outside of [0, num_rows) arrive as zeros. `box_panels`: of a box, 0 for all. Throws std::runtime_error if the driver
// does not take it.
CUtensorMap tensor_map(const char* name, const Rows& rows, DType dtype, int64_t num_rows, int64_t num_heads,
                       int64_t head_dim, int box_rows, int box_panels = 0);

}  // namespace qwen_sparse::sm90
