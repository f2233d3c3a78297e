#include "cuda/sm80/decode/instantiate.cuh"

template void qwen_sparse::sm80::decode::launch_splits<qwen_sparse::cuda::Float16, qwen_sparse::cuda::Float16, 64,
                                                       false>(const Args&, cudaStream_t);
