// Peak multiply-add rates of one core after the other and of all together, as JSON. Built and run by bench_machine.py.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr long kSteps = 20'000'000;
constexpr int kChains = 12;  // independent accumulators: more than latency times throughput

// Sums kSteps steps of acc = step(acc) in each chain.
#define QWEN_SPARSE_CHAINS(name, isa, Vec, step, first)                                \
  __attribute__((target(isa), noinline)) float name() {                                \
    Vec a[kChains] = {};                                                               \
    for (long i = 0; i < kSteps; ++i) {                                                \
      _Pragma("GCC unroll 12") for (int j = 0; j < kChains; ++j) a[j] = step(a[j]);    \
      _Pragma("GCC unroll 12") for (int j = 0; j < kChains; ++j) asm("" : "+v"(a[j])); \
    }                                                                                  \
    float total = 0;                                                                   \
    _Pragma("GCC unroll 12") for (int j = 0; j < kChains; ++j) total += first(a[j]);   \
    return total;                                                                      \
  }

#define QWEN_SPARSE_FMA_256(x) _mm256_fmadd_ps(x, x, x)
#define QWEN_SPARSE_FMA_512(x) _mm512_fmadd_ps(x, x, x)
#define QWEN_SPARSE_DPBF16_512(x) _mm512_dpbf16_ps(x, (__m512bh)x, (__m512bh)x)
QWEN_SPARSE_CHAINS(fma_256, "avx2,fma", __m256, QWEN_SPARSE_FMA_256, _mm256_cvtss_f32)
QWEN_SPARSE_CHAINS(fma_512, "avx512f", __m512, QWEN_SPARSE_FMA_512, _mm512_cvtss_f32)
QWEN_SPARSE_CHAINS(dpbf16_512, "avx512f,avx512bf16", __m512, QWEN_SPARSE_DPBF16_512, _mm512_cvtss_f32)

constexpr long kTileProducts = kSteps / 4;

// Tile products of numbers that are not zero (zeros are faster) into four accumulators. Tiles of 16 rows of 64 bytes.
float tdpbf16_products() {
  struct alignas(64) {
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    unsigned short bytes_per_row[16] = {64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16};
  } config;
  alignas(64) unsigned short ones[16 * 32];
  alignas(64) float sums[16 * 16] = {};
  for (int i = 0; i < 16 * 32; ++i) ones[i] = 0x3f80 + i % 64;
  asm volatile("ldtilecfg %0" ::"m"(config));
  asm volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(ones), "r"(64l) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm5" ::"r"(ones), "r"(64l) : "memory");
  asm volatile("tilezero %%tmm0\ntilezero %%tmm1\ntilezero %%tmm2\ntilezero %%tmm3" ::);
  for (long i = 0; i < kTileProducts; i += 4) {
    asm volatile("tdpbf16ps %%tmm5, %%tmm4, %%tmm0\n tdpbf16ps %%tmm5, %%tmm4, %%tmm1" ::);
    asm volatile("tdpbf16ps %%tmm5, %%tmm4, %%tmm2\n tdpbf16ps %%tmm5, %%tmm4, %%tmm3" ::);
  }
  asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(sums), "r"(64l) : "memory");
  asm volatile("tilerelease");
  return sums[0];
}

// Linux grants tiles when asked.
bool has_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-bf16") != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

volatile float sink;

// Best of several runs, giga-operations (a multiply and an add are two) per second of `threads` threads.
double rate(float (*kernel)(), double flop, int threads) {
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> workers;
    for (int i = 0; i < threads; ++i) workers.emplace_back([kernel] { sink = kernel(); });
    for (std::thread& worker : workers) worker.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = std::max(best, flop * threads / seconds / 1e9);
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  struct Case {
    const char* name;
    bool supported;
    float (*kernel)();
    double flop;
  };
  constexpr double kInstructions = double(kSteps) * kChains;
  const Case cases[] = {{"fma_256", __builtin_cpu_supports("fma") != 0, fma_256, 16 * kInstructions},
                        {"fma_512", __builtin_cpu_supports("avx512f") != 0, fma_512, 32 * kInstructions},
                        {"dpbf16_512", __builtin_cpu_supports("avx512bf16") != 0, dpbf16_512, 64 * kInstructions},
                        {"tdpbf16", has_tiles(), tdpbf16_products, 16384.0 * kTileProducts}};
  const char* separator = "{";
  for (const Case& c : cases) {
    if (!c.supported) continue;
    std::printf("%s\"%s\": {\"one\": %.1f, \"all\": %.1f}", separator, c.name, rate(c.kernel, c.flop, 1),
                rate(c.kernel, c.flop, threads));
    separator = ", ";
  }
  std::printf("}\n");
}
