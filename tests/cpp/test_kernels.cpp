// The CPU kernels alone, without libtorch, against scalar arithmetic: also for a processor of which
// there is an emulator and no libtorch.
//
//   test_kernels [CALLERS]    so many threads at once, each through all cases, with other random
//   numbers
//
// Rotations and their gradients must have the exact bits; tables of cos and sin are compared with
// long double.
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <thread>

#include "../../csrc/cpu/capability.h"
#include "../../csrc/kernels.h"
#include "kernel_cases.h"

using namespace kernel_cases;

// Calls f(0), ..., f(count - 1), each in a thread of its own, and nothing else orders them.
template <class F>
void in_threads(int64_t count, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back(f, i);
  for (std::thread& thread : threads) thread.join();
}

// In place of libtorch's: the last range first, and ranges that begin in the middle of a token.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc func,
                                  void* context) {
  constexpr int64_t kThreads = 3;
  const int64_t step = grain - grain / 3;
  const int64_t ranges = (end - begin + step - 1) / step;
  in_threads(std::min(kThreads, ranges), [&](int64_t thread) {
    for (int64_t i = ranges - 1 - thread; i >= 0; i -= kThreads) {
      const int64_t at = begin + i * step;
      func(at, std::min(at + step, end), context);
    }
  });
  return 0;
}

namespace {

constexpr int64_t kLargeBytes = 33 << 20;  // written past the caches
constexpr double kAngleUlps = 0.5001;      // csrc/angle.h, of results below float64
constexpr double kAngleUlpsFloat64 = 1;

// ---------------------------------------------------------------------------------- apply_rotary

// What apply_rotary must write for one head of `in` to `out`.
void rotate_head(const Case& c, const Tensor& in, int64_t from, const TableSide& cos,
                 const TableSide& sin, int64_t row_cos, int64_t row_sin, Memory& out, int64_t to) {
  const auto rounded = [&](double value) { return scalar::computed(c.dtype, value); };
  for (int64_t i = 0; i < c.dim(); ++i) {
    const bool rotates = i >= c.before && i < c.before + 2 * c.pairs;
    if (!rotates) out.set(to + i, in.memory.bits(from + i));
  }
  for (int64_t i = 0; i < c.pairs; ++i) {
    const Places x = places(c.interleaved, c.pairs, i), column = columns(c, i);
    const Places y = places(c.interleaved_out, c.pairs, i);
    const double x1 = in.memory.value(from + c.before + x.first);
    const double x2 = in.memory.value(from + c.before + x.second);
    const double c1 = rounded(cos.memory.value(row_cos + column.first));
    const double c2 = rounded(cos.memory.value(row_cos + column.second));
    double s1 = rounded(sin.memory.value(row_sin + column.first));
    double s2 = rounded(sin.memory.value(row_sin + column.second));
    if (c.inverse) {
      std::swap(s1, s2);
      s1 = -s1, s2 = -s2;
    }
    const double y1 = rounded(rounded(x1 * c1) - rounded(x2 * s1));
    const double y2 = rounded(rounded(x2 * c2) + rounded(x1 * s2));
    out.set_value(to + c.before + y.first, y1);
    out.set_value(to + c.before + y.second, y2);
  }
}

void test_apply_rotary(const Case& c, Random& random) {
  ++cases;
  const bool by_index = c.rows == Rows::Index || c.rows == Rows::PerToken;
  const int64_t rows = by_index ? c.seq : 50;
  TableSide cos = random_table(c, rows, random), sin = random_table(c, rows, random);
  const Positions positions(c, rows, random);
  RotaryArgs args{};
  args.op = c.op;
  args.dtype = c.dtype;
  args.batch = c.batch, args.seq = c.seq;
  args.head_dim = c.dim(), args.rotary_dim = 2 * c.pairs, args.rotary_offset = c.before;
  args.table = {cos.memory.data(), sin.memory.data(),  c.table_dtype, rows,
                cos.stride_b,      cos.stride_row,     sin.stride_b,  sin.stride_row,
                c.full_width,      c.table_interleaved};
  args.position_ids = positions.ids(c);
  args.interleaved = c.interleaved, args.interleaved_out = c.interleaved_out;
  args.inverse = c.inverse;

  const int64_t heads[] = {c.heads_q, c.heads_k};
  std::vector<Tensor> in, out;
  std::vector<Memory> expected;
  for (int x = 0; x < 2; ++x) {
    in.push_back(random_tensor(c, heads[x], c.in_place ? kGuard : 0, random));
    out.push_back(c.in_place ? in[x] : random_tensor(c, heads[x], kGuard, random));
    expected.push_back(out[x].memory);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t s = 0; s < c.seq; ++s) {
        const int64_t row = positions.wide[b * c.seq + s];
        for (int64_t h = 0; h < heads[x]; ++h) {
          rotate_head(
              c, in[x], in[x].index(b, s, h, 0), cos, sin, b * cos.stride_b + row * cos.stride_row,
              b * sin.stride_b + row * sin.stride_row, expected[x], out[x].index(b, s, h, 0));
        }
      }
    }
    RotatedHeads& rotated = x == 0 ? args.q : args.k;
    rotated.in = (c.in_place ? out : in)[x].heads<const void*>(c);
    rotated.out = out[x].heads<void*>(c);
    rotated.heads = heads[x];
  }
  cpu::apply_rotary(args);
  for (int x = 0; x < 2; ++x)
    expect_same(expected[x], out[x].memory, text(c) + (x == 0 ? ", q" : ", k"));
}

