// apply_rotary_quantize: rotated, and rounded to float8 by a scale of each group of channels.
#include <vector>

#include "check/cache.h"
#include "check/rotation.h"
#include "check/written.h"
#include "host/device.h"
#include "host/outputs.h"
#include "registration.h"

namespace rope {

namespace {

// Smaller ones would make subnormal scales.
constexpr double kLeastEps = 1e-30;

void apply_rotary_quantize(const TokenTensor& x, const Rows& rows, int64_t group_size, double eps,
                           bool power_of_two_scales, const AnyRotation& rotation,
                           const TokenTensor& x_out, const TokenTensor& scale_out) {
  const char* const op = "apply_rotary_quantize";
  const RotaryInputs in(op, x, nullptr, rows, rotation);
  check_device_supported(op, in.q);
  QuantizeArgs args{};
  static_cast<RotaryArgs&>(args) = check_apply_rotary(in);
  args.float8_dtype = check_float8_out(op, "x_out", x_out, "x", in.q);
  const int64_t head_dim = args.head_dim;
  if (group_size < 1 || head_dim % group_size != 0 || head_dim / group_size > kMostGroups) {
    refuse(op,
           text("group_size to divide x's channels, ", head_dim, ", into at most ", kMostGroups,
                " groups"),
           std::to_string(group_size));
  }
  if (!(eps >= kLeastEps && eps <= 1 / kLeastEps)) {
    refuse(op, "eps to be between 1e-30 and 1e30", std::to_string(eps));
  }
  std::vector<int64_t> of_scales(in.q.sizes().begin(), in.q.sizes().end());
  of_scales.back() = head_dim / group_size;
  check_scale_out(op, "scale_out", scale_out, {of_scales.data(), of_scales.size()},
                  "one for each group of x's channels", "x", in.q);
  const Named written[] = {{"x_out", x_out}, {"scale_out", scale_out}};
  const Named read[] = {
      {"x", in.q}, {"cos", in.cos}, {"sin", in.sin}, {"position_ids", in.position_ids}};
  check_written(op, written, read);

  args.group_size = group_size;
  args.eps = static_cast<float>(eps);
  args.power_of_two_scales = power_of_two_scales;
  args.float8 = heads_of(x_out.strides(), x_out.mutable_data_ptr(), args.dtype, 0);
  float* const scales = static_cast<float*>(scale_out.mutable_data_ptr());
  const Heads<void*> at = heads_of(scale_out.strides(), static_cast<void*>(scales), args.dtype, 0);
  args.scales = {scales, at.stride_b, at.stride_s, at.stride_h};
  args.scales_stride_group = scale_out.strides().back();
  run(in.q, args);
}

}  // namespace

std::vector<Operator> quantize_operators() {
  return {boxed<&apply_rotary_quantize>("apply_rotary_quantize")};
}

}  // namespace rope
