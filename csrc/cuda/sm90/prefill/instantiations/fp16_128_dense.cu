#include "cuda/sm90/prefill/instantiate.cuh"

template void qwen_sparse::sm90::prefill::launch<qwen_sparse::cuda::Float16, 128,
                                                 qwen_sparse::sm90::prefill::DenseTiles>(const Args&, int,
                                                                                         cudaStream_t);
