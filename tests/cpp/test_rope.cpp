// librope in a C++ program: no Python, and nothing of libtorch but its stable ABI.
//
//   test_rope operators    tables and rotations against plain loops
//   test_rope refusal      a wrong shape is refused, and nothing is written
//   test_rope negated      so is a view that negates its elements, in place
//   test_rope copy FILE    loading a copy of librope keeps the registered operators
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;
using OptionalBool = std::optional<bool>;

// Newer than the oldest torch that the library runs on, 2.10, which prints the message itself.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace stable = torch::stable::detail;  // from, to: values as the dispatcher takes them

namespace {

constexpr int64_t kBatch = 2, kSeq = 5, kHeads = 3, kHeadsK = 1, kDim = 22, kRotary = 18;
constexpr int64_t kPairs = kRotary / 2, kRows = 40;
constexpr double kBase = 10000;

int failures = 0;

void expect(bool condition, const char* what) {
  if (!condition) ++failures;
  std::printf("%-4s %s\n", condition ? "ok" : "FAIL", what);
}

// ------------------------------------------------------------------------------- the operators

// Fails with the operator's message on stderr.
template <size_t kSlots>
bool call(const char* op, std::array<StableIValue, kSlots>& stack) {
  if (torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) == TORCH_SUCCESS) return true;
  if (torch_exception_get_what_without_backtrace != nullptr) {
    std::fprintf(stderr, "%s\n", torch_exception_get_what_without_backtrace());
  }
  return false;
}

// cos, sin: [length, P]
std::array<Tensor, 2> cos_sin_cache(const Tensor& inv_freq, int64_t length, int64_t start) {
  std::array<StableIValue, 5> stack{stable::from(inv_freq), stable::from(length),
                                    stable::from(start), stable::from(1.0),
                                    stable::from(std::optional<ScalarType>())};
  if (!call("rope::cos_sin_cache", stack)) throw std::runtime_error("cos_sin_cache failed");
  return {stable::to<Tensor>(stack[0]), stable::to<Tensor>(stack[1])};
}

OptionalTensor apply_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
                            int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                            bool inverse) {
  std::array<StableIValue, 9> stack{stable::from(x),
                                    stable::from(cos),
                                    stable::from(sin),
                                    stable::from(OptionalTensor()),
                                    stable::from(OptionalInt()),
                                    stable::from(rotary_offset),
                                    stable::from(interleaved),
                                    stable::from(interleaved_out),
                                    stable::from(inverse)};
  if (!call("rope::apply_rotary", stack)) return std::nullopt;
  return stable::to<Tensor>(stack[0]);
}

bool apply_rotary_qk_(Tensor& q, Tensor& k, const Tensor& cos, const Tensor& sin,
                      const Tensor& position_ids, int64_t rotary_dim) {
  std::array<StableIValue, 10> stack{stable::from(q),
                                     stable::from(k),
                                     stable::from(cos),
                                     stable::from(sin),
                                     stable::from(OptionalTensor(position_ids)),
                                     stable::from(OptionalInt(rotary_dim)),
                                     stable::from(int64_t{0}),
                                     stable::from(false),
                                     stable::from(OptionalBool()),
                                     stable::from(false)};
  return call("rope::apply_rotary_qk_", stack);
}

// ----------------------------------------------------------------------------------- tensors

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

Tensor tensor(std::initializer_list<int64_t> sizes, ScalarType dtype = ScalarType::Float) {
  return torch::stable::empty(std::vector<int64_t>(sizes), dtype);
}

// Numbers in [-1, 1) that repeat late and are no round binary fractions.
Tensor numbers(std::initializer_list<int64_t> sizes, int64_t seed) {
  Tensor t = tensor(sizes);
  for (int64_t i = 0; i < t.numel(); ++i) {
    const double phase = 0.7548776662 * static_cast<double>(i + seed);
    data<float>(t)[i] = static_cast<float>(2 * (phase - std::floor(phase)) - 1);
  }
  return t;
}

std::vector<float> values(const Tensor& t) { return {data<float>(t), data<float>(t) + t.numel()}; }

