// What cuda/backend.cpp chooses from, by architecture. smxx runs on every card that the library supports (sm_80 and
// later).
#pragma once

#include "backend.h"

namespace qwen_sparse {

namespace sm80 {
int64_t attention_workspace(const AttentionParams& p);
void attention(const AttentionParams& p, Launch launch);
}  // namespace sm80

}  // namespace qwen_sparse