// Results too large for the caches are written past them, with the bits of those that are not.
void test_streaming(Random& random) {
  constexpr int64_t kDim = 128, kHeads = 3, kRows = 64, kSpare = 64;
  const auto random_bytes = [&](int64_t bytes) {
    return Memory(DType::Float64, bytes / 8, true, random);
  };
  Memory in = random_bytes(kLargeBytes), cached = random_bytes(kLargeBytes + kSpare);
  Memory streamed = cached;
  Memory cos(DType::Float32, kRows * kDim / 2, false, random), sin = cos;
  for (const DType dtype : kDTypes) {
    const int64_t seq = kLargeBytes / size_of(dtype) / kDim / kHeads;
    std::vector<int32_t> ids;
    for (int64_t s = 0; s < seq; ++s) ids.push_back(static_cast<int32_t>(random.below(kRows)));
    for (int orders = 0; orders < 4; ++orders) {
      // The portable code has no such stores and takes the same way: once a dtype.
      const bool sample = cpu::capability() == cpu::Capability::Portable;
      if (sample && orders != static_cast<int>(dtype)) continue;
      ++cases;
      RotaryArgs args{};
      args.op = "apply_rotary";
      args.dtype = dtype;
      args.batch = 1, args.seq = seq;
      args.head_dim = args.rotary_dim = kDim;
      args.table = {cos.data(), sin.data(), DType::Float32, kRows, 0,
                    kDim / 2,   0,          kDim / 2,       false, false};
      args.position_ids = {ids.data(), false, 0, 1};
      args.interleaved = orders & 1, args.interleaved_out = orders & 2;
      for (const bool new_outputs : {false, true}) {
        void* const out = (new_outputs ? cached : streamed).data();
        args.q = {{in.data(), 0, kHeads * kDim, kDim}, {out, 0, kHeads * kDim, kDim}, kHeads};
        args.new_outputs = new_outputs;
        cpu::apply_rotary(args);
      }
      expect(std::memcmp(cached.data(), streamed.data(), kLargeBytes + kSpare) == 0,
             text("apply_rotary of 33 MiB %s, orders %d: not the same past the caches", name(dtype),
                  orders));
    }
  }
}

// ----------------------------------------------------------------------------- rotary_table_grad

