// Work distribution over torch's intra-op threads, for kernels that must not see torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qwen_sparse::cpu {

// Runs body(context, task, following, scratch) for every task in [0, num_tasks). Threads take the next task when they
// finish one, so put the longest first. `scratch` is 64-byte aligned, private to the thread, uninitialised. With
// `ahead`, a thread takes its next task before it begins one, and `following` is that task; it is -1 for the last one
// and without `ahead`.
void run_tasks(int64_t num_tasks, size_t scratch_bytes,
               void (*body)(void* context, int64_t task, int64_t following, std::byte* scratch), void* context,
               bool ahead);

// The same for a callable body(task, scratch). Kernel files compiled per ISA pass lambdas with internal linkage only.
template <typename Body>
void parallel_tasks(int64_t num_tasks, size_t scratch_bytes, const Body& body) {
  run_tasks(
      num_tasks, scratch_bytes,
      [](void* context, int64_t task, int64_t, std::byte* scratch) {
        (*static_cast<const Body*>(context))(task, scratch);
      },
      const_cast<Body*>(&body), false);
}

// For a callable body(task, following, scratch) that prepares for the following task.
template <typename Body>
void parallel_tasks_ahead(int64_t num_tasks, size_t scratch_bytes, const Body& body) {
  run_tasks(
      num_tasks, scratch_bytes,
      [](void* context, int64_t task, int64_t following, std::byte* scratch) {
        (*static_cast<const Body*>(context))(task, following, scratch);
      },
      const_cast<Body*>(&body), true);
}

}  // namespace qwen_sparse::cpu
