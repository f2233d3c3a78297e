#include "cuda/sm80/prefill/instantiate.cuh"

template void qwen_sparse::sm80::prefill::launch<qwen_sparse::cuda::Float16, 128, qwen_sparse::sm80::prefill::KeyTiles>(
    const Args&, cudaStream_t);
