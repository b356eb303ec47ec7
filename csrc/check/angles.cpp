#include "check/angles.h"

#include "check/parts.h"

namespace rope {

namespace {

PositionType check_position_type(const char* op, const char* name, const TensorView& ids) {
  switch (ids.scalar_type()) {
    case ScalarType::Int: return PositionType::Int32;
    case ScalarType::Long: return PositionType::Int64;
    case ScalarType::Double: return PositionType::Float64;
    case ScalarType::Float: return PositionType::Float32;
    case ScalarType::Half: return PositionType::Float16;
    case ScalarType::BFloat16: return PositionType::BFloat16;
    default:
      refuse(op, text(name, " to be int32, int64, float64, float32, float16 or bfloat16"),
             dtype_text(ids.scalar_type()));
  }
}

// axes [P], each in [0, A), for position_ids [A, ...]; returns A.
int64_t check_axes(const AngleInputs& in) {
  const char* const op = in.op;
  const TensorView& axes = *in.axes;
  check_int(op, "axes", axes);
  check_device(op, "axes", axes, "inv_freq", in.inv_freq);
  const int64_t pairs = in.inv_freq.size(0);
  if (axes.dim() != 1 || axes.size(0) != pairs) {
    refuse(op, text("axes to have shape [P] = [", pairs, "], as inv_freq"), shape_text(axes));
  }
  if (!in.position_ids) refuse(op, "position_ids with axes", "None");
  const TensorView& ids = *in.position_ids;
  if (ids.dim() == 0 || ids.size(0) == 0) {
    refuse(op, "position_ids to have shape [A, ...] with axes, A at least 1", shape_text(ids));
  }
  const int64_t count = ids.size(0);
  look_at_values(axes, [&](const TensorView& values) {
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t axis = index_at(values.const_data_ptr(),
                                    values.scalar_type() == ScalarType::Long, i * values.stride(0));
      if (is_inside(axis, count)) continue;
      refuse(op, text("axes in [0, ", count, "), the first dimension of position_ids"),
             text(axis, " at index [", i, "]"));
    }
  });
  return count;
}

}  // namespace

Angles check_angles(const AngleInputs& in) {
  Angles angles{};
  angles.op = in.op;
  if (in.inv_freq.dim() != 1) {
    refuse(in.op, text(in.inv_freq_name, " to have shape [P]"), shape_text(in.inv_freq));
  }
  angles.inv_freq_dtype = check_floating(in.op, in.inv_freq_name, in.inv_freq);
  angles.pairs = in.inv_freq.size(0);
  angles.attention_scaling = in.attention_scaling;
  angles.positions.axes = 1;
  angles.positions.start = in.start;
  if (in.position_ids) {
    const char* const name = in.position_ids_name;
    angles.positions.type = check_position_type(in.op, name, *in.position_ids);
    check_device(in.op, name, *in.position_ids, in.inv_freq_name, in.inv_freq);
  }
  if (in.axes) {
    angles.positions.axes = check_axes(in);
    angles.axes.int64 = in.axes->scalar_type() == ScalarType::Long;
  }
  return angles;
}

}  // namespace rope
