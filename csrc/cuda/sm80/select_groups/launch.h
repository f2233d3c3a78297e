// Host side of the kernels of kernel.cuh.
#pragma once

#include "cuda/sm80/select_groups/config.h"

namespace qwen_sparse::sm80::select_groups {

// Defined for the types and head sizes of instantiations/.
template <typename T, int kHeadDim>
void launch_normalizers(const Args& args, cudaStream_t stream);

template <typename T, int kHeadDim>
void launch_shares(const Args& args, cudaStream_t stream);

}  // namespace qwen_sparse::sm80::select_groups
