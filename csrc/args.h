// What a kernel needs to know, as plain data: pointers, sizes and strides.
//
// checks.cpp fills these structs from tensors after validating everything; kernels trust them.
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

// Row of the table for each token, [B, S]; data == nullptr: row = index in the sequence.
struct PositionIds {
  const void* data;
  bool int64;  // else int32
  int64_t stride_b, stride_s;
};

// q and k (or one tensor x as q) rotated by the same rows. Channels before rotary_offset and from
// rotary_offset + R on stay as they are.
struct RotaryArgs {
  const char* op;  // the operator's name, for messages
  RotatedHeads q, k;
  DType dtype;
  int64_t batch, seq, head_dim, rotary_dim, rotary_offset;
  Table table;
  PositionIds position_ids;
  bool interleaved, interleaved_out;  // the order of the pairs in `in` and in `out`
  bool inverse;
  bool new_outputs;  // nothing has touched their memory yet
};

// Gradient of apply_rotary to its cos and sin: the sum over the tokens that use a row, and over
// their heads. Token b * S + s uses row `s` of batch row b (or of the one shared batch row), or,
// when positions were given, the tokens of row l are
// token_order[row_offsets[l]] .. token_order[row_offsets[l + 1] - 1].
struct RotaryTableGradArgs {
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
  bool interleaved, interleaved_out;   // the order of the pairs in x and in grad
  bool inverse;
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

// Angles: position times inv_freq, for `tokens` positions and P pairs.
struct Angles {
  const char* op;
  const void* inv_freq;  // contiguous [P]
  DType inv_freq_dtype;
  int64_t pairs;
  const void* position_ids;  // contiguous [tokens]; nullptr: start + index
  bool position_int64;       // else int32
  int64_t start;
  int64_t tokens;
  double attention_scaling;
};

// cos and sin of the angles, scaled.
struct CosSinArgs {
  Angles angles;
  void* cos;  // contiguous [tokens, P]
  void* sin;
  DType dtype;
};

// Gradient of CosSinArgs to inv_freq: the sum over tokens, in float64, in an order that does not
// depend on the number of threads: partial sums of `chunk_tokens` tokens, added in order.
struct CosSinGradArgs {
  Angles angles;
  const void* grad_cos;  // contiguous [tokens, P]
  const void* grad_sin;
  DType grad_dtype;
  double* partial;  // [chunks, P] workspace
  int64_t chunks, chunk_tokens;
  void* grad_inv_freq;  // contiguous [P], of inv_freq's dtype
};

}  // namespace rope
