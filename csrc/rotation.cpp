// apply_rotary and apply_rotary_qk: new, in place, and into given tensors.
#include "check/rotation.h"

#include "host/destinations.h"
#include "host/device.h"
#include "registration.h"

namespace rope {

namespace {

RotaryArgs check(const RotaryInputs& in) {
  check_device_supported(in.op, in.q);
  return check_apply_rotary(in);
}

// A call of one of the operators, checked; k is null for those on one tensor.
struct Rotating {
  Rotating(const char* op, const TensorView& q, const TensorView* k, const Rows& rows,
           const Rotation& rotation)
      : in(op, q, k, rows, rotation), args(check(in)) {}

  void run() const { rope::run(in.q, args); }

  const RotaryInputs in;
  RotaryArgs args;
};

void rotate_in_place(Rotating call) {
  const RotaryInputs& in = call.in;
  const Named read[] = {{"cos", in.cos}, {"sin", in.sin}, {"position_ids", in.position_ids}};
  write_in_place(in, call.args, read);
  call.run();
}

// out_k is null for the operator on one tensor.
void rotate_into(Rotating call, const TensorView& out_q, const TensorView* out_k) {
  const RotaryInputs& in = call.in;
  const Named read[] = {{in.q_name, in.q},
                        {"k", in.k},
                        {"cos", in.cos},
                        {"sin", in.sin},
                        {"position_ids", in.position_ids}};
  write_into(out_q, out_k, in, call.args, read);
  call.run();
}

Tensor apply_rotary(const TokenTensor& x, const Rows& rows, const AnyRotation& rotation) {
  Rotating call("apply_rotary", x, nullptr, rows, rotation);
  Tensor out = new_output(call.args, call.args.q, x);
  call.run();
  return out;
}

std::tuple<Tensor, Tensor> apply_rotary_qk(const TokenTensor& q, const TokenTensor& k,
                                           const Rows& rows, const AnyRotation& rotation) {
  Rotating call("apply_rotary_qk", q, &k, rows, rotation);
  Tensor out_q = new_output(call.args, call.args.q, q);
  Tensor out_k = new_output(call.args, call.args.k, k);
  call.run();
  return {std::move(out_q), std::move(out_k)};
}

void apply_rotary_(const TokenTensor& x, const Rows& rows, const AnyRotation& rotation) {
  rotate_in_place({"apply_rotary_", x, nullptr, rows, rotation});
}

void apply_rotary_qk_(const TokenTensor& q, const TokenTensor& k, const Rows& rows,
                      const AnyRotation& rotation) {
  rotate_in_place({"apply_rotary_qk_", q, &k, rows, rotation});
}

void apply_rotary_out(const TokenTensor& x, const Rows& rows, const AnyRotation& rotation,
                      const TokenTensor& out) {
  rotate_into({"apply_rotary.out", x, nullptr, rows, rotation}, out, nullptr);
}

void apply_rotary_qk_out(const TokenTensor& q, const TokenTensor& k, const Rows& rows,
                         const AnyRotation& rotation, const TokenTensor& out_q,
                         const TokenTensor& out_k) {
  rotate_into({"apply_rotary_qk.out", q, &k, rows, rotation}, out_q, &out_k);
}

}  // namespace

std::vector<Operator> rotation_operators() {
  return {boxed<&apply_rotary>("apply_rotary"),
          boxed<&apply_rotary_qk>("apply_rotary_qk"),
          boxed<&apply_rotary_>("apply_rotary_"),
          boxed<&apply_rotary_qk_>("apply_rotary_qk_"),
          boxed<&apply_rotary_out>("apply_rotary.out"),
          boxed<&apply_rotary_qk_out>("apply_rotary_qk.out")};
}

}  // namespace rope
