// apply_rotary_table_backward: the gradient of a rotation to its cos and sin.
#include "check/heads.h"
#include "check/rotation.h"
#include "host/device.h"
#include "host/outputs.h"
#include "registration.h"

namespace rope {

namespace {

struct Inputs {
  const char* op;
  TensorView grad_q, q;  // of one shape
  std::optional<TensorView> grad_k, k;
  TensorView cos;                         // gives the shape and dtype of the gradient
  std::optional<TensorView> token_order;  // int64 [B * S]
  std::optional<TensorView> row_offsets;  // int64 [L + 1]
  Rotation rotation;
};

// Contiguous int64 [length].
const int64_t* check_index(const Inputs& in, const char* name, const TensorView& t,
                           int64_t length) {
  if (t.scalar_type() != ScalarType::Long || t.dim() != 1 || t.size(0) != length ||
      !t.is_contiguous()) {
    refuse(in.op, text(name, " to be contiguous int64 of shape [", length, "]"),
           text(dtype_text(t.scalar_type()), " ", shape_text(t)));
  }
  check_device(in.op, name, t, "q", in.q);
  return static_cast<const int64_t*>(t.const_data_ptr());
}

void check_tokens_of_rows(const Inputs& in, RotaryTableGradArgs& args) {
  if (in.token_order.has_value() != in.row_offsets.has_value()) {
    refuse(in.op, "token_order and row_offsets together", "one of them");
  }
  if (!in.token_order) return;
  const int64_t tokens = args.batch * args.seq;
  args.token_order = check_index(in, "token_order", *in.token_order, tokens);
  args.row_offsets = check_index(in, "row_offsets", *in.row_offsets, args.rows + 1);
  if (!in.q.is_cpu()) return;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t token = read_once(args.token_order + i);
    if (!is_inside(token, tokens)) {
      refuse(in.op, text("token_order in [0, ", tokens, ")"), text(token));
    }
  }
  int64_t last = 0;
  for (int64_t i = 0; i <= args.rows; ++i) {
    const int64_t offset = read_once(args.row_offsets + i);
    if (offset < last || offset > tokens) {
      refuse(in.op, text("row_offsets to rise from 0 to at most ", tokens), text(offset));
    }
    last = offset;
  }
}

// Everything but the outputs.
RotaryTableGradArgs check(const Inputs& in) {
  RotaryTableGradArgs args{};
  args.op = in.op;
  args.dtype = check_rotated(in.op, "q", in.q);
  check_like(in.op, "grad_q", in.grad_q, "q", in.q);
  if (in.k.has_value() != in.grad_k.has_value()) {
    refuse(in.op, "k and grad_k together", in.k ? "k alone" : "grad_k alone");
  }
  if (in.k) {
    check_k(in.op, in.q, *in.k);
    check_like(in.op, "grad_k", *in.grad_k, "k", *in.k);
  }

  const Sizes sizes = sizes_of(in.q);
  args.batch = sizes.batch;
  args.seq = sizes.seq;
  set_flags(args, in.rotation);
  const auto [table, rotary_dim, rotary_offset] =
      check_table(in.op, in.cos, in.cos, in.q, "q", in.token_order.has_value(), in.rotation);
  args.rotary_dim = rotary_dim;
  args.table_dtype = table.dtype;
  args.full_width = table.full_width;
  args.table_interleaved = table.interleaved;
  args.rows = table.rows;
  args.grad_batch = in.cos.dim() == 3 ? in.cos.size(0) : 1;
  check_tokens_of_rows(in, args);
  args.q = {heads_of(in.grad_q, args.dtype, rotary_offset),
            heads_of(in.q, args.dtype, rotary_offset), in.q.size(in.q.dim() - 2)};
  if (in.k) {
    args.k = {heads_of(*in.grad_k, args.dtype, rotary_offset),
              heads_of(*in.k, args.dtype, rotary_offset), in.k->size(in.k->dim() - 2)};
  }
  return args;
}

std::tuple<Tensor, Tensor> apply_rotary_table_backward(const Tensor& grad_q, const Tensor& q,
                                                       const OptionalTensor& grad_k,
                                                       const OptionalTensor& k, const Tensor& cos,
                                                       const OptionalTensor& token_order,
                                                       const OptionalTensor& row_offsets,
                                                       const AnyRotation& rotation) {
  const char* const op = "apply_rotary_table_backward";
  check_device_supported(op, q);
  RotaryTableGradArgs args = check(
      {op, grad_q, q, view(grad_k), view(k), cos, view(token_order), view(row_offsets), rotation});
  Tensor grad_cos = new_like(cos, cos.sizes());
  Tensor grad_sin = new_like(cos, cos.sizes());
  args.grad_cos = grad_cos.mutable_data_ptr();
  args.grad_sin = grad_sin.mutable_data_ptr();
  run(q, args);
  return {std::move(grad_cos), std::move(grad_sin)};
}

}  // namespace

std::vector<Operator> table_grad_operators() {
  return {boxed<&apply_rotary_table_backward>("apply_rotary_table_backward")};
}

}  // namespace rope
