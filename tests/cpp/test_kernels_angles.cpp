// The CPU kernels that compute angles, part of test_kernels.cpp: tables of cos and sin and their
// gradient against long double; the rotation by angles must have the bits of the rotation by a
// table.
#include "kernel_cases.h"
#include "kernels.h"

using namespace kernel_cases;

namespace {

constexpr double kUlps = 0.5001;  // csrc/math/angle.h, for results narrower than float64
constexpr double kUlpsFloat64 = 1;
constexpr int64_t kAxes = 3;

// Positions: counted from a start, or a tensor of integers or of floating-point numbers.
enum class Kind { Counted, Int32, Int64, Floating };
constexpr Kind kKinds[] = {Kind::Counted, Kind::Int32, Kind::Int64, Kind::Floating};

const char* name_of(Kind kind, DType dtype) {
  switch (kind) {
    case Kind::Counted: return "counted";
    case Kind::Int32: return "int32";
    case Kind::Int64: return "int64";
    default: return name(dtype);
  }
}

// inv_freq in float32, positions of at most 31 bits: their products are exact in long double.
struct AngleCase {
  int64_t axes_count;
  Memory inv_freq, floating;
  std::vector<int32_t> narrow;
  std::vector<int64_t> wide;
  std::vector<double> position;
  std::vector<int32_t> narrow_axes;
  std::vector<int64_t> axes;
  Angles angles{};

