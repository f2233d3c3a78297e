// Paged keys and values to contiguous ones: the workspace that prefill attention reads.
//
// int8 is scaled on the way and keys get their rotated bias back. With R_t the rotation to position t, the bias at
// position j0 + t is R_t (R_j0 b): R_j0 b is formed once per segment of kSegment keys, and the table of R_t, for
// t < kSegment, once per CTA, so that a key costs two multiply-adds per element and no trigonometry. Both are in shared
// memory, in the order in which the lanes of a warp read them.
//
// gather_int8  a CTA takes up to kHeads heads of every gridDim.x-th segment; each thread up to 16 bytes of both halves
//              of a key and of a value at a time. Chunks of dual-chunk attention start at segments.
// gather_copy  one CTA per segment, 16 bytes of a key and of a value per thread at a time
//
// Both are bound by memory: 3 bytes move per element of int8, 4 per 16-bit element, half of that or more being writes.
#include "cuda/common/launch.h"
#include "cuda/common/pages.h"
#include "cuda/common/rotation.h"
#include "cuda/common/vector.h"
#include "cuda/kernels.h"

namespace qwen_sparse::smxx {
namespace {

constexpr int kThreads = 256;
constexpr int kSegment = 32;
constexpr int kHeads = 8;      // per CTA, for the size of the biases in shared memory
constexpr int kCtasPerSm = 2;  // 256 threads that read 64 bytes each: several times what hides the memory's latency
constexpr int kTableStep = 8;  // R_t is R_{8 (t / 8)} R_{t % 8}: 12 sines per channel pair instead of 32

static_assert(kBlockM % kSegment == 0, "chunk lengths are multiples of kBlockM; segments must not straddle chunks");

using cuda::address;
using cuda::Location;

// The keys [begin, begin + count), by the last warp. A barrier must follow.
__device__ __forceinline__ void locate_keys(const GatherParams& p, int64_t begin, int count, Location* locations) {
  static_assert(kSegment == 32, "one key per lane");
  const int t = static_cast<int>(threadIdx.x) - (kThreads - kSegment);
  if (t < 0 || t >= count) return;
  const int64_t index = (begin + t) / p.page_size;
  locations[t] = cuda::locate(p.block_table[index], begin + t - index * p.page_size, p.num_pages);
}

template <typename T>
__device__ __forceinline__ T* out_address(void* out, int64_t stride, int64_t key, int head, int head_dim) {
  return static_cast<T*>(out) + key * stride + head * head_dim;
}

// Reads 4 floats at a multiple of 16 bytes.
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// How gather_int8 spreads a head over threads and lays out shared memory.
template <typename T, int kHeadDim>
struct Layout {
  static constexpr int kHalf = kHeadDim / 2;
  static constexpr int kVector = 32 / sizeof(T);  // channels of each half per thread; results are what fills registers
  static constexpr int kLanes = kHalf / kVector;  // threads per head
  static constexpr int kHeadStride = kHeadDim + 16;  // neighbouring heads are in different banks

  // Where a channel of either half is: a lane's channels 0 to 3 are followed by those of the next lane, so that lanes
  // that read four each read consecutive addresses.
  __device__ static int place(int channel) {
    return channel % kVector / 4 * (4 * kLanes) + channel / kVector * 4 + channel % 4;
  }

