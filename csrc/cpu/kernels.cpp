#include "cpu/kernels.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef QWEN_SPARSE_X86
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qwen_sparse::cpu {

constexpr int64_t no_workspace(const AttentionParams&) { return 0; }

constexpr Kernels with_tiles(Kernels kernels, const char* isa, int64_t (*workspace)(const AttentionParams&),
                             void (*attention)(const AttentionParams&, const HeadIndexView*),
                             void (*select_groups)(const SelectGroupsParams&)) {
  kernels.isa = isa;
  kernels.attention_workspace = workspace;
  kernels.attention = attention;
  kernels.select_groups = select_groups;
  return kernels;
}

#define QWEN_SPARSE_DECLARE_ISA(isa)                                                                \
  namespace isa {                                                                                   \
  void attention(const AttentionParams&, const HeadIndexView*);                                     \
  void select_scores(const SelectParams&);                                                          \
  void select_groups(const SelectGroupsParams&);                                                    \
  void rotary(const RotaryParams&);                                                                 \
  void store_kv(const StoreParams&);                                                                \
  void dequantize_kv(const DequantizeParams&);                                                      \
  void gather_kv(const GatherParams&);                                                              \
  void decode_attention(const DecodeParams&);                                                       \
  constexpr Kernels kKernels{#isa,   no_workspace, attention,     select_scores, select_groups,     \
                             rotary, store_kv,     dequantize_kv, gather_kv,     decode_attention}; \
  }

// Attention (where inputs allow it) and the selection of groups on tiles; all else as `base` does it.
#define QWEN_SPARSE_DECLARE_TILES(set, base)                                                               \
  namespace set {                                                                                          \
  int64_t tile_workspace(const AttentionParams&);                                                          \
  bool attend_on_tiles(const AttentionParams&, const HeadIndexView*);                                      \
  void attention(const AttentionParams& p, const HeadIndexView* heads) {                                   \
    if (attend_on_tiles(p, heads)) return;                                                                 \
    if (p.attended != nullptr) std::fill_n(p.attended, p.shape.num_heads, 0);                              \
    base::attention(p, heads);                                                                             \
  }                                                                                                        \
  void select_groups(const SelectGroupsParams&);                                                           \
  constexpr Kernels kKernels = with_tiles(base::kKernels, #set, tile_workspace, attention, select_groups); \
  }

QWEN_SPARSE_DECLARE_ISA(baseline)
#ifdef QWEN_SPARSE_X86
QWEN_SPARSE_DECLARE_ISA(avx2)
QWEN_SPARSE_DECLARE_ISA(avx512)
QWEN_SPARSE_DECLARE_ISA(avx512_bf16)
QWEN_SPARSE_DECLARE_TILES(amx, avx512)
#ifdef QWEN_SPARSE_EMULATED_AMX
QWEN_SPARSE_DECLARE_TILES(amx_emulated, avx2)
#endif
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
  bool preferred = true;  // over those before it, unless named
};

#ifdef QWEN_SPARSE_X86
// Linux gives a process the state of tiles only when asked; threads inherit it. False where it refuses, which it does
// to old kernels, and to processes with signal stacks too small for the state.
bool may_use_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> result{{&baseline::kKernels, true}};
#ifdef QWEN_SPARSE_X86
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    result.push_back({&avx2::kKernels, has_avx2});
    result.push_back({&avx512::kKernels, has_avx512});
    // Measured on Emerald Rapids: with bf16 inputs, converting to float32 is faster than vdpbf16ps
    // (bench/results/attention_cpu.json).
    result.push_back(
        {&avx512_bf16::kKernels, has_avx512 && __builtin_cpu_supports("avx512bf16"), !__builtin_cpu_is("intel")});
#ifdef QWEN_SPARSE_EMULATED_AMX
    result.push_back({&amx_emulated::kKernels, has_avx2, false});
#endif
    const bool has_amx = has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
                         __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
    result.push_back({&amx::kKernels, has_amx && may_use_tiles()});
#endif
    return result;
  }();
  return all;
}

const Kernels& choose(const std::string& isa, const char* source) {
  if (isa.empty()) {
    const Kernels* best = nullptr;
    for (const Candidate& candidate : candidates()) {
      if (candidate.supported && candidate.preferred) best = candidate.kernels;
    }
    return *best;
  }
  std::string usable;
  for (const Candidate& candidate : candidates()) {
    if (!candidate.supported) continue;
    if (isa == candidate.kernels->isa) return *candidate.kernels;
    usable += (usable.empty() ? "" : ", ") + std::string(candidate.kernels->isa);
  }
  throw std::invalid_argument(std::string(source) + " must name an instruction set that this build holds and this " +
                              "CPU runs (" + usable + "), got '" + isa + "'");
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  if (const Kernels* chosen = current.load(std::memory_order_acquire)) return *chosen;
  set_isa("");
  return *current.load(std::memory_order_acquire);
}

void set_isa(const std::string& isa) {
  const char* variable = std::getenv("QWEN_SPARSE_CPU_ISA");
  const bool use_variable = isa.empty() && variable != nullptr;
  const Kernels& chosen = use_variable ? choose(variable, "QWEN_SPARSE_CPU_ISA") : choose(isa, "isa");
  current.store(&chosen, std::memory_order_release);
}

std::vector<std::string> fast_matmul_dtypes() {
  std::vector<std::string> names;
#ifdef QWEN_SPARSE_X86
  const bool has_bf16_dot = __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel");
  if (has_bf16_dot || __builtin_cpu_supports("amx-bf16")) names.emplace_back("bfloat16");
  if (__builtin_cpu_supports("avx512fp16")) names.emplace_back("float16");
#else
  names = {"bfloat16", "float16"};
#endif
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.supported) names.emplace_back(candidate.kernels->isa);
  }
  return names;
}

}  // namespace qwen_sparse::cpu
