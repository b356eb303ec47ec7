// librope in a C++ program: no Python, and nothing of libtorch but its stable ABI.
//
//   test_rope operators    rotations by a table of the library, against plain loops
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

// cos, sin: [kRows, P]
std::array<Tensor, 2> cos_sin_cache(const Tensor& inv_freq) {
  std::array<StableIValue, 5> stack{stable::from(inv_freq), stable::from(kRows),
                                    stable::from(int64_t{0}), stable::from(1.0),
                                    stable::from(std::optional<ScalarType>())};
  if (!call("rope::cos_sin_cache", stack)) throw std::runtime_error("cos_sin_cache failed");
  return {stable::to<Tensor>(stack[0]), stable::to<Tensor>(stack[1])};
}

OptionalTensor apply_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
                            int64_t rotary_offset, bool interleaved, bool interleaved_out) {
  std::array<StableIValue, 9> stack{stable::from(x),
                                    stable::from(cos),
                                    stable::from(sin),
                                    stable::from(OptionalTensor()),
                                    stable::from(OptionalInt()),
                                    stable::from(rotary_offset),
                                    stable::from(interleaved),
                                    stable::from(OptionalBool(interleaved_out)),
                                    stable::from(false)};
  if (!call("rope::apply_rotary", stack)) return std::nullopt;
  return stable::to<Tensor>(stack[0]);
}

bool apply_rotary_qk_(Tensor& q, Tensor& k, const Tensor& cos, const Tensor& sin,
                      const Tensor& position_ids) {
  std::array<StableIValue, 10> stack{stable::from(q),
                                     stable::from(k),
                                     stable::from(cos),
                                     stable::from(sin),
                                     stable::from(OptionalTensor(position_ids)),
                                     stable::from(OptionalInt(kRotary)),
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

// x [B, S, H, D], its channels from `offset` on rotated by the rows `rows` [S] of cos, sin [L, P],
// from one order of pairs to another.
std::vector<float> rotated(const Tensor& x, const Tensor& cos, const Tensor& sin,
                           const std::vector<int64_t>& rows, int64_t offset = 0,
                           bool interleaved = false, bool interleaved_out = false) {
  const std::vector<float> in = values(x);
  std::vector<float> out = in;
  const int64_t heads = x.size(2), dim = x.size(3);
  for (int64_t i = 0; i < kBatch * kSeq * heads * kPairs; ++i) {
    const int64_t pair = i % kPairs, head = i / kPairs, row = rows[head / heads % kSeq];
    const float c = data<float>(cos)[row * kPairs + pair];
    const float s = data<float>(sin)[row * kPairs + pair];
    const int64_t first = head * dim + offset;
    const float x1 = in[first + (interleaved ? 2 * pair : pair)];
    const float x2 = in[first + (interleaved ? 2 * pair + 1 : pair + kPairs)];
    out[first + (interleaved_out ? 2 * pair : pair)] = x1 * c - x2 * s;
    out[first + (interleaved_out ? 2 * pair + 1 : pair + kPairs)] = x2 * c + x1 * s;
  }
  return out;
}

// -------------------------------------------------------------------------------------- tests

// The last channels of a head, from one order of pairs to the other.
void test_rotation(const Tensor& cos, const Tensor& sin) {
  for (const bool interleaved : {false, true}) {
    const int64_t offset = kDim - kRotary;
    const Tensor x = numbers({kBatch, kSeq, kHeads, kDim}, 5);
    const OptionalTensor got = apply_rotary(x, cos, sin, offset, interleaved, !interleaved);
    expect(got && values(*got) ==
                      rotated(x, cos, sin, {0, 1, 2, 3, 4}, offset, interleaved, !interleaved),
           interleaved ? "apply_rotary, from neighbours to halves: every bit"
                       : "apply_rotary, from halves to neighbours: every bit");
  }
}

void test_rotation_in_place(const Tensor& cos, const Tensor& sin) {
  const std::vector<int64_t> rows{7, 39, 0, 7, 12};
  Tensor position_ids = tensor({kSeq}, ScalarType::Long);
  std::copy(rows.begin(), rows.end(), data<int64_t>(position_ids));
  Tensor q = numbers({kBatch, kSeq, kHeads, kDim}, 2),
         k = numbers({kBatch, kSeq, kHeadsK, kDim}, 3);
  const auto expected_q = rotated(q, cos, sin, rows), expected_k = rotated(k, cos, sin, rows);
  expect(apply_rotary_qk_(q, k, cos, sin, position_ids), "apply_rotary_qk_ succeeds");
  expect(values(q) == expected_q && values(k) == expected_k, "apply_rotary_qk_: every bit");
}

// Two channels too few for the table. CTest reads the message.
void test_refusal(const Tensor& cos, const Tensor& sin) {
  Tensor x = numbers({kBatch, kSeq, kHeads, kRotary - 2}, 4);
  const std::vector<float> before = values(x);
  const bool refused = !apply_rotary(x, cos, sin, 0, false, false);
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
  const bool refused = !apply_rotary_qk_(q, negated, cos, sin, position_ids);
  std::fflush(stderr);
  const bool written = values(q) != before_q || values(k) != before_k;
  std::puts(refused && !written ? "refused, nothing written" : "not refused");
  if (!refused) ++failures;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto [cos, sin] = cos_sin_cache(default_inv_freq());
    if (argc == 2 && std::strcmp(argv[1], "operators") == 0) {
      test_rotation(cos, sin);
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
