// Work distribution over torch's intra-op threads, for kernels that must not see torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qwen_sparse::cpu {

// Runs body(context, task, scratch) for every task in [0, num_tasks). Threads take the next task when they finish
// one, so put the longest first. `scratch` is 64-byte aligned, private to the thread, uninitialised.
void run_tasks(int64_t num_tasks, size_t scratch_bytes, void (*body)(void*, int64_t, std::byte*), void* context);

// The same for a callable. Kernel files compiled per ISA pass lambdas with internal linkage only.
template <typename Body>
void parallel_tasks(int64_t num_tasks, size_t scratch_bytes, const Body& body) {
  run_tasks(
      num_tasks, scratch_bytes,
      [](void* context, int64_t task, std::byte* scratch) { (*static_cast<const Body*>(context))(task, scratch); },
      const_cast<Body*>(&body));
}

}  // namespace qwen_sparse::cpu
