// The operators that rotate, and their gradient to cos and sin: checks, outputs, kernel.
#include <torch/csrc/stable/ops.h>

#include <array>

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

// aten operators that PyTorch's stable C++ functions lack.
template <class... Arguments>
StableIValue call_aten(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack[0];
}

// An alias of x is a leaf of the autograd graph if and only if x needs no gradient.
bool requires_grad(const Tensor& x) {
  using torch::stable::detail::to;
  const Tensor alias = to<Tensor>(call_aten("aten::alias", x));
  return !to<bool>(call_aten("aten::is_leaf", alias));
}

// Autograd has no part in the in-place operators, so a gradient would be wrong in silence.
void check_no_grad(const RotaryInputs& in) {
  const auto check = [&](const char* name, const Tensor& t) {
    if (requires_grad(t)) {
      refuse(in.op,
             text(name, " to need no gradient (the functions of rope_ext differentiate in place)"),
             "a tensor that requires grad");
    }
  };
  if (!aoti_torch_grad_mode_is_enabled()) return;
  check(in.k ? "q" : "x", in.q);
  if (in.k) check("k", *in.k);
  check("cos", in.cos);
  check("sin", in.sin);
}

// Tells autograd that x has been written: bumps its version counter, as PyTorch's own in-place
// operators do. Swapping a dimension with itself does that and nothing else.
void mark_written(const Tensor& x) {
  torch::stable::detail::to<Tensor>(call_aten("aten::transpose_", x, int64_t{0}, int64_t{0}));
}

}  // namespace

Tensor apply_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
                    const OptionalTensor& position_ids, OptionalInt rotary_dim, bool interleaved,
                    bool inverse) {
  const char* const op = "apply_rotary";
  check_device_supported(op, x);
  RotaryArgs args = check_apply_rotary(
      {op, x, nullptr, cos, sin, position_ids, rotary_dim, interleaved, inverse});
  Tensor out = output_like(x);
  set_output(args.q, out);
  rotate(x, args);
  return out;
}

std::tuple<Tensor, Tensor> apply_rotary_qk(const Tensor& q, const Tensor& k, const Tensor& cos,
                                           const Tensor& sin, const OptionalTensor& position_ids,
                                           OptionalInt rotary_dim, bool interleaved, bool inverse) {
  const char* const op = "apply_rotary_qk";
  check_device_supported(op, q);
  RotaryArgs args =
      check_apply_rotary({op, q, &k, cos, sin, position_ids, rotary_dim, interleaved, inverse});
  Tensor out_q = output_like(q);
  Tensor out_k = output_like(k);
  set_output(args.q, out_q);
  set_output(args.k, out_k);
  rotate(q, args);
  return {out_q, out_k};
}

void apply_rotary_(const Tensor& x, const Tensor& cos, const Tensor& sin,
                   const OptionalTensor& position_ids, OptionalInt rotary_dim, bool interleaved,
                   bool inverse) {
  const char* const op = "apply_rotary_";
  check_device_supported(op, x);
  const RotaryInputs in{op, x, nullptr, cos, sin, position_ids, rotary_dim, interleaved, inverse};
  const RotaryArgs args = check_apply_rotary(in);
  check_in_place(in);
  check_no_grad(in);
  rotate(x, args);
  mark_written(x);
}

void apply_rotary_qk_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                      const OptionalTensor& position_ids, OptionalInt rotary_dim, bool interleaved,
                      bool inverse) {
  const char* const op = "apply_rotary_qk_";
  check_device_supported(op, q);
  const RotaryInputs in{op, q, &k, cos, sin, position_ids, rotary_dim, interleaved, inverse};
  const RotaryArgs args = check_apply_rotary(in);
  check_in_place(in);
  check_no_grad(in);
  rotate(q, args);
  mark_written(q);
  mark_written(k);
}

std::tuple<Tensor, Tensor> apply_rotary_table_backward(
    const Tensor& grad_q, const Tensor& q, const OptionalTensor& grad_k, const OptionalTensor& k,
    const Tensor& cos, const OptionalTensor& token_order, const OptionalTensor& row_offsets,
    OptionalInt rotary_dim, bool interleaved, bool inverse) {
  const char* const op = "apply_rotary_table_backward";
  check_device_supported(op, q);
  RotaryTableGradArgs args = check_table_grad(
      {op, grad_q, q, grad_k, k, cos, token_order, row_offsets, rotary_dim, interleaved, inverse});
  Tensor grad_cos = torch::stable::new_empty(cos, cos.sizes());
  Tensor grad_sin = torch::stable::new_empty(cos, cos.sizes());
  args.grad_cos = grad_cos.mutable_data_ptr();
  args.grad_sin = grad_sin.mutable_data_ptr();
  run(q, args, &cpu::rotary_table_grad, &cuda::rotary_table_grad);
  return {grad_cos, grad_sin};
}

}  // namespace rope
