// Checks of the operators that normalise q and k before they rotate them.
#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "check/heads.h"
#include "checks.h"

namespace rope {

namespace {

using torch::headeronly::ScalarType;

// [D], or [H, D] for the H heads of x. The result is where its first rotating channel is.
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

RmsNorm check_norm(const RmsNormInputs& in, const RotaryArgs& rotary) {
  const char* const op = in.rotary.op;
  const TensorView &q = in.rotary.q, &k = *in.rotary.k;
  RmsNorm norm{};
  norm.q_weight = check_weight(op, "q_weight", in.q_weight, "q", q, rotary, norm.dtype);
  norm.k_weight = check_weight(op, "k_weight", in.k_weight, "k", k, rotary, norm.dtype);
  check_dtype_like(op, "k_weight", in.k_weight, "q_weight", in.q_weight);
  norm.all_heads = in.q_weight.dim() == 2;
  if (in.k_weight.dim() != in.q_weight.dim()) {
    refuse(op,
           text("k_weight to have ", in.q_weight.dim(), " dimension", norm.all_heads ? "s" : "",
                ", as q_weight has"),
           shape_text(in.k_weight));
  }
  if (norm.all_heads) {
    norm.q_stride_h = in.q_weight.stride(0);
    norm.k_stride_h = in.k_weight.stride(0);
  }
  norm.eps = in.eps;
  norm.unit_offset = in.unit_offset;
  if (!(in.eps >= 0)) refuse(op, "eps to be at least 0", std::to_string(in.eps));
  return norm;
}

// The transposed rotation, which takes gradients back: it reads the result's order of pairs. The
// columns of the table keep theirs.
void turn_back(RotaryArgs& rotary) {
  std::swap(rotary.interleaved, rotary.interleaved_out);
  rotary.inverse = !rotary.inverse;
}

}  // namespace

RmsNormRotaryArgs check_rms_norm_rotary(const RmsNormInputs& in) {
  RmsNormRotaryArgs args{};
  args.rotary = check_apply_rotary(in.rotary);
  args.norm = check_norm(in, args.rotary);
  return args;
}

RmsNormRotaryGradArgs check_rms_norm_rotary_grad(const RmsNormInputs& in,
                                                 const std::optional<TensorView>& grad_q,
                                                 const std::optional<TensorView>& grad_k) {
  const char* const op = in.rotary.op;
  if (!grad_q && !grad_k) refuse(op, "grad_q or grad_k", "neither");
  RmsNormRotaryGradArgs args{};
  args.rotary = check_apply_rotary(in.rotary);
  args.norm = check_norm(in, args.rotary);
  args.q = args.rotary.q.in;
  args.k = args.rotary.k.in;
  const auto set_grad = [&](const char* name, const std::optional<TensorView>& grad,
                            const char* x_name, const TensorView& x, RotatedHeads& heads) {
    heads.heads = grad ? heads.heads : 0;
    if (!grad) return;
    check_sizes_like(op, name, *grad, x_name, x);
    check_dtype_like(op, name, *grad, x_name, x);
    check_device(op, name, *grad, x_name, x);
    check_last_stride(op, name, *grad);
    heads.in = heads_of(*grad, args.rotary.dtype, args.rotary.rotary_offset);
  };
  set_grad("grad_q", grad_q, "q", in.rotary.q, args.rotary.q);
  set_grad("grad_k", grad_k, "k", *in.rotary.k, args.rotary.k);
  turn_back(args.rotary);

  // At most so many partial sums, and of so many tokens at least where one has as many columns as
  // q and k have channels: they take a small part of the bytes that the gradients do.
  const int64_t tokens = args.rotary.batch * args.rotary.seq;
  const int64_t most = args.norm.all_heads ? 256 : 512, least = args.norm.all_heads ? 8 : 1;
  args.chunk_tokens = std::max((tokens + most - 1) / most, least);
  args.chunks = (tokens + args.chunk_tokens - 1) / args.chunk_tokens;
  args.q_columns = grad_q ? in.q_weight.numel() : 0;
  args.columns = args.q_columns + (grad_k ? in.k_weight.numel() : 0);
  return args;
}

}  // namespace rope
