// All that a thread runs, for one instruction set: included once by each isa_*.cpp, inside the
// region that selects the instructions and in a namespace of its own. Standard headers come before
// that region, so that no function of theirs is compiled for instructions the machine may lack.

#include "cpu/isa/pairs.h"

// Rounds to odd, so that a later rounding to a narrower type sees on which side of the float the
// value was.
ROPE_HOST_DEVICE float round_to_odd(double value) {
  const float f = static_cast<float>(value);
  if (static_cast<double>(f) == value || value != value) return f;
  uint32_t bits = bit_cast<uint32_t>(f);
  if (std::fabs(static_cast<double>(f)) > std::fabs(value)) bits -= 1;
  return bit_cast<float>(bits | 1u);
}
ROPE_HOST_DEVICE float round_to_odd(float value) { return value; }

// A value in double or float as storage type T, rounded once, to nearest, ties to even.
template <class T, class A>
ROPE_HOST_DEVICE T narrow(A value) {
  if constexpr (sizeof(T) >= 4) {
    return static_cast<T>(value);
  } else {
    Float8 lanes = {};
    lanes[0] = round_to_odd(value);
    T out[8];
    Lanes<T>::store(out, lanes);
    return out[0];
  }
}

// Calls f with a value of the storage type of dtype.
template <class F>
ROPE_HOST_DEVICE void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float64: return f(double{});
    case DType::Float32: return f(float{});
    case DType::Float16: return f(Half{});
    case DType::BFloat16: return f(BFloat16{});
  }
}

// Calls f with the orders of the pairs as types: std::bool_constant of interleaved, and of
// interleaved_out.
template <class Args, class F>
ROPE_HOST_DEVICE void dispatch_orders(const Args& args, const F& f) {
  if (args.interleaved) {
    args.interleaved_out ? f(std::true_type(), std::true_type())
                         : f(std::true_type(), std::false_type());
  } else {
    args.interleaved_out ? f(std::false_type(), std::true_type())
                         : f(std::false_type(), std::false_type());
  }
}

// Table entries [first, first + n) of one row, as A.
template <class A, class S>
ROPE_HOST_DEVICE void convert(const void* row, int64_t first, int64_t n, A* to) {
  const S* from = static_cast<const S*>(row) + first;
  if constexpr (sizeof(S) >= 4) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
  } else {
    const auto convert8 = [&](const S* eight, int64_t at, int64_t lanes) ROPE_ALWAYS_INLINE {
      Float8 v;
      Lanes<S>::load(eight, v);
      for (int64_t lane = 0; lane < lanes; ++lane) to[at + lane] = static_cast<A>(v[lane]);
    };
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) convert8(from + i, i, 8);
    if (i < n) {
      S padded[8] = {};
      memcpy(padded, from + i, (n - i) * sizeof(S));
      convert8(padded, i, n - i);
    }
  }
}

template <class A>
void convert(DType dtype, const void* row, int64_t first, int64_t n, A* to) {
  switch (dtype) {
    case DType::Float64: return convert<A, double>(row, first, n, to);
    case DType::Float32: return convert<A, float>(row, first, n, to);
    case DType::Float16: return convert<A, Half>(row, first, n, to);
    case DType::BFloat16: return convert<A, BFloat16>(row, first, n, to);
  }
}

// Writes entry `at` of an output of the given dtype.
template <class A>
ROPE_HOST_DEVICE void write_entry(void* to, DType dtype, int64_t at, A value) {
  dispatch(dtype, [&](auto storage) {
    static_cast<decltype(storage)*>(to)[at] = narrow<decltype(storage)>(value);
  });
}

#include "cpu/isa/angle_chunk.h"
#include "cpu/isa/angles.inl"
#include "cpu/isa/rms_norm.inl"
#include "cpu/isa/rms_norm_grad.inl"
#include "cpu/isa/rotation.inl"
#include "cpu/isa/table_grad.inl"

// On the rotation above.
#include "cpu/isa/kv_cache.inl"
