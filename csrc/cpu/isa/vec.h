// Vectors of the CPU kernels: GCC's and Clang's vector extension, so that one source compiles to
// AVX2, SSE2 or NEON, and the loads and stores that convert each storage type on the way.
//
// Included inside an instruction-set region (isa_*.cpp), in its own namespace; only fp16 and stores
// past the caches have instructions of their own.
//
// Lanes<T> loads and stores consecutive elements of a storage type T as 8 lanes of float, or 4 of
// double for float64. Stores round once, to nearest, ties to even; NaN stays NaN.

typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Uint8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef uint16_t Short8 __attribute__((vector_size(16)));
typedef uint16_t Short16 __attribute__((vector_size(32)));
typedef int16_t SignedShort16 __attribute__((vector_size(32)));
typedef double Double4 __attribute__((vector_size(32)));
typedef int64_t Long4 __attribute__((vector_size(32)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
ROPE_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

#include "cpu/isa/lanes.h"

template <class V>
ROPE_HOST_DEVICE V read(const void* from) {
  V v;
  memcpy(&v, from, sizeof(v));
  return v;
}

// kStream: past the caches, to an address that is a multiple of the vector's size. Followed by
// finish_streaming() before another thread may read.
template <bool kStream = false, class V>
ROPE_HOST_DEVICE void write(void* to, const V& v) {
#if defined(ROPE_ISA_STREAMS)
  if constexpr (kStream && sizeof(V) == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(v));
  } else if constexpr (kStream) {
    return _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(v));
  }
#endif
  memcpy(to, &v, sizeof(v));
}

ROPE_HOST_DEVICE void finish_streaming() {
#if defined(ROPE_ISA_STREAMS)
  _mm_sfence();
#endif
}

// The float32 bits of bfloat16 are its upper half: rounded into the upper half of each lane, with
// the lower half undefined. A NaN stays one if its lower half is empty.
ROPE_HOST_DEVICE Uint8 nearest_bfloat16(const Float8& v) {
  const Uint8 u = bit_cast<Uint8>(v);
  return u + 0x7fffu + ((u >> 16) & 1u);
}
// Every NaN stays NaN.
ROPE_HOST_DEVICE Uint8 round_to_bfloat16(const Float8& v) {
  return where_nan(v, Uint8{} + 0x7fc00000u, nearest_bfloat16(v));
}

#if defined(ROPE_ISA_F16C)
ROPE_HOST_DEVICE Float8 float_of_half(const Short8& h) {
  return bit_cast<Float8>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
}
ROPE_HOST_DEVICE Short8 half_of_float(const Float8& v) {
  return bit_cast<Short8>(
      _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// IEEE 754 binary16: 1 sign, 5 exponent (bias 15), 10 mantissa bits.
ROPE_HOST_DEVICE Float8 float_of_half(const Short8& h) {
  const Uint8 bits = __builtin_convertvector(h, Uint8);
  const Uint8 magnitude = (bits & 0x7fffu) << 13;
  const Uint8 sign = (bits & 0x8000u) << 16;
  const Uint8 normal = magnitude + (112u << 23);
  // A subnormal m * 2^-24 is (1 + m * 2^-10) * 2^-14 - 2^-14, exactly.
  const Float8 tiny = bit_cast<Float8>(magnitude + (113u << 23)) - 0x1p-14f;
  const Uint8 special = magnitude | (255u << 23);
  const Int8 order = bit_cast<Int8>(magnitude);
  Uint8 result = where_less(order, Int8{} + (1 << 23), bit_cast<Uint8>(tiny), normal);
  result = where_less(order, Int8{} + (31 << 23), result, special);
  return bit_cast<Float8>(result | sign);
}
ROPE_HOST_DEVICE Short8 half_of_float(const Float8& v) {
  const Uint8 bits = bit_cast<Uint8>(v);
  const Uint8 magnitude = bits & 0x7fffffffu;
  const Uint8 sign = (bits >> 16) & 0x8000u;
  const Uint8 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the unit is 2^-24, which is that of float32 at 0.5: let the addition round.
  const Float8 shifted = bit_cast<Float8>(magnitude) + 0.5f;
  const Uint8 subnormal = bit_cast<Uint8>(shifted) - (126u << 23);
  const Int8 order = bit_cast<Int8>(magnitude);
  Uint8 result = where_less(order, Int8{} + (113 << 23), subnormal, normal);
  result = where_less(order, Int8{} + (143 << 23), result, Uint8{} + 0x7c00u);  // from 2^16 on
  result = where_nan(v, Uint8{} + 0x7e00u, result);
  return __builtin_convertvector(result | sign, Short8);
}
#endif

// load and store of kLanes consecutive elements, converted.
template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = Float8;
  static ROPE_HOST_DEVICE void load(const float* from, Vector& v) { v = read<Vector>(from); }
  template <bool kStream = false>
  static ROPE_HOST_DEVICE void store(float* to, const Vector& v) {
    write<kStream>(to, v);
  }
};

template <>
struct Lanes<double> {
  using Vector = Double4;
  static ROPE_HOST_DEVICE void load(const double* from, Vector& v) { v = read<Vector>(from); }
  template <bool kStream = false>
  static ROPE_HOST_DEVICE void store(double* to, const Vector& v) {
    write<kStream>(to, v);
  }
};

template <>
struct Lanes<Half> {
  using Vector = Float8;
  static ROPE_HOST_DEVICE void load(const Half* from, Vector& v) {
    v = float_of_half(read<Short8>(from));
  }
  template <bool kStream = false>
  static ROPE_HOST_DEVICE void store(Half* to, const Vector& v) {
    write<kStream>(to, half_of_float(v));
  }
};

template <>
struct Lanes<BFloat16> {
  using Vector = Float8;
  static ROPE_HOST_DEVICE void load(const BFloat16* from, Vector& v) {
    v = bit_cast<Float8>(__builtin_convertvector(read<Short8>(from), Uint8) << 16);
  }
  template <bool kStream = false>
  static ROPE_HOST_DEVICE void store(BFloat16* to, const Vector& v) {
    write<kStream>(to, __builtin_convertvector(round_to_bfloat16(v) >> 16, Short8));
  }
};
