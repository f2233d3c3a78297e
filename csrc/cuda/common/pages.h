// Addresses in a paged cache. Page numbers and slots come from device memory, unchecked: what does not exist is
// nowhere.
#pragma once

#include <cstdint>

#include "params.h"

namespace qwen_sparse::cuda {

struct Location {
  int32_t page;  // negative: nowhere
  int32_t row;

  __device__ bool exists() const { return page >= 0; }
};

// Row `row` of page `page`, which may be any number.
__device__ __forceinline__ Location locate(int64_t page, int64_t row, int64_t num_pages) {
  return {page >= 0 && page < num_pages ? static_cast<int32_t>(page) : -1, static_cast<int32_t>(row)};
}

template <typename T>
__device__ __forceinline__ const T* address(const Pages& pages, const Location& location, int head) {
  return static_cast<const T*>(pages.data) + location.page * pages.page_stride + location.row * pages.row_stride +
         head * pages.head_stride;
}

}  // namespace qwen_sparse::cuda
