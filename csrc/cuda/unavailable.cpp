// Stands for cuda/backend.cpp and cuda/arch.cpp in a build without CUDA.
#include <stdexcept>

#include "backend.h"
#include "cuda/arch.h"

namespace qwen_sparse::cuda {

const Backend* backend() { return nullptr; }

void set_arch(const std::string& arch) {
  if (arch.empty()) return;
  throw std::invalid_argument("arch must be empty, since this build has no CUDA kernels; got '" + arch + "'");
}

}  // namespace qwen_sparse::cuda
