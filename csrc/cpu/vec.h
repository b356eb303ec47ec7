// Vectors of the CPU kernels: GCC's and Clang's vector extension, so that one source compiles to
// AVX2, SSE2 or NEON, and the loads and stores that convert each storage type on the way.
//
// Included inside an instruction-set region (isa_*.cpp), in its own namespace; only fp16 has an
// instruction of its own.
//
// Lanes<T> loads and stores consecutive elements of a storage type T as 8 lanes of float, or 4 of
// double for float64; Pairs<T, interleaved> as many pairs (x1, x2) of a head. Stores round once, to
// nearest, ties to even; NaN stays NaN.

typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Uint8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef uint16_t Short8 __attribute__((vector_size(16)));
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

template <class V>
ROPE_HOST_DEVICE V read(const void* from) {
  V v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <class V>
ROPE_HOST_DEVICE void write(void* to, const V& v) {
  memcpy(to, &v, sizeof(v));
}

// The float32 bits of bfloat16 are its upper half.
ROPE_HOST_DEVICE Uint8 round_to_bfloat16(const Float8& v) {
  const Uint8 u = bit_cast<Uint8>(v);
  const Uint8 rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const Uint8 nan = Uint8{} + 0x7fc00000u;
  return v != v ? nan : rounded;  // in the upper half of each lane; the lower is undefined
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
  Uint8 result = magnitude < (1u << 23) ? bit_cast<Uint8>(tiny) : normal;
  result = magnitude >= (31u << 23) ? special : result;
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
  Uint8 result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? Uint8{} + 0x7c00u : result;  // 2^16 and above
  result = v != v ? Uint8{} + 0x7e00u : result;
  return __builtin_convertvector(result | sign, Short8);
}
#endif

// Even lanes of (a, b) to x1, odd ones to x2, and back.
ROPE_HOST_DEVICE void deinterleave(const Float8& a, const Float8& b, Float8& x1, Float8& x2) {
  x1 = ROPE_SHUFFLE(Int8, a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  x2 = ROPE_SHUFFLE(Int8, a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
ROPE_HOST_DEVICE void interleave(const Float8& x1, const Float8& x2, Float8& a, Float8& b) {
  a = ROPE_SHUFFLE(Int8, x1, x2, 0, 8, 1, 9, 2, 10, 3, 11);
  b = ROPE_SHUFFLE(Int8, x1, x2, 4, 12, 5, 13, 6, 14, 7, 15);
}
ROPE_HOST_DEVICE void deinterleave(const Double4& a, const Double4& b, Double4& x1, Double4& x2) {
  x1 = ROPE_SHUFFLE(Long4, a, b, 0, 2, 4, 6);
  x2 = ROPE_SHUFFLE(Long4, a, b, 1, 3, 5, 7);
}
ROPE_HOST_DEVICE void interleave(const Double4& x1, const Double4& x2, Double4& a, Double4& b) {
  a = ROPE_SHUFFLE(Long4, x1, x2, 0, 4, 1, 5);
  b = ROPE_SHUFFLE(Long4, x1, x2, 2, 6, 3, 7);
}

// load and store of kLanes consecutive elements, converted.
template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = Float8;
  static ROPE_HOST_DEVICE void load(const float* from, Vector& v) { v = read<Vector>(from); }
  static ROPE_HOST_DEVICE void store(float* to, const Vector& v) { write(to, v); }
};

template <>
struct Lanes<double> {
  using Vector = Double4;
  static ROPE_HOST_DEVICE void load(const double* from, Vector& v) { v = read<Vector>(from); }
  static ROPE_HOST_DEVICE void store(double* to, const Vector& v) { write(to, v); }
};

template <>
struct Lanes<Half> {
  using Vector = Float8;
  static ROPE_HOST_DEVICE void load(const Half* from, Vector& v) {
    v = float_of_half(read<Short8>(from));
  }
  static ROPE_HOST_DEVICE void store(Half* to, const Vector& v) { write(to, half_of_float(v)); }
};

template <>
struct Lanes<BFloat16> {
  using Vector = Float8;
  static ROPE_HOST_DEVICE void load(const BFloat16* from, Vector& v) {
    v = bit_cast<Float8>(__builtin_convertvector(read<Short8>(from), Uint8) << 16);
  }
  static ROPE_HOST_DEVICE void store(BFloat16* to, const Vector& v) {
    write(to, __builtin_convertvector(round_to_bfloat16(v) >> 16, Short8));
  }
};

// kLanes pairs: `first` and `second` point at the first halves and the second halves of the pairs;
// when interleaved, `first` points at the 2 * kLanes channels and `second` is not used.
template <class T, bool kInterleaved>
struct Pairs {
  using Vector = typename Lanes<T>::Vector;
  static ROPE_HOST_DEVICE void load(const T* first, const T* second, Vector& x1, Vector& x2) {
    if constexpr (kInterleaved) {
      constexpr int kLanes = sizeof(Vector) / sizeof(x1[0]);
      Vector a, b;
      Lanes<T>::load(first, a);
      Lanes<T>::load(first + kLanes, b);
      deinterleave(a, b, x1, x2);
    } else {
      Lanes<T>::load(first, x1);
      Lanes<T>::load(second, x2);
    }
  }
  static ROPE_HOST_DEVICE void store(T* first, T* second, const Vector& x1, const Vector& x2) {
    if constexpr (kInterleaved) {
      constexpr int kLanes = sizeof(Vector) / sizeof(x1[0]);
      Vector a, b;
      interleave(x1, x2, a, b);
      Lanes<T>::store(first, a);
      Lanes<T>::store(first + kLanes, b);
    } else {
      Lanes<T>::store(first, x1);
      Lanes<T>::store(second, x2);
    }
  }
};

// Two bfloat16 in each 32-bit word: they become floats, and words again, without moving a lane.
ROPE_HOST_DEVICE void unpack(const Uint8& words, Float8& low, Float8& high) {
  low = bit_cast<Float8>(words << 16);
  high = bit_cast<Float8>(words & 0xffff0000u);
}
ROPE_HOST_DEVICE void pack(Uint8& words, const Float8& low, const Float8& high) {
  words = (round_to_bfloat16(low) >> 16) | (round_to_bfloat16(high) & 0xffff0000u);
}

// An interleaved pair is one word, x1 below x2.
template <>
struct Pairs<BFloat16, true> {
  using Vector = Float8;
  static ROPE_HOST_DEVICE void load(const BFloat16* first, const BFloat16*, Vector& x1,
                                    Vector& x2) {
    unpack(read<Uint8>(first), x1, x2);
  }
  static ROPE_HOST_DEVICE void store(BFloat16* first, BFloat16*, const Vector& x1,
                                     const Vector& x2) {
    Uint8 words;
    pack(words, x1, x2);
    write(first, words);
  }
};

// 16 consecutive channels as those of even and those of odd index.
struct EvenOdd {
  Float8 even, odd;
};
template <>
ROPE_HOST_DEVICE EvenOdd read<EvenOdd>(const void* from) {  // whole vectors: GCC copies by 16 bytes
  return {read<Float8>(from), read<Float8>(static_cast<const float*>(from) + 8)};
}
ROPE_HOST_DEVICE EvenOdd operator*(const EvenOdd& a, const EvenOdd& b) {
  return {a.even * b.even, a.odd * b.odd};
}
ROPE_HOST_DEVICE EvenOdd operator+(const EvenOdd& a, const EvenOdd& b) {
  return {a.even + b.even, a.odd + b.odd};
}
ROPE_HOST_DEVICE EvenOdd operator-(const EvenOdd& a, const EvenOdd& b) {
  return {a.even - b.even, a.odd - b.odd};
}

// 16 pairs of bfloat16, even and odd by the index of the pair: of the half-split that moves no
// lane, of the interleaved whole words.
template <bool kInterleaved>
struct EvenOddPairs {
  static ROPE_HOST_DEVICE void load(const BFloat16* first, const BFloat16* second, EvenOdd& x1,
                                    EvenOdd& x2) {
    if constexpr (kInterleaved) {
      Float8 even, odd;
      deinterleave(read<Float8>(first), read<Float8>(first + 16), even, odd);
      unpack(bit_cast<Uint8>(even), x1.even, x2.even);
      unpack(bit_cast<Uint8>(odd), x1.odd, x2.odd);
    } else {
      unpack(read<Uint8>(first), x1.even, x1.odd);
      unpack(read<Uint8>(second), x2.even, x2.odd);
    }
  }
  static ROPE_HOST_DEVICE void store(BFloat16* first, BFloat16* second, const EvenOdd& x1,
                                     const EvenOdd& x2) {
    Uint8 a, b;
    if constexpr (kInterleaved) {
      Float8 low, high;
      pack(a, x1.even, x2.even);
      pack(b, x1.odd, x2.odd);
      interleave(bit_cast<Float8>(a), bit_cast<Float8>(b), low, high);
      write(first, low);
      write(first + 16, high);
    } else {
      pack(a, x1.even, x1.odd);
      pack(b, x2.even, x2.odd);
      write(first, a);
      write(second, b);
    }
  }
};

// The pairs as the rotation takes them, and puts them back, in one order or another. Where bfloat16
// are or become half-split they are in the order of EvenOdd, and so are the rows of the table.
template <class T, bool kInterleaved, bool kInterleavedOut>
struct RotationPairs {
  static constexpr bool kEvenOddRows =
      std::is_same_v<T, BFloat16> && !(kInterleaved && kInterleavedOut);
  using Vector = std::conditional_t<kEvenOddRows, EvenOdd, typename Lanes<T>::Vector>;
  template <bool kOrder>
  using InOrder = std::conditional_t<kEvenOddRows, EvenOddPairs<kOrder>, Pairs<T, kOrder>>;
  static ROPE_HOST_DEVICE void load(const T* first, const T* second, Vector& x1, Vector& x2) {
    InOrder<kInterleaved>::load(first, second, x1, x2);
  }
  static ROPE_HOST_DEVICE void store(T* first, T* second, const Vector& x1, const Vector& x2) {
    InOrder<kInterleavedOut>::store(first, second, x1, x2);
  }
};

// Values in the order of channels to that of EvenOdd, in place, 16 at a time.
ROPE_HOST_DEVICE void reorder(float* values, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    Float8 even, odd;
    deinterleave(read<Float8>(values + i), read<Float8>(values + i + 8), even, odd);
    write(values + i, even);
    write(values + i + 8, odd);
  }
}
