// rms_norm_rotary, rms_norm_rotary_qk and rms_norm_rotary_qkv: one tensor, q and k, or a packed qkv
// normalised by RMSNorm, then rotated; and their backward.
#include <algorithm>
#include <optional>
#include <vector>

#include "check/heads.h"
#include "check/norm.h"
#include "check/packed.h"
#include "host/destinations.h"
#include "host/device.h"
#include "registration.h"

namespace rope {

namespace {

// k and k_weight are null for the operators on one tensor.
struct Inputs {
  Inputs(const char* op, const TensorView& q, const TensorView* k, const TensorView& q_weight,
         const TensorView* k_weight, const Rows& rows, const NormOptions& norm,
         const Rotation& rotation)
      : rotary(op, q, k, rows, rotation), q_weight(q_weight), norm(norm) {
    if (k_weight != nullptr) this->k_weight.emplace(*k_weight);
    q_weight_name = k_weight != nullptr ? "q_weight" : "weight";
  }

  RotaryInputs rotary;
  const char* q_weight_name;           // weight for the operators on one tensor
  TensorView q_weight;                 // [D], or [H, D]
  std::optional<TensorView> k_weight;  // [D], or [Hk, D]
  NormOptions norm;
};

RmsNorm norm_of(const Inputs& in, const RotaryArgs& rotary) {
  return check_norm(in.rotary, in.q_weight, in.k_weight ? &*in.k_weight : nullptr, in.norm, rotary);
}

// A call of one of the operators that are no backward, checked.
struct Norming {
  explicit Norming(const Inputs& inputs) : in(inputs) {
    check_device_supported(in.rotary.op, in.rotary.q);
    args.rotary = check_apply_rotary(in.rotary);
    args.norm = norm_of(in, args.rotary);
  }

  void run() const { rope::run(in.rotary.q, args); }