void test_table_grad(const Case& c, Random& random) {
  ++cases;
  const bool by_index = c.rows == Rows::Index || c.rows == Rows::PerToken;
  const int64_t rows = c.rows == Rows::PerToken ? c.seq : c.seq + 3;  // some without a token
  const int64_t grad_batch = c.rows == Rows::PerToken ? c.batch : 1;
  const Positions positions(c, rows, random);
  // The tokens of each row, in order.
  std::vector<int64_t> order, offsets{0};
  for (int64_t row = 0; row < grad_batch * rows; ++row) {
    for (int64_t token = 0; token < c.batch * c.seq; ++token) {
      const int64_t b = grad_batch > 1 ? token / c.seq : 0;
      if (b * rows + positions.wide[token] == row) order.push_back(token);
    }
    offsets.push_back(static_cast<int64_t>(order.size()));
  }
  order.shrink_to_fit(), offsets.shrink_to_fit();

  Memory grad_cos(c.table_dtype, grad_batch * rows * c.width() + kGuard, false, random);
  Memory grad_sin = grad_cos, expected_cos = grad_cos, expected_sin = grad_cos;
  Tensor grad[] = {random_tensor(c, c.heads_q, 0, random), random_tensor(c, c.heads_k, 0, random)};
  Tensor x[] = {random_tensor(c, c.heads_q, 0, random), random_tensor(c, c.heads_k, 0, random)};
  RotaryTableGradArgs args{};
  args.op = c.op;
  args.q = {grad[0].heads<const void*>(c), x[0].heads<const void*>(c), c.heads_q};
  args.k = {grad[1].heads<const void*>(c), x[1].heads<const void*>(c), c.heads_k};
  args.dtype = c.dtype;
  args.batch = c.batch, args.seq = c.seq, args.rotary_dim = 2 * c.pairs;
  args.grad_cos = grad_cos.data(), args.grad_sin = grad_sin.data();
  args.table_dtype = c.table_dtype;
  args.grad_batch = grad_batch, args.rows = rows;
  args.full_width = c.full_width, args.table_interleaved = c.table_interleaved;
  if (!by_index) args.token_order = order.data(), args.row_offsets = offsets.data();
  args.interleaved = c.interleaved, args.interleaved_out = c.interleaved_out;
  args.inverse = c.inverse;
  cpu::rotary_table_grad(args);

  const auto rounded = [&](double value) { return scalar::computed(c.dtype, value); };
  for (int64_t row = 0; row < grad_batch * rows; ++row) {
    for (int64_t i = 0; i < c.pairs; ++i) {
      const Places in = places(c.interleaved, c.pairs, i), column = columns(c, i);
      const Places out = places(c.interleaved_out, c.pairs, i);
      double sum11 = 0, sum12 = 0, sum21 = 0, sum22 = 0;  // of g1 x1, g1 x2, g2 x1, g2 x2
      const auto add = [&](double& sum, double g, double value) {
        sum = rounded(sum + rounded(g * value));
      };
      for (int64_t at = offsets[row]; at < offsets[row + 1]; ++at) {
        const int64_t b = order[at] / c.seq, s = order[at] % c.seq;
        for (int tensor = 0; tensor < 2; ++tensor) {
          for (int64_t h = 0; h < (tensor == 0 ? c.heads_q : c.heads_k); ++h) {
            const int64_t at_g = grad[tensor].index(b, s, h, c.before);
            const int64_t at_x = x[tensor].index(b, s, h, c.before);
            const double g1 = grad[tensor].memory.value(at_g + out.first);
            const double g2 = grad[tensor].memory.value(at_g + out.second);
            const double x1 = x[tensor].memory.value(at_x + in.first);
            const double x2 = x[tensor].memory.value(at_x + in.second);
            add(sum11, g1, x1), add(sum12, g1, x2), add(sum21, g2, x1), add(sum22, g2, x2);
          }
        }
      }
      const double s1 = c.inverse ? -sum21 : -sum12, s2 = c.inverse ? sum12 : sum21;
      const int64_t first = row * c.width() + column.first;
      const int64_t second = row * c.width() + column.second;
      expected_cos.set_value(first, c.full_width ? sum11 : rounded(sum11 + sum22));
      expected_sin.set_value(first, c.full_width ? s1 : rounded(s1 + s2));
      if (!c.full_width) continue;
      expected_cos.set_value(second, sum22);
      expected_sin.set_value(second, s2);
    }
  }
  expect_same(expected_cos, grad_cos, text(c) + ", cos");
  expect_same(expected_sin, grad_sin, text(c) + ", sin");
}

