#include "check/parts.h"
#include "checks.h"

namespace rope {

using torch::headeronly::ScalarType;

namespace {

PositionType check_position_type(const char* op, const TensorView& ids) {
  switch (ids.scalar_type()) {
    case ScalarType::Int: return PositionType::Int32;
    case ScalarType::Long: return PositionType::Int64;
    case ScalarType::Double: return PositionType::Float64;
    case ScalarType::Float: return PositionType::Float32;
    case ScalarType::Half: return PositionType::Float16;
    case ScalarType::BFloat16: return PositionType::BFloat16;
    default:
      refuse(op, "position_ids to be int32, int64, float64, float32, float16 or bfloat16",
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
    refuse(in.op, "inv_freq to have shape [P]", shape_text(in.inv_freq));
  }
  angles.inv_freq_dtype = check_floating(in.op, "inv_freq", in.inv_freq);
  angles.pairs = in.inv_freq.size(0);
  angles.attention_scaling = in.attention_scaling;
  angles.positions.axes = 1;
  angles.positions.start = in.start;
  if (in.position_ids) {
    angles.positions.type = check_position_type(in.op, *in.position_ids);
    check_device(in.op, "position_ids", *in.position_ids, "inv_freq", in.inv_freq);
  }
  if (in.axes) {
    angles.positions.axes = check_axes(in);
    angles.axes.int64 = in.axes->scalar_type() == ScalarType::Long;
  }
  return angles;
}

int64_t check_length(const AngleInputs& in, int64_t length) {
  if (in.position_ids) return in.position_ids->numel() / (in.axes ? in.position_ids->size(0) : 1);
  constexpr int64_t kPositions = int64_t{1} << 53;
  if (length < 0) refuse(in.op, "length to be at least 0", text(length));
  if (in.start <= -kPositions || in.start > kPositions - length) {
    refuse(in.op, "start and start + length within +-2^53", text("start ", in.start));
  }
  return length;
}

ScalarType check_table_dtype(const char* op, const TensorView& inv_freq,
                             std::optional<ScalarType> asked) {
  if (!asked) {
    return inv_freq.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
  switch (*asked) {
    case ScalarType::Double:
    case ScalarType::Float:
    case ScalarType::Half:
    case ScalarType::BFloat16: return *asked;
    default: refuse(op, "dtype to be float64, float32, float16 or bfloat16", dtype_text(*asked));
  }
}

CosSinGradArgs check_cos_sin_grad(const AngleInputs& in, const TensorView& grad_cos,
                                  const TensorView& grad_sin) {
  const char* const op = in.op;
  CosSinGradArgs args{};
  args.grad_dtype = check_floating(op, "grad_cos", grad_cos);
  check_dtype_like(op, "grad_sin", grad_sin, "grad_cos", grad_cos);
  check_sizes_like(op, "grad_sin", grad_sin, "grad_cos", grad_cos);
  check_device(op, "grad_cos", grad_cos, "inv_freq", in.inv_freq);
  check_device(op, "grad_sin", grad_sin, "inv_freq", in.inv_freq);
  const auto sizes = grad_cos.sizes();
  args.angles = check_angles(in);
  args.tokens = check_length(in, sizes.size() > 0 ? sizes[0] : 0);

  bool fits;
  std::string expected = "[length, P]";
  if (in.position_ids) {
    const auto ids = in.position_ids->sizes();
    const size_t first = in.axes ? 1 : 0, dims = ids.size() - first;
    fits = sizes.size() == dims + 1 && std::equal(ids.begin() + first, ids.end(), sizes.begin()) &&
           sizes[dims] == args.angles.pairs;
    expected =
        text("[*", shape_text(*in.position_ids), in.axes ? "[1:], " : ", ", args.angles.pairs, "]");
  } else {
    fits = sizes.size() == 2 && sizes[1] == args.angles.pairs;
  }
  if (!fits) refuse(op, text("grad_cos to have shape ", expected), shape_text(grad_cos));
  return args;
}

}  // namespace rope
