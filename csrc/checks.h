// From tensors to the plain structs of args.h: all validation, once, for every operator and device.
//
// Every refusal is a std::runtime_error (RuntimeError in Python) that names the operator, the
// argument, what was expected and what came, and is thrown before anything is written or allocated.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "args.h"
#include "check/tensor_view.h"

namespace rope {

// The keywords of every operator that rotates, as they were given.
struct RotaryOptions {
  std::optional<int64_t> rotary_dim;
  int64_t rotary_offset;
  bool interleaved;
  std::optional<bool> interleaved_out;
  bool inverse;
};

// A view of an argument that may be absent.
inline std::optional<TensorView> view(const std::optional<torch::stable::Tensor>& t) {
  return t ? std::optional<TensorView>(*t) : std::nullopt;
}

// What an operator was called with; k is absent for the operators on one tensor, named x then if it
// has no other name.
struct RotaryInputs {
  const char* op;
  TensorView q;                            // [B, S, H, D] or [T, H, D]
  std::optional<TensorView> k;             // [B, S, Hk, D] or [T, Hk, D]
  TensorView cos, sin;                     // [L, W], [1|B, S, W] or [1, T, W]
  std::optional<TensorView> position_ids;  // [S], [1|B, S] or [T]
  RotaryOptions options;
  const char* name = nullptr;

  const char* q_name() const { return name ? name : k ? "q" : "x"; }
};

// Everything but the outputs.
RotaryArgs check_apply_rotary(const RotaryInputs& in);

// Further, for the operators that write into q and k: pairs stay where they are, and no element may
// be written twice, or read as table or position while it is written.
void check_in_place(const RotaryInputs& in);

// Further, for the operators that write into out_q and out_k (out): tensors like q and k, no
// element of which may be written twice, or be read.
void check_out(const RotaryInputs& in, const TensorView& out_q, const TensorView* out_k);

// The order of the pairs in the result.
inline bool interleaved_out(const RotaryOptions& options) {
  return options.interleaved_out.value_or(options.interleaved);
}

// Points q or k of checked arguments to its output, a tensor of its shape.
void set_output(const RotaryArgs& args, RotatedHeads& heads, const torch::stable::Tensor& out);
void set_in_place(const RotaryArgs& args, RotatedHeads& heads, const torch::stable::Tensor& x);

struct TableGradInputs {
  const char* op;
  TensorView grad_q, q;  // of one shape
  std::optional<TensorView> grad_k, k;
  TensorView cos;                         // gives the shape and dtype of the gradient
  std::optional<TensorView> token_order;  // int64 [B * S]
  std::optional<TensorView> row_offsets;  // int64 [L + 1]
  RotaryOptions options;
};

// Everything but the outputs.
RotaryTableGradArgs check_table_grad(const TableGradInputs& in);

// What the operators that normalise were called with.
struct RmsNormInputs {
  RotaryInputs rotary;
  TensorView q_weight, k_weight;  // [D], or [H, D] and [Hk, D]
  double eps;
  bool unit_offset;
};

// Everything but the outputs.
RmsNormRotaryArgs check_rms_norm_rotary(const RmsNormInputs& in);

// grad_q, grad_k: of the shape of q and k; one may be absent. Everything but the outputs and the
// workspace.
RmsNormRotaryGradArgs check_rms_norm_rotary_grad(const RmsNormInputs& in,
                                                 const std::optional<TensorView>& grad_q,
                                                 const std::optional<TensorView>& grad_k);

// What angles are made of. Without position_ids: start, start + 1, ...
struct AngleInputs {
  const char* op;
  TensorView inv_freq;                     // [P]
  std::optional<TensorView> position_ids;  // of any shape; with axes [A, ...]
  std::optional<TensorView> axes;          // [P]
  int64_t start;
  double attention_scaling;
};

// Everything but where the data and the positions lie.
Angles check_angles(const AngleInputs& in);

// The positions of all tokens, one after the other; without position_ids, `length` of them.
int64_t check_length(const AngleInputs& in, int64_t length);

// The dtype of a table: the one asked for, or float32 (float64 for a float64 inv_freq).
torch::headeronly::ScalarType check_table_dtype(const char* op, const TensorView& inv_freq,
                                                std::optional<torch::headeronly::ScalarType> asked);

// Everything but the data of the tensors.
CosSinGradArgs check_cos_sin_grad(const AngleInputs& in, const TensorView& grad_cos,
                                  const TensorView& grad_sin);

// What an operator that rotates by angles was called with.
struct RotaryAtInputs {
  TensorView q, k;     // as in RotaryInputs
  AngleInputs angles;  // position_ids [S], [1|B, S] or [T]; with axes a leading A
  RotaryOptions options;
};

// Everything but the outputs and the data of inv_freq and axes.
RotaryAtArgs check_apply_rotary_at(const RotaryAtInputs& in);
void check_in_place(const RotaryAtInputs& in);

// What the operators were called with that rotate and write to a paged cache.
struct AppendInputs {
  RotaryInputs rotary;                         // q and k
  TensorView v;                                // of k's shape
  TensorView k_cache, v_cache;                 // [blocks, block_size, Hk, D]
  TensorView slot_mapping;                     // [B, S], [B * S] or [T], or shorter
  std::optional<TensorView> k_scale, v_scale;  // one, or [Hk]
};

struct LatentInputs {
  RotaryInputs rotary;              // q alone
  TensorView k_pe;                  // [B, S, R], [B, S, 1, R], [T, R] or [T, 1, R]
  TensorView kv_c;                  // [B, S, rank] or [T, rank]
  TensorView kv_cache;              // [blocks, block_size, rank + R]
  TensorView slot_mapping;          // as above
  std::optional<TensorView> scale;  // one
};

// Everything but the pointers that are written.
AppendArgs check_append(const AppendInputs& in);
AppendArgs check_append(const LatentInputs& in);

// Further: no element may be written twice, or be read while it is written.
void check_append_written(const AppendInputs& in);
void check_append_written(const LatentInputs& in);

}  // namespace rope