// ----------------------------------------------------------------------------------- cos and sin

// inv_freq in float32: its product with a position is exact in long double.
struct AngleCase {
  Memory inv_freq;
  std::vector<int32_t> narrow;
  std::vector<int64_t> wide;
  Angles angles{};

  AngleCase(int64_t pairs, int64_t tokens, int ids, double scaling, Random& random)
      : inv_freq(DType::Float32, pairs, false, random) {
    for (int64_t i = 0; i < pairs; ++i)
      inv_freq.set_value(i, std::pow(10000.0, -double(i) / pairs));
    angles.op = "cos_sin";
    angles.inv_freq = inv_freq.data();
    angles.inv_freq_dtype = DType::Float32;
    angles.pairs = pairs;
    angles.positions = {nullptr,
                        ids == 1 ? PositionType::Int32 : PositionType::Int64,
                        1,
                        0,
                        0,
                        1,
                        random.below(int64_t{1} << 30)};
    angles.attention_scaling = scaling;
    constexpr int64_t kLast = (int64_t{1} << 31) - 1;
    narrow.reserve(tokens), wide.reserve(tokens);
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t drawn = random.below(int64_t{2} << random.below(31));
      wide.push_back(ids == 0 ? angles.positions.start + token : token == 0 ? kLast : drawn);
      narrow.push_back(static_cast<int32_t>(wide.back()));
    }
    if (ids == 1) angles.positions.data = narrow.data();
    if (ids == 2) angles.positions.data = wide.data();
  }
  long double angle(int64_t token, int64_t pair) const {
    return static_cast<long double>(wide[token]) * static_cast<long double>(inv_freq.value(pair));
  }
};

