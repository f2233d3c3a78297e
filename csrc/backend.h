// What the ops need of a device, without torch: one table of functions per kind of device (cpu/backend.cpp,
// cuda/backend.cpp).
#pragma once

#include "params.h"

struct CUstream_st;  // what a cudaStream_t points to

namespace qwen_sparse {

// Where a call runs. Not read by the CPU.
struct Launch {
  int device = 0;
  CUstream_st* stream = nullptr;
};

struct Backend {
  bool float32_attention;  // attention, selection and decode take float32, besides bfloat16 and float16

  // Bytes of scratch memory for a call; whoever calls allocates them and sets params.workspace.
  int64_t (*attention_workspace)(const AttentionParams&);
  int64_t (*select_workspace)(const SelectParams&);
  int64_t (*select_groups_workspace)(const SelectGroupsParams&);
  int64_t (*top_indexes_workspace)(const TopIndexesParams&);
  int64_t (*decode_workspace)(const DecodeParams&);

  void (*attention)(const AttentionParams&, Launch);
  void (*select_scores)(const SelectParams&, Launch);
  void (*select_groups)(const SelectGroupsParams&, Launch);
  void (*top_indexes)(const TopIndexesParams&, Launch);
  void (*rotary)(const RotaryParams&, Launch);
  void (*store_kv)(const StoreParams&, Launch);
  void (*dequantize_kv)(const DequantizeParams&, Launch);
  void (*gather_kv)(const GatherParams&, Launch);
  void (*decode_attention)(const DecodeParams&, Launch);
};

namespace cpu {
const Backend& backend();
}

namespace cuda {
const Backend* backend();  // null: built without CUDA
}

}  // namespace qwen_sparse
