#include "check/norm.h"

#include "check/parts.h"

namespace rope {

namespace {

// weight: [D], or [H, D] for the H heads of x. Sets dtype, and returns the pointer to the first
// channel that rotates.
const void* check_weight(const char* op, const char* name, const TensorView& weight,
                         const char* x_name, const TensorView& x, const RotaryArgs& rotary,
                         DType& dtype) {
  const int64_t heads = x.size(x.dim() - 2), rank = weight.dim();
  const bool fits = (rank == 1 || (rank == 2 && weight.size(0) == heads)) &&
                    weight.size(rank - 1) == rotary.head_dim;
  if (!fits) {
    refuse(op,
           text(name, " to have shape [", rotary.head_dim, "] or [", heads, ", ", rotary.head_dim,
                "], the heads and head_dim of ", x_name),
           shape_text(weight));
  }
  if (weight.scalar_type() != x.scalar_type() && weight.scalar_type() != ScalarType::Float) {
    const std::string of_x = dtype_text(x.scalar_type());
    refuse(op,
           x.scalar_type() == ScalarType::Float
               ? text(name, " of ", x_name, "'s dtype ", of_x)
               : text(name, " of ", x_name, "'s dtype ", of_x, " or float32"),
           dtype_text(weight.scalar_type()));
  }
  check_device(op, name, weight, x_name, x);
  check_last_stride(op, name, weight);
  dtype = *dtype_of(weight.scalar_type());
  const auto* const data = static_cast<const char*>(weight.const_data_ptr());
  return data == nullptr ? nullptr : data + rotary.rotary_offset * size_of(dtype);
}

}  // namespace

RmsNorm check_norm(const RotaryInputs& in, const TensorView& q_weight, const TensorView* k_weight,
                   const NormOptions& options, const RotaryArgs& rotary) {
  const char* const op = in.op;
  RmsNorm norm{};
  norm.q_weight = check_weight(op, k_weight ? "q_weight" : "weight", q_weight, in.q_name, in.q,
                               rotary, norm.dtype);
  norm.all_heads = q_weight.dim() == 2;
  if (norm.all_heads) norm.q_stride_h = q_weight.stride(0);
  if (k_weight) {
    norm.k_weight = check_weight(op, "k_weight", *k_weight, "k", *in.k, rotary, norm.dtype);
    check_dtype_like(op, "k_weight", *k_weight, "q_weight", q_weight);
    if (k_weight->dim() != q_weight.dim()) {
      refuse(op,
             text("k_weight to have ", q_weight.dim(), " dimension", norm.all_heads ? "s" : "",
                  ", as q_weight has"),
             shape_text(*k_weight));
    }
    if (norm.all_heads) norm.k_stride_h = k_weight->stride(0);
  }
  norm.eps = options.eps;
  norm.unit_offset = options.unit_offset;
  if (!(options.eps >= 0)) refuse(op, "eps to be at least 0", std::to_string(options.eps));
  return norm;
}

}  // namespace rope