void test_cos_sin(Random& random) {
  for (const DType dtype : kDTypes) {
    for (int ids = 0; ids < 3; ++ids) {
      ++cases;
      // Scaled by a power of two a float64 result is not rounded again.
      const double scaling = dtype == DType::Float64 ? 0.5 : 1.1875;
      const int64_t pairs = ids == 0 ? 130 : 7, tokens = ids == 0 ? 20 : 301;
      AngleCase c(pairs, tokens, ids, scaling, random);
      Memory cos(dtype, tokens * pairs + kGuard, false, random), sin = cos;
      const Memory before = cos;
      CosSinArgs args{c.angles, tokens, cos.data(), sin.data(), dtype};
      cpu::cos_sin(args);
      const double most = dtype == DType::Float64 ? kAngleUlpsFloat64 : kAngleUlps;
      for (int64_t at = 0; at < tokens * pairs; ++at) {
        const long double angle = c.angle(at / pairs, at % pairs);
        for (const bool is_cos : {true, false}) {
          const long double want = (is_cos ? std::cos(angle) : std::sin(angle)) * scaling;
          const double got = (is_cos ? cos : sin).value(at);
          const int unit = scalar::format_of(dtype).unit(static_cast<double>(want));
          const double ulps = static_cast<double>(std::ldexp(std::fabs(got - want), -unit));
          if (ulps <= most) continue;
          expect(false, text("cos_sin %s: %s of %.10Lg, position %" PRId64
                             ": expected %.17Lg, got %.17g, %.3f ulps away",
                             name(dtype), is_cos ? "cos" : "sin", angle, c.wide[at / pairs], want,
                             got, ulps));
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
    for (int ids = 0; ids < 3; ++ids) {
      ++cases;
      const int64_t pairs = ids == 0 ? 130 : 7, tokens = 100, chunk_tokens = 32, chunks = 4;
      AngleCase c(pairs, tokens, ids, 1.1875, random);
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
          const long double slope = c.wide[token] * 1.1875L;
          const int64_t at = token * pairs + pair;
          const long double of_sin = slope * std::cos(angle) * grad_sin.value(at);
          const long double of_cos = slope * std::sin(angle) * grad_cos.value(at);
          want += of_sin - of_cos;
          terms += std::fabs(of_sin) + std::fabs(of_cos);
        }
        // The terms and their sum in float64, some roundings each; the result in float32.
        const long double most = terms * 0x1p-46L + std::fabs(want) * 0x1p-24L;
        if (std::fabs(grad.value(pair) - want) <= most) continue;
        expect(false, text("cos_sin_grad %s, pair %d: expected %.9Lg, got %.9g", name(dtype),
                           int(pair), want, grad.value(pair)));
      }
      for (int64_t at = pairs; at < grad.count(); ++at) {
        expect(grad.bits(at) == before.bits(at), "cos_sin_grad: written past the end");
      }
    }
  }
}

// ------------------------------------------------------------------------------- apply_rotary_at

// The bits of apply_rotary by rows that cos_sin has made: of three axes, or 0, 1, 2, ...
void test_apply_rotary_at(const Case& c, Random& random) {
  if (c.full_width) return;
  ++cases;
  const bool given = c.rows == Rows::Int32 || c.rows == Rows::Int64;
  const int64_t tokens = (given ? c.batch : 1) * c.seq;
  AngleCase made(c.pairs, 3 * tokens, given ? (c.rows == Rows::Int32 ? 1 : 2) : 0, 1.1875, random);
  std::vector<int64_t> axes;
  for (int64_t i = 0; i < c.pairs; ++i) axes.push_back(random.below(3));
  axes.shrink_to_fit();
  if (given) {
    made.angles.positions.axes = 3, made.angles.positions.stride_axis = tokens;
    made.angles.axes = {axes.data(), true};
  }
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
  const auto rotate = [&](Tensor(&out)[2], const auto& run) {
    args.q = {out[0].heads<const void*>(c), out[0].heads<void*>(c), c.heads_q};
    args.k = {out[1].heads<const void*>(c), out[1].heads<void*>(c), c.heads_k};
    Tensor from[] = {in[0], in[1]};
    if (!c.in_place) {
      args.q.in = from[0].heads<const void*>(c);
      args.k.in = from[1].heads<const void*>(c);
    }
    run();
  };
  rotate(by_rows, [&] { cpu::apply_rotary(args); });
  rotate(at, [&] { cpu::apply_rotary_at(args); });
  expect_same(by_rows[0].memory, at[0].memory, text(c) + ", q");
  expect_same(by_rows[1].memory, at[1].memory, text(c) + ", k");
}

}  // namespace

int main(int argc, char** argv) {
  const int callers = argc > 1 ? std::atoi(argv[1]) : 1;
  in_threads(callers, [](int64_t caller) {
    Random random(20210420 + caller);
    for_each_case("apply_rotary", random, test_apply_rotary);
    for_each_case("rotary_table_grad", random, test_table_grad);
    test_cos_sin(random);
    test_cos_sin_grad(random);
    for_each_case("apply_rotary_at", random, test_apply_rotary_at);
  });
  Random random(20210420);
  test_streaming(random);
  std::printf("%s: %" PRId64 " cases, %d failures\n", cpu::name(cpu::capability()), cases.load(),
              failures.load());
  return failures == 0 ? 0 : 1;
}
