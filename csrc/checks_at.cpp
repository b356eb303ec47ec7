// Checks of the operators that rotate by angles instead of a table.
#include "check/heads.h"
#include "checks.h"

namespace rope {

namespace {

// position_ids for x: [S], [1|B, S] or [T], with axes of a leading A.
void place_positions(const RotaryAtInputs& in, const Sizes& sizes, TokenPositions& positions) {
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

}  // namespace

RotaryAtArgs check_apply_rotary_at(const RotaryAtInputs& in) {
  const char* const op = in.angles.op;
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
      check_rotary_offset(op, in.options.rotary_offset, args.rotary_dim, sizes.head_dim);
  if (in.angles.position_ids) {
    place_positions(in, sizes, args.angles.positions);
  } else {
    args.angles.positions.stride_s = 1;
  }
  args.interleaved = in.options.interleaved;
  args.interleaved_out = interleaved_out(in.options);
  args.inverse = in.options.inverse;
  args.q = rotated_heads(in.q, args.dtype, args.rotary_offset);
  args.k = rotated_heads(in.k, args.dtype, args.rotary_offset);
  return args;
}

}  // namespace rope
