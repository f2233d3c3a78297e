#include "cuda/sm80/select/instantiate.cuh"

QWEN_SPARSE_INSTANTIATE_SELECT(Float16, 64);
