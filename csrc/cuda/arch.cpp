#include "cuda/arch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cuda/common/launch.h"

namespace qwen_sparse::cuda {
namespace {

enum class Arch { kUnset, kNewest, kSm80, kSm90 };

std::atomic<Arch> requested{Arch::kUnset};

Arch parse(const std::string& name, const char* source) {
  if (name.empty()) return Arch::kNewest;
  if (name == "sm80") return Arch::kSm80;
#ifdef QWEN_SPARSE_SM90
  if (name == "sm90") return Arch::kSm90;
  constexpr const char* kNames = "sm80 or sm90";
#else
  constexpr const char* kNames = "sm80 (this build has no kernels for sm90)";
#endif
  throw std::invalid_argument(std::string(source) + " must be " + kNames + ", got '" + name + "'");
}

}  // namespace

void set_arch(const std::string& arch) {
  const char* variable = std::getenv("QWEN_SPARSE_CUDA_ARCH");
  const bool use_variable = arch.empty() && variable != nullptr;
  requested = use_variable ? parse(variable, "QWEN_SPARSE_CUDA_ARCH") : parse(arch, "arch");
}

bool uses_sm90(int device) {
  if (requested == Arch::kUnset) set_arch("");
  const Arch arch = requested;
  if (arch == Arch::kSm80) return false;
#ifdef QWEN_SPARSE_SM90
  // Code for sm_90a runs on compute capability 9.0 only, not on later ones.
  const bool is_hopper = device_attribute(cudaDevAttrComputeCapabilityMajor, device) == 9;
#else
  const bool is_hopper = false;
#endif
  if (arch == Arch::kSm90 && !is_hopper) {
    throw std::invalid_argument("kernels for sm90 were asked for, but device " + std::to_string(device) +
                                " has compute capability " +
                                std::to_string(device_attribute(cudaDevAttrComputeCapabilityMajor, device)) + "." +
                                std::to_string(device_attribute(cudaDevAttrComputeCapabilityMinor, device)));
  }
  return is_hopper;
}

}  // namespace qwen_sparse::cuda
