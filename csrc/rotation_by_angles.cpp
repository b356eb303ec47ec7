// The operators that rotate by angles, without a table: checks, outputs, kernel.
#include "angle_tensors.h"
#include "checks.h"
#include "host/device.h"
#include "host/outputs.h"
#include "operators.h"

namespace rope {

namespace {

RotaryAtArgs check(const RotaryAtInputs& in) {
  check_device_supported(in.angles.op, in.q);
  return check_apply_rotary_at(in);
}

void rotate(const RotaryAtInputs& in, RotaryAtArgs& args, const Tensor& inv_freq,
            const OptionalTensor& axes) {
  const AngleTensors tensors(inv_freq, axes);
  tensors.set(args.angles);
  run(in.q, args, &cpu::apply_rotary_at, &cuda::apply_rotary_at);
}

}  // namespace

std::tuple<Tensor, Tensor> apply_rotary_qk_at(const Tensor& q, const Tensor& k,
                                              const Tensor& inv_freq,
                                              const OptionalTensor& position_ids,
                                              const OptionalTensor& axes, double attention_scaling,
                                              int64_t rotary_offset, bool interleaved,
                                              OptionalBool interleaved_out, bool inverse) {
  const AngleInputs angles{"apply_rotary_qk_at", inv_freq, view(position_ids),
                           view(axes),           0,        attention_scaling};
  const RotaryOptions options{std::nullopt, rotary_offset, interleaved, interleaved_out, inverse};
  const RotaryAtInputs in{q, k, angles, options};
  RotaryAtArgs args = check(in);
  Tensor out_q = new_output(args, args.q, q);
  Tensor out_k = new_output(args, args.k, k);
  rotate(in, args, inv_freq, axes);
  return {out_q, out_k};
}

void apply_rotary_qk_at_(const Tensor& q, const Tensor& k, const Tensor& inv_freq,
                         const OptionalTensor& position_ids, const OptionalTensor& axes,
                         double attention_scaling, int64_t rotary_offset, bool interleaved,
                         OptionalBool interleaved_out, bool inverse) {
  const AngleInputs angles{"apply_rotary_qk_at_", inv_freq, view(position_ids), view(axes), 0,
                           attention_scaling};
  const RotaryOptions options{std::nullopt, rotary_offset, interleaved, interleaved_out, inverse};
  const RotaryAtInputs in{q, k, angles, options};
  RotaryAtArgs args = check(in);
  check_in_place(in);
  set_in_place(args, args.q, q);
  set_in_place(args, args.k, k);
  rotate(in, args, inv_freq, axes);
}

}  // namespace rope
