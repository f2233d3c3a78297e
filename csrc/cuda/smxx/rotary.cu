// RoPE of queries and keys, with all rotations of dual-chunk attention from one read of q.
//
// A CTA takes kRows rows: first the cos and sin of each (row, rotation, channel pair) into shared memory, then 16 bytes
// of both halves of a head per thread. What moves is one read and up to three writes of q; the double arithmetic, at
// most (2 rotations + 1 / kRows) x head_dim / 2 sines per row, hides behind that even where doubles run at 1/64 rate.
#include "cuda/common/launch.h"
#include "cuda/common/rotation.h"
#include "cuda/common/vector.h"
#include "cuda/kernels.h"

namespace qwen_sparse::smxx {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;  // a decoding batch should reach more than one SM; the inter rotation is made once per CTA

// Rotations that each row has its own of; the inter-chunk one is a constant.
enum RotationKind { kIntra, kSucc, kSuccCritical, kInterCritical, kNumKinds };

struct alignas(16) Rotation {
  float cos[cuda::kMaxHalfDim];
  float sin[cuda::kMaxHalfDim];
};

__device__ int64_t position_of(const RotaryParams& p, int64_t in_chunk, int kind) {
  if (kind == kIntra) return in_chunk;
  if (kind == kInterCritical) return in_chunk + p.chunk_size;
  const int64_t next = in_chunk + p.chunk_len;
  return kind == kSucc && next > p.chunk_size ? p.chunk_size : next;
}

__device__ void make_rotation(const RotaryParams& p, int64_t position, int channel, Rotation& rotation) {
  const double2 turn = cuda::cos_sin(position, p.inv_freq[channel], p.attention_factor);
  rotation.cos[channel] = static_cast<float>(turn.x);
  rotation.sin[channel] = static_cast<float>(turn.y);
}

// Channels [channel, channel + N) of both halves of one head.
template <typename T, int N>
__device__ __forceinline__ void write_rotated(const float (&first)[N], const float (&second)[N],
                                              const Rotation& rotation, int channel, int half, void* out,
                                              int64_t head_row) {
  const auto cos = cuda::Vector<float, N>::load(rotation.cos + channel, true);
  const auto sin = cuda::Vector<float, N>::load(rotation.sin + channel, true);
  float first_out[N], second_out[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    first_out[i] = first[i] * cos.at[i] - second[i] * sin.at[i];
    second_out[i] = second[i] * cos.at[i] + first[i] * sin.at[i];
  }
  T* to = static_cast<T*>(out) + head_row * 2 * half + channel;
  cuda::from_floats<T>(first_out).store(to, true);
  cuda::from_floats<T>(second_out).store(to + half, true);
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) rotary_kernel(__grid_constant__ const RotaryParams p, bool aligned) {
  constexpr int kHalf = kHeadDim / 2;
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kPieces = kHalf / kVector;
  __shared__ int64_t in_chunk[kRows];
  __shared__ Rotation rotations[kRows][kNumKinds];
  __shared__ Rotation inter;

  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  const int64_t first_critical = p.num_rows - p.critical_rows;
  const int rows = static_cast<int>(p.num_rows - first_row < kRows ? p.num_rows - first_row : kRows);
  const bool dual_chunk = p.chunk_len != 0;
  const bool any_critical = dual_chunk && first_row + rows > first_critical;
  const int kinds = !dual_chunk ? kIntra + 1 : any_critical ? kNumKinds : kSucc + 1;

  if (threadIdx.x < rows) {
    const int64_t position = p.positions[first_row + threadIdx.x];
    in_chunk[threadIdx.x] = dual_chunk ? cuda::floor_mod(position, p.chunk_len) : position;
  }
  __syncthreads();
  const int own = rows * kinds * kHalf;
  for (int i = threadIdx.x; i < own + (dual_chunk ? kHalf : 0); i += kThreads) {
    const int channel = i % kHalf;
    if (i < own) {
      const int row = i / kHalf / kinds, kind = i / kHalf % kinds;
      make_rotation(p, position_of(p, in_chunk[row], kind), channel, rotations[row][kind]);
    } else {
      const int64_t furthest = 2 * p.chunk_len - 1;
      make_rotation(p, furthest < p.chunk_size ? furthest : p.chunk_size, channel, inter);
    }
  }
  __syncthreads();

  const int num_heads = static_cast<int>(p.num_heads), num_kv_heads = static_cast<int>(p.num_kv_heads);
  for (int i = threadIdx.x; i < rows * (num_heads + num_kv_heads) * kPieces; i += kThreads) {
    const int channel = i % kPieces * kVector;
    const int local_row = i / kPieces / (num_heads + num_kv_heads);
    const int any_head = i / kPieces % (num_heads + num_kv_heads);
    const bool is_k = any_head >= num_heads;
    const int head = is_k ? any_head - num_heads : any_head;
    const int64_t row = first_row + local_row;
    const Rows& x = is_k ? p.k : p.q;
    const T* from = static_cast<const T*>(x.data) + row * x.row_stride + head * x.head_stride + channel;
    float first[kVector], second[kVector];
    to_floats(cuda::Vector<T, kVector>::load(from, aligned), first);
    to_floats(cuda::Vector<T, kVector>::load(from + kHalf, aligned), second);
    const auto write = [&](const Rotation& rotation, void* out, int64_t head_row) {
      write_rotated<T>(first, second, rotation, channel, kHalf, out, head_row);
    };
    const Rotation* own_rotations = rotations[local_row];
    if (is_k) {
      write(own_rotations[kIntra], p.k_out, row * num_kv_heads + head);
      continue;
    }
    write(own_rotations[kIntra], p.q_out, row * num_heads + head);
    if (!dual_chunk) continue;
    write(own_rotations[kSucc], p.q_succ_out, row * num_heads + head);
    write(inter, p.q_inter_out, row * num_heads + head);
    if (row < first_critical) continue;
    const int64_t critical = (row - first_critical) * num_heads + head;
    write(own_rotations[kSuccCritical], p.q_succ_critical_out, critical);
    write(own_rotations[kInterCritical], p.q_inter_critical_out, critical);
  }
}

}  // namespace

void rotary(const RotaryParams& p, Launch launch) {
  if (p.num_rows == 0) return;
  const cuda::DeviceGuard guard(launch.device);
  const auto blocks = static_cast<unsigned>(cuda::ceil_div<int64_t>(p.num_rows, kRows));
  cuda::dispatch_float(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool aligned = cuda::is_aligned(p.q, sizeof(T)) && cuda::is_aligned(p.k, sizeof(T));
    const auto kernel = p.head_dim == 64 ? rotary_kernel<T, 64> : rotary_kernel<T, 128>;
    kernel<<<blocks, kThreads, 0, launch.stream>>>(p, aligned);
    cuda::check(cudaGetLastError(), "rotary");
  });
}

}  // namespace qwen_sparse::smxx