  // dtype: of floating positions. A tensor of positions may have three axes.
  AngleCase(int64_t pairs, int64_t tokens, Kind kind, DType dtype, double scaling, Random& random)
      : axes_count(kind != Kind::Counted && random.coin() ? kAxes : 1),
        inv_freq(DType::Float32, pairs, false, random),
        floating(dtype, axes_count * tokens, false, random),
        axes(pairs) {
    for (int64_t i = 0; i < pairs; ++i)
      inv_freq.set_value(i, std::pow(10000.0, -double(i) / pairs));
    angles.op = "cos_sin";
    angles.inv_freq = inv_freq.data();
    angles.inv_freq_dtype = DType::Float32;
    angles.pairs = pairs;
    angles.positions.type = PositionType::Int64;
    angles.positions.axes = 1, angles.positions.stride_s = 1;
    angles.positions.start = random.below(int64_t{1} << 30);
    angles.attention_scaling = scaling;
    constexpr int64_t kLast = (int64_t{1} << 31) - 1;
    const int64_t count = axes_count * tokens;
    narrow.reserve(count), wide.reserve(count), position.reserve(count);
    for (int64_t token = 0; token < count; ++token) {
      const int64_t drawn = random.below(int64_t{2} << random.below(31));
      wide.push_back(kind == Kind::Counted ? angles.positions.start + token
                     : token == 0          ? kLast
                                           : drawn);
      narrow.push_back(static_cast<int32_t>(wide.back()));
      floating.set_value(token, static_cast<double>(random.below(1 << 20)) / 64);
      position.push_back(kind == Kind::Floating ? floating.value(token) : wide.back());
    }
    if (kind == Kind::Counted) return;
    if (axes_count > 1) {
      const bool int64 = random.coin(), outside = random.coin();
      for (int64_t& axis : axes) {
        axis = random.below(kAxes);
        if (outside && random.below(5) == 0) axis = index_outside(kAxes, int64, random);
      }
      narrow_axes.assign(axes.begin(), axes.end());
      angles.positions.axes = kAxes, angles.positions.stride_axis = tokens;
      angles.axes = {narrow_axes.data(), false};
      if (int64) angles.axes = {axes.data(), true};
    }
    angles.positions.data = wide.data();
    if (kind == Kind::Int32) {
      angles.positions.data = narrow.data(), angles.positions.type = PositionType::Int32;
    } else if (kind == Kind::Floating) {
      constexpr int kFirst = static_cast<int>(PositionType::Float64);  // in the order of DType
      angles.positions.data = floating.data();
      angles.positions.type = static_cast<PositionType>(kFirst + static_cast<int>(dtype));
    }
  }
  double position_of(int64_t token, int64_t pair) const {  // NaN for an axis that does not exist
    if (axes[pair] < 0 || axes[pair] >= axes_count) return NAN;
    return position[axes[pair] * angles.positions.stride_axis + token];
  }
  long double angle(int64_t token, int64_t pair) const {
    return static_cast<long double>(position_of(token, pair)) *
           static_cast<long double>(inv_freq.value(pair));
  }
};

void test_cos_sin(Random& random) {
  for (const DType dtype : kDTypes) {
    for (const Kind kind : kKinds) {
      ++cases;
      // A power of two: a float64 result is not rounded again.
      const double scaling = dtype == DType::Float64 ? 0.5 : 1.1875;
      const int64_t pairs = kind == Kind::Counted ? 130 : 7,
                    tokens = kind == Kind::Counted ? 20 : 301;
      AngleCase c(pairs, tokens, kind, dtype, scaling, random);
      Memory cos(dtype, tokens * pairs + kGuard, false, random), sin = cos;
      const Memory before = cos;
      CosSinArgs args{c.angles, tokens, cos.data(), sin.data(), dtype};
      cpu::cos_sin(args);
      const double most = dtype == DType::Float64 ? kUlpsFloat64 : kUlps;
      for (int64_t at = 0; at < tokens * pairs; ++at) {
        const long double angle = c.angle(at / pairs, at % pairs);
        for (const bool is_cos : {true, false}) {
          const long double want = (is_cos ? std::cos(angle) : std::sin(angle)) * scaling;
          const double got = (is_cos ? cos : sin).value(at);
          if (std::isnan(want) && std::isnan(got)) continue;
          const int unit = scalar::format_of(dtype).unit(static_cast<double>(want));
          const double ulps = static_cast<double>(std::ldexp(std::fabs(got - want), -unit));
          if (ulps <= most) continue;
          expect(
              false,
              text("cos_sin %s, positions %s: %s of %.10Lg, position %.17g: expected %.17Lg, got "
                   "%.17g, %.3f ulps away",
                   name(dtype), name_of(kind, dtype), is_cos ? "cos" : "sin", angle,
                   c.position_of(at / pairs, at % pairs), want, got, ulps));
        }
      }
      for (int64_t at = tokens * pairs; at < before.count(); ++at) {
        expect(cos.bits(at) == before.bits(at) && sin.bits(at) == before.bits(at),
               "cos_sin: written past the end");
      }
    }
  }
}

void test_cos_sin_grad(Random& random) {
  for (const DType dtype : kDTypes) {
    for (const Kind kind : kKinds) {
      ++cases;
      const int64_t pairs = kind == Kind::Counted ? 130 : 7, tokens = 100, chunk_tokens = 32,
                    chunks = 4;
      AngleCase c(pairs, tokens, kind, dtype, 1.1875, random);
      const Memory grad_cos(dtype, tokens * pairs, false, random);
      const Memory grad_sin(dtype, tokens * pairs, false, random);
      Memory partial(DType::Float64, chunks * pairs + kGuard, false, random);
      Memory grad(DType::Float32, pairs + kGuard, false, random);
      const Memory before = grad;
      CosSinGradArgs args{c.angles, tokens, grad_cos.data(), grad_sin.data(), dtype,
                          nullptr,  chunks, chunk_tokens,    grad.data()};
      args.partial = static_cast<double*>(partial.data());
      cpu::cos_sin_grad(args);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        long double want = 0, terms = 0;
        for (int64_t token = 0; token < tokens; ++token) {
          const long double angle = c.angle(token, pair);
          const long double slope = c.position_of(token, pair) * 1.1875L;
          const int64_t at = token * pairs + pair;
          const long double of_sin = slope * std::cos(angle) * grad_sin.value(at);
          const long double of_cos = slope * std::sin(angle) * grad_cos.value(at);
          want += of_sin - of_cos;
          terms += std::fabs(of_sin) + std::fabs(of_cos);
        }
        // The terms and their sum have some roundings in float64, the result one in float32.
        const long double most = terms * 0x1p-46L + std::fabs(want) * 0x1p-24L;
        if (std::fabs(grad.value(pair) - want) <= most) continue;
        if (std::isnan(want) && std::isnan(grad.value(pair))) continue;
        expect(false, text("cos_sin_grad %s, positions %s, pair %d: expected %.9Lg, got %.9g",
                           name(dtype), name_of(kind, dtype), int(pair), want, grad.value(pair)));
      }
      for (int64_t at = pairs; at < grad.count(); ++at) {
        expect(grad.bits(at) == before.bits(at), "cos_sin_grad: written past the end");
      }
    }
  }
}

