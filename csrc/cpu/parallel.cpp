#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <new>

namespace qwen_sparse::cpu {

void run_tasks(int64_t num_tasks, size_t scratch_bytes, void (*body)(void*, int64_t, int64_t, std::byte*),
               void* context, bool ahead) {
  constexpr size_t kAlignment = 64;
  scratch_bytes = (scratch_bytes + kAlignment - 1) / kAlignment * kAlignment;
  const int64_t num_threads = std::min<int64_t>(num_tasks, torch::stable::get_num_threads());
  if (num_threads <= 0) return;

  // Allocated here, where a failure can still be thrown.
  struct Free {
    std::byte* data;
    ~Free() { ::operator delete[](data, std::align_val_t{kAlignment}); }
  } scratch{new (std::align_val_t{kAlignment}) std::byte[std::max<size_t>(scratch_bytes * num_threads, 1)]};

  std::atomic<int64_t> next{ahead ? num_threads : 0};
  const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      int64_t task = ahead ? thread : take();
      while (task < num_tasks) {
        const int64_t following = ahead ? take() : num_tasks;
        body(context, task, following < num_tasks ? following : -1, scratch.data + thread * scratch_bytes);
        task = ahead ? following : take();
      }
    }
  });
}

}  // namespace qwen_sparse::cpu
