#include "cuda/sm80/select/instantiate.cuh"

QWEN_SPARSE_INSTANTIATE_SELECT(BFloat16, 64);
