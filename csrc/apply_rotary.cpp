// The operators that rotate, and their gradient to cos and sin: checks, outputs, kernel.
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "device.h"
#include "operators.h"

namespace rope {

namespace {

// Dense, of x's shape and order of dimensions, as torch.empty_like; last stride 1.
Tensor output_like(const Tensor& x) {
  Tensor out = torch::stable::empty_like(x);
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && out.stride(last) != 1) return torch::stable::new_empty(x, x.sizes());
  return out;
}

void rotate(const Tensor& x, const RotaryArgs& args) {
  run(x, args, &cpu::apply_rotary, &cuda::apply_rotary);
}

}  // namespace

Tensor apply_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
                    const OptionalTensor& position_ids, OptionalInt rotary_dim,
                    int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                    bool inverse) {
  const char* const op = "apply_rotary";
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  check_device_supported(op, x);
  RotaryArgs args = check_apply_rotary({op, x, nullptr, cos, sin, position_ids, options});
  Tensor out = output_like(x);
  set_output(args.q, out, args.rotary_offset);
  rotate(x, args);
  return out;
}

std::tuple<Tensor, Tensor> apply_rotary_qk(const Tensor& q, const Tensor& k, const Tensor& cos,
                                           const Tensor& sin, const OptionalTensor& position_ids,
                                           OptionalInt rotary_dim, int64_t rotary_offset,
                                           bool interleaved, OptionalBool interleaved_out,
                                           bool inverse) {
  const char* const op = "apply_rotary_qk";
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  check_device_supported(op, q);
  RotaryArgs args = check_apply_rotary({op, q, &k, cos, sin, position_ids, options});
  Tensor out_q = output_like(q);
  Tensor out_k = output_like(k);
  set_output(args.q, out_q, args.rotary_offset);
  set_output(args.k, out_k, args.rotary_offset);
  rotate(q, args);
  return {out_q, out_k};
}

void apply_rotary_(const Tensor& x, const Tensor& cos, const Tensor& sin,
                   const OptionalTensor& position_ids, OptionalInt rotary_dim,
                   int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                   bool inverse) {
  const char* const op = "apply_rotary_";
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  check_device_supported(op, x);
  const RotaryInputs in{op, x, nullptr, cos, sin, position_ids, options};
  RotaryArgs args = check_apply_rotary(in);
  check_in_place(in);
  set_in_place(args.q, x, args.rotary_offset);
  rotate(x, args);
}

void apply_rotary_qk_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                      const OptionalTensor& position_ids, OptionalInt rotary_dim,
                      int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                      bool inverse) {
  const char* const op = "apply_rotary_qk_";
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  check_device_supported(op, q);
  const RotaryInputs in{op, q, &k, cos, sin, position_ids, options};
  RotaryArgs args = check_apply_rotary(in);
  check_in_place(in);
  set_in_place(args.q, q, args.rotary_offset);
  set_in_place(args.k, k, args.rotary_offset);
  rotate(q, args);
}

void apply_rotary_out(const Tensor& x, const Tensor& cos, const Tensor& sin,
                      const OptionalTensor& position_ids, OptionalInt rotary_dim,
                      int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                      bool inverse, const Tensor& out) {
  const char* const op = "apply_rotary.out";
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  check_device_supported(op, x);
  const RotaryInputs in{op, x, nullptr, cos, sin, position_ids, options};
  RotaryArgs args = check_apply_rotary(in);
  check_out(in, out, nullptr);
  set_output(args.q, out, args.rotary_offset);
  rotate(x, args);
}

void apply_rotary_qk_out(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                         const OptionalTensor& position_ids, OptionalInt rotary_dim,
                         int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                         bool inverse, const Tensor& out_q, const Tensor& out_k) {
  const char* const op = "apply_rotary_qk.out";
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  check_device_supported(op, q);
  const RotaryInputs in{op, q, &k, cos, sin, position_ids, options};
  RotaryArgs args = check_apply_rotary(in);
  check_out(in, out_q, &out_k);
  set_output(args.q, out_q, args.rotary_offset);
  set_output(args.k, out_k, args.rotary_offset);
  rotate(q, args);
}

std::tuple<Tensor, Tensor> apply_rotary_table_backward(
    const Tensor& grad_q, const Tensor& q, const OptionalTensor& grad_k, const OptionalTensor& k,
    const Tensor& cos, const OptionalTensor& token_order, const OptionalTensor& row_offsets,
    OptionalInt rotary_dim, int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
    bool inverse) {
  const char* const op = "apply_rotary_table_backward";
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  check_device_supported(op, q);
  RotaryTableGradArgs args =
      check_table_grad({op, grad_q, q, grad_k, k, cos, token_order, row_offsets, options});
  Tensor grad_cos = torch::stable::new_empty(cos, cos.sizes());
  Tensor grad_sin = torch::stable::new_empty(cos, cos.sizes());
  args.grad_cos = grad_cos.mutable_data_ptr();
  args.grad_sin = grad_sin.mutable_data_ptr();
  run(q, args, &cpu::rotary_table_grad, &cuda::rotary_table_grad);
  return {grad_cos, grad_sin};
}

}  // namespace rope
