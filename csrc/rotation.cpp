// The operators that rotate, and their gradient to cos and sin: checks, outputs, kernel.
#include "checks.h"
#include "host/allocation.h"
#include "host/device.h"
#include "host/outputs.h"
#include "operators.h"

namespace rope {

namespace {

RotaryArgs check(const RotaryInputs& in) {
  check_device_supported(in.op, in.q);
  return check_apply_rotary(in);
}

void rotate(const RotaryInputs& in, const RotaryArgs& args) {
  run(in.q, args, &cpu::apply_rotary, &cuda::apply_rotary);
}

}  // namespace

Tensor apply_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
                    const OptionalTensor& position_ids, OptionalInt rotary_dim,
                    int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                    bool inverse) {
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  const RotaryInputs in{"apply_rotary", x, std::nullopt, cos, sin, view(position_ids), options};
  RotaryArgs args = check(in);
  Tensor out = new_output(args, args.q, x);
  rotate(in, args);
  return out;
}

std::tuple<Tensor, Tensor> apply_rotary_qk(const Tensor& q, const Tensor& k, const Tensor& cos,
                                           const Tensor& sin, const OptionalTensor& position_ids,
                                           OptionalInt rotary_dim, int64_t rotary_offset,
                                           bool interleaved, OptionalBool interleaved_out,
                                           bool inverse) {
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  const RotaryInputs in{"apply_rotary_qk", q, k, cos, sin, view(position_ids), options};
  RotaryArgs args = check(in);
  Tensor out_q = new_output(args, args.q, q);
  Tensor out_k = new_output(args, args.k, k);
  rotate(in, args);
  return {out_q, out_k};
}

void apply_rotary_(const Tensor& x, const Tensor& cos, const Tensor& sin,
                   const OptionalTensor& position_ids, OptionalInt rotary_dim,
                   int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                   bool inverse) {
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  const RotaryInputs in{"apply_rotary_", x, std::nullopt, cos, sin, view(position_ids), options};
  RotaryArgs args = check(in);
  check_in_place(in);
  set_in_place(args, args.q, x);
  rotate(in, args);
}

void apply_rotary_qk_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                      const OptionalTensor& position_ids, OptionalInt rotary_dim,
                      int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                      bool inverse) {
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  const RotaryInputs in{"apply_rotary_qk_", q, k, cos, sin, view(position_ids), options};
  RotaryArgs args = check(in);
  check_in_place(in);
  set_in_place(args, args.q, q);
  set_in_place(args, args.k, k);
  rotate(in, args);
}

void apply_rotary_out(const Tensor& x, const Tensor& cos, const Tensor& sin,
                      const OptionalTensor& position_ids, OptionalInt rotary_dim,
                      int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                      bool inverse, const Tensor& out) {
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  const RotaryInputs in{"apply_rotary.out", x, std::nullopt, cos, sin, view(position_ids), options};
  RotaryArgs args = check(in);
  check_out(in, out, nullptr);
  set_output(args, args.q, out);
  rotate(in, args);
}

void apply_rotary_qk_out(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                         const OptionalTensor& position_ids, OptionalInt rotary_dim,
                         int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                         bool inverse, const Tensor& out_q, const Tensor& out_k) {
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  const RotaryInputs in{"apply_rotary_qk.out", q, k, cos, sin, view(position_ids), options};
  RotaryArgs args = check(in);
  const TensorView view_of_out_k(out_k);
  check_out(in, out_q, &view_of_out_k);
  set_output(args, args.q, out_q);
  set_output(args, args.k, out_k);
  rotate(in, args);
}

std::tuple<Tensor, Tensor> apply_rotary_table_backward(
    const Tensor& grad_q, const Tensor& q, const OptionalTensor& grad_k, const OptionalTensor& k,
    const Tensor& cos, const OptionalTensor& token_order, const OptionalTensor& row_offsets,
    OptionalInt rotary_dim, int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
    bool inverse) {
  const char* const op = "apply_rotary_table_backward";
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  check_device_supported(op, q);
  RotaryTableGradArgs args = check_table_grad(
      {op, grad_q, q, view(grad_k), view(k), cos, view(token_order), view(row_offsets), options});
  Tensor grad_cos = allocate(cos, cos.sizes());
  Tensor grad_sin = allocate(cos, cos.sizes());
  args.grad_cos = grad_cos.mutable_data_ptr();
  args.grad_sin = grad_sin.mutable_data_ptr();
  run(q, args, &cpu::rotary_table_grad, &cuda::rotary_table_grad);
  return {grad_cos, grad_sin};
}

}  // namespace rope