Tensor default_inv_freq() {
  Tensor inv_freq = tensor({kPairs});
  for (int64_t i = 0; i < kPairs; ++i) {
    data<float>(inv_freq)[i] = static_cast<float>(std::pow(kBase, -2.0 * i / kRotary));
  }
  return inv_freq;
}

// --------------------------------------------------------------------------------- plain loops

// Which channels rotate, and the order of their pairs before and after.
struct Channels {
  int64_t offset = 0;
  bool interleaved = false, interleaved_out = false;
};

// x [B, S, H, D], rotated by the rows `rows` [S] of cos, sin [L, P].
void rotate_plainly(std::vector<float>& x, int64_t heads, int64_t dim, const Tensor& cos,
                    const Tensor& sin, const std::vector<int64_t>& rows, const Channels& at,
                    bool inverse) {
  const std::vector<float> before = x;
  for (int64_t token = 0; token < kBatch * kSeq; ++token) {
    const int64_t row = rows[token % kSeq];
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t first = (token * heads + head) * dim + at.offset;
      const float* in = &before[first];
      float* out = &x[first];
      for (int64_t i = 0; i < kPairs; ++i) {
        const float c = data<float>(cos)[row * kPairs + i];
        const float s = (inverse ? -1 : 1) * data<float>(sin)[row * kPairs + i];
        const float x1 = in[at.interleaved ? 2 * i : i];
        const float x2 = in[at.interleaved ? 2 * i + 1 : i + kPairs];
        out[at.interleaved_out ? 2 * i : i] = x1 * c - x2 * s;
        out[at.interleaved_out ? 2 * i + 1 : i + kPairs] = x2 * c + x1 * s;
      }
    }
  }
}

// The distance in units of the last place of `expected`.
double ulps(float got, double expected) {
  const float rounded = std::fabs(static_cast<float>(expected));
  const float next = std::nextafter(rounded, std::numeric_limits<float>::infinity());
  return std::fabs(got - expected) / (static_cast<double>(next) - rounded);
}

// -------------------------------------------------------------------------------------- tests

void test_cache() {
  const int64_t start = 1000000;
  const Tensor inv_freq = default_inv_freq();
  const auto [cos, sin] = cos_sin_cache(inv_freq, kRows, start);
  expect(cos.sizes().size() == 2 && cos.size(0) == kRows && cos.size(1) == kPairs,
         "cos_sin_cache gives [length, P]");

  double worst = 0;
  for (int64_t i = 0; i < kRows * kPairs; ++i) {
    const long double position = start + i / kPairs;
    const long double angle = position * data<float>(inv_freq)[i % kPairs];
    worst = std::max(worst, ulps(data<float>(cos)[i], static_cast<double>(std::cos(angle))));
    worst = std::max(worst, ulps(data<float>(sin)[i], static_cast<double>(std::sin(angle))));
  }
  std::printf("     largest error: %.3f ulp\n", worst);
  expect(worst <= 1, "cos and sin at position 1e6 are within 1 ulp");
}

void test_rotation(const Tensor& cos, const Tensor& sin) {
  const std::vector<int64_t> rows{0, 1, 2, 3, 4};
  for (const bool interleaved : {false, true}) {
    for (const bool inverse : {false, true}) {
      const Tensor x = numbers({kBatch, kSeq, kHeads, kRotary}, 1);
      std::vector<float> expected = values(x);
      rotate_plainly(expected, kHeads, kRotary, cos, sin, rows, {0, interleaved, interleaved},
                     inverse);
      const OptionalTensor got = apply_rotary(x, cos, sin, 0, interleaved, std::nullopt, inverse);
      char what[80];
      std::snprintf(what, sizeof(what), "apply_rotary, %s%s: every bit",
                    interleaved ? "interleaved" : "half-split", inverse ? ", inverse" : "");
      expect(got && values(*got) == expected, what);
    }
  }
}

