// rms_norm_rotary_qk: q and k normalised by RMSNorm, then rotated; forward and backward.
#include <algorithm>
#include <vector>

#include "check/heads.h"
#include "check/norm.h"
#include "check/rotation.h"
#include "host/device.h"
#include "host/outputs.h"
#include "registration.h"

namespace rope {

namespace {

struct Inputs {
  Inputs(const char* op, const TensorView& q, const TensorView& k, const NormWeights& weights,
         const Rows& rows, const NormOptions& norm, const Rotation& rotation)
      : rotary(op, q, &k, rows, rotation),
        q_weight(weights.q_weight),
        k_weight(weights.k_weight),
        norm(norm) {}

  RotaryInputs rotary;
  TensorView q_weight, k_weight;  // [D], or [H, D] and [Hk, D]
  NormOptions norm;
};

// Makes it the transposed rotation, for gradients: this reads the pairs in the order of the result.
// The columns of the table keep their order.
void transpose(RotaryArgs& rotary) {
  std::swap(rotary.interleaved, rotary.interleaved_out);
  rotary.inverse = !rotary.inverse;
}

std::tuple<Tensor, Tensor> rms_norm_rotary_qk(const TokenTensor& q, const TokenTensor& k,
                                              const NormWeights& weights, const Rows& rows,
                                              const NormOptions& options,
                                              const AnyRotation& rotation) {
  const Inputs in("rms_norm_rotary_qk", q, k, weights, rows, options, rotation);
  check_device_supported(in.rotary.op, in.rotary.q);
  RmsNormRotaryArgs args{};
  args.rotary = check_apply_rotary(in.rotary);
  args.norm = check_norm(in.rotary, in.q_weight, in.k_weight, in.norm, args.rotary);
  Tensor out_q = dense_like(q), out_k = dense_like(k);
  set_output(args.rotary, args.rotary.q, out_q);
  set_output(args.rotary, args.rotary.k, out_k);
  run(in.rotary.q, args);
  return {std::move(out_q), std::move(out_k)};
}

// grad_q, grad_k: of the shape of q and k; one may be absent. Everything but the outputs and the
// workspace.
RmsNormRotaryGradArgs check_grad(const Inputs& in, const std::optional<TensorView>& grad_q,
                                 const std::optional<TensorView>& grad_k) {
  const char* const op = in.rotary.op;
  if (!grad_q && !grad_k) refuse(op, "grad_q or grad_k", "neither");
  RmsNormRotaryGradArgs args{};
  args.rotary = check_apply_rotary(in.rotary);
  args.norm = check_norm(in.rotary, in.q_weight, in.k_weight, in.norm, args.rotary);
  args.q = args.rotary.q.in;
  args.k = args.rotary.k.in;
  const auto set_grad = [&](const char* name, const std::optional<TensorView>& grad,
                            const char* x_name, const TensorView& x, RotatedHeads& heads) {
    heads.heads = grad ? heads.heads : 0;
    if (!grad) return;
    check_like(op, name, *grad, x_name, x);
    heads.in = heads_of(*grad, args.rotary.dtype, args.rotary.rotary_offset);
  };
  set_grad("grad_q", grad_q, "q", in.rotary.q, args.rotary.q);
  set_grad("grad_k", grad_k, "k", *in.rotary.k, args.rotary.k);
  transpose(args.rotary);

  // At most so many partial sums, each of at least so many tokens: they are small beside the
  // gradients, also where a sum has as many columns as q and k have channels.
  const int64_t tokens = args.rotary.batch * args.rotary.seq;
  const int64_t most = args.norm.all_heads ? 256 : 512, least = args.norm.all_heads ? 8 : 1;
  args.chunk_tokens = std::max((tokens + most - 1) / most, least);
  args.chunks = (tokens + args.chunk_tokens - 1) / args.chunk_tokens;
  args.q_columns = grad_q ? in.q_weight.numel() : 0;
  args.columns = args.q_columns + (grad_k ? in.k_weight.numel() : 0);
  return args;
}

// grad, where there is a gradient, else zeros.
Tensor zeros_unless(bool given, Tensor grad) {
  if (!given) grad.call().fill_zero(grad);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_rotary_qk_backward(
    const OptionalTensor& grad_q, const OptionalTensor& grad_k, const Tensor& q, const Tensor& k,
    const NormWeights& weights, const Rows& rows, const NormOptions& options,
    const AnyRotation& rotation) {
  const Inputs in("rms_norm_rotary_qk_backward", q, k, weights, rows, options, rotation);
  check_device_supported(in.rotary.op, in.rotary.q);
  RmsNormRotaryGradArgs args = check_grad(in, view(grad_q), view(grad_k));
  Tensor to_q = dense_like(q), to_k = dense_like(k);
  Tensor to_q_weight = new_like(weights.q_weight, weights.q_weight.sizes());
  Tensor to_k_weight = new_like(weights.k_weight, weights.k_weight.sizes());
  const std::vector<int64_t> partial_shape{args.chunks, args.columns};
  Tensor partial =
      new_like(q, partial_shape,
               args.rotary.dtype == DType::Float64 ? ScalarType::Double : ScalarType::Float);
  set_output(args.rotary, args.rotary.q, to_q);
  set_output(args.rotary, args.rotary.k, to_k);
  args.partial = partial.mutable_data_ptr();
  args.grad_q_weight = to_q_weight.mutable_data_ptr();
  args.grad_k_weight = to_k_weight.mutable_data_ptr();
  run(in.rotary.q, args);
  return {zeros_unless(grad_q.has_value(), std::move(to_q)),
          zeros_unless(grad_k.has_value(), std::move(to_k)),
          zeros_unless(grad_q.has_value(), std::move(to_q_weight)),
          zeros_unless(grad_k.has_value(), std::move(to_k_weight))};
}

}  // namespace

std::vector<Operator> rms_norm_operators() {
  return {boxed<&rms_norm_rotary_qk>("rms_norm_rotary_qk"),
          boxed<&rms_norm_rotary_qk_backward>("rms_norm_rotary_qk_backward")};
}

}  // namespace rope
