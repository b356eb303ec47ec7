#include "check_parts.h"
#include "checks.h"

namespace rope {

using torch::headeronly::ScalarType;

Angles check_angles(const char* op, const TensorView& inv_freq,
                    const std::optional<TensorView>& position_ids, int64_t length, int64_t start,
                    double attention_scaling) {
  Angles angles{};
  angles.op = op;
  if (inv_freq.dim() != 1) refuse(op, "inv_freq to have shape [P]", shape_text(inv_freq));
  angles.inv_freq_dtype = check_floating(op, "inv_freq", inv_freq);
  angles.pairs = inv_freq.size(0);
  angles.attention_scaling = attention_scaling;
  if (position_ids) {
    check_int(op, "position_ids", *position_ids);
    check_device(op, "position_ids", *position_ids, "inv_freq", inv_freq);
    angles.position_int64 = position_ids->scalar_type() == ScalarType::Long;
    angles.tokens = position_ids->numel();
  } else {
    constexpr int64_t kPositions = int64_t{1} << 53;
    if (length < 0) refuse(op, "length to be at least 0", text(length));
    if (start <= -kPositions || start > kPositions - length) {
      refuse(op, "start and start + length within +-2^53", text("start ", start));
    }
    angles.start = start;
    angles.tokens = length;
  }
  return angles;
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

CosSinGradArgs check_cos_sin_grad(const char* op, const TensorView& grad_cos,
                                  const TensorView& grad_sin, const TensorView& inv_freq,
                                  const std::optional<TensorView>& position_ids, int64_t start,
                                  double attention_scaling) {
  CosSinGradArgs args{};
  args.grad_dtype = check_floating(op, "grad_cos", grad_cos);
  check_dtype_like(op, "grad_sin", grad_sin, "grad_cos", grad_cos);
  check_sizes_like(op, "grad_sin", grad_sin, "grad_cos", grad_cos);
  check_device(op, "grad_cos", grad_cos, "inv_freq", inv_freq);
  check_device(op, "grad_sin", grad_sin, "inv_freq", inv_freq);
  const auto sizes = grad_cos.sizes();
  const int64_t length = sizes.size() > 0 ? sizes[0] : 0;
  args.angles = check_angles(op, inv_freq, position_ids, length, start, attention_scaling);

  bool fits;
  std::string expected = "[length, P]";
  if (position_ids) {
    const auto ids = position_ids->sizes();
    fits = sizes.size() == ids.size() + 1 && std::equal(ids.begin(), ids.end(), sizes.begin()) &&
           sizes[ids.size()] == args.angles.pairs;
    expected = text("[*", shape_text(*position_ids), ", ", args.angles.pairs, "]");
  } else {
    fits = sizes.size() == 2 && sizes[1] == args.angles.pairs;
  }
  if (!fits) refuse(op, text("grad_cos to have shape ", expected), shape_text(grad_cos));
  return args;
}

}  // namespace rope
