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

// The types on the stack for a parameter of type T: T itself, or those of the pack T.
template <class T, class = void>
struct Parameter {
  using Slots = std::tuple<T>;
};
template <class Pack>
struct Parameter<Pack, std::void_t<typename Pack::Parameters>> {
  using Slots = typename Pack::Parameters;
};

template <class T>
inline constexpr size_t kSlots = std::tuple_size_v<typename Parameter<T>::Slots>;

// A result, or several, as a tuple.
template <class T>
struct Result {
  using Tuple = std::tuple<T>;
};
template <>
struct Result<void> {
  using Tuple = std::tuple<>;
};
template <class... T>
struct Result<std::tuple<T...>> {
  using Tuple = std::tuple<T...>;
};

template <class Tuple>
struct Stack;

template <class... T>
struct Stack<std::tuple<T...>> {
  static constexpr auto kIndices = std::index_sequence_for<T...>{};

  // All values of the stack. If one can't be converted, the handles of the others are released.
  template <size_t... i>
  static std::tuple<T...> take(StableIValue* stack, std::index_sequence<i...>) {
    size_t taken = 0;
    try {
      return std::tuple<T...>{take_next<T>(stack, taken)...};  // braces: from left to right
    } catch (...) {
      (release<T>(stack[i], i < taken), ...);
      throw;
    }
  }

  template <size_t... i>
  static void put(StableIValue* stack, const std::tuple<T...>& values, std::index_sequence<i...>) {
    ((stack[i] = torch::stable::detail::from<T>(std::get<i>(values))), ...);
  }

 private:
  template <class Value>
  static Value take_next(StableIValue* stack, size_t& taken) {
    return torch::stable::detail::to<Value>(stack[taken++]);
  }

  template <class Value>
  static void release(StableIValue slot, bool is_taken) {
    if (is_taken) return;
    try {
      torch::stable::detail::to<Value>(slot);
    } catch (...) {  // not a value of this type: it holds no handle
    }
  }
};

template <auto function>
struct Boxed;

template <class R, class... P, R (*function)(P...)>
struct Boxed<function> {
  using Arguments = decltype(std::tuple_cat(std::declval<typename Parameter<Bare<P>>::Slots>()...));
  using Results = typename Result<R>::Tuple;
  static constexpr size_t kArguments = std::tuple_size_v<Arguments>;
  static constexpr size_t kResults = std::tuple_size_v<Results>;

  static inline const char* name = "";  // of the operator

  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    if (arguments != kArguments || results != kResults) {
      throw std::logic_error(text("rope::", name, ": its schema has ", arguments, " arguments and ",
                                  results, " results, its C++ function ", kArguments, " and ",
                                  kResults));
    }
    Arguments values = take(stack);
    constexpr auto parameters = std::index_sequence_for<P...>{};
    if constexpr (std::is_void_v<R>) {
      invoke(values, parameters);
    } else {
      Stack<Results>::put(stack, Results(invoke(values, parameters)), Stack<Results>::kIndices);
    }
  }

  // For tensors that negate their elements when these are read, such as imag(conj(z)). PyTorch's
  // own way with them is to pass a copy, which an operator that writes would change in its place.
  static void refuse_negated(StableIValue* stack, uint64_t, uint64_t) {
    take(stack);
    refuse(name, "tensors that have their values in memory",
           "one that negates its elements: call resolve_neg first");
  }

 private:
  static Arguments take(StableIValue* stack) {
    return Stack<Arguments>::take(stack, Stack<Arguments>::kIndices);
  }

  static constexpr size_t first_slot(size_t parameter) {
    const size_t slots[] = {kSlots<Bare<P>>...};
    size_t first = 0;
    for (size_t i = 0; i < parameter; ++i) first += slots[i];
    return first;
  }

  template <size_t... parameter>
  static R invoke(Arguments& values, std::index_sequence<parameter...>) {
    return function(make<Bare<P>, first_slot(parameter)>(
        values, std::make_index_sequence<kSlots<Bare<P>>>{})...);
  }

  template <class T, size_t first, size_t... i>
  static T make(Arguments& values, std::index_sequence<i...>) {
    return T{std::get<first + i>(std::move(values))...};
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
