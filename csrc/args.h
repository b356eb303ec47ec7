// What a kernel needs to know, as plain data: pointers, sizes and strides.
//
// The families fill these structs from tensors after all checks. Kernels trust them, but
// not the values of indices, which may change after the checks (math/index.h).
// Strides are in elements, never bytes. Sizes are in the words of the field: B batch, S sequence,
// H heads, D head_dim, R rotary_dim, P = R / 2 pairs, L rows of a table, W columns of a table.
// A packed batch [T, H, D] is B = 1, S = T.
#pragma once

#include <cstdint>

namespace rope {

enum class DType : int32_t { Float64, Float32, Float16, BFloat16 };

inline constexpr int64_t size_of(DType dtype) {
  return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2;
}

// A tensor [B, S, H, D] whose last stride is 1. `data` points at its first channel that rotates.
template <class Pointer>
struct Heads {
  Pointer data;
  int64_t stride_b, stride_s, stride_h;
};

// One tensor to rotate: `out` may be `in` itself. heads == 0 means that there is none.
struct RotatedHeads {
  Heads<const void*> in;
  Heads<void*> out;
  int64_t heads;
};

// One tensor of a gradient pair: x as the forward saw it and the gradient of its rotation.
struct GradHeads {
  Heads<const void*> grad;
  Heads<const void*> x;
  int64_t heads;
};

// cos and sin: a table [L, W] (stride_b == 0), or rows [1|B, S, W] for each token. Last stride 1.
struct Table {
  const void* cos;
  const void* sin;
  DType dtype;
  int64_t rows;  // L, or S for per-token rows
  int64_t cos_stride_b, cos_stride_row;
  int64_t sin_stride_b, sin_stride_row;
  bool full_width;   // W == R, one angle a channel, instead of W == P, one angle a pair
  bool interleaved;  // full_width: the columns of pair i are (2i, 2i + 1) instead of (i, i + P)
};

// Row of the table for each token, [B, S]; data == nullptr: row = index in the sequence. A row that
// is not there turns by NaN.
struct PositionIds {
  const void* data;
  bool int64;  // else int32
  int64_t stride_b, stride_s;
};

enum class PositionType : int32_t { Int32, Int64, Float64, Float32, Float16, BFloat16 };

inline constexpr int64_t size_of(PositionType type) {
  switch (type) {
    case PositionType::Int64:
    case PositionType::Float64: return 8;
    case PositionType::Int32:
    case PositionType::Float32: return 4;
    default: return 2;
  }
}

// What angles are made from, [B, S], of each axis: that of token (b, s) is at
// axis * stride_axis + b * stride_b + s * stride_s. data == nullptr: start + s * stride_s.
struct TokenPositions {
  const void* data;
  PositionType type;
  int64_t axes;  // how many there are
  int64_t stride_axis, stride_b, stride_s;
  int64_t start;
};

// The axis of each pair, contiguous [P]; data == nullptr: the only one. One that is not there gives
// NaN.
struct Axes {
  const void* data;
  bool int64;  // else int32
};

// Angles: position times inv_freq, for each token and P pairs.
struct Angles {
  const char* op;
  const void* inv_freq;  // contiguous [P]
  DType inv_freq_dtype;
  int64_t pairs;
  TokenPositions positions;
  Axes axes;
  double attention_scaling;
};

// The keywords of a rotation that a kernel has to know.
struct RotationFlags {
  bool interleaved, interleaved_out;  // the order of the pairs in what is read and in the result
  bool inverse;
};

// q and k (or one tensor x as q) rotated by the same rows. Channels before rotary_offset and from
// rotary_offset + R on stay as they are.
struct RotaryArgs : RotationFlags {
  const char* op;  // the operator's name, for messages
  RotatedHeads q, k;
  DType dtype;
  int64_t batch, seq, head_dim, rotary_dim, rotary_offset;
  Table table;
  PositionIds position_ids;
  bool new_outputs;  // nothing has touched their memory yet
};

// The same rotation by angles that are computed as it goes; R = 2P. Without table and position_ids.
struct RotaryAtArgs : RotaryArgs {
  Angles angles;
};

// Gradient of apply_rotary to its cos and sin: the sum over the tokens that use a row, and over
// their heads. Token b * S + s uses row `s` of batch row b (or of the one shared batch row), or,
// when positions were given, the tokens of row l are
// token_order[row_offsets[l]] .. token_order[row_offsets[l + 1] - 1]: without tokens that are not
// there, and none where the offsets are outside of token_order or fall.
struct RotaryTableGradArgs : RotationFlags {  // of the rotation of x, whose result has grad
  const char* op;
  GradHeads q, k;
  DType dtype;
  int64_t batch, seq, rotary_dim;
  void* grad_cos;  // contiguous [grad_batch, rows, W]
  void* grad_sin;
  DType table_dtype;
  int64_t grad_batch, rows;
  bool full_width, table_interleaved;  // as in Table
  const int64_t* token_order;          // [B * S], or nullptr
  const int64_t* row_offsets;          // [rows + 1], or nullptr
};

// RMSNorm of rows of q and of k: x / sqrt(mean(x^2) + eps) * weight. A row is a head, or all heads
// of a token.
struct RmsNorm {
  const void *q_weight, *k_weight;  // of the first head, at its first channel that rotates
  int64_t q_stride_h, k_stride_h;   // 0: one weight [D] for all heads
  DType dtype;                      // of both weights
  double eps;
  bool unit_offset;  // times 1 + weight
  bool all_heads;    // a row is all heads of a token
};

// q and k normalised, then rotated.
struct RmsNormRotaryArgs {
  RotaryArgs rotary;
  RmsNorm norm;
};

// Its gradients. Those to the weights are sums over tokens, and over heads where these share a
// weight, in an order that depends on shapes alone: partial sums of `chunk_tokens` consecutive
// tokens [B * S], added in order.
struct RmsNormRotaryGradArgs {
  RotaryArgs rotary;        // the way back: from the gradients of the results to those of q and k
  Heads<const void*> q, k;  // as the forward saw them
  RmsNorm norm;
  int64_t chunks, chunk_tokens;
  void* partial;               // [chunks, columns] of the dtype of the arithmetic, a workspace
  int64_t q_columns, columns;  // those of q's weight come first; 0: it has no gradient
  void *grad_q_weight, *grad_k_weight;  // contiguous, like the weights
};

// cos and sin of the angles, scaled; the tokens are one sequence.
struct CosSinArgs {
  Angles angles;
  int64_t tokens;
  void* cos;  // contiguous [tokens, P]
  void* sin;
  DType dtype;
};

// Gradient of CosSinArgs to inv_freq: the sum over tokens, in float64, in an order that does not
// depend on the number of threads: partial sums of `chunk_tokens` tokens, added in order.
struct CosSinGradArgs {
  Angles angles;
  int64_t tokens;
  const void* grad_cos;  // contiguous [tokens, P]
  const void* grad_sin;
  DType grad_dtype;
  double* partial;  // [chunks, P] workspace
  int64_t chunks, chunk_tokens;
  void* grad_inv_freq;  // contiguous [P], of inv_freq's dtype
};

// The storage of a cache: the model's own dtype, or eight bits (float8.h).
enum class CacheDType : int32_t { OfModel, Float8E4M3, Float8E5M2 };

// Heads that are written to a paged cache [blocks, block_size, H, channels].
struct StoredHeads {
  Heads<const void*> in;  // [B, S, H, channels], from the first channel on
  int64_t heads, channels;
  void* cache;
  int64_t stride_block, stride_offset, stride_h;  // of the cache
  const float* scale;  // float8: divides what is stored; one, or one a head; nullptr: 1
  int64_t scale_stride_h;
};

// q after its rotation as float8, in the place of the rotation in place: divided by a scale and
// rounded.
struct Float8Heads {
  Heads<void*> out;    // [B, S, H, D], from the first channel on; without data: q stays q's dtype
  CacheDType dtype;    // of `out`
  const float* scale;  // one, or one a head; nullptr: 1
  int64_t scale_stride_h;
  // [B, S, H]; with data, each head is divided by a scale of its own, which is written here: its
  // largest magnitude by the largest float8, or 1 if that is 0.
  Heads<float*> own_scale;
};

// A rotation in place that changes the order of the pairs holds all channels of a head that rotate
// at once: at most so many.
inline constexpr int64_t kMostReordered = 512;

// q and k rotated in place, or q to float8, and k as it is then, and v, written to a cache. A
// token's slot is block * block_size + offset; it is stored nowhere if it has none, or the cache
// has no such slot.
struct AppendArgs {
  RotaryArgs rotary;
  Float8Heads float8_q;
  StoredHeads k, v;
  bool latent;  // v is one head, of any length, and all of k rotates
  CacheDType cache_dtype;
  int64_t blocks, block_size;
  PositionIds slots;  // of each token, [B, S]
  // Token b * slots_seq + s has a slot if that is below slot_count; the others are not stored.
  int64_t slots_seq, slot_count;
};

// The same with q and k normalised before they rotate. v, if it has heads here, is normalised in
// place too, in rows like those of k, without a weight.
struct RmsNormAppendArgs {
  AppendArgs append;
  RmsNorm norm;
  RotatedHeads v;
};

// Keys of a paged cache that are rotated in place from the angles of their old positions to
// `angles`, those of their new ones. q: the cache; its b is a block, its s an offset in the block.
// The tokens are one sequence; the key of each is in its slot, if the cache has one.
struct ShiftArgs : RotaryAtArgs {
  Angles old;
  bool same_frequencies;
  CacheDType cache_dtype;  // float8: dtype is that of the arithmetic
  int64_t blocks, block_size;
  PositionIds slots;
};

}  // namespace rope
