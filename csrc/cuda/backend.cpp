// The GPU's table of functions.
#include "backend.h"

#include "cuda/kernels.h"

namespace qwen_sparse::cuda {

const Backend* backend() {
  static const Backend table{
      /*float32_attention=*/false,
      sm80::attention_workspace,
      nullptr, nullptr, nullptr,
      sm80::attention,
  };
  return &table;
}

}  // namespace qwen_sparse::cuda
