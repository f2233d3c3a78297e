#include "cuda/sm80/decode/instantiate.cuh"

template void qwen_sparse::sm80::decode::launch_splits<qwen_sparse::cuda::Float16, qwen_sparse::cuda::Float16, 128,
                                                       false>(const Args&, cudaStream_t);
