// The operators that make cos and sin, and their gradient to inv_freq: checks, outputs, kernel.
#include <algorithm>
#include <vector>

#include "angle_tensors.h"
#include "check/parts.h"
#include "checks.h"
#include "host/allocation.h"
#include "host/device.h"
#include "operators.h"

namespace rope {

namespace {

// shape: of the tokens.
std::tuple<Tensor, Tensor> make(const AngleInputs& in, const Tensor& inv_freq,
                                const OptionalTensor& position_ids, const OptionalTensor& axes,
                                int64_t length, std::vector<int64_t> shape,
                                std::optional<ScalarType> dtype) {
  check_device_supported(in.op, in.inv_freq);
  CosSinArgs args{};
  args.angles = check_angles(in);
  args.tokens = check_length(in, length);
  const ScalarType type = check_table_dtype(in.op, in.inv_freq, dtype);
  args.dtype = *dtype_of(type);
  AngleTensors tensors(inv_freq, axes);
  tensors.set(args.angles, position_ids, args.tokens);
  shape.push_back(args.angles.pairs);
  Tensor cos = allocate(inv_freq, shape, type);
  Tensor sin = allocate(inv_freq, shape, type);
  args.cos = cos.mutable_data_ptr();
  args.sin = sin.mutable_data_ptr();
  run(in.inv_freq, args, &cpu::cos_sin, &cuda::cos_sin);
  return {cos, sin};
}

}  // namespace

std::tuple<Tensor, Tensor> cos_sin_cache(const Tensor& inv_freq, int64_t length, int64_t start,
                                         double attention_scaling,
                                         std::optional<ScalarType> dtype) {
  const AngleInputs in{"cos_sin_cache", inv_freq, std::nullopt,
                       std::nullopt,    start,    attention_scaling};
  return make(in, inv_freq, std::nullopt, std::nullopt, length, {length}, dtype);
}

std::tuple<Tensor, Tensor> cos_sin(const Tensor& inv_freq, const Tensor& position_ids,
                                   const OptionalTensor& axes, double attention_scaling,
                                   std::optional<ScalarType> dtype) {
  const AngleInputs in{"cos_sin", inv_freq, position_ids, view(axes), 0, attention_scaling};
  const auto sizes = in.position_ids->sizes();
  const bool has_axes = axes && sizes.size() > 0;  // without a dimension for them: refused
  return make(in, inv_freq, position_ids, axes, 0, {sizes.begin() + has_axes, sizes.end()}, dtype);
}

Tensor cos_sin_backward(const Tensor& grad_cos, const Tensor& grad_sin, const Tensor& inv_freq,
                        const OptionalTensor& position_ids, const OptionalTensor& axes,
                        int64_t start, double attention_scaling) {
  const AngleInputs in{"cos_sin_backward", inv_freq, view(position_ids),
                       view(axes),         start,    attention_scaling};
  check_device_supported(in.op, in.inv_freq);
  CosSinGradArgs args = check_cos_sin_grad(in, grad_cos, grad_sin);
  const Tensor dcos = packed(grad_cos), dsin = packed(grad_sin);
  AngleTensors tensors(inv_freq, axes);
  tensors.set(args.angles, position_ids, args.tokens);
  args.grad_cos = dcos.const_data_ptr();
  args.grad_sin = dsin.const_data_ptr();
  // At most 1024 partial sums, of at least 64 tokens; by the number of tokens alone, so that the
  // order of the sum is always the same.
  args.chunk_tokens = std::max<int64_t>(64, (args.tokens + 1023) / 1024);
  args.chunks = (args.tokens + args.chunk_tokens - 1) / args.chunk_tokens;
  const std::vector<int64_t> partial_shape{args.chunks, args.angles.pairs};
  const std::vector<int64_t> shape{args.angles.pairs};
  Tensor partial = allocate(inv_freq, partial_shape, ScalarType::Double);
  Tensor grad = allocate(inv_freq, shape);
  args.partial = static_cast<double*>(partial.mutable_data_ptr());
  args.grad_inv_freq = grad.mutable_data_ptr();
  run(inv_freq, args, &cpu::cos_sin_grad, &cuda::cos_sin_grad);
  return grad;
}

}  // namespace rope
