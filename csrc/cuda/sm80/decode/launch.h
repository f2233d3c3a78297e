// Host side of the Ampere decode kernels.
#pragma once

#include "cuda/sm80/decode/config.h"

namespace qwen_sparse::sm80::decode {

// Defined for the types, head sizes and caches of instantiations/. C is T or int8_t.
template <typename T, typename C, int kHeadDim, bool kHasBias>
void launch_splits(const Args& args, cudaStream_t stream);

// Merges the splits into p.out and p.lse.
void combine(const Args& args, cudaStream_t stream);

}  // namespace qwen_sparse::sm80::decode
