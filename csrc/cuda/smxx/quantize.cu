// Keys and values into pages and, from int8, back. int8 is symmetric, one scale per token and kv head, keys minus their
// rotated bias.
//
// A CTA takes kRows rows: cos and sin of each (row, channel pair) into shared memory, in double, then 4 to 16 lanes per
// (row, head) of the keys and of the values, each with 16 bytes of both halves of the head. store_plain, into pages of
// the same dtype, copies 16 bytes of a key and of a value per thread.
//
// The definition is in double, and bytes and scales are those of the CPU. Few of the elements need double for that: a
// residual that is exact (no bias) is a float, and quotients are formed in float unless that leaves the rounding open.
#include <utility>

#include "cuda/common/launch.h"
#include "cuda/common/pages.h"
#include "cuda/common/rotation.h"
#include "cuda/common/vector.h"
#include "cuda/kernels.h"

namespace qwen_sparse::smxx {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 8;

using Rotations = double2[kRows][cuda::kMaxHalfDim];  // (cos, sin)

// Of the rows [first_row, first_row + kRows). A barrier must follow.
template <int kHalf>
__device__ void make_rotations(const RotatedBias& bias, int64_t first_row, int64_t num_rows, Rotations& rotations) {
  if (bias.data == nullptr) return;
  for (int i = threadIdx.x; i < kRows * kHalf; i += kThreads) {
    const int64_t row = first_row + i / kHalf;
    const int channel = i % kHalf;
    if (row >= num_rows) break;
    rotations[i / kHalf][channel] = cuda::cos_sin(bias.positions[row], bias.inv_freq[channel], bias.attention_factor);
  }
}

// Where the rows [first_row, first_row + kRows) go, by one thread each. A barrier must follow.
__device__ void locate_rows(const StoreParams& p, int64_t first_row, cuda::Location (&locations)[kRows]) {
  if (threadIdx.x >= kRows) return;
  const int64_t row = first_row + threadIdx.x;
  int64_t slot = -1;
  if (row < p.num_rows) slot = p.slot_mapping == nullptr ? row : p.slot_mapping[row];
  const int64_t page = slot < 0 ? -1 : slot / p.page_size;
  locations[threadIdx.x] = cuda::locate(page, slot - page * p.page_size, p.num_pages);
}

// R b at `channel` of the first half and of the second; `b` is the head's bias.
template <int kHalf>
__device__ __forceinline__ double2 rotate(const float* b, const double2& rotation, int channel) {
  const double first = b[channel], second = b[kHalf + channel];
  return make_double2(first * rotation.x - second * rotation.y, second * rotation.x + first * rotation.y);
}

// What a group of lanes works on: the keys or the values of one head in one row.
struct Item {
  bool is_k;
  int row;  // in the CTA
  int head;
};

// Calls body(item, channel) for every (keys or values, row, head) of the CTA, with the lane's first channel. Warps stay
// whole: kRows is a multiple of the number of groups in a warp. All keys come first, so that a warp rarely has both.
template <int kHalf, int kVector, typename Body>
__device__ __forceinline__ void for_each_item(int num_heads, const Body& body) {
  constexpr int kLanes = kHalf / kVector;
  static_assert(kRows % (32 / kLanes) == 0, "a warp must be inside or outside of the range as a whole");
  const int pairs = kRows * num_heads;
  for (int i = threadIdx.x / kLanes; i < 2 * pairs; i += kThreads / kLanes) {
    const int pair = i < pairs ? i : i - pairs;
    body(Item{i < pairs, pair / num_heads, pair % num_heads}, static_cast<int>(threadIdx.x) % kLanes * kVector);
  }
}

template <typename T>
__device__ __forceinline__ const T* row_of(const Rows& rows, int64_t row, int64_t head) {
  return static_cast<const T*>(rows.data) + row * rows.row_stride + head * rows.head_stride;
}

// x[0 .. N / 2) from `from`, the rest from the other half of the head.
template <int kHalf, typename T, int N>
__device__ __forceinline__ void load_halves(const T* from, bool aligned, float (&x)[N]) {
  float first[N / 2], second[N / 2];
  to_floats(cuda::Vector<T, N / 2>::load(from, aligned), first);
  to_floats(cuda::Vector<T, N / 2>::load(from + kHalf, aligned), second);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    x[i] = first[i];
    x[N / 2 + i] = second[i];
  }
}

