// The device of an op's arguments, and memory on it.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <utility>

#include "backend.h"

namespace qwen_sparse::api {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct NamedTensor {
  NamedTensor(const char* name, const Tensor& tensor) : name(name), tensor(&tensor) {}
  NamedTensor(const char* name, const std::optional<Tensor>& tensor)
      : name(name), tensor(tensor.has_value() ? &*tensor : nullptr) {}

  const char* name;
  const Tensor* tensor;  // null: not given
};

class Device {
 public:
  using Guard = torch::stable::accelerator::DeviceGuard;

  Device(const Backend& backend, Launch launch, bool is_host, std::optional<Guard> guard = std::nullopt)
      : backend_(&backend), launch_(launch), is_host_(is_host), guard_(std::move(guard)) {}

  const Backend& backend() const { return *backend_; }
  Launch launch() const { return launch_; }
  // Whether values of index arguments are read, and so checked, before the kernel runs. Reading them from a GPU would
  // stop the host until the GPU has caught up; there, kernels take what is out of range as absent.
  bool is_host() const { return is_host_; }

 private:
  const Backend* backend_;
  Launch launch_;
  bool is_host_;
  // Makes a GPU current while this object lives. Kernels guard themselves too, by the CUDA runtime alone; to make the
  // device before current again it would set up a context there (hundreds of megabytes) where there was none.
  std::optional<Guard> guard_;
};

// The one device that all tensors given are on. Throws std::invalid_argument when there are several, or when this build
// has no kernels for it.
Device check_device(const char* op, std::initializer_list<NamedTensor> tensors);

// New contiguous memory on the device of `like`.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

// Scratch memory of a kernel: `bytes` on the device of `like`, freed with this object (on a GPU, in stream order).
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) : memory_(empty(like, {bytes}, ScalarType::Byte)) {}
  template <typename Params>
  void attach(Params& params) {
    params.workspace = memory_.mutable_data_ptr();
  }

 private:
  Tensor memory_;
};

}  // namespace qwen_sparse::api
