// Storage types, loads and stores of several elements at once, and conversions, each rounding once
// (to nearest, ties to even; NaN stays NaN).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "args.h"
#include "math/float8.h"

namespace rope::cuda {

// An element of a float8 cache.
template <class Format_>
struct Float8 {
  using Format = Format_;
  uint8_t code;
};

// Arithmetic is in float32, for float64 in float64.
template <class E>
using ArithmeticOf = std::conditional_t<std::is_same_v<E, double>, double, float>;

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using Type = uint4;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};
template <>
struct WordOf<2> {
  using Type = uint16_t;
};
template <>
struct WordOf<1> {
  using Type = uint8_t;
};

// N consecutive elements, moved by one instruction; addresses are multiples of their size.
template <class E, int N>
struct Vector {
  using Word = typename WordOf<N * sizeof(E)>::Type;
  Word word;
};

template <class E, int N>
__device__ __forceinline__ void load(Vector<E, N>& v, const E* from) {
  v.word = *reinterpret_cast<const typename Vector<E, N>::Word*>(from);
}

// For memory that no thread of the kernel writes.
template <class E, int N>
__device__ __forceinline__ void load_constant(Vector<E, N>& v, const E* from) {
  v.word = __ldg(reinterpret_cast<const typename Vector<E, N>::Word*>(from));
}

template <class E, int N>
__device__ __forceinline__ void store(const Vector<E, N>& v, E* to) {
  *reinterpret_cast<typename Vector<E, N>::Word*>(to) = v.word;
}

template <class E>
__device__ __forceinline__ float to_float(E value) {
  if constexpr (std::is_same_v<E, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<E, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else if constexpr (sizeof(E) == 1) {
    return float8_value<typename E::Format>(value.code);
  } else {
    return static_cast<float>(value);
  }
}

// The exact value where the storage type is narrower than C, else rounded to C.
template <class C, class E>
__device__ __forceinline__ C widen(E value) {
  if constexpr (std::is_same_v<E, double>) {
    return static_cast<C>(value);
  } else {
    return to_float(value);
  }
}

// Rounds to odd. A later rounding to a narrower type then gives what one rounding of `value` would
// (Boldo and Melquiond, IEEE TC 57, 2008).
__device__ __forceinline__ float round_to_odd(double value) {
  const float toward_zero = __double2float_rz(value);
  const bool exact = static_cast<double>(toward_zero) == value;
  return __uint_as_float(__float_as_uint(toward_zero) | (exact ? 0u : 1u));
}

template <class E, class C>
__device__ __forceinline__ E narrow(C value) {
  if constexpr (sizeof(E) >= 4) {
    return static_cast<E>(value);
  } else if constexpr (sizeof(E) == 1) {
    return {float8_of<typename E::Format>(value)};
  } else if constexpr (std::is_same_v<C, double>) {
    return narrow<E>(round_to_odd(value));
  } else if constexpr (std::is_same_v<E, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

template <class C, class E, int N>
__device__ __forceinline__ void unpack(const Vector<E, N>& v, C* x) {
  if constexpr (std::is_same_v<E, __nv_bfloat16> && N > 1) {
    // A bfloat16 is the upper half of its float32: one instruction each converts and extracts it.
    uint32_t words[N / 2];
    memcpy(words, &v.word, sizeof(words));
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      x[2 * j] = __uint_as_float(words[j] << 16);
      x[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
    }
  } else {
    E elements[N];
    memcpy(elements, &v.word, sizeof(elements));
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = widen<C>(elements[j]);
  }
}

template <class C, class E, int N>
__device__ __forceinline__ void pack(Vector<E, N>& v, const C* x) {
  if constexpr (sizeof(E) == 2 && N > 1) {  // one instruction converts two
    uint32_t words[N / 2];
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      if constexpr (std::is_same_v<E, __half>) {
        const __half2 two = __floats2half2_rn(x[2 * j], x[2 * j + 1]);
        memcpy(&words[j], &two, sizeof(two));
      } else {
        const __nv_bfloat162 two = __floats2bfloat162_rn(x[2 * j], x[2 * j + 1]);
        memcpy(&words[j], &two, sizeof(two));
      }
    }
    memcpy(&v.word, words, sizeof(words));
  } else {
    E elements[N];
#pragma unroll
    for (int j = 0; j < N; ++j) elements[j] = narrow<E>(x[j]);
    memcpy(&v.word, elements, sizeof(elements));
  }
}

// K consecutive values as C, in steps of up to 16 bytes, to which `from` is aligned. Values of
// float64 for float32 are read one by one, as vectors of them would take many registers.
template <int K, class C, class E>
__device__ __forceinline__ void load_values(C* x, const E* from) {
  constexpr int kWhole = K * sizeof(E) < 16 ? K : 16 / sizeof(E);
  constexpr int kStep = sizeof(E) > sizeof(C) ? 1 : kWhole;
#pragma unroll
  for (int j = 0; j < K; j += kStep) {
    Vector<E, kStep> v;
    load_constant(v, from + j);
    unpack(v, x + j);
  }
}

// Calls f, a function of the host or of the device like its caller, with a value of the storage
// type.
#pragma nv_exec_check_disable
template <class F>
__host__ __device__ __forceinline__ void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float64: return f(double{});
    case DType::Float32: return f(float{});
    case DType::Float16: return f(__half{});
    case DType::BFloat16: return f(__nv_bfloat16{});
  }
}

}  // namespace rope::cuda
