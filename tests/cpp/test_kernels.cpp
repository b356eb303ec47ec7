// The CPU kernels without libtorch, against scalar arithmetic: also for a processor that is
// emulated and for which there is no libtorch.
//
//   test_kernels [CALLERS]    CALLERS threads at once (1) go through all cases, each with its own
//                             random numbers
//
// Rotations and their gradients must have the exact bits. The kernels of angles, of caches and of
// RMSNorm have files of their own.
#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>

#include "cpu/capability.h"
#include "cpu/parallel.h"
#include "kernel_cases.h"
#include "kernels.h"

using namespace kernel_cases;

// Calls f(0), ..., f(count - 1), each in a thread of its own.
template <class F>
void in_threads(int64_t count, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back(f, i);
  for (std::thread& thread : threads) thread.join();
}

// Replaces libtorch's: the last range comes first, and ranges begin in the middle of a token.
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

constexpr int64_t kLargeBytes = 33 << 20;  // stored past the caches

// ---------------------------------------------------------------------------------- apply_rotary

void test_apply_rotary(const Case& c, Random& random) {
  ++cases;
  const Rotation rotation(c, random);
  RotaryArgs args = rotation.args(c);
  const int64_t heads[] = {c.heads_q, c.heads_k};
  std::vector<Tensor> in, out;
  std::vector<Memory> expected;
  for (int x = 0; x < 2; ++x) {
    in.push_back(random_tensor(c, heads[x], c.in_place ? kGuard : 0, random));
    out.push_back(c.in_place ? in[x] : random_tensor(c, heads[x], kGuard, random));
    expected.push_back(out[x].memory);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t s = 0; s < c.seq; ++s) {
        for (int64_t h = 0; h < heads[x]; ++h) {
          rotate_head(c, rotation, b, s, in[x].memory, in[x].index(b, s, h, 0), expected[x],
                      out[x].index(b, s, h, 0));
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

// Results too large for the caches are stored past them, with the same bits.
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
      // The portable code has no such stores: one sample for each dtype.
      const bool sample = cpu::capability() == std::string("portable");
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
      const auto same = [&](int64_t i) {  // any NaN equals any other
        const uint64_t want = scalar::read_bits(dtype, cached.data(), i);
        const uint64_t have = scalar::read_bits(dtype, streamed.data(), i);
        return want == have || (scalar::is_nan(dtype, want) && scalar::is_nan(dtype, have));
      };
      const int64_t count = (kLargeBytes + kSpare) / size_of(dtype);
      int64_t i = 0;
      while (i < count && same(i)) ++i;
      expect(i == count, text("apply_rotary of 33 MiB %s, orders %d: element %" PRId64
                              " is not the same past the caches",
                              name(dtype), orders, i));
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
  const int64_t tokens = c.batch * c.seq;
  order.resize(tokens);
  if (c.outside && !by_index) {
    for (int64_t& token : order) {
      if (random.below(5) == 0) token = index_outside(tokens, true, random);
    }
    for (int64_t& offset : offsets) {
      if (random.below(5) == 0) offset = index_outside(tokens + 1, true, random);
      if (random.below(5) == 0) offset = random.below(tokens + 1);  // so that some fall
    }
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
      const Pair in = channels(c.interleaved, c.pairs, i), column = columns(c, i);
      const Pair out = channels(c.interleaved_out, c.pairs, i);
      double sum11 = 0, sum12 = 0, sum21 = 0, sum22 = 0;  // of g1 x1, g1 x2, g2 x1, g2 x2
      const auto add = [&](double& sum, double g, double value) {
        sum = rounded(sum + rounded(g * value));
      };
      const bool rises = 0 <= offsets[row] && offsets[row + 1] <= tokens;
      for (int64_t at = offsets[row]; rises && at < offsets[row + 1]; ++at) {
        if (order[at] < 0 || order[at] >= tokens) continue;
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

// ---------------------------------------------------------------------------------------- threads

void test_exceptions() {
  ++cases;
  std::atomic<int64_t> done = 0;
  bool thrown = false;
  try {
    cpu::parallel_for(90, 3, [&](int64_t begin, int64_t end) {
      done += end - begin;
      if (begin > 30) throw std::bad_alloc();
    });
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  expect(thrown && done == 90, "an exception in a thread reaches the caller, after all are done");
}

}  // namespace

int main(int argc, char** argv) {
  const int callers = argc > 1 ? std::atoi(argv[1]) : 1;
  in_threads(callers, [](int64_t caller) {
    Random random(20210420 + caller);
    for_each_case("apply_rotary", random, test_apply_rotary);
    for_each_case("rotary_table_grad", random, test_table_grad);
    test_angles(random);
    test_append(random);
    test_cached_keys(random);
    test_qkv(random);
    test_quantize(random);
    test_rms_norm(random);
  });
  Random random(20210420);
  test_streaming(random);
  test_exceptions();
  std::printf("%s: %" PRId64 " cases, %d failures\n", cpu::capability(), cases.load(),
              failures.load());
  return failures == 0 ? 0 : 1;
}
