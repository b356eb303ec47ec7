// The boxer of operators: packs of any size, the order of arguments and results, and a refusal of a
// schema that does not fit its function.
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <exception>
#include <optional>
#include <string>
#include <tuple>

#include "boxed.h"

namespace {

namespace stable = torch::stable::detail;

struct Seven {
  using Parameters = std::tuple<int64_t, double, bool, int64_t, int64_t, int64_t, int64_t>;
  int64_t a;
  double b;
  bool c;
  int64_t d, e, f, g;
};

struct One {
  using Parameters = std::tuple<int64_t>;
  int64_t a;
};

// Every argument has a decimal digit of its own.
int64_t sum = 0;
double half = 0;
void writes_digits(int64_t first, const Seven& pack, const One& one, std::optional<bool> last) {
  sum = first + pack.a + pack.c * 100 + pack.d + pack.e + pack.f + pack.g + one.a;
  sum += last.value_or(false) ? 100000000 : 0;
  half = pack.b;
}

std::tuple<rope::Tensor, rope::Tensor> returns(const One&) { return {}; }

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

template <class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace

int main() {
  const rope::Operator op = rope::boxed<&writes_digits>("digits_"),
                       two = rope::boxed<&returns>("two");
  StableIValue stack[] = {stable::from(int64_t{1}),
                          stable::from(int64_t{20}),
                          stable::from(0.5),
                          stable::from(true),
                          stable::from(int64_t{3000}),
                          stable::from(int64_t{40000}),
                          stable::from(int64_t{500000}),
                          stable::from(int64_t{6000000}),
                          stable::from(int64_t{70000000}),
                          stable::from(std::optional<bool>(true))};
  op.function(stack, 10, 0);
  expect(sum == 176543121 && half == 0.5, "arguments of packs in order");

  expect(message_of([&] { op.function(stack, 9, 0); }) ==
             "rope::digits_: its schema has 9 arguments and 0 results, its C++ function 10 and 0",
         "a wrong number of arguments is refused");
  StableIValue argument[] = {stable::from(int64_t{1}), {}};
  StableIValue again[10] = {};
  expect(message_of([&] { two.function(argument, 1, 1); }).find("1 results") != std::string::npos,
         "a wrong number of results is refused");

  expect(two.refuse_negated == nullptr, "an operator with results writes nothing");
  expect(message_of([&] { op.refuse_negated(again, 10, 0); }).find("rope::digits_: expected") == 0,
         "an operator without results refuses negated tensors");
  if (failures == 0) std::printf("ok\n");
  return failures;
}
