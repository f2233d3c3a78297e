// The GPU's table of functions.
#include "backend.h"

#include "cuda/kernels.h"

namespace qwen_sparse::cuda {

const Backend* backend() {
  static const Backend table{
      /*float32_attention=*/false,
      attention_workspace,
      sm80::select_workspace,
      sm80::select_block_groups_workspace,
      smxx::top_indexes_workspace,
      sm80::decode_workspace,
      attention,
      sm80::select_scores,
      sm80::select_block_groups,
      smxx::top_indexes,
      smxx::rotary,
      smxx::store_kv,
      smxx::dequantize_kv,
      smxx::gather_kv,
      sm80::decode_attention,
  };
  return &table;
}

}  // namespace qwen_sparse::cuda
