// Host side of the Hopper prefill kernel.
#pragma once

#include "cuda/sm90/prefill/config.h"

namespace qwen_sparse::sm90::prefill {

// Defined for the types, head sizes and kinds of tiles of instantiations/. `ctas` is the number of persistent CTAs.
template <typename T, int kHeadDim, typename Tiles>
void launch(const Args& args, int ctas, cudaStream_t stream);

}  // namespace qwen_sparse::sm90::prefill
