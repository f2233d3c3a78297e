// Stands for csrc/api/device.cpp: CPU tensors are handed to the CUDA kernels, which the simulator runs.
//
// The simulator rejects accesses outside of registered memory, so what a call receives and allocates is registered:
// inputs as far as the tensor reaches (a stray read between its rows is not seen), new memory exactly, and filled with
// 0xff, so that a result which a kernel left out is NaN or -1.
#include "api/device.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "api/check.h"

// The simulator's runtime (ptxsim/runtime.cpp).
extern "C" {
void ptxsim_register(const void* pointer, uint64_t bytes);
void ptxsim_unregister(const void* pointer);
}

namespace qwen_sparse::api {
namespace {

// What the op that runs now has registered; memory of earlier ones may have been given to other tensors.
std::vector<const void*>& registered() {
  static std::vector<const void*> pointers;
  return pointers;
}

void register_memory(const void* begin, uint64_t bytes) {
  registered().push_back(begin);
  ptxsim_register(begin, bytes);
}

int posed_device = 0;

}  // namespace

Device check_device(const char* op, std::initializer_list<NamedTensor> tensors) {
  for (const void* pointer : registered()) ptxsim_unregister(pointer);
  registered().clear();
  std::vector<std::pair<const char*, const char*>> ranges;
  for (const NamedTensor& named : tensors) {
    if (named.tensor == nullptr || named.tensor->numel() == 0) continue;
    check(named.tensor->is_cpu(), op, named.name, " must be on the CPU to be simulated");
    int64_t reach = 1;
    for (int64_t i = 0; i < named.tensor->dim(); ++i) reach += (named.tensor->size(i) - 1) * named.tensor->stride(i);
    const auto* begin = static_cast<const char*>(named.tensor->const_data_ptr());
    ranges.emplace_back(begin, begin + reach * named.tensor->element_size());
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 0; i < ranges.size();) {  // views of one buffer overlap and become one range
    auto [begin, end] = ranges[i];
    for (++i; i < ranges.size() && ranges[i].first < end; ++i) end = std::max(end, ranges[i].second);
    register_memory(begin, static_cast<uint64_t>(end - begin));
  }
  return Device(*cuda::backend(), {posed_device, nullptr}, false);
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
  if (tensor.numel() == 0) return tensor;
  const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  std::memset(tensor.mutable_data_ptr(), 0xff, bytes);
  register_memory(tensor.const_data_ptr(), bytes);
  return tensor;
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor tensor = empty(like, sizes, dtype);
  if (tensor.numel() > 0) std::memset(tensor.mutable_data_ptr(), 0, tensor.numel() * tensor.element_size());
  return tensor;
}

}  // namespace qwen_sparse::api

// Whose tensors the ops take the next ones to be.
extern "C" __attribute__((visibility("default"))) void qwen_sparse_simulated_pose(int device) {
  qwen_sparse::api::posed_device = device;
}
