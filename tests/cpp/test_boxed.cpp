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
std::tuple<int64_t, double> digits(int64_t first, const Seven& pack, const One& one,
                                   std::optional<bool> last) {
  const int64_t sum = first + pack.a + pack.c * 100 + pack.d + pack.e + pack.f + pack.g + one.a;
  return {sum + (last.value_or(false) ? 100000000 : 0), pack.b};
}

void writes(const One&) {}

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
  const rope::Operator op = rope::boxed<&digits>("digits"), write = rope::boxed<&writes>("writes_");
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
  op.function(stack, 10, 2);
  expect(stable::to<int64_t>(stack[0]) == 176543121, "arguments of packs in order");
  expect(stable::to<double>(stack[1]) == 0.5, "results in order");

  expect(message_of([&] { op.function(stack, 9, 2); }) ==
             "rope::digits: its schema has 9 arguments and 2 results, its C++ function 10 and 2",
         "a wrong number of arguments is refused");
  expect(message_of([&] { op.function(stack, 10, 1); }).find("1 results") != std::string::npos,
         "a wrong number of results is refused");

  expect(op.refuse_negated == nullptr, "an operator with results writes nothing");
  StableIValue argument[] = {stable::from(int64_t{1})};
  expect(message_of([&] {
           write.refuse_negated(argument, 1, 0);
         }).find("rope::writes_: expected") == 0,
         "an operator without results refuses negated tensors");
  if (failures == 0) std::printf("ok\n");
  return failures;
}
