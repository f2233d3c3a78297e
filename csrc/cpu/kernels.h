// The kernels that exist once per CPU instruction set, and the choice among them.
#pragma once

#include <string>
#include <vector>

#include "cpu/head_index.h"
#include "params.h"

namespace qwen_sparse::cpu {

struct Kernels {
  const char* isa;
  int64_t (*attention_workspace)(const AttentionParams&);
  void (*attention)(const AttentionParams&, const HeadIndexView* heads);  // heads: null unless vertical-slash
  void (*select_scores)(const SelectParams&);
  void (*select_groups)(const SelectGroupsParams&);
  void (*rotary)(const RotaryParams&);
  void (*store_kv)(const StoreParams&);
  void (*dequantize_kv)(const DequantizeParams&);
  void (*gather_kv)(const GatherParams&);
  void (*decode_attention)(const DecodeParams&);
};

// The set expected to be fastest on this CPU, or the one that QWEN_SPARSE_CPU_ISA names. Throws std::invalid_argument
// when that is unknown, not built, or not supported by the CPU.
const Kernels& kernels();

// Replaces the choice (tests); the empty string restores the default choice.
void set_isa(const std::string& isa);

// Names of the sets in this build that this CPU runs, slowest first.
std::vector<std::string> supported_isas();

// Names of the 16-bit dtypes whose matrix products this CPU forms faster than float32 ones (AMX, AVX512_FP16, AMD's
// AVX512_BF16; not Intel's, which has half the rate of float32 multiply-adds). CPUs other than x86: both, unmeasured.
std::vector<std::string> fast_matmul_dtypes();

}  // namespace qwen_sparse::cpu