  const Inputs in;
  RmsNormRotaryArgs args{};
};

void norm_in_place(Norming call) {
  const RotaryInputs& in = call.in.rotary;
  const Named read[] = {{call.in.q_weight_name, call.in.q_weight},
                        {"k_weight", call.in.k_weight},
                        {"cos", in.cos},
                        {"sin", in.sin},
                        {"position_ids", in.position_ids}};
  write_in_place(in, call.args.rotary, read);
  call.run();
}

// out_k is null for the operator on one tensor.
void norm_into(Norming call, const TensorView& out_q, const TensorView* out_k) {
  const RotaryInputs& in = call.in.rotary;
  const Named read[] = {{in.q_name, in.q},
                        {"k", in.k},
                        {call.in.q_weight_name, call.in.q_weight},
                        {"k_weight", call.in.k_weight},
                        {"cos", in.cos},
                        {"sin", in.sin},
                        {"position_ids", in.position_ids}};
  write_into(out_q, out_k, in, call.args.rotary, read);
  call.run();
}

Norming one(const char* op, const TensorView& x, const TensorView& weight, const Rows& rows,
            const NormOptions& options, const Rotation& rotation) {
  return Norming({op, x, nullptr, weight, nullptr, rows, options, rotation});
}

Norming both(const char* op, const TensorView& q, const TensorView& k, const NormWeights& weights,
             const Rows& rows, const NormOptions& options, const Rotation& rotation) {
  return Norming({op, q, &k, weights.q_weight, &weights.k_weight, rows, options, rotation});
}

Tensor rms_norm_rotary(const TokenTensor& x, const Tensor& weight, const Rows& rows,
                       const NormOptions& options, const AnyRotation& rotation) {
  Norming call = one("rms_norm_rotary", x, weight, rows, options, rotation);
  Tensor out = new_output(call.args.rotary, call.args.rotary.q, x);
  call.run();
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_rotary_qk(const TokenTensor& q, const TokenTensor& k,
                                              const NormWeights& weights, const Rows& rows,
                                              const NormOptions& options,
                                              const AnyRotation& rotation) {
  Norming call = both("rms_norm_rotary_qk", q, k, weights, rows, options, rotation);
  Tensor out_q = new_output(call.args.rotary, call.args.rotary.q, q);
  Tensor out_k = new_output(call.args.rotary, call.args.rotary.k, k);
  call.run();
  return {std::move(out_q), std::move(out_k)};
}

void rms_norm_rotary_(const TokenTensor& x, const Tensor& weight, const Rows& rows,
                      const NormOptions& options, const AnyRotation& rotation) {
  norm_in_place(one("rms_norm_rotary_", x, weight, rows, options, rotation));
}

void rms_norm_rotary_qk_(const TokenTensor& q, const TokenTensor& k, const NormWeights& weights,
                         const Rows& rows, const NormOptions& options,
                         const AnyRotation& rotation) {
  norm_in_place(both("rms_norm_rotary_qk_", q, k, weights, rows, options, rotation));
}

void rms_norm_rotary_out(const TokenTensor& x, const Tensor& weight, const Rows& rows,
                         const NormOptions& options, const AnyRotation& rotation,
                         const TokenTensor& out) {
  norm_into(one("rms_norm_rotary.out", x, weight, rows, options, rotation), out, nullptr);
}

void rms_norm_rotary_qk_out(const TokenTensor& q, const TokenTensor& k, const NormWeights& weights,
                            const Rows& rows, const NormOptions& options,
                            const AnyRotation& rotation, const TokenTensor& out_q,
                            const TokenTensor& out_k) {
  norm_into(both("rms_norm_rotary_qk.out", q, k, weights, rows, options, rotation), out_q, &out_k);
}

// Everything but the gradients that come in, the outputs and the workspace.
RmsNormRotaryGradArgs check_forward(const Inputs& in) {
  RmsNormRotaryGradArgs args{};
  args.rotary = check_apply_rotary(in.rotary);
  args.norm = norm_of(in, args.rotary);
  args.q = args.rotary.q.in;
  args.k = args.rotary.k.in;
  args.rotary.q.heads = args.rotary.k.heads = 0;
  transpose(args.rotary);
  return args;
}

// How the sums over tokens are divided: at most so many partial sums, each of at least so many
// tokens. They are small beside the gradients, also where a sum has as many columns as q and k have
// channels.
void divide_tokens(const Inputs& in, bool of_q, bool of_k, RmsNormRotaryGradArgs& args) {
  const int64_t tokens = args.rotary.batch * args.rotary.seq;
  const int64_t most = args.norm.all_heads ? 256 : 512, least = args.norm.all_heads ? 8 : 1;
  args.chunk_tokens = std::max((tokens + most - 1) / most, least);
  args.chunks = (tokens + args.chunk_tokens - 1) / args.chunk_tokens;
  args.q_columns = of_q ? in.q_weight.numel() : 0;
  args.columns = args.q_columns + (of_k ? in.k_weight->numel() : 0);
}

// grad_q, grad_k: of the shape of q and k; one may be absent. Everything but the outputs and the
// workspace.
RmsNormRotaryGradArgs check_grad(const Inputs& in, const std::optional<TensorView>& grad_q,
                                 const std::optional<TensorView>& grad_k) {
  const RotaryInputs& rotary = in.rotary;
  check_device_supported(rotary.op, rotary.q);
  if (!grad_q && !grad_k) refuse(rotary.op, "grad_q or grad_k", "neither");
  RmsNormRotaryGradArgs args = check_forward(in);
  const auto set_grad = [&](const std::optional<TensorView>& grad, const char* x_name,
                            const TensorView& x, RotatedHeads& heads) {
    if (!grad) return;
    check_like(rotary.op, text("grad_", x_name).c_str(), *grad, x_name, x);
    heads = rotated_heads(*grad, args.rotary.dtype, args.rotary.rotary_offset);
  };
  set_grad(grad_q, rotary.q_name, rotary.q, args.rotary.q);
  if (rotary.k) set_grad(grad_k, "k", *rotary.k, args.rotary.k);
  divide_tokens(in, grad_q.has_value(), grad_k.has_value(), args);
  return args;
}

// New gradients to x and to its weight.
struct NewGrads {
  NewGrads(RmsNormRotaryGradArgs& args, RotatedHeads& heads, const TensorView& x,
           const TensorView& weight, void*& to_weight)
      : x(dense_like(x)), weight(new_like(weight, weight.sizes())) {
    set_output(args.rotary, heads, this->x);
    to_weight = this->weight.mutable_data_ptr();
  }

  Tensor x, weight;
};

void run_grad(const TensorView& q, RmsNormRotaryGradArgs& args) {
  const std::vector<int64_t> partial_shape{args.chunks, args.columns};
  const Tensor partial =
      new_like(q, partial_shape,
               args.rotary.dtype == DType::Float64 ? ScalarType::Double : ScalarType::Float);
  args.partial = partial.mutable_data_ptr();
  run(q, args);
}

std::tuple<Tensor, Tensor> rms_norm_rotary_backward(const Tensor& grad_x, const Tensor& x,
                                                    const Tensor& weight, const Rows& rows,
                                                    const NormOptions& options,
                                                    const AnyRotation& rotation) {
  const Inputs in("rms_norm_rotary_backward", x, nullptr, weight, nullptr, rows, options, rotation);
  RmsNormRotaryGradArgs args = check_grad(in, grad_x, std::nullopt);
  NewGrads to(args, args.rotary.q, x, weight, args.grad_q_weight);
  run_grad(x, args);
  return {std::move(to.x), std::move(to.weight)};
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
  const Inputs in("rms_norm_rotary_qk_backward", q, &k, weights.q_weight, &weights.k_weight, rows,
                  options, rotation);
  RmsNormRotaryGradArgs args = check_grad(in, view(grad_q), view(grad_k));
  NewGrads to_q(args, args.rotary.q, q, weights.q_weight, args.grad_q_weight);
  NewGrads to_k(args, args.rotary.k, k, weights.k_weight, args.grad_k_weight);
  run_grad(q, args);
  const bool has_q = grad_q.has_value(), has_k = grad_k.has_value();
  return {zeros_unless(has_q, std::move(to_q.x)), zeros_unless(has_k, std::move(to_k.x)),
          zeros_unless(has_q, std::move(to_q.weight)), zeros_unless(has_k, std::move(to_k.weight))};
}

// ---- packed

// A call with a packed qkv, whose rows of all heads can't lie in groups.
struct PackedInputs {
  PackedInputs(const char* op, const TensorView& qkv, std::optional<int64_t> kv_heads,
               const NormWeights& weights, const Rows& rows, const NormOptions& options,
               const Rotation& rotation)
      : packing(check_packing(op, qkv, kv_heads)),
        q(qkv, packing, 0, packing.q_heads),
        k(qkv, packing, packing.q_heads, packing.kv_heads),
        in(op, q, &k, weights.q_weight, &weights.k_weight, rows, options, rotation) {
    in.rotary.q_name = "qkv";
    check_device_supported(op, qkv);
    if (packing.by_group && weights.q_weight.dim() == 2) {
      refuse(op,
             text("q_weight to have shape [", qkv.size(qkv.dim() - 1),
                  "], as heads that come by group are normalised one by one"),
             shape_text(weights.q_weight));
    }
  }

  const Packing packing;
  const HeadsOfGroup q, k;
  Inputs in;
};

std::tuple<Tensor, Tensor, Tensor> rms_norm_rotary_qkv(const TokenTensor& qkv,
                                                       const NormWeights& weights, const Rows& rows,
                                                       std::optional<int64_t> kv_heads,
                                                       const NormOptions& options,
                                                       const AnyRotation& rotation) {
  const PackedInputs packed("rms_norm_rotary_qkv", qkv, kv_heads, weights, rows, options, rotation);
  const Packing& packing = packed.packing;
  RmsNormRotaryArgs args{};
  args.rotary = check_apply_rotary(packed.in.rotary);
  args.norm = norm_of(packed.in, args.rotary);
  args.groups = packing.groups;
  auto results = new_parts(qkv, packing, args.rotary, args.v);
  run(qkv, args);
  return results;
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_rotary_qkv_backward(
    const OptionalTensor& grad_q, const OptionalTensor& grad_k, const OptionalTensor& grad_v,
    const Tensor& qkv, const NormWeights& weights, const Rows& rows,
    std::optional<int64_t> kv_heads, const NormOptions& options, const AnyRotation& rotation) {
  const char* const op = "rms_norm_rotary_qkv_backward";
  const PackedInputs packed(op, qkv, kv_heads, weights, rows, options, rotation);
  const Packing& packing = packed.packing;
  if (!grad_q && !grad_k && !grad_v) refuse(op, "grad_q, grad_k or grad_v", "none of them");
  RmsNormRotaryGradArgs args = check_forward(packed.in);
  args.q.stride_g = args.k.stride_g = packing.by_group ? qkv.stride(packing.token_dims) : 0;
  args.groups = packing.groups;
  const auto set_grad = [&](const char* name, const OptionalTensor& grad, int64_t heads,
                            RotatedHeads& x) {
    x.heads = heads;
    x.in = {};
    if (!grad) return;
    check_part(op, name, *grad, packing.groups * heads, packing.token_dims, "qkv", qkv);
    x.in = heads_by_group(*grad, grad->const_data_ptr(), heads, args.rotary);
  };
  set_grad("grad_q", grad_q, packing.q_heads, args.rotary.q);
  set_grad("grad_k", grad_k, packing.kv_heads, args.rotary.k);
  set_grad("grad_v", grad_v, packing.kv_heads, args.v);
  const bool has_q = grad_q.has_value(), has_k = grad_k.has_value();
  divide_tokens(packed.in, has_q, has_k, args);

  Tensor out = dense_like(qkv);
  void* const data = out.mutable_data_ptr();
  args.rotary.q.out = packed_heads(out, data, packing, 0, args.rotary);
  args.rotary.k.out = packed_heads(out, data, packing, packing.q_heads, args.rotary);
  args.v.out = packed_heads(out, data, packing, packing.q_heads + packing.kv_heads, args.rotary);
  Tensor to_q_weight = new_like(weights.q_weight, weights.q_weight.sizes());
  Tensor to_k_weight = new_like(weights.k_weight, weights.k_weight.sizes());
  args.grad_q_weight = to_q_weight.mutable_data_ptr();
  args.grad_k_weight = to_k_weight.mutable_data_ptr();
  run_grad(qkv, args);
  return {std::move(out), zeros_unless(has_q, std::move(to_q_weight)),
          zeros_unless(has_k, std::move(to_k_weight))};
}

}  // namespace

std::vector<Operator> rms_norm_operators() {
  return {boxed<&rms_norm_rotary>("rms_norm_rotary"),
          boxed<&rms_norm_rotary_qk>("rms_norm_rotary_qk"),
          boxed<&rms_norm_rotary_>("rms_norm_rotary_"),
          boxed<&rms_norm_rotary_qk_>("rms_norm_rotary_qk_"),
          boxed<&rms_norm_rotary_out>("rms_norm_rotary.out"),
          boxed<&rms_norm_rotary_qk_out>("rms_norm_rotary_qk.out"),
          boxed<&rms_norm_rotary_backward>("rms_norm_rotary_backward"),
          boxed<&rms_norm_rotary_qk_backward>("rms_norm_rotary_qk_backward"),
          boxed<&rms_norm_rotary_qkv>("rms_norm_rotary_qkv"),
          boxed<&rms_norm_rotary_qkv_backward>("rms_norm_rotary_qkv_backward")};
}

}  // namespace rope
