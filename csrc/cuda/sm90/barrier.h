// Barriers in shared memory (PTX ISA, "mbarrier").
//
// CUTLASS has the same class, but the compiler may move ordinary accesses across its asm; here descriptions of tiles
// are passed on in ordinary memory, so accesses before an arrival stay before it, and those after a wait after it.
#pragma once

#include <cstdint>

#include "cuda/common/ptx.h"

namespace qwen_sparse::sm90 {

class Barrier {
 public:
  // A phase ends when `arrivals` have arrived and the bytes expected have been copied.
  __device__ __forceinline__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }

  __device__ __forceinline__ void arrive_and_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }

  // Until the phase of parity `parity` has ended. The phase before the first counts as ended, with parity 1.
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "retry:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra end;\n"
        "bra retry;\n"
        "end:\n"
        "}" ::"r"(address()),
        "r"(parity)
        : "memory");
  }

 private:
  __device__ __forceinline__ uint32_t address() const { return cuda::ptx::shared_address(&state_); }

  uint64_t state_;
};

// Makes initialised barriers visible to the copy engine; a barrier of the CTA must follow.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

}  // namespace qwen_sparse::sm90
