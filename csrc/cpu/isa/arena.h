// A thread's scratch memory.
#pragma once

#include <cstddef>

#include "cpu/isa/vec.h"

namespace qwen_sparse::cpu::QWEN_SPARSE_ISA {
namespace {

// Hands out 64-byte aligned pieces of a thread's scratch memory; with a null base it only counts.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    const uintptr_t piece = base_ + used_;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace qwen_sparse::cpu::QWEN_SPARSE_ISA
