// Loads and stores of the storage types, which convert: a vector of elements, one element, a row.
// Stores round once, to nearest, ties to even; NaN stays NaN.

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type in which a storage type is computed with.
template <class T>
using ArithmeticOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// kStream: past the caches, to an address that is a multiple of the vector's size; then
// finish_streaming() comes before another thread may read.
template <bool kStream = false, class V>
ROPE_HOST_DEVICE void write(void* to, const V& v) {
  if constexpr (kStream) {
    stream(to, v);
  } else {
    memcpy(to, &v, sizeof(v));
  }
}

// load and store of kLanes consecutive elements, as a vector of the arithmetic.
template <class T>
struct Lanes {  // float and double
  using Vector = Vec<T>;
  static constexpr int kLanes = kLanesOf<Vector>;
  static ROPE_HOST_DEVICE void load(const T* from, Vector& v) { v = read<Vector>(from); }
  template <bool kStream = false>
  static ROPE_HOST_DEVICE void store(T* to, const Vector& v) {
    write<kStream>(to, v);
  }
};

template <>
struct Lanes<Half> {
  using Vector = F32;
  static constexpr int kLanes = kFloats;
  static ROPE_HOST_DEVICE void load(const Half* from, Vector& v) {
    v = float_of_half(read<U16>(from));
  }
  template <bool kStream = false>
  static ROPE_HOST_DEVICE void store(Half* to, const Vector& v) {
    write<kStream>(to, half_of_float(v));
  }
};

template <>
struct Lanes<BFloat16> {
  using Vector = F32;
  static constexpr int kLanes = kFloats;
  static ROPE_HOST_DEVICE void load(const BFloat16* from, Vector& v) {
    v = float_of_bfloat16(read<U16>(from));
  }
  template <bool kStream = false>
  static ROPE_HOST_DEVICE void store(BFloat16* to, const Vector& v) {
    write<kStream>(to, bfloat16_of_float(v));
  }
};

// ------------------------------------------------------------------------------------ one element

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

// A value in double or float as storage type T.
template <class T, class A>
ROPE_HOST_DEVICE T narrow(A value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<T>(value);
  } else {
    F32 lanes = {};
    lanes[0] = round_to_odd(value);
    T out[kFloats];
    Lanes<T>::store(out, lanes);
    return out[0];
  }
}

template <class T>
ROPE_HOST_DEVICE double as_double(const T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<double>(value);
  } else {
    const T padded[kFloats] = {value};
    F32 lanes;
    Lanes<T>::load(padded, lanes);
    return lanes[0];
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

// Writes element `at` of an output of the given dtype.
template <class A>
ROPE_HOST_DEVICE void write_element(void* to, DType dtype, int64_t at, A value) {
  dispatch(dtype, [&](auto storage) {
    static_cast<decltype(storage)*>(to)[at] = narrow<decltype(storage)>(value);
  });
}

// ------------------------------------------------------------------------------------------ a row

// Elements [first, first + n) of a row, as A.
template <class A, class S>
ROPE_HOST_DEVICE void convert(const void* row, int64_t first, int64_t n, A* to) {
  const S* from = static_cast<const S*>(row) + first;
  if constexpr (std::is_arithmetic_v<S>) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
  } else {
    const auto convert_vector = [&](const S* vector, int64_t at, int64_t lanes) ROPE_ALWAYS_INLINE {
      F32 v;
      Lanes<S>::load(vector, v);
      for (int64_t lane = 0; lane < lanes; ++lane) to[at + lane] = static_cast<A>(v[lane]);
    };
    int64_t i = 0;
    for (; i + kFloats <= n; i += kFloats) convert_vector(from + i, i, kFloats);
    if (i < n) {
      S padded[kFloats] = {};
      memcpy(padded, from + i, (n - i) * sizeof(S));
      convert_vector(padded, i, n - i);
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