  struct alignas(16) Rotation {
    float cos[kHalf];
    float sin[kHalf];
  };
  struct alignas(16) Biases {
    float of[kHeads * kHeadStride];  // first half, second half of each head
  };
};

// R_t for t < kSegment, unscaled. A barrier must follow.
template <typename L>
__device__ void make_table(const RotatedBias& bias, typename L::Rotation* table) {
  constexpr int kHalf = L::kHalf;
  for (int i = threadIdx.x; i < (kTableStep + kSegment / kTableStep - 1) * kHalf; i += kThreads) {
    const int entry = i / kHalf, channel = i % kHalf;  // t < kTableStep, then its multiples
    const int t = entry < kTableStep ? entry : (entry - kTableStep + 1) * kTableStep;
    const double2 turn = cuda::cos_sin(t, bias.inv_freq[channel], 1.0);
    table[t].cos[L::place(channel)] = static_cast<float>(turn.x);
    table[t].sin[L::place(channel)] = static_cast<float>(turn.y);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSegment * kHalf; i += kThreads) {
    const int t = i / kHalf, place = i % kHalf;
    if (t < kTableStep || t % kTableStep == 0) continue;
    const auto &coarse = table[t - t % kTableStep], &fine = table[t % kTableStep];
    table[t].cos[place] = coarse.cos[place] * fine.cos[place] - coarse.sin[place] * fine.sin[place];
    table[t].sin[place] = coarse.sin[place] * fine.cos[place] + coarse.cos[place] * fine.sin[place];
  }
}

// R_position b of some heads, by the first head_dim / 2 threads. A barrier must follow.
template <typename L>
__device__ __forceinline__ void make_biases(const RotatedBias& bias, int64_t position, int first_head, int num_heads,
                                            float* biases) {
  constexpr int kHalf = L::kHalf, kHeadDim = 2 * kHalf;
  const int channel = threadIdx.x;
  if (channel >= kHalf) return;
  const double2 turn = cuda::cos_sin(position, bias.inv_freq[channel], bias.attention_factor);
  const float cos = static_cast<float>(turn.x), sin = static_cast<float>(turn.y);
  const float* from = bias.data + first_head * kHeadDim + channel;
  float* to = biases + L::place(channel);
  for (int head = 0; head < num_heads; ++head) {
    const float first = from[head * kHeadDim], second = from[head * kHeadDim + kHalf];
    to[head * L::kHeadStride] = first * cos - second * sin;
    to[head * L::kHeadStride + kHalf] = second * cos + first * sin;
  }
}

// x += R_t b for one lane's channels of one half each.
template <typename L, int N>
__device__ __forceinline__ void add_bias(const typename L::Rotation& rotation, const float* bias, int lane,
                                         float (&first)[N], float (&second)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const int place = i * L::kLanes + lane * 4;
    const float4 c = load4(rotation.cos + place), s = load4(rotation.sin + place);
    const float4 a = load4(bias + place), b = load4(bias + L::kHalf + place);
    first[i] += a.x * c.x - b.x * s.x;
    first[i + 1] += a.y * c.y - b.y * s.y;
    first[i + 2] += a.z * c.z - b.z * s.z;
    first[i + 3] += a.w * c.w - b.w * s.w;
    second[i] += b.x * c.x + a.x * s.x;
    second[i + 1] += b.y * c.y + a.y * s.y;
    second[i + 2] += b.z * c.z + a.z * s.z;
    second[i + 3] += b.w * c.w + a.w * s.w;
  }
}

template <int N>
__device__ __forceinline__ void to_scaled_floats(const cuda::Vector<int8_t, N>& x, float scale, float (&values)[N]) {
  to_floats(x, values);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] *= scale;
}

