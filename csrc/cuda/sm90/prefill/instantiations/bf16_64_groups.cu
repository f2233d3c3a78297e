#include "cuda/sm90/prefill/instantiate.cuh"

template void qwen_sparse::sm90::prefill::launch<qwen_sparse::cuda::BFloat16, 64,
                                                 qwen_sparse::sm90::prefill::GroupTiles>(const Args&, int,
                                                                                         cudaStream_t);
