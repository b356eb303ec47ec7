// apply_rotary_qkv: the packed output of a projection becomes q, k and v; and the way back, for
// gradients.
#include "check/packed.h"
#include "check/rotation.h"
#include "host/destinations.h"
#include "host/device.h"
#include "registration.h"

namespace rope {

namespace {

std::tuple<Tensor, Tensor, Tensor> apply_rotary_qkv(const TokenTensor& qkv, const Rows& rows,
                                                    std::optional<int64_t> kv_heads,
                                                    const AnyRotation& rotation) {
  const char* const op = "apply_rotary_qkv";
  const Packing packing = check_packing(op, qkv, kv_heads);
  const HeadsOfGroup q(qkv, packing, 0, packing.q_heads);
  const HeadsOfGroup k(qkv, packing, packing.q_heads, packing.kv_heads);
  RotaryInputs in(op, q, &k, rows, rotation);
  in.q_name = "qkv";
  check_device_supported(op, qkv);
  RotaryQkvArgs args{};
  static_cast<RotaryArgs&>(args) = check_apply_rotary(in);
  args.groups = packing.groups;
  auto results = new_parts(qkv, packing, args, args.v);
  run(qkv, args);
  return results;
}

Tensor apply_rotary_qkv_backward(const OptionalTensor& grad_q, const OptionalTensor& grad_k,
                                 const OptionalTensor& grad_v, const Rows& rows, int64_t q_heads,
                                 int64_t kv_heads, bool by_group, const AnyRotation& rotation) {
  const char* const op = "apply_rotary_qkv_backward";
  const OptionalTensor* const grads[] = {&grad_q, &grad_k, &grad_v};
  const char* const names[] = {"grad_q", "grad_k", "grad_v"};
  int first = 0;
  while (first < 3 && !*grads[first]) ++first;
  if (first == 3) refuse(op, "grad_q, grad_k or grad_v", "none of them");
  const TensorView& given = **grads[first];

  check_device_supported(op, given);
  RotaryInputs in(op, given, nullptr, rows, rotation);
  in.q_name = names[first];
  RotaryQkvArgs args{};
  static_cast<RotaryArgs&>(args) = check_apply_rotary(in);
  const Packing packing = check_packing(op, q_heads, kv_heads, by_group, given.dim() - 2);
  args.groups = packing.groups;
  transpose(args);
  RotatedHeads* const parts[] = {&args.q, &args.k, &args.v};
  for (int i = 0; i < 3; ++i) {
    parts[i]->heads = i == 0 ? packing.q_heads : packing.kv_heads;
    parts[i]->in = {};
    if (!*grads[i]) continue;
    const TensorView& grad = **grads[i];
    check_part(op, names[i], grad, packing.groups * parts[i]->heads, packing.token_dims,
               names[first], given);
    parts[i]->in = heads_by_group(grad, grad.const_data_ptr(), parts[i]->heads, args);
  }
  const int64_t heads = packing.all_heads(), dim = args.head_dim;
  Tensor out = by_group ? new_tokens(given, packing.token_dims, {packing.groups, heads, dim})
                        : new_tokens(given, packing.token_dims, {heads, dim});
  void* const data = out.mutable_data_ptr();
  int64_t before = 0;
  for (RotatedHeads* part : parts) {
    part->out = packed_heads(out, data, packing, before, args);
    before += part->heads;
  }
  run(given, args);
  return out;
}

}  // namespace

std::vector<Operator> qkv_operators() {
  return {boxed<&apply_rotary_qkv>("apply_rotary_qkv"),
          boxed<&apply_rotary_qkv_backward>("apply_rotary_qkv_backward")};
}

}  // namespace rope
