// Host side of the selection's two passes over the keys.
#pragma once

#include "cuda/sm80/select/config.h"

namespace qwen_sparse::sm80::select {

// Defined for the types and head sizes of instantiations/.
template <typename T, int kHeadDim>
void launch_normalizers(const Args& args, cudaStream_t stream);  // fills split_lse
template <typename T, int kHeadDim>
void launch_scores(const Args& args, cudaStream_t stream);  // fills the scores and overruns, from lse

}  // namespace qwen_sparse::sm80::select
