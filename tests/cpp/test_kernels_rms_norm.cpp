// The CPU kernels of RMSNorm with rotation and of its gradients, part of test_kernels.cpp, against
// long double: the error of a result must be within what the roundings of its arithmetic can add up
// to.
#include "kernel_cases.h"
#include "kernels.h"

using namespace kernel_cases;

namespace {

constexpr Sizes kSizes[] = {
    // B, S, heads of q, of k; channels before, pairs, channels after
    {"Qwen3", 2, 3, 4, 2, 0, 64, 0},
    {"decoding", 3, 1, 4, 2, 0, 64, 0},
    {"less than a vector", 2, 3, 3, 1, 1, 1, 0},
    {"parts of vectors", 1, 7, 2, 3, 5, 17, 9},
    {"whole blocks of vectors, single vectors and a tail", 2, 2, 2, 1, 43, 43, 47},
    {"more than one piece, of 512 pairs or 1,024 channels", 1, 2, 1, 2, 1030, 520, 1027},
    {"divided among threads", 2, 60, 4, 2, 3, 20, 6},
    {"queries alone", 2, 3, 2, 0, 2, 16, 0},
    {"no token", 2, 0, 3, 1, 0, 16, 2},
    {"no sequence", 0, 3, 3, 1, 5, 16, 0},
};

// ------------------------------------------------------------------------------------- tolerances

// The most roundings that a result has gone through, for some heads normalised together. A sum over
// their channels, whose partial sums have a quarter each, and the rotation, the root, the weight
// and the products: less than 15 roundings. A gradient has three of these.
double roundings(const Case& c, int64_t heads) {
  const int64_t quarter = c.dtype == DType::Float64 ? 4 : 8;
  constexpr int64_t kSpans = 4;  // of the channels of a head: each may end in part of a quarter
  return static_cast<double>(3 * (heads * (c.dim() / quarter + kSpans) + 15));
}

// A sum, and the sum of the magnitudes of its terms.
struct Sum {
  long double value = 0, size = 0;

  void add(long double term) { value += term, size += std::fabs(term); }
  void add(const Sum& sum, long double times) {
    value += sum.value * times, size += sum.size * std::fabs(times);
  }
};

// What memory may hold: a rounded number between two bounds or, where none are set, what it held.
class Bounds {
 public:
  explicit Bounds(const Memory& before) : least_(before), most_(before) {}

  // A sum each of whose terms has gone through at most `most` roundings.
  void set(int64_t at, const Sum& sum, double most, DType dtype) {
    const long double error = std::ldexp(most * sum.size, dtype == DType::Float64 ? -53 : -24);
    least_.set_value(at, static_cast<double>(sum.value - error));
    most_.set_value(at, static_cast<double>(sum.value + error));
  }
  void expect_holds(const Memory& got, const std::string& what) const {
    for (int64_t i = 0; i < got.count(); ++i) {
      const double least = least_.value(i), most = most_.value(i), value = got.value(i);
      if (least <= value && value <= most) continue;
      if (std::isnan(least) && std::isnan(value)) continue;
      expect(false, what + text(": element %" PRId64 ": expected %.17g to %.17g, got %.17g", i,
                                least, most, value));
      return;
    }
  }

 private:
  Memory least_, most_;
};

// ------------------------------------------------------------------------------------------ inputs

// q and k (index 0 and 1), their weights and their rotation.
struct Inputs {
  Packed x;  // q, k and v
  RmsNorm norm{};
  std::vector<Memory> weights;
  Rotation rotation;

  Inputs(const Case& c, Random& random)
      : x(random_packed(c, {{c.heads_q, c.dim()}, {c.heads_k, c.dim()}, {c.heads_k, c.dim()}}, 0,
                        random)),
        rotation(c, random) {
    norm.dtype = random.coin() ? c.dtype : DType::Float32;
    norm.eps = random.coin() ? 0.25 : 1e-6;  // a large part of the mean, or as in models
    norm.unit_offset = random.coin();
    norm.all_heads = random.coin();
    for (int which = 0; which < 2; ++which) {
      const int64_t stride = norm.all_heads ? c.dim() + random.below(3) : 0;
      const int64_t most = std::max<int64_t>(x.views[which].heads - 1, 0) * stride + c.dim();
      weights.emplace_back(norm.dtype, most, false, random);
      (which == 0 ? norm.q_stride_h : norm.k_stride_h) = stride;
    }
    norm.q_weight = weights[0].data(c.before);
    norm.k_weight = weights[1].data(c.before);
    const bool zeros = c.batch * c.seq > 0 && random.coin();  // a head whose mean is eps alone
    for (int64_t i = 0; zeros && i < c.dim(); ++i) x.memory.set(x.views[0].index(0, 0, 0, i), 0);
  }