// The last channels of a head, from one order of pairs to the other.
void test_rotation_between_orders(const Tensor& cos, const Tensor& sin) {
  const std::vector<int64_t> rows{0, 1, 2, 3, 4};
  for (const bool interleaved : {false, true}) {
    const Channels at{kDim - kRotary, interleaved, !interleaved};
    const Tensor x = numbers({kBatch, kSeq, kHeads, kDim}, 5);
    std::vector<float> expected = values(x);
    rotate_plainly(expected, kHeads, kDim, cos, sin, rows, at, false);
    const OptionalTensor got =
        apply_rotary(x, cos, sin, at.offset, at.interleaved, at.interleaved_out, false);
    expect(got && values(*got) == expected,
           interleaved ? "apply_rotary, the last channels, from neighbours to halves: every bit"
                       : "apply_rotary, the last channels, from halves to neighbours: every bit");
  }
}

void test_rotation_in_place(const Tensor& cos, const Tensor& sin) {
  const std::vector<int64_t> rows{7, 39, 0, 7, 12};
  Tensor position_ids = tensor({kSeq}, ScalarType::Long);
  std::copy(rows.begin(), rows.end(), data<int64_t>(position_ids));

  Tensor q = numbers({kBatch, kSeq, kHeads, kDim}, 2);
  Tensor k = numbers({kBatch, kSeq, kHeadsK, kDim}, 3);
  std::vector<float> expected_q = values(q), expected_k = values(k);
  rotate_plainly(expected_q, kHeads, kDim, cos, sin, rows, {}, false);
  rotate_plainly(expected_k, kHeadsK, kDim, cos, sin, rows, {}, false);
  expect(apply_rotary_qk_(q, k, cos, sin, position_ids, kRotary), "apply_rotary_qk_ succeeds");
  expect(values(q) == expected_q, "apply_rotary_qk_, q: every bit, channels past rotary_dim kept");
  expect(values(k) == expected_k, "apply_rotary_qk_, k: every bit, channels past rotary_dim kept");
}

// Two channels too few for the table. CTest reads the message.
void test_refusal(const Tensor& cos, const Tensor& sin) {
  Tensor x = numbers({kBatch, kSeq, kHeads, kRotary - 2}, 4);
  const std::vector<float> before = values(x);
  const bool refused = !apply_rotary(x, cos, sin, 0, false, std::nullopt, false);
  std::fflush(stderr);
  std::puts(refused && values(x) == before ? "refused, nothing written" : "not refused");
  if (!refused) ++failures;
}

// As imag(conj(z)) is one, and beside a q that is none.
void test_negated(const Tensor& cos, const Tensor& sin) {
  Tensor position_ids = tensor({kSeq}, ScalarType::Long);
  std::fill_n(data<int64_t>(position_ids), kSeq, 1);
  Tensor q = numbers({kBatch, kSeq, kHeads, kDim}, 2),
         k = numbers({kBatch, kSeq, kHeadsK, kDim}, 3);
  const std::vector<float> before_q = values(q), before_k = values(k);
  std::array<StableIValue, 1> stack{stable::from(k)};
  if (!call("aten::_neg_view", stack)) throw std::runtime_error("_neg_view failed");
  Tensor negated = stable::to<Tensor>(stack[0]);
  const bool refused = !apply_rotary_qk_(q, negated, cos, sin, position_ids, kRotary);
  std::fflush(stderr);
  const bool written = values(q) != before_q || values(k) != before_k;
  std::puts(refused && !written ? "refused, nothing written" : "not refused");
  if (!refused) ++failures;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto [cos, sin] = cos_sin_cache(default_inv_freq(), kRows, 0);
    if (argc == 2 && std::strcmp(argv[1], "operators") == 0) {
      test_cache();
      test_rotation(cos, sin);
      test_rotation_between_orders(cos, sin);
      test_rotation_in_place(cos, sin);
    } else if (argc == 2 && std::strcmp(argv[1], "refusal") == 0) {
      test_refusal(cos, sin);
    } else if (argc == 2 && std::strcmp(argv[1], "negated") == 0) {
      test_negated(cos, sin);
    } else if (argc == 3 && std::strcmp(argv[1], "copy") == 0) {
      expect(dlopen(argv[2], RTLD_NOW) != nullptr, "a copy of librope is loaded");
      test_rotation_in_place(cos, sin);
    } else {
      std::fprintf(stderr, "usage: test_rope operators | refusal | negated | copy FILE\n");
      return 2;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return failures == 0 ? 0 : 1;
}