// Order as unsigned integers is that of |x|; NaN is above infinity.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ __forceinline__ unsigned long long magnitude(double x) {
  return static_cast<unsigned long long>(__double_as_longlong(x)) & 0x7fffffffffffffffull;
}
__device__ __forceinline__ double from_magnitude(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ double from_magnitude(unsigned long long bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

// The scale of a head whose residuals `r` are spread over kLanes lanes, N each; `words` are this lane's residuals
// divided by it, rounded to nearest even, four to a word.
template <int kLanes, typename Residual, int N>
__device__ __forceinline__ float quantize(const Residual (&r)[N], uint32_t (&words)[N / 4]) {
  auto largest = magnitude(r[0]);
#pragma unroll
  for (int i = 1; i < N; ++i) largest = max(largest, magnitude(r[i]));
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, lane));
  const float scale = static_cast<float>(from_magnitude(largest) / 127.0);
  const float divisor = scale == 0.0f ? 1.0f : scale;

  // Quotients are at most 127, so that their error here is below 127 x 3 x 2^-24 < 2^-15 (roundings of the residual,
  // the inverse and the product), and rounding leads to the same integer unless it is that close to a half. The inverse
  // of a tiny scale would overflow.
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: rounds to nearest even, leaves the integer in the low bits
  constexpr float kSafe = 0.5f - 1.0f / 32768;
  const float inverse = 1.0f / divisor;
  bool certain = divisor > 1e-30f;
  uint32_t bytes[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float quotient = static_cast<float>(r[i]) * inverse;
    const float shifted = quotient + kRound;
    certain = certain && fabsf(quotient - (shifted - kRound)) < kSafe;
    bytes[i] = __float_as_uint(shifted);
  }
  if (!certain) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const double quotient = static_cast<double>(r[i]) / divisor;
      bytes[i] = static_cast<uint32_t>(__double2int_rn(fmax(-127.0, fmin(127.0, quotient))));
    }
  }
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const uint32_t low = __byte_perm(bytes[4 * i], bytes[4 * i + 1], 0x0040);
    const uint32_t high = __byte_perm(bytes[4 * i + 2], bytes[4 * i + 3], 0x0040);
    words[i] = __byte_perm(low, high, 0x5410);
  }
  return scale;
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) store_int8(__grid_constant__ const StoreParams p, bool aligned) {
  constexpr int kHalf = kHeadDim / 2;
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kLanes = kHalf / kVector;
  __shared__ Rotations rotations;
  __shared__ cuda::Location locations[kRows];
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  locate_rows(p, first_row, locations);
  make_rotations<kHalf>(p.bias, first_row, p.num_rows, rotations);
  __syncthreads();
  for_each_item<kHalf, kVector>(static_cast<int>(p.num_kv_heads), [&](const Item& item, int channel) {
    const int64_t row = first_row + item.row;
    const cuda::Location location = locations[item.row];
    const bool inside = location.exists();  // the others take part in shuffles only
    float x[2 * kVector] = {};
    if (inside) load_halves<kHalf>(row_of<T>(item.is_k ? p.k : p.v, row, item.head) + channel, aligned, x);
    uint32_t words[kVector / 2];
    float scale;
    if (item.is_k && p.bias.data != nullptr) {
      const float* bias = p.bias.data + item.head * kHeadDim;
      double residual[2 * kVector] = {};
      if (inside) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const double2 rotated = rotate<kHalf>(bias, rotations[item.row][channel + i], channel + i);
          residual[i] = x[i] - rotated.x;
          residual[kVector + i] = x[kVector + i] - rotated.y;
        }
      }
      scale = quantize<kLanes>(residual, words);
    } else {
      scale = quantize<kLanes>(x, words);
    }
    if (!inside) return;
    int8_t* out = cuda::address<int8_t>(item.is_k ? p.k_cache : p.v_cache, location, item.head) + channel;
    cuda::Vector<int8_t, kVector> bytes;
    memcpy(bytes.at, words, kVector);
    bytes.store(out, aligned);
    memcpy(bytes.at, words + kVector / 4, kVector);
    bytes.store(out + kHalf, aligned);
    if (channel == 0) *cuda::address<float>(item.is_k ? p.k_scale : p.v_scale, location, item.head) = scale;
  });
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) store_plain(__grid_constant__ const StoreParams p, bool aligned) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kPieces = kHeadDim / kVector;
  using Piece = cuda::Vector<T, kVector>;
  __shared__ cuda::Location locations[kRows];
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  const int num_heads = static_cast<int>(p.num_kv_heads);
  locate_rows(p, first_row, locations);
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * num_heads * kPieces; i += kThreads) {
    const int channel = i % kPieces * kVector, head = i / kPieces % num_heads, row = i / kPieces / num_heads;
    const cuda::Location location = locations[row];
    if (!location.exists()) continue;
    const Piece k = Piece::load(row_of<T>(p.k, first_row + row, head) + channel, aligned);
    const Piece v = Piece::load(row_of<T>(p.v, first_row + row, head) + channel, aligned);
    k.store(cuda::address<T>(p.k_cache, location, head) + channel, aligned);
    v.store(cuda::address<T>(p.v_cache, location, head) + channel, aligned);
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(__grid_constant__ const DequantizeParams p, bool aligned) {
  constexpr int kHalf = kHeadDim / 2;
  constexpr int kVector = 16 / sizeof(T);
  __shared__ Rotations rotations;
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  make_rotations<kHalf>(p.bias, first_row, p.num_rows, rotations);
  __syncthreads();
  for_each_item<kHalf, kVector>(static_cast<int>(p.num_kv_heads), [&](const Item& item, int channel) {
    const int64_t row = first_row + item.row;
    if (row >= p.num_rows) return;
    float x[2 * kVector];
    load_halves<kHalf>(row_of<int8_t>(item.is_k ? p.k : p.v, row, item.head) + channel, aligned, x);
    const float scale = *row_of<float>(item.is_k ? p.k_scale : p.v_scale, row, item.head);
    float first[kVector], second[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      first[i] = x[i] * scale;
      second[i] = x[kVector + i] * scale;
    }
    if (item.is_k && p.bias.data != nullptr) {
      const float* bias = p.bias.data + item.head * kHeadDim;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const double2 rotated = rotate<kHalf>(bias, rotations[item.row][channel + i], channel + i);
        first[i] += static_cast<float>(rotated.x);
        second[i] += static_cast<float>(rotated.y);
      }
    }
    T* out = static_cast<T*>(item.is_k ? p.k_out : p.v_out) + (row * p.num_kv_heads + item.head) * kHeadDim + channel;
    cuda::from_floats<T>(first).store(out, true);
    cuda::from_floats<T>(second).store(out + kHalf, true);
  });
}