  long double weight(int which, int64_t h, int64_t channel) const {
    const int64_t stride = which == 0 ? norm.q_stride_h : norm.k_stride_h;
    return weights[which].value(h * stride + channel) + (norm.unit_offset ? 1.0L : 0.0L);
  }
  long double value(int which, int64_t b, int64_t s, int64_t h, int64_t channel) const {
    return x.memory.value(x.views[which].index(b, s, h, channel));
  }
  long double inverse_rms(const Case& c, int which, int64_t b, int64_t s, int64_t first_head,
                          int64_t heads) const {
    long double squares = 0;
    for (int64_t h = first_head; h < first_head + heads; ++h) {
      for (int64_t i = 0; i < c.dim(); ++i) {
        squares += value(which, b, s, h, i) * value(which, b, s, h, i);
      }
    }
    return 1 / std::sqrt(squares / (heads * c.dim()) + norm.eps);
  }
  // work(b, s, first head, heads) for the heads that are normalised together.
  template <class Work>
  void for_each_group(const Case& c, int which, const Work& work) const {
    const int64_t all = x.views[which].heads, heads = norm.all_heads ? all : 1;
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t s = 0; s < c.seq; ++s) {
        for (int64_t h = 0; h < all; h += heads) work(b, s, h, heads);
      }
    }
  }
};

// Rotates a head of token (b, s) whose channel i is head(i).
template <class Head>
std::vector<Sum> rotated(const Case& c, const Rotation& rotation, int64_t b, int64_t s,
                         const Head& head) {
  std::vector<Sum> out(c.dim());
  for (int64_t i = 0; i < c.dim(); ++i) {
    if (i < c.before || i >= c.before + 2 * c.pairs) out[i].add(head(i));
  }
  for (int64_t i = 0; i < c.pairs; ++i) {
    const Pair x = channels(c.interleaved, c.pairs, i);
    const Pair y = channels(c.interleaved_out, c.pairs, i);
    const long double x1 = head(c.before + x.first), x2 = head(c.before + x.second);
    const Turn turn = rotation.turn(c, b, s, i);
    Sum &y1 = out[c.before + y.first], &y2 = out[c.before + y.second];
    y1.add(x1 * turn.c1), y1.add(-x2 * turn.s1);
    y2.add(x2 * turn.c2), y2.add(x1 * turn.s2);
  }
  return out;
}

std::string text_of(const Case& c, const Inputs& in) {
  return text(c) + text(", weight %s%s%s, eps %g", name(in.norm.dtype),
                        in.norm.all_heads ? " of all heads" : "",
                        in.norm.unit_offset ? " and 1" : "", in.norm.eps);
}

// ------------------------------------------------------------------------------------------- tests

void test_forward(const Case& c, Random& random) {
  ++cases;
  Inputs in(c, random);
  RmsNormRotaryArgs args{};
  args.rotary = in.rotation.args(c);
  args.norm = in.norm;
  std::vector<Tensor> out;
  std::vector<Bounds> bounds;
  for (int which = 0; which < 2; ++which) {
    const View& x = in.x.views[which];
    out.push_back(random_tensor(c, x.heads, kGuard, random));
    bounds.emplace_back(out[which].memory);
    in.for_each_group(c, which, [&](int64_t b, int64_t s, int64_t first_head, int64_t heads) {
      const long double inverse_rms = in.inverse_rms(c, which, b, s, first_head, heads);
      for (int64_t h = first_head; h < first_head + heads; ++h) {
        const auto y = rotated(c, in.rotation, b, s, [&](int64_t i) {
          return in.value(which, b, s, h, i) * inverse_rms * in.weight(which, h, i);
        });
        for (int64_t i = 0; i < c.dim(); ++i) {
          bounds[which].set(out[which].index(b, s, h, i), y[i], roundings(c, heads), c.dtype);
        }
      }
    });
    RotatedHeads& rotated_heads = which == 0 ? args.rotary.q : args.rotary.k;
    rotated_heads = {x.in<const void*>(in.x.memory, c.before), out[which].heads<void*>(c), x.heads};
  }
  cpu::rms_norm_rotary(args);
  for (int which = 0; which < 2; ++which) {
    bounds[which].expect_holds(out[which].memory, text_of(c, in) + (which == 0 ? ", q" : ", k"));
  }
}

