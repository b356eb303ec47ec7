// The operators that normalise q and k and rotate them, forward and backward: checks, outputs,
// kernel.
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "host/allocation.h"
#include "host/device.h"
#include "host/outputs.h"
#include "operators.h"

namespace rope {

namespace {

// grad, where there is a gradient, else zeros.
Tensor zeros_unless(bool given, Tensor grad) { return given ? grad : torch::stable::zero_(grad); }

}  // namespace

std::tuple<Tensor, Tensor> rms_norm_rotary_qk(const Tensor& q, const Tensor& k,
                                              const Tensor& q_weight, const Tensor& k_weight,
                                              const Tensor& cos, const Tensor& sin,
                                              const OptionalTensor& position_ids, double eps,
                                              bool unit_offset, OptionalInt rotary_dim,
                                              int64_t rotary_offset, bool interleaved,
                                              OptionalBool interleaved_out, bool inverse) {
  const char* const op = "rms_norm_rotary_qk";
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  check_device_supported(op, q);
  RmsNormRotaryArgs args = check_rms_norm_rotary(
      {{op, q, k, cos, sin, view(position_ids), options}, q_weight, k_weight, eps, unit_offset});
  Tensor out_q = dense_like(q), out_k = dense_like(k);
  set_output(args.rotary, args.rotary.q, out_q);
  set_output(args.rotary, args.rotary.k, out_k);
  run(q, args, &cpu::rms_norm_rotary, &cuda::rms_norm_rotary);
  return {out_q, out_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_rotary_qk_backward(
    const OptionalTensor& grad_q, const OptionalTensor& grad_k, const Tensor& q, const Tensor& k,
    const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos, const Tensor& sin,
    const OptionalTensor& position_ids, double eps, bool unit_offset, OptionalInt rotary_dim,
    int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out, bool inverse) {
  const char* const op = "rms_norm_rotary_qk_backward";
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, interleaved_out, inverse};
  check_device_supported(op, q);
  RmsNormRotaryGradArgs args = check_rms_norm_rotary_grad(
      {{op, q, k, cos, sin, view(position_ids), options}, q_weight, k_weight, eps, unit_offset},
      view(grad_q), view(grad_k));
  Tensor to_q = dense_like(q), to_k = dense_like(k);
  Tensor to_q_weight = allocate(q_weight, q_weight.sizes());
  Tensor to_k_weight = allocate(k_weight, k_weight.sizes());
  const std::vector<int64_t> partial_shape{args.chunks, args.columns};
  Tensor partial =
      allocate(q, partial_shape,
               args.rotary.dtype == DType::Float64 ? ScalarType::Double : ScalarType::Float);
  set_output(args.rotary, args.rotary.q, to_q);
  set_output(args.rotary, args.rotary.k, to_k);
  args.partial = partial.mutable_data_ptr();
  args.grad_q_weight = to_q_weight.mutable_data_ptr();
  args.grad_k_weight = to_k_weight.mutable_data_ptr();
  run(q, args, &cpu::rms_norm_rotary_grad, &cuda::rms_norm_rotary_grad);
  return {zeros_unless(grad_q.has_value(), to_q), zeros_unless(grad_k.has_value(), to_k),
          zeros_unless(grad_q.has_value(), to_q_weight),
          zeros_unless(grad_k.has_value(), to_k_weight)};
}

}  // namespace rope
