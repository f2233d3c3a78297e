#include "cuda/sm80/select_groups/instantiate.cuh"

QWEN_SPARSE_INSTANTIATE_SELECT_GROUPS(BFloat16, 128);