// With n = x / rms, g the gradient rotated back and m = mean(n g w): the gradient to x is
// (g w - n m) / rms, the gradient to the weight is the sum of n g.
void test_backward(const Case& c, Random& random) {
  ++cases;
  Inputs in(c, random);
  Case back = c;
  std::swap(back.interleaved, back.interleaved_out);
  back.inverse = !c.inverse;
  const int missing = static_cast<int>(random.below(5));  // 0, 1: q or k has no gradient
  Packed grad = random_packed(c, {in.x.views[0], in.x.views[1]}, 0, random);
  for (View& view : grad.views) {  // expanded, as that of a sum is
    if (random.below(4) == 0) view.stride_b = view.stride_s = view.stride_h = 0;
  }

  RmsNormRotaryGradArgs args{};
  args.rotary = in.rotation.args(back);
  args.norm = in.norm;
  args.q = in.x.views[0].in<const void*>(in.x.memory, c.before);
  args.k = in.x.views[1].in<const void*>(in.x.memory, c.before);
  args.chunk_tokens = 1 + random.below(8);
  args.chunks = (c.batch * c.seq + args.chunk_tokens - 1) / args.chunk_tokens;
  std::vector<Tensor> out;
  std::vector<Memory> out_weight;
  std::vector<Bounds> bounds, weight_bounds;
  for (int which = 0; which < 2; ++which) {
    const bool given = missing != which;
    const int64_t heads = in.x.views[which].heads, weights = in.norm.all_heads ? heads : 1;
    const int64_t columns = weights * c.dim();
    out.push_back(random_tensor(c, heads, kGuard, random));
    out_weight.emplace_back(in.norm.dtype, columns + 2 * kGuard, false, random);
    bounds.emplace_back(out[which].memory);
    weight_bounds.emplace_back(out_weight[which]);
    RotatedHeads& rotated_heads = which == 0 ? args.rotary.q : args.rotary.k;
    rotated_heads = {grad.views[which].in<const void*>(grad.memory, c.before),
                     out[which].heads<void*>(c), given ? heads : 0};
    (which == 0 ? args.grad_q_weight : args.grad_k_weight) = out_weight[which].data(kGuard);
    if (!given) continue;
    args.columns += columns;
    if (which == 0) args.q_columns = columns;

    std::vector<Sum> sums(columns);
    in.for_each_group(c, which, [&](int64_t b, int64_t s, int64_t first_head, int64_t group_heads) {
      const long double inverse_rms = in.inverse_rms(c, which, b, s, first_head, group_heads);
      const int64_t channels = group_heads * c.dim();
      std::vector<Sum> g;
      Sum mean;
      for (int64_t j = 0; j < channels; ++j) {
        const int64_t h = first_head + j / c.dim(), i = j % c.dim();
        if (i == 0) {
          for (const Sum& each : rotated(back, in.rotation, b, s, [&](int64_t channel) {
                 return grad.memory.value(grad.views[which].index(b, s, h, channel));
               })) {
            g.push_back(each);
          }
        }
        mean.add(g[j],
                 in.weight(which, h, i) * in.value(which, b, s, h, i) * inverse_rms / channels);
      }
      for (int64_t j = 0; j < channels; ++j) {
        const int64_t h = first_head + j / c.dim(), i = j % c.dim();
        const long double n = in.value(which, b, s, h, i) * inverse_rms;
        Sum to_x;
        to_x.add(g[j], in.weight(which, h, i) * inverse_rms);
        to_x.add(mean, -n * inverse_rms);
        bounds[which].set(out[which].index(b, s, h, i), to_x, roundings(c, group_heads), c.dtype);
        sums[in.norm.all_heads ? j : i].add(g[j], n);
      }
    });
    const int64_t additions = args.chunk_tokens * (heads / std::max<int64_t>(weights, 1));
    const double most = roundings(c, weights) + static_cast<double>(additions + args.chunks);
    for (int64_t column = 0; column < columns; ++column) {
      weight_bounds[which].set(kGuard + column, sums[column], most, c.dtype);
    }
  }
  const DType arithmetic = c.dtype == DType::Float64 ? DType::Float64 : DType::Float32;
  const int64_t workspace = args.chunks * args.columns;
  Memory partial(arithmetic, workspace + 2 * kGuard, false, random);
  const Memory before = partial;
  args.partial = partial.data(kGuard);
  cpu::rms_norm_rotary_grad(args);

  for (int which = 0; which < 2; ++which) {
    const std::string what = text_of(c, in) + (which == 0 ? ", to q" : ", to k");
    bounds[which].expect_holds(out[which].memory, what);
    weight_bounds[which].expect_holds(out_weight[which], what + "'s weight");
  }
  for (int64_t i = 0; i < kGuard; ++i) {
    expect(partial.bits(i) == before.bits(i) &&
               partial.bits(kGuard + workspace + i) == before.bits(kGuard + workspace + i),
           text_of(c, in) + ": written beside the partial sums");
  }
}

}  // namespace

void kernel_cases::test_rms_norm(Random& random) {
  const auto ordinary = [](const auto& test) {
    return [test](Case c, Random& random) {
      c.any_bits = c.in_place = false;
      test(c, random);
    };
  };
  for_each_size("rms_norm_rotary", kSizes, random, ordinary(test_forward));
  for_each_size("rms_norm_rotary_grad", kSizes, random, ordinary(test_backward));
}