// ------------------------------------------------------------------------------- apply_rotary_at

// The bits of apply_rotary with rows that cos_sin has computed.
void test_apply_rotary_at(const Case& c, Random& random) {
  if (c.full_width) return;
  ++cases;
  const Kind kind = kKinds[random.below(4)];
  const bool given = kind != Kind::Counted;
  const int64_t tokens = (given ? c.batch : 1) * c.seq;
  const DType positions = kDTypes[random.below(4)];
  AngleCase made(c.pairs, tokens, kind, positions, 1.1875, random);
  const DType table_dtype = c.dtype == DType::Float64 ? DType::Float64 : DType::Float32;
  Memory cos(table_dtype, tokens * c.pairs, false, random), sin = cos;
  cpu::cos_sin({made.angles, tokens, cos.data(), sin.data(), table_dtype});
  made.angles.positions.stride_b = given ? c.seq : 0;

  RotaryAtArgs args{};
  args.op = c.op;
  args.dtype = c.dtype;
  args.batch = c.batch, args.seq = c.seq;
  args.head_dim = c.dim(), args.rotary_dim = 2 * c.pairs, args.rotary_offset = c.before;
  const int64_t stride_b = given ? c.seq * c.pairs : 0;
  args.table = {cos.data(), sin.data(), table_dtype, c.seq, stride_b,
                c.pairs,    stride_b,   c.pairs,     false, false};
  args.interleaved = c.interleaved, args.interleaved_out = c.interleaved_out;
  args.inverse = c.inverse;
  args.angles = made.angles;

  const Tensor in[] = {random_tensor(c, c.heads_q, kGuard, random),
                       random_tensor(c, c.heads_k, kGuard, random)};
  Tensor by_rows[] = {in[0], in[1]}, at[] = {in[0], in[1]};
  const auto rotate = [&](Tensor(&out)[2], const auto& kernel) {
    args.q = {out[0].heads<const void*>(c), out[0].heads<void*>(c), c.heads_q};
    args.k = {out[1].heads<const void*>(c), out[1].heads<void*>(c), c.heads_k};
    Tensor from[] = {in[0], in[1]};
    if (!c.in_place) {
      args.q.in = from[0].heads<const void*>(c);
      args.k.in = from[1].heads<const void*>(c);
    }
    kernel();
  };
  rotate(by_rows, [&] { cpu::apply_rotary(args); });
  rotate(at, [&] { cpu::apply_rotary_at(args); });
  const std::string what = text(c) + ", positions " + name_of(kind, positions);
  expect_same(by_rows[0].memory, at[0].memory, what + ", q");
  expect_same(by_rows[1].memory, at[1].memory, what + ", k");
}

// No tokens and no heads, which the random cases do not have.
constexpr Sizes kNothing[] = {
    // B, S, heads of q, of k; channels before, pairs, channels after
    {"no token", 2, 0, 3, 1, 0, 16, 0},
    {"no sequence", 0, 3, 3, 1, 5, 16, 0},
    {"no head", 2, 3, 0, 0, 0, 16, 0},
};

}  // namespace

void kernel_cases::test_angles(Random& random) {
  test_cos_sin(random);
  test_cos_sin_grad(random);
  for_each_case("apply_rotary_at", random, test_apply_rotary_at);
  for_each_size("apply_rotary_at", kNothing, random, test_apply_rotary_at);
}
