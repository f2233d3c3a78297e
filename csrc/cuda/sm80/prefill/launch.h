// Host side of the Ampere prefill kernel.
#pragma once

#include "cuda/sm80/prefill/config.h"

namespace qwen_sparse::sm80::prefill {

// Defined for the types, head sizes and kinds of tiles of instantiations/.
template <typename T, int kHeadDim, typename Tiles>
void launch(const Args& args, cudaStream_t stream);

}  // namespace qwen_sparse::sm80::prefill
