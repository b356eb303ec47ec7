// apply_rotary_qk_at: rotations by angles that are computed on the way, without a table.
#include "check/angles.h"
#include "check/heads.h"
#include "check/rotation.h"
#include "check/written.h"
#include "host/angle_tensors.h"
#include "host/device.h"
#include "host/outputs.h"
#include "registration.h"

namespace rope {

namespace {

struct Inputs {
  TensorView q, k;     // [B, S, H, D] or [T, H, D]
  AngleInputs angles;  // position_ids [S], [1|B, S] or [T]; with axes a leading A
  Rotation rotation;
};

// Sets the data and the strides of the positions.
void check_positions(const Inputs& in, const Sizes& sizes, TokenPositions& positions) {
  const TensorView& ids = *in.angles.position_ids;
  const int64_t first = in.angles.axes ? 1 : 0, rank = ids.dim() - first;
  const bool fits = (rank == 1 && ids.size(first) == sizes.seq) ||
                    (rank == 2 && !sizes.packed && ids.size(first + 1) == sizes.seq &&
                     (ids.size(first) == 1 || ids.size(first) == sizes.batch));
  if (!fits) {
    const char* const a = in.angles.axes ? "A, " : "";
    refuse(in.angles.op,
           sizes.packed ? text("position_ids to have shape [", a, "T] with T = ", sizes.seq)
                        : text("position_ids to have shape [", a, "S] or [", a,
                               "1|B, S] with B = ", sizes.batch, ", S = ", sizes.seq),
           shape_text(ids));
  }
  positions.data = ids.const_data_ptr();
  if (first == 1) positions.stride_axis = ids.stride(0);
  if (rank == 2 && ids.size(first) > 1) positions.stride_b = ids.stride(first);
  positions.stride_s = ids.stride(first + rank - 1);
}

// Everything but the outputs and the data of inv_freq and axes.
RotaryAtArgs check(const Inputs& in) {
  const char* const op = in.angles.op;
  check_device_supported(op, in.q);
  RotaryAtArgs args{};
  args.op = op;
  args.dtype = check_rotated(op, "q", in.q);
  check_k(op, in.q, in.k);
  check_device(op, "inv_freq", in.angles.inv_freq, "q", in.q);
  args.angles = check_angles(in.angles);

  const Sizes sizes = sizes_of(in.q);
  args.batch = sizes.batch;
  args.seq = sizes.seq;
  args.head_dim = sizes.head_dim;
  args.rotary_dim = check_rotary_dim(op, std::nullopt, args.angles.pairs, "the length of inv_freq",
                                     sizes.head_dim, false);
  args.rotary_offset =
      check_rotary_offset(op, in.rotation.rotary_offset, args.rotary_dim, sizes.head_dim);
  if (in.angles.position_ids) {
    check_positions(in, sizes, args.angles.positions);
  } else {
    args.angles.positions.stride_s = 1;
  }
  set_flags(args, in.rotation);
  args.q = rotated_heads(in.q, args.dtype, args.rotary_offset);
  args.k = rotated_heads(in.k, args.dtype, args.rotary_offset);
  return args;
}

void rotate(const Inputs& in, RotaryAtArgs& args) {
  AngleTensors tensors;
  tensors.set(args.angles, in.angles);
  run(in.q, args);
}

std::tuple<Tensor, Tensor> apply_rotary_qk_at(const TokenTensor& q, const TokenTensor& k,
                                              const AngleSource& angles, double attention_scaling,
                                              const RotationByAngles& rotation) {
  const Inputs in{q, k, angle_inputs("apply_rotary_qk_at", angles, 0, attention_scaling), rotation};
  RotaryAtArgs args = check(in);
  Tensor out_q = new_output(args, args.q, q);
  Tensor out_k = new_output(args, args.k, k);
  rotate(in, args);
  return {std::move(out_q), std::move(out_k)};
}

void apply_rotary_qk_at_(const TokenTensor& q, const TokenTensor& k, const AngleSource& angles,
                         double attention_scaling, const RotationByAngles& rotation) {
  const char* const op = "apply_rotary_qk_at_";
  const Inputs in{q, k, angle_inputs(op, angles, 0, attention_scaling), rotation};
  RotaryAtArgs args = check(in);
  check_order_stays(op, rotation);
  const Named written[] = {{"q", in.q}, {"k", in.k}};
  const Named read[] = {{"inv_freq", in.angles.inv_freq},
                        {"position_ids", in.angles.position_ids},
                        {"axes", in.angles.axes}};
  check_written(op, written, read);
  set_in_place(args, args.q, q);
  set_in_place(args, args.k, k);
  rotate(in, args);
}

}  // namespace

std::vector<Operator> rotation_by_angles_operators() {
  return {boxed<&apply_rotary_qk_at>("apply_rotary_qk_at"),
          boxed<&apply_rotary_qk_at_>("apply_rotary_qk_at_")};
}

}  // namespace rope
