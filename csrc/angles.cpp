// cos_sin_cache and cos_sin, which make tables, and their gradient to inv_freq.
#include "check/angles.h"

#include <algorithm>
#include <vector>

#include "check/parts.h"
#include "host/angle_tensors.h"
#include "host/device.h"
#include "host/outputs.h"
#include "registration.h"

namespace rope {

namespace {

// How many positions there are: those of position_ids, or `length`.
int64_t check_length(const AngleInputs& in, int64_t length) {
  if (in.position_ids) return in.position_ids->numel() / (in.axes ? in.position_ids->size(0) : 1);
  constexpr int64_t kPositions = int64_t{1} << 53;
  if (length < 0) refuse(in.op, "length to be at least 0", text(length));
  if (in.start <= -kPositions || in.start > kPositions - length) {
    refuse(in.op, "start and start + length within +-2^53", text("start ", in.start));
  }
  return length;
}

// The dtype asked for, or float32 (float64 for a float64 inv_freq).
ScalarType check_table_dtype(const AngleInputs& in, std::optional<ScalarType> asked) {
  if (!asked) {
    return in.inv_freq.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
  if (!dtype_of(*asked)) {
    refuse(in.op, "dtype to be float64, float32, float16 or bfloat16", dtype_text(*asked));
  }
  return *asked;
}

// cos and sin of shape [*shape, P]; `length` positions where there are no position_ids.
std::tuple<Tensor, Tensor> make_tables(const AngleInputs& in, int64_t length,
                                       std::vector<int64_t> shape,
                                       std::optional<ScalarType> asked) {
  check_device_supported(in.op, in.inv_freq);
  CosSinArgs args{};
  args.angles = check_angles(in);
  args.tokens = check_length(in, length);
  const ScalarType dtype = check_table_dtype(in, asked);
  args.dtype = *dtype_of(dtype);
  AngleTensors tensors;
  tensors.set(args.angles, in, args.tokens);
  shape.push_back(args.angles.pairs);
  Tensor cos = new_like(in.inv_freq, shape, dtype);
  Tensor sin = cos.call().empty_like(cos);
  args.cos = cos.mutable_data_ptr();
  args.sin = sin.mutable_data_ptr();
  run(cos, args);
  return {std::move(cos), std::move(sin)};
}

std::tuple<Tensor, Tensor> cos_sin_cache(const Tensor& inv_freq, int64_t length, int64_t start,
                                         const TableOptions& options) {
  const AngleInputs in{"cos_sin_cache", inv_freq, {}, {}, start, options.attention_scaling};
  return make_tables(in, length, {length}, options.dtype);
}

std::tuple<Tensor, Tensor> cos_sin(const Tensor& inv_freq, const Tensor& position_ids,
                                   const OptionalTensor& axes, const TableOptions& options) {
  const AngleInputs in{"cos_sin", inv_freq, position_ids, view(axes), 0, options.attention_scaling};
  const auto sizes = position_ids.sizes();
  const bool has_axes = axes && sizes.size() > 0;  // axes of position_ids []: refused later
  return make_tables(in, 0, {sizes.begin() + has_axes, sizes.end()}, options.dtype);
}

// Everything but the data of the tensors.
CosSinGradArgs check_grad(const AngleInputs& in, const TensorView& grad_cos,
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

Tensor cos_sin_backward(const Tensor& grad_cos, const Tensor& grad_sin, const AngleSource& angles,
                        int64_t start, double attention_scaling) {
  const AngleInputs in = angle_inputs("cos_sin_backward", angles, start, attention_scaling);
  check_device_supported(in.op, in.inv_freq);
  CosSinGradArgs args = check_grad(in, grad_cos, grad_sin);
  Tensor cos_copy, sin_copy;
  AngleTensors tensors;
  tensors.set(args.angles, in, args.tokens);
  args.grad_cos = contiguous_data(grad_cos, cos_copy);
  args.grad_sin = contiguous_data(grad_sin, sin_copy);
  // At most 1024 partial sums, each of at least 64 tokens. Their number depends on that of the
  // tokens alone, so the order of the sum is always the same.
  args.chunk_tokens = std::max<int64_t>(64, (args.tokens + 1023) / 1024);
  args.chunks = (args.tokens + args.chunk_tokens - 1) / args.chunk_tokens;
  const std::vector<int64_t> partial_shape{args.chunks, args.angles.pairs};
  const std::vector<int64_t> shape{args.angles.pairs};
  Tensor partial = new_like(in.inv_freq, partial_shape, ScalarType::Double);
  Tensor grad = new_like(in.inv_freq, shape);
  args.partial = static_cast<double*>(partial.mutable_data_ptr());
  args.grad_inv_freq = grad.mutable_data_ptr();
  run(grad_cos, args);
  return grad;
}

}  // namespace

std::vector<Operator> angles_operators() {
  return {boxed<&cos_sin_cache>("cos_sin_cache"), boxed<&cos_sin>("cos_sin"),
          boxed<&cos_sin_backward>("cos_sin_backward")};
}

}  // namespace rope
