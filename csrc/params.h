// Plain parameter structs that cross from the torch-facing layer (api/) to the kernels (cpu/, cuda/).
// No torch here. Strides count elements; the last dimension is always contiguous. `workspace` is scratch memory, as
// much as the backend asks for (backend.h).
#pragma once

#include <cstdint>

namespace qwen_sparse {

constexpr int64_t kBlockM = 64;  // rows of a vertical-slash block: part of the definition, not a tuning knob
constexpr int64_t kNumForcedColumns = 30;
constexpr int64_t kNumForcedDistances = 100;
constexpr int64_t kMaxLastQ = 64;       // voting rows of the selection
constexpr int64_t kGroupKeys = 16;      // keys of a block group, and rows that are pooled: part of the definition
constexpr int64_t kForcedGroups = 2;    // the prompt's first keys, which every block attends
constexpr int64_t kMaxDecodeRows = 64;  // (row, head) pairs of one kv head that a decode task takes
constexpr int64_t kNoWindow = INT64_MAX / 4;

enum class DType : int { kFloat32, kBFloat16, kFloat16, kInt8 };

// [rows, heads, head_dim], strided
struct Rows {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

struct AttentionShape {
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
};

// Which causal keys a row attends.
enum class KeySet : int {
  kAll,
  kVerticalSlash,  // columns and diagonals of its head
  kBlockGroups,    // groups of kGroupKeys keys of its head and block
};

// Blocks of kBlockM rows, by absolute position, that a call's rows lie in.
struct RowBlocks {
  int64_t first = 0;  // number of the first one; the last row is row seqlen_k - 1
  int64_t count = 0;

