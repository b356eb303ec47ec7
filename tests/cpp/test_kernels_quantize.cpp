// The CPU kernel that rotates and rounds groups of channels to float8, part of test_kernels.cpp:
// the exact scales, and the float8 nearest to each quotient.
#include "kernel_cache.h"
#include "kernels.h"

using namespace kernel_cases;

namespace {

constexpr Sizes kSizes[] = {
    // B, S, heads; channels before, pairs, channels after
    {"one group", 2, 3, 3, 0, 0, 64, 0},
    {"a group without channels that rotate", 2, 1, 2, 0, 96, 16, 0},
    {"less than a vector", 2, 3, 3, 0, 1, 1, 1},
    {"parts of vectors", 1, 7, 5, 0, 5, 17, 9},
    {"more than 256 channels", 1, 2, 2, 0, 3, 150, 1},
    {"more pairs than rows of the table are held for", 2, 2, 1, 0, 0, kManyPairs, 0},
    {"divided among threads", 2, 60, 4, 0, 0, 33, 6},
    {"no token", 2, 0, 3, 0, 0, 16, 0},
    {"no sequence", 0, 3, 3, 0, 5, 16, 1},
};

// The smallest power of two that is not below a positive, normal number.
float rounded_up(float scale) {
  int exponent = 0;
  const float fraction = std::frexp(scale, &exponent);
  return std::ldexp(1.0f, fraction == 0.5f ? exponent - 1 : exponent);
}

void test(Case c, Random& random) {
  ++cases;
  c.in_place = false;
  const Rotation rotation(c, random);
  Tensor x = random_tensor(c, c.heads_q, 0, random);
  QuantizeArgs args{};
  static_cast<RotaryArgs&>(args) = rotation.args(c);
  args.q = {x.heads<const void*>(c), {}, c.heads_q};
  std::vector<int64_t> sizes;
  for (int64_t size = 1; size <= c.dim(); ++size) {
    if (c.dim() % size == 0 && c.dim() / size <= 40) sizes.push_back(size);
  }
  args.group_size = sizes[random.below(static_cast<int64_t>(sizes.size()))];
  args.eps = random.coin() ? 1e-10f : 0.7f;
  args.power_of_two_scales = random.coin();
  const int64_t groups = c.dim() / args.group_size;
  HeadsAsFloat8 out(c, c.heads_q, random);
  WrittenScales scales(c.batch * c.seq * c.heads_q * groups, random);
  args.float8 = out.heads();
  args.float8_dtype = out.dtype();
  // [.., groups, H] in memory
  args.scales = {scales.data(), c.seq * c.heads_q * groups, c.heads_q * groups, 1};
  args.scales_stride_group = c.heads_q;

  Case wide = c;  // the type of the arithmetic
  if (c.dtype != DType::Float64) wide.dtype = DType::Float32;
  Memory head(wide.dtype, c.dim(), false, random), rotated = head;
  for (int64_t i = 0; i < c.batch * c.seq * c.heads_q; ++i) {
    const int64_t token = i / c.heads_q, b = token / c.seq, s = token % c.seq, h = i % c.heads_q;
    for (int64_t channel = 0; channel < c.dim(); ++channel) {
      head.set_value(channel, x.memory.value(x.index(b, s, h, channel)));
    }
    rotate_head(wide, rotation, b, s, head, 0, rotated, 0);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * args.group_size;
      float largest = args.eps;
      for (int64_t j = 0; j < args.group_size; ++j) {
        largest = larger_magnitude(largest, rotated.value(first + j));
      }
      float scale = largest / out.format().largest();
      if (args.power_of_two_scales && std::isfinite(scale)) scale = rounded_up(scale);
      scales.set((token * groups + group) * c.heads_q + h, scale);
      for (int64_t j = first; j < first + args.group_size; ++j) {
        out.expect(c.dtype, b, s, h, j, rotated.value(j), scale);
      }
    }
  }
  cpu::apply_rotary_quantize(args);
  const std::string what = text(c) + text(", groups of %d%s", int(args.group_size),
                                          args.power_of_two_scales ? ", powers of two" : "");
  out.check(what);
  scales.check(what);
}

}  // namespace

void kernel_cases::test_quantize(Random& random) {
  for_each_size("apply_rotary_quantize", kSizes, random, test);
}
