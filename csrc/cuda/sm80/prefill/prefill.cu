// Chooses the instantiation of the Ampere prefill kernel.
#include "cuda/common/types.h"
#include "cuda/kernels.h"
#include "cuda/sm80/prefill/launch.h"

namespace qwen_sparse::sm80 {
namespace {

template <typename T, typename Tiles>
void run(const cuda::PrefillArgs& args, cudaStream_t stream) {
  args.p.shape.head_dim == 64 ? prefill::launch<T, 64, Tiles>(args, stream)
                              : prefill::launch<T, 128, Tiles>(args, stream);
}

}  // namespace

void prefill_attention(const cuda::PrefillArgs& args, Launch launch) {
  cuda::dispatch_float16_bits(args.p.dtype, [&](auto type) {
    using T = decltype(type);
    args.p.key_set == KeySet::kBlockGroups ? run<T, prefill::GroupTiles>(args, launch.stream)
                                           : run<T, prefill::KeyTiles>(args, launch.stream);
  });
}

}  // namespace qwen_sparse::sm80