  explicit RowBlocks(const AttentionShape& shape) {
    const int64_t past = shape.seqlen_k - shape.seqlen_q;
    if (shape.seqlen_q == 0) return;
    first = past / kBlockM - (past % kBlockM < 0);
    count = (shape.seqlen_k + kBlockM - 1) / kBlockM - first;
  }
};

// Prefill attention: dense, over one of the sparse sets, dual-chunk, in any combination.
struct AttentionParams {
  AttentionShape shape;
  DType dtype = DType::kFloat32;
  Rows q_intra;                               // [seqlen_q, num_heads, head_dim]
  Rows q_succ, q_inter;                       // like q_intra; read only when chunk_len > 0
  Rows k, v;                                  // [seqlen_k, num_kv_heads, head_dim]
  void* out = nullptr;                        // [seqlen_q, num_heads, head_dim], contiguous, dtype
  float* lse = nullptr;                       // [seqlen_q, num_heads], contiguous
  int64_t* attended = nullptr;                // [num_heads]: attended (row, key) pairs; null: not counted
  const int32_t* vertical_indexes = nullptr;  // [num_heads, num_vertical], ascending, -1 padded
  const int32_t* slash_indexes = nullptr;     // [num_heads, num_slash], ascending, -1 padded
  int64_t num_vertical = 0;
  int64_t num_slash = 0;
  // [num_heads, RowBlocks.count, group_words]: bit i of word w stands for the keys from 16 (32 w + i) on
  const uint32_t* block_groups = nullptr;
  int64_t group_words = 0;
  KeySet key_set = KeySet::kAll;  // indexes of other sets are not read
  bool causal = true;
  int64_t window = kNoWindow;  // row p attends j > p - window
  int64_t chunk_len = 0;       // 0: no dual-chunk attention
  float softmax_scale = 1.0f;
  void* workspace = nullptr;
};

// Scores of columns and distances from the last rows; top-k follows on the host side.
struct SelectParams {
  AttentionShape shape;  // seqlen_q is the number of voting rows, <= kMaxLastQ
  DType dtype = DType::kFloat32;
  Rows q_intra, q_succ, q_inter;     // [seqlen_q, num_heads, head_dim]
  Rows k;                            // [seqlen_k, num_kv_heads, head_dim]
  float* vertical_scores = nullptr;  // [num_heads, seqlen_k]
  float* slash_scores = nullptr;     // [num_heads, seqlen_k], by distance
  int64_t chunk_len = 0;
  float softmax_scale = 1.0f;
  void* workspace = nullptr;
};

// Which groups of keys each block of rows attends, by a threshold on what pooled rows and pooled keys estimate.
struct SelectGroupsParams {
  AttentionShape shape;  // seqlen_k >= seqlen_q
  DType dtype = DType::kFloat32;
  Rows q_intra, q_succ, q_inter;      // [seqlen_q, num_heads, head_dim]; the latter read only when chunk_len > 0
  Rows k;                             // [seqlen_k, num_kv_heads, head_dim]
  const float* thresholds = nullptr;  // [num_heads, RowBlocks.count], share of attention per key
  uint32_t* block_groups = nullptr;   // [num_heads, RowBlocks.count, group_words], written whole
  int64_t group_words = 0;
  float* kept = nullptr;  // [num_heads, RowBlocks.count]: share of attention that the groups are estimated to hold
  int64_t chunk_len = 0;
  float softmax_scale = 1.0f;
  void* workspace = nullptr;
};

// For each head, the indexes of its `sizes[head]` highest scores, ascending, padded with -1 to `width`. Equal scores go
// to the lower index; NaN counts as -infinity.
struct TopIndexesParams {
  const float* scores = nullptr;  // [num_heads, num_keys]
  int64_t num_heads = 0;
  int64_t num_keys = 0;
  int64_t num_forced = 0;          // the first entries count as infinite
  const int64_t* sizes = nullptr;  // [num_heads], on the host, not negative
  int64_t width = 0;               // >= min(size, num_keys) for every size
  int32_t* indexes = nullptr;      // [num_heads, width]
  void* workspace = nullptr;
};

struct RotaryParams {
  DType dtype = DType::kFloat32;
  int64_t num_rows = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  Rows q, k;
  const int64_t* positions = nullptr;  // [num_rows]
  const double* inv_freq = nullptr;    // [head_dim / 2]
  double attention_factor = 1.0;
  void* q_out = nullptr;  // [num_rows, num_heads, head_dim]; q_intra under DCA
  void* k_out = nullptr;  // [num_rows, num_kv_heads, head_dim]
  int64_t chunk_len = 0;  // 0: no dual-chunk attention, the rest is not read
  int64_t chunk_size = 0;
  int64_t critical_rows = 0;  // <= num_rows
  void* q_succ_out = nullptr;
  void* q_inter_out = nullptr;
  void* q_succ_critical_out = nullptr;  // [critical_rows, num_heads, head_dim]
  void* q_inter_critical_out = nullptr;
};

// The key bias rotated to each key's position; data == nullptr: no bias.
struct RotatedBias {
  const float* data = nullptr;         // [num_kv_heads, head_dim], unrotated
  const int64_t* positions = nullptr;  // [num_rows]; unused by decode and gather, which know them
  const double* inv_freq = nullptr;    // [head_dim / 2]
  double attention_factor = 1.0;
};

// [num_pages, page_size, num_kv_heads, head_dim] (or without head_dim for scales), strided
struct Pages {
  const void* data = nullptr;
  int64_t page_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};
struct MutablePages {
  void* data = nullptr;
  int64_t page_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

// Keys and values into pages, quantised where these are int8. Slot s is row s % page_size of page s / page_size.
struct StoreParams {
  DType dtype = DType::kFloat32;        // of k and v
  DType cache_dtype = DType::kFloat32;  // dtype, or int8
  int64_t num_rows = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  Rows k, v;                              // [num_rows, num_kv_heads, head_dim]
  const int64_t* slot_mapping = nullptr;  // [num_rows], distinct; null: row i goes to slot i
  int64_t page_size = 0;
  int64_t num_pages = 0;
  RotatedBias bias;  // int8 only
  MutablePages k_cache, v_cache;
  MutablePages k_scale, v_scale;  // float32, int8 only
};

struct DequantizeParams {
  DType dtype = DType::kFloat32;  // of the result
  int64_t num_rows = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  Rows k, v;              // int8 [num_rows, num_kv_heads, head_dim]
  Rows k_scale, v_scale;  // float32 [num_rows, num_kv_heads]
  RotatedBias bias;
  void* k_out = nullptr;  // [num_rows, num_kv_heads, head_dim]
  void* v_out = nullptr;
};

// Paged keys and values to contiguous ones.
struct GatherParams {
  DType dtype = DType::kFloat32;        // of the result
  DType cache_dtype = DType::kFloat32;  // dtype, or int8
  int64_t num_keys = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  Pages k, v, k_scale, v_scale;
  const int32_t* block_table = nullptr;  // [ceil(num_keys / page_size)]
  int64_t page_size = 0;
  int64_t num_pages = 0;
  RotatedBias bias;       // positions unused
  int64_t chunk_len = 0;  // keys are rotated at their position modulo this; 0: at their position
  void* k_out = nullptr;  // [num_keys, num_kv_heads, head_dim], rows k_out_stride apart
  void* v_out = nullptr;
  int64_t k_out_stride = 0;
  int64_t v_out_stride = 0;
};

struct DecodeParams {
  int64_t batch = 0;
  AttentionShape shape;                 // seqlen_q rows per sequence; seqlen_k: no sequence is longer
  DType dtype = DType::kFloat32;        // of q and out
  DType cache_dtype = DType::kFloat32;  // dtype, or int8
  Rows q_intra, q_succ, q_inter;        // [batch * seqlen_q, num_heads, head_dim]
  Pages k, v, k_scale, v_scale;
  const int32_t* block_table = nullptr;  // [batch, max_pages]
  int64_t block_table_stride = 0;
  const int32_t* seqlens_k = nullptr;  // [batch]
  int64_t page_size = 0;
  int64_t num_pages = 0;
  RotatedBias bias;
  int64_t chunk_len = 0;
  int64_t window = kNoWindow;
  float softmax_scale = 1.0f;
  const float* scale_factors = nullptr;  // [batch]: each sequence's factor on softmax_scale; null: 1
  void* out = nullptr;                   // [batch, seqlen_q, num_heads, head_dim]
  float* lse = nullptr;                  // [batch, seqlen_q, num_heads]
  void* workspace = nullptr;
};

}  // namespace qwen_sparse
