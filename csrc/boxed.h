// Makes C++ functions callable by PyTorch's dispatcher, as TORCH_BOX does.
//
// A parameter may also be a pack (packs.h): a struct that stands for several consecutive parameters
// of the schema. Its type has a std::tuple of their types, `Parameters`, and is made by
// Pack{first, second, ...}.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

#include "check/refusal.h"

namespace rope {

// Takes its arguments from the stack, which it owns from then on, and leaves its results there.
using BoxedFunction = void (*)(StableIValue* stack, uint64_t arguments, uint64_t results);

// An operator, as StableLibrary::impl takes it.
struct Operator {
  const char* name;
  BoxedFunction function;
  BoxedFunction refuse_negated;  // see Boxed; nullptr for an operator that writes to no argument
};

namespace boxing {

template <class T>
using Bare = std::remove_cv_t<std::remove_reference_t<T>>;

// The arguments of a call, each to be taken once; a tensor is a handle, which its taker owns.
struct Stack {
  StableIValue* values;
  uint64_t taken = 0;  // a bit for each

  template <class T>
  T take(size_t i) {
    taken |= uint64_t{1} << i;
    return torch::stable::detail::to<T>(values[i]);
  }

  // Takes it if nobody has, for nobody.
  template <class T>
  void release(size_t i) {
    if (taken >> i & 1) return;
    try {
      take<T>(i);
    } catch (...) {  // not a value of type T: it holds no handle
    }
  }
};

// A parameter of type T, from the value `first` on.
template <class T, class = void>
struct Parameter {
  static constexpr size_t kCount = 1;
  static T take(Stack& stack, size_t first) { return stack.take<T>(first); }
  static void release(Stack& stack, size_t first) { stack.release<T>(first); }
};

template <class Pack>
struct Parameter<Pack, std::void_t<typename Pack::Parameters>> {
  using Types = typename Pack::Parameters;
  static constexpr size_t kCount = std::tuple_size_v<Types>;
  static constexpr auto kIndices = std::make_index_sequence<kCount>{};

  static Pack take(Stack& stack, size_t first) { return take(stack, first, kIndices); }
  static void release(Stack& stack, size_t first) { release(stack, first, kIndices); }

 private:
  template <size_t... i>
  static Pack take(Stack& stack, size_t first, std::index_sequence<i...>) {
    return Pack{stack.take<std::tuple_element_t<i, Types>>(first + i)...};
  }
  template <size_t... i>
  static void release(Stack& stack, size_t first, std::index_sequence<i...>) {
    (stack.release<std::tuple_element_t<i, Types>>(first + i), ...);
  }
};

// What a function returns, for the stack.
template <class T>
struct Results {
  static constexpr size_t kCount = 1;
  static void put(StableIValue* stack, const T& value) {
    *stack = torch::stable::detail::from<T>(value);
  }
};
template <>
struct Results<void> {
  static constexpr size_t kCount = 0;
};
template <class... T>
struct Results<std::tuple<T...>> {
  static constexpr size_t kCount = sizeof...(T);
  static void put(StableIValue* stack, const std::tuple<T...>& values) {
    std::apply([&](const T&... value) { (Results<T>::put(stack++, value), ...); }, values);
  }
};

template <auto function>
struct Boxed;

template <class R, class... P, R (*function)(P...)>
struct Boxed<function> {
  static constexpr size_t kArguments = (Parameter<Bare<P>>::kCount + ...);
  static constexpr size_t kResults = Results<R>::kCount;
  static constexpr auto kParameters = std::index_sequence_for<P...>{};
  static_assert(kArguments <= 64, "Stack has a bit for each argument");

  static inline const char* name = "";  // of the operator

  static void call(StableIValue* values, uint64_t arguments, uint64_t results) {
    if (arguments != kArguments || results != kResults) {
      throw std::logic_error(text("rope::", name, ": its schema has ", arguments, " arguments and ",
                                  results, " results, its C++ function ", kArguments, " and ",
                                  kResults));
    }
    Stack stack{values};
    try {
      if constexpr (std::is_void_v<R>) {
        invoke(stack, kParameters);
      } else {
        Results<R>::put(values, invoke(stack, kParameters));
      }
    } catch (...) {
      release(stack, kParameters);  // what was not taken, if one could not be converted
      throw;
    }
  }

  // For tensors that negate their elements when these are read, such as imag(conj(z)). PyTorch's
  // own way with them is to pass a copy, which an operator that writes would change in its place.
  static void refuse_negated(StableIValue* values, uint64_t, uint64_t) {
    Stack stack{values};
    release(stack, kParameters);
    refuse(name, "tensors that have their values in memory",
           "one that negates its elements: call resolve_neg first");
  }

 private:
  static constexpr size_t first_value(size_t parameter) {
    const size_t counts[] = {Parameter<Bare<P>>::kCount...};
    size_t first = 0;
    for (size_t i = 0; i < parameter; ++i) first += counts[i];
    return first;
  }

  template <size_t... i>
  static R invoke(Stack& stack, std::index_sequence<i...>) {
    return function(Parameter<Bare<P>>::take(stack, first_value(i))...);
  }
  template <size_t... i>
  static void release(Stack& stack, std::index_sequence<i...>) {
    (Parameter<Bare<P>>::release(stack, first_value(i)), ...);
  }
};

}  // namespace boxing

// An operator that `function` implements. One without a result writes to its arguments.
template <auto function>
Operator boxed(const char* name) {
  using Boxed = boxing::Boxed<function>;
  Boxed::name = name;
  return {name, &Boxed::call, Boxed::kResults == 0 ? &Boxed::refuse_negated : nullptr};
}

}  // namespace rope
