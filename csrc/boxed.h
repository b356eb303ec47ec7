// Makes C++ functions callable by PyTorch's dispatcher, as TORCH_BOX does, and by Python.
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
#include "host/dispatcher_call.h"

namespace rope {

// Takes its arguments from the stack, which it owns from then on, and leaves its results there.
using BoxedFunction = void (*)(StableIValue* stack, uint64_t arguments, uint64_t results);

// An operator, as StableLibrary::impl takes it.
struct Operator {
  const char* name;
  BoxedFunction function;
  BoxedFunction without_kernel;  // only checks its arguments and makes its results
  BoxedFunction refuse_negated;  // see Boxed; nullptr for an operator that writes to no argument
  // The same for any kind of call.
  void (*run)(Call& call);
  size_t arguments, results;
};

namespace boxing {

template <class T>
using Bare = std::remove_cv_t<std::remove_reference_t<T>>;

// A parameter of type T, from argument `first` on.
template <class T, class = void>
struct Parameter {
  static constexpr size_t kCount = 1;
  static T take(Call& call, size_t first) { return call.take<T>(first); }
  static void drop(DispatcherCall& call, size_t first) { call.drop<T>(first); }
};

template <class Pack>
struct Parameter<Pack, std::void_t<typename Pack::Parameters>> {
  using Types = typename Pack::Parameters;
  static constexpr size_t kCount = std::tuple_size_v<Types>;
  static constexpr auto kIndices = std::make_index_sequence<kCount>{};

  static Pack take(Call& call, size_t first) { return take(call, first, kIndices); }
  static void drop(DispatcherCall& call, size_t first) { drop(call, first, kIndices); }

 private:
  template <size_t... i>
  static Pack take(Call& call, size_t first, std::index_sequence<i...>) {
    return Pack{call.take<std::tuple_element_t<i, Types>>(first + i)...};
  }
  template <size_t... i>
  static void drop(DispatcherCall& call, size_t first, std::index_sequence<i...>) {
    (call.drop<std::tuple_element_t<i, Types>>(first + i), ...);
  }
};

// What a function returns.
template <class T>
struct Results;
template <>
struct Results<void> {
  static constexpr size_t kCount = 0;
};
template <>
struct Results<Tensor> {
  static constexpr size_t kCount = 1;
  static void give(Call& call, Tensor value) { call.give(0, std::move(value)); }
};
template <class... T>
struct Results<std::tuple<T...>> {
  static constexpr size_t kCount = sizeof...(T);
  static void give(Call& call, std::tuple<T...> values) {
    size_t i = 0;
    std::apply([&](T&... value) { (call.give(i++, std::move(value)), ...); }, values);
  }
};

template <auto function>
struct Boxed;

template <class R, class... P, R (*function)(P...)>
struct Boxed<function> {
  static constexpr size_t kArguments = (Parameter<Bare<P>>::kCount + ...);
  static constexpr size_t kResults = Results<R>::kCount;
  static constexpr auto kParameters = std::index_sequence_for<P...>{};
  static_assert(kArguments <= 64, "DispatcherCall has a bit for each argument");

  static inline const char* name = "";  // of the operator

  template <bool runs_kernel>
  static void call(StableIValue* values, uint64_t arguments, uint64_t results) {
    if (arguments != kArguments || results != kResults) {
      throw std::logic_error(text("rope::", name, ": its schema has ", arguments, " arguments and ",
                                  results, " results, its C++ function ", kArguments, " and ",
                                  kResults));
    }
    DispatcherCall call(values, runs_kernel);
    try {
      run(call);
    } catch (...) {
      drop(call, kParameters);  // what was not taken, if one could not be converted
      throw;
    }
  }

  static void run(Call& call) {
    if constexpr (kResults == 0) {
      invoke(call, kParameters);
    } else {
      Results<R>::give(call, invoke(call, kParameters));
    }
  }

  // For tensors that negate their elements when these are read, such as imag(conj(z)). PyTorch's
  // own way with them is to pass a copy, which an operator that writes would change in its place.
  static void refuse_negated(StableIValue* values, uint64_t, uint64_t) {
    DispatcherCall call(values);
    drop(call, kParameters);
    refuse(name, "tensors that have their values in memory",
           "one that negates its elements: call resolve_neg first");
  }

 private:
  static constexpr size_t first_argument(size_t parameter) {
    const size_t counts[] = {Parameter<Bare<P>>::kCount...};
    size_t first = 0;
    for (size_t i = 0; i < parameter; ++i) first += counts[i];
    return first;
  }

  template <size_t... i>
  static R invoke(Call& call, std::index_sequence<i...>) {
    return function(Parameter<Bare<P>>::take(call, first_argument(i))...);
  }
  template <size_t... i>
  static void drop(DispatcherCall& call, std::index_sequence<i...>) {
    (Parameter<Bare<P>>::drop(call, first_argument(i)), ...);
  }
};

}  // namespace boxing

// An operator that `function` implements. One without a result writes to its arguments.
template <auto function>
Operator boxed(const char* name) {
  using Boxed = boxing::Boxed<function>;
  Boxed::name = name;
  return {name,
          &Boxed::template call<true>,
          &Boxed::template call<false>,
          Boxed::kResults == 0 ? &Boxed::refuse_negated : nullptr,
          &Boxed::run,
          Boxed::kArguments,
          Boxed::kResults};
}

}  // namespace rope
