// Host side of every kernel: errors, the current device, launch arithmetic.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "backend.h"

namespace qwen_sparse::cuda {

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Positions are negative where there are more rows than keys.
__host__ __device__ constexpr int64_t floor_div(int64_t a, int64_t b) { return (a >= 0 ? a : a - b + 1) / b; }
__host__ __device__ constexpr int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

template <typename T>
__host__ __device__ constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

// `what` names the op or kernel. Must follow every launch: check(cudaGetLastError(), "rotary").
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error("qwen_sparse: " + std::string(what) + ": CUDA error: " + cudaGetErrorString(status));
}

// Makes `device` current for its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Whether every row of every head starts at a multiple of 16 bytes.
inline bool is_aligned(const Rows& rows, int64_t element_bytes) {
  const auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  return aligned(reinterpret_cast<intptr_t>(rows.data)) && aligned(rows.row_stride * element_bytes) &&
         aligned(rows.head_stride * element_bytes);
}

inline bool is_aligned(const Pages& pages, int64_t element_bytes) {
  return is_aligned(Rows{pages.data, pages.row_stride, pages.head_stride}, element_bytes) &&
         pages.page_stride * element_bytes % 16 == 0;
}

inline bool is_aligned(const MutablePages& pages, int64_t element_bytes) {
  return is_aligned(Pages{pages.data, pages.page_stride, pages.row_stride, pages.head_stride}, element_bytes);
}

// Kernels read rows in pieces of 16 bytes.
inline void check_alignment(const char* op, const char* name, const Rows& rows, int64_t element_bytes) {
  if (is_aligned(rows, element_bytes)) return;
  throw std::invalid_argument(std::string(op) + ": " + name +
                              " must be aligned to 16 bytes, with strides that are multiples of 16 bytes, on a GPU; "
                              "got row stride " +
                              std::to_string(rows.row_stride) + " and head stride " + std::to_string(rows.head_stride) +
                              " (elements); .contiguous() gives such a copy");
}

inline void check_alignment(const char* op, const char* name, const Pages& pages, int64_t element_bytes) {
  if (is_aligned(pages, element_bytes)) return;
  throw std::invalid_argument(std::string(op) + ": " + name +
                              " must be aligned to 16 bytes, with strides that are multiples of 16 bytes, on a GPU; "
                              "got page stride " +
                              std::to_string(pages.page_stride) + ", row stride " + std::to_string(pages.row_stride) +
                              " and head stride " + std::to_string(pages.head_stride) + " (elements)");
}

// Consecutive pieces of a workspace, each aligned to 256 bytes. With a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(base_ + used_);
    used_ = round_up<int64_t>(used_ + count * static_cast<int64_t>(sizeof(T)), 256);
    return result;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace qwen_sparse::cuda
