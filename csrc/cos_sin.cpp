// The operators that make cos and sin, and their gradient to inv_freq: checks, outputs, kernel.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "check_parts.h"
#include "checks.h"
#include "device.h"
#include "operators.h"

namespace rope {

namespace {

// Small beside the tables: copied where its elements do not lie one after the other.
Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// position_ids: or nullptr.
void set_data(Angles& angles, const Tensor& inv_freq, const Tensor* position_ids) {
  angles.inv_freq = inv_freq.const_data_ptr();
  if (position_ids) angles.position_ids = position_ids->const_data_ptr();
}

// angles: checked; position_ids: or nullptr.
std::tuple<Tensor, Tensor> make(const char* op, const Tensor& inv_freq, const Tensor* position_ids,
                                Angles angles, std::vector<int64_t> shape,
                                std::optional<ScalarType> dtype) {
  const ScalarType type = check_table_dtype(op, inv_freq, dtype);
  const Tensor frequencies = packed(inv_freq);
  const Tensor positions = position_ids ? packed(*position_ids) : inv_freq;
  set_data(angles, frequencies, position_ids ? &positions : nullptr);
  shape.push_back(angles.pairs);
  Tensor cos = torch::stable::new_empty(inv_freq, shape, type);
  Tensor sin = torch::stable::new_empty(inv_freq, shape, type);
  const CosSinArgs args{angles, cos.mutable_data_ptr(), sin.mutable_data_ptr(), *dtype_of(type)};
  run(inv_freq, args, &cpu::cos_sin, &cuda::cos_sin);
  return {cos, sin};
}

}  // namespace

std::tuple<Tensor, Tensor> cos_sin_cache(const Tensor& inv_freq, int64_t length, int64_t start,
                                         double attention_scaling,
                                         std::optional<ScalarType> dtype) {
  const char* const op = "cos_sin_cache";
  check_device_supported(op, inv_freq);
  const Angles angles = check_angles(op, inv_freq, std::nullopt, length, start, attention_scaling);
  return make(op, inv_freq, nullptr, angles, {length}, dtype);
}

std::tuple<Tensor, Tensor> cos_sin(const Tensor& inv_freq, const Tensor& position_ids,
                                   double attention_scaling, std::optional<ScalarType> dtype) {
  const char* const op = "cos_sin";
  check_device_supported(op, inv_freq);
  const Angles angles = check_angles(op, inv_freq, view(position_ids), 0, 0, attention_scaling);
  const auto sizes = position_ids.sizes();
  return make(op, inv_freq, &position_ids, angles, {sizes.begin(), sizes.end()}, dtype);
}

Tensor cos_sin_backward(const Tensor& grad_cos, const Tensor& grad_sin, const Tensor& inv_freq,
                        const OptionalTensor& position_ids, int64_t start,
                        double attention_scaling) {
  const char* const op = "cos_sin_backward";
  check_device_supported(op, inv_freq);
  CosSinGradArgs args = check_cos_sin_grad(op, grad_cos, grad_sin, inv_freq, view(position_ids),
                                           start, attention_scaling);
  const Tensor dcos = packed(grad_cos), dsin = packed(grad_sin), frequencies = packed(inv_freq);
  const Tensor positions = position_ids ? packed(*position_ids) : inv_freq;
  set_data(args.angles, frequencies, position_ids ? &positions : nullptr);
  args.grad_cos = dcos.const_data_ptr();
  args.grad_sin = dsin.const_data_ptr();
  // At most 1024 partial sums, of at least 64 tokens; by the number of tokens alone, so that the
  // order of the sum is always the same.
  args.chunk_tokens = std::max<int64_t>(64, (args.angles.tokens + 1023) / 1024);
  args.chunks = (args.angles.tokens + args.chunk_tokens - 1) / args.chunk_tokens;
  const std::vector<int64_t> partial_shape{args.chunks, args.angles.pairs};
  const std::vector<int64_t> shape{args.angles.pairs};
  Tensor partial = torch::stable::new_empty(inv_freq, partial_shape, ScalarType::Double);
  Tensor grad = torch::stable::new_empty(inv_freq, shape);
  args.partial = static_cast<double*>(partial.mutable_data_ptr());
  args.grad_inv_freq = grad.mutable_data_ptr();
  run(inv_freq, args, &cpu::cos_sin_grad, &cuda::cos_sin_grad);
  return grad;
}

}  // namespace rope
