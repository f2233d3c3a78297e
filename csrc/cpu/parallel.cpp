#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <new>

namespace qwen_sparse::cpu {

void run_tasks(int64_t num_tasks, size_t scratch_bytes, void (*body)(void*, int64_t, std::byte*), void* context) {
  constexpr size_t kAlignment = 64;
  scratch_bytes = (scratch_bytes + kAlignment - 1) / kAlignment * kAlignment;
  const int64_t num_threads = std::min<int64_t>(num_tasks, torch::stable::get_num_threads());
  if (num_threads <= 0) return;

  // Allocated here, where a failure can still be thrown.
  struct Free {
    std::byte* data;
    ~Free() { ::operator delete[](data, std::align_val_t{kAlignment}); }
  } scratch{new (std::align_val_t{kAlignment}) std::byte[std::max<size_t>(scratch_bytes * num_threads, 1)]};

  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
        body(context, task, scratch.data + thread * scratch_bytes);
      }
    }
  });
}

}  // namespace qwen_sparse::cpu
