// Stands for cuda/backend.cpp in a build without CUDA.
#include "backend.h"

namespace qwen_sparse::cuda {

const Backend* backend() { return nullptr; }

}  // namespace qwen_sparse::cuda