template <typename T, int kHeadDim, bool kBias>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    gather_int8(__grid_constant__ const GatherParams p, bool aligned) {
  using L = Layout<T, kHeadDim>;
  using Bytes = cuda::Vector<int8_t, L::kVector>;
  __shared__ typename L::Rotation table[kBias ? kSegment : 1];
  __shared__ typename L::Biases biases;
  __shared__ Location locations[kSegment];

  const int first_head = blockIdx.y * kHeads;
  const int num_heads = p.num_kv_heads - first_head < kHeads ? static_cast<int>(p.num_kv_heads) - first_head : kHeads;
  if constexpr (kBias) make_table<L>(p.bias, table);
  for (int64_t begin = int64_t{blockIdx.x} * kSegment; begin < p.num_keys; begin += int64_t{gridDim.x} * kSegment) {
    const int count = p.num_keys - begin < kSegment ? static_cast<int>(p.num_keys - begin) : kSegment;
    __syncthreads();  // the table is complete; nobody reads the segment before
    locate_keys(p, begin, count, locations);
    if constexpr (kBias) {
      const int64_t position = p.chunk_len == 0 ? begin : begin % p.chunk_len;
      make_biases<L>(p.bias, position, first_head, num_heads, biases.of);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * num_heads * L::kLanes; i += kThreads) {
      const int lane = i % L::kLanes, head = i / L::kLanes % num_heads, t = i / L::kLanes / num_heads;
      const int channel = lane * L::kVector;
      const Location location = locations[t];
      Bytes k_first{}, k_second{}, v_first{}, v_second{};
      float k_scale = 0.0f, v_scale = 0.0f;
      if (location.exists()) {
        const int8_t* k = address<int8_t>(p.k, location, first_head + head) + channel;
        const int8_t* v = address<int8_t>(p.v, location, first_head + head) + channel;
        k_first = Bytes::load(k, aligned);
        k_second = Bytes::load(k + L::kHalf, aligned);
        v_first = Bytes::load(v, aligned);
        v_second = Bytes::load(v + L::kHalf, aligned);
        k_scale = *address<float>(p.k_scale, location, first_head + head);
        v_scale = *address<float>(p.v_scale, location, first_head + head);
      }
      float first[L::kVector], second[L::kVector];
      to_scaled_floats(k_first, k_scale, first);
      to_scaled_floats(k_second, k_scale, second);
      if constexpr (kBias) {
        if (location.exists()) {
          add_bias<L>(table[t], biases.of + head * L::kHeadStride, lane, first, second);
        }
      }
      T* k_out = out_address<T>(p.k_out, p.k_out_stride, begin + t, first_head + head, kHeadDim) + channel;
      cuda::from_floats<T>(first).store(k_out, aligned);
      cuda::from_floats<T>(second).store(k_out + L::kHalf, aligned);
      T* v_out = out_address<T>(p.v_out, p.v_out_stride, begin + t, first_head + head, kHeadDim) + channel;
      to_scaled_floats(v_first, v_scale, first);
      to_scaled_floats(v_second, v_scale, second);
      cuda::from_floats<T>(first).store(v_out, aligned);
      cuda::from_floats<T>(second).store(v_out + L::kHalf, aligned);
    }
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) gather_copy(__grid_constant__ const GatherParams p, bool aligned) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kPieces = kHeadDim / kVector;
  using Piece = cuda::Vector<T, kVector>;
  __shared__ Location locations[kSegment];
  const int64_t begin = int64_t{blockIdx.x} * kSegment;
  const int count = p.num_keys - begin < kSegment ? static_cast<int>(p.num_keys - begin) : kSegment;
  const int num_heads = static_cast<int>(p.num_kv_heads);
  locate_keys(p, begin, count, locations);
  __syncthreads();
#pragma unroll 1  // enough loads are in flight with eight CTAs per SM
  for (int i = threadIdx.x; i < count * num_heads * kPieces; i += kThreads) {
    const int channel = i % kPieces * kVector, head = i / kPieces % num_heads, t = i / kPieces / num_heads;
    const Location location = locations[t];
    Piece k{}, v{};
    if (location.exists()) {
      k = Piece::load(address<T>(p.k, location, head) + channel, aligned);
      v = Piece::load(address<T>(p.v, location, head) + channel, aligned);
    }
    k.store(out_address<T>(p.k_out, p.k_out_stride, begin + t, head, kHeadDim) + channel, aligned);
    v.store(out_address<T>(p.v_out, p.v_out_stride, begin + t, head, kHeadDim) + channel, aligned);
  }
}

// A kernel for T and kHeadDim, its grid, and how it may access memory.
template <typename T, int kHeadDim>
void launch_kernel(const GatherParams& p, Launch launch) {
  const auto segments = static_cast<unsigned>(cuda::ceil_div<int64_t>(p.num_keys, kSegment));
  const bool is_int8 = p.cache_dtype == DType::kInt8;
  const int64_t cache_element = is_int8 ? 1 : sizeof(T);
  const bool aligned = cuda::is_aligned(p.k, cache_element) && cuda::is_aligned(p.v, cache_element) &&
                       cuda::is_aligned(Rows{p.k_out, p.k_out_stride, 0}, sizeof(T)) &&
                       cuda::is_aligned(Rows{p.v_out, p.v_out_stride, 0}, sizeof(T));
  if (!is_int8) {
    gather_copy<T, kHeadDim><<<segments, kThreads, 0, launch.stream>>>(p, aligned);
    return;
  }
  const auto head_groups = static_cast<unsigned>(cuda::ceil_div<int64_t>(p.num_kv_heads, kHeads));
  if (p.bias.data == nullptr) {
    gather_int8<T, kHeadDim, false><<<dim3(segments, head_groups), kThreads, 0, launch.stream>>>(p, aligned);
    return;
  }
  const auto resident =
      static_cast<unsigned>(kCtasPerSm * cuda::device_attribute(cudaDevAttrMultiProcessorCount, launch.device));
  const dim3 grid(segments < resident ? segments : resident, head_groups);
  gather_int8<T, kHeadDim, true><<<grid, kThreads, 0, launch.stream>>>(p, aligned);
}

}  // namespace

void gather_kv(const GatherParams& p, Launch launch) {
  if (p.num_keys == 0 || p.num_kv_heads == 0) return;
  const cuda::DeviceGuard guard(launch.device);
  cuda::dispatch_float(p.dtype, [&](auto type) {
    using T = decltype(type);
    p.head_dim == 64 ? launch_kernel<T, 64>(p, launch) : launch_kernel<T, 128>(p, launch);
  });
  cuda::check(cudaGetLastError(), "gather_kv");
}

}  // namespace qwen_sparse::smxx
