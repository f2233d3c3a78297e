// What cuda/backend.cpp chooses from, by architecture. smxx runs on every card that the library supports (sm_80 and
// later).
#pragma once

#include "backend.h"

namespace qwen_sparse {

namespace cuda {
struct PrefillArgs;
int64_t attention_workspace(const AttentionParams& p);
void attention(const AttentionParams& p, Launch launch);
}  // namespace cuda

namespace smxx {
int64_t top_indexes_workspace(const TopIndexesParams& p);
void top_indexes(const TopIndexesParams& p, Launch launch);
void rotary(const RotaryParams& p, Launch launch);
void store_kv(const StoreParams& p, Launch launch);
void dequantize_kv(const DequantizeParams& p, Launch launch);
void gather_kv(const GatherParams& p, Launch launch);
}  // namespace smxx

namespace sm80 {
void prefill_attention(const cuda::PrefillArgs& args, Launch launch);
int64_t select_workspace(const SelectParams& p);
void select_scores(const SelectParams& p, Launch launch);
int64_t select_block_groups_workspace(const SelectGroupsParams& p);
void select_block_groups(const SelectGroupsParams& p, Launch launch);
int64_t decode_workspace(const DecodeParams& p);
void decode_attention(const DecodeParams& p, Launch launch);
}  // namespace sm80

namespace sm90 {
// `next_tile`: scratch memory.
void prefill_attention(const cuda::PrefillArgs& args, int32_t* next_tile, Launch launch);
}  // namespace sm90

}  // namespace qwen_sparse
