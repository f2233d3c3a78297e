#include "cuda/sm80/decode/instantiate.cuh"

template void qwen_sparse::sm80::decode::launch_splits<qwen_sparse::cuda::BFloat16, int8_t, 128, false>(const Args&,
                                                                                                        cudaStream_t);
template void qwen_sparse::sm80::decode::launch_splits<qwen_sparse::cuda::BFloat16, int8_t, 128, true>(const Args&,
                                                                                                       cudaStream_t);
