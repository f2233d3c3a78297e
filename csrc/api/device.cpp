#include "api/device.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <string>

#include "api/check.h"

namespace qwen_sparse::api {
namespace {

std::string name_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "another device, index ") + std::to_string(tensor.get_device());
}

// torch's function for the current stream lives in a library that CPU builds of torch lack, so it is looked up when the
// first CUDA tensor arrives, in the library that made this tensor.
CUstream_st* current_cuda_stream(int device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    if (symbol == nullptr) throw std::runtime_error("qwen_sparse: torch has no aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Function>(symbol);
  }();
  void* stream = nullptr;
  if (function(device, &stream) != 0) throw std::runtime_error("qwen_sparse: torch gave no current CUDA stream");
  return static_cast<CUstream_st*>(stream);
}

}  // namespace

Device check_device(const char* op, std::initializer_list<NamedTensor> tensors) {
  const NamedTensor& first = *tensors.begin();
  for (const NamedTensor& other : tensors) {
    if (other.tensor == nullptr) continue;
    check(other.tensor->defined(), op, other.name, " must be a tensor, got None");
    check(other.tensor->is_cpu() == first.tensor->is_cpu() && other.tensor->get_device() == first.tensor->get_device(),
          op, other.name, " must be on the device of ", first.name, " (", name_of(*first.tensor), "), got ",
          name_of(*other.tensor));
  }
  if (first.tensor->is_cpu()) return Device(cpu::backend(), {}, true);
  check(first.tensor->is_cuda(), op, first.name, " must be on a CPU or CUDA device, got ", name_of(*first.tensor));
  check(cuda::backend() != nullptr, op, first.name, " must be on the CPU, since this build of qwen_sparse has no CUDA ",
        "kernels (build with nvcc on the PATH; QWEN_SPARSE_CUDA=1 insists on it), got ", name_of(*first.tensor));
  const int index = first.tensor->get_device();
  return Device(*cuda::backend(), {index, current_cuda_stream(index)}, false, Device::Guard(index));
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, sizes, dtype);
}

}  // namespace qwen_sparse::api
