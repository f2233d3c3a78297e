#include "cuda/sm80/prefill/instantiate.cuh"

template void qwen_sparse::sm80::prefill::launch<qwen_sparse::cuda::BFloat16, 128,
                                                 qwen_sparse::sm80::prefill::GroupTiles>(const Args&, cudaStream_t);
