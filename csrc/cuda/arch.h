// Which architecture's kernels a call runs, where there are several.
#pragma once

#include <string>

namespace qwen_sparse::cuda {

// Whether calls on `device` run the kernels of csrc/cuda/sm90: where the build holds them and the device is a Hopper
// GPU, unless set_arch() or QWEN_SPARSE_CUDA_ARCH asks for "sm80". Throws std::invalid_argument if the variable names
// something else, or if "sm90" is asked for and cannot run.
bool uses_sm90(int device);

// "sm80", "sm90", or "" for what QWEN_SPARSE_CUDA_ARCH says, or else the newest. For comparisons in one process.
void set_arch(const std::string& arch);

}  // namespace qwen_sparse::cuda