// `kernel_of(T{})` is the kernel and whether what it reads and writes is aligned.
template <typename Params, typename KernelOf>
void launch_kernel(const Params& p, Launch launch, const char* name, const KernelOf& kernel_of) {
  if (p.num_rows == 0 || p.num_kv_heads == 0) return;
  const cuda::DeviceGuard guard(launch.device);
  const auto blocks = static_cast<unsigned>(cuda::ceil_div<int64_t>(p.num_rows, kRows));
  cuda::dispatch_float(p.dtype, [&](auto type) {
    const auto [kernel, aligned] = kernel_of(type);
    kernel<<<blocks, kThreads, 0, launch.stream>>>(p, aligned);
    cuda::check(cudaGetLastError(), name);
  });
}

}  // namespace

void store_kv(const StoreParams& p, Launch launch) {
  launch_kernel(p, launch, "store_kv", [&](auto type) {
    using T = decltype(type);
    const bool is_int8 = p.cache_dtype == DType::kInt8;
    const int64_t stored_bytes = is_int8 ? 1 : sizeof(T);
    const bool aligned = cuda::is_aligned(p.k, sizeof(T)) && cuda::is_aligned(p.v, sizeof(T)) &&
                         cuda::is_aligned(p.k_cache, stored_bytes) && cuda::is_aligned(p.v_cache, stored_bytes);
    if (is_int8) return std::pair{p.head_dim == 64 ? store_int8<T, 64> : store_int8<T, 128>, aligned};
    return std::pair{p.head_dim == 64 ? store_plain<T, 64> : store_plain<T, 128>, aligned};
  });
}

void dequantize_kv(const DequantizeParams& p, Launch launch) {
  launch_kernel(p, launch, "dequantize_kv", [&](auto type) {
    using T = decltype(type);
    return std::pair{p.head_dim == 64 ? dequantize_kernel<T, 64> : dequantize_kernel<T, 128>,
                     cuda::is_aligned(p.k, 1) && cuda::is_aligned(p.v, 1)};
  });
}

}  // namespace qwen_sparse::smxx
