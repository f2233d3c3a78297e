// Chooses the instantiation of the Ampere prefill kernel.
#include "cuda/common/types.h"
#include "cuda/kernels.h"
#include "cuda/sm80/prefill/launch.h"

namespace qwen_sparse::sm80 {

void prefill_attention(const cuda::PrefillArgs& args, Launch launch) {
  cuda::dispatch_float16_bits(args.p.dtype, [&](auto type) {
    using T = decltype(type);
    args.p.shape.head_dim == 64 ? prefill::launch<T, 64>(args, launch.stream)
                                : prefill::launch<T, 128>(args, launch.stream);
  });
}

}  // namespace qwen_sparse::sm80
