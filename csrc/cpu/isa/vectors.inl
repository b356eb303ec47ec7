// Vectors of an instruction set: GCC's and Clang's vector extension, so that one source compiles to
// AVX2, SSE2 or NEON.
//
// Included first by the file of an instruction set, inside its region and namespace, after
//   kVectorBytes   the bytes of a vector
//   kNativeBytes   the bytes of the processor's own vectors, if these are narrower
// and followed there by what has instructions of its own:
//   F32 float_of_half(const U16&)      float16 to float32
//   U16 half_of_float(const F32&)      and back: to nearest, ties to even; NaN stays NaN
//   F32 float_of_bfloat16(const U16&)  the same for bfloat16
//   U16 bfloat16_of_float(const F32&)
//   U32 pack(const F32& low, high)     two vectors to bfloat16, in the halves of words; a NaN must
//                                      have a lower half of zero
//   kBFloat16InWords                   whether pack is faster than bfloat16_of_float
//   void stream(void* to, const V&)    stores past the caches, at a multiple of the vector's size
//   void finish_streaming()            makes the stored data visible to other threads
//   copy_few, fill_few                 fewer elements than a vector has, as few.inl says

template <class T, int kLanes>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T, int kLanes = kVectorBytes / sizeof(T)>
using Vec = typename VectorOf<T, kLanes>::Type;

template <class V>
using LaneOf = std::decay_t<decltype(V{}[0])>;
template <class V>
constexpr int kLanesOf = sizeof(V) / sizeof(LaneOf<V>);

constexpr int kFloats = kVectorBytes / sizeof(float);  // lanes of F32
using F32 = Vec<float>;
using I32 = Vec<int32_t>;
using U32 = Vec<uint32_t>;
using U16 = Vec<uint16_t, kFloats>;  // as many lanes as F32

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

// ------------------------------------------------------------------------------------------ halves

// GCC moves, compares and selects the lanes of a vector wider than the processor's one by one,
// through memory: it gets the halves of such a vector.
template <class V>
constexpr bool kIsNative = sizeof(V) <= kNativeBytes;

template <class V>
struct Halves {
  Vec<LaneOf<V>, kLanesOf<V> / 2> low, high;
};
template <class V>
ROPE_HOST_DEVICE Halves<V> split(const V& v) {
  return bit_cast<Halves<V>>(v);
}

template <class H>
ROPE_HOST_DEVICE auto join(const H& low, const H& high) {
  using V = Vec<LaneOf<H>, 2 * kLanesOf<H>>;
  return bit_cast<V>(Halves<V>{low, high});
}

// select(v, others...), which works lane by lane.
template <class Select, class V, class... Others>
ROPE_HOST_DEVICE auto by_lanes(const Select& select, const V& v, const Others&... others) {
  if constexpr (kIsNative<V>) {
    return select(v, others...);
  } else {
    return join(by_lanes(select, split(v).low, split(others).low...),
                by_lanes(select, split(v).high, split(others).high...));
  }
}

// v is NaN ? yes : no
ROPE_HOST_DEVICE U32 where_nan(const F32& v, const U32& yes, const U32& no) {
  const auto select = [](const auto& v, const auto& yes, const auto& no)
                          ROPE_ALWAYS_INLINE { return v != v ? yes : no; };
  return by_lanes(select, v, yes, no);
}

// a < b ? yes : no
ROPE_HOST_DEVICE U32 where_less(const I32& a, const I32& b, const U32& yes, const U32& no) {
  const auto select = [](const auto& a, const auto& b, const auto& yes, const auto& no)
                          ROPE_ALWAYS_INLINE { return a < b ? yes : no; };
  return by_lanes(select, a, b, yes, no);
}

// ---------------------------------------------------------------------------------------- shuffles

// Lane i of the result is lane kFrom(i, n, group) of the 2n lanes of (a, b). group: as many lanes
// as kFrom works within.
using From = int (*)(int i, int n, int group);

template <From kFrom, int kGroup, class V, int... i>
ROPE_HOST_DEVICE V shuffle(const V& a, const V& b, std::integer_sequence<int, i...>) {
  using Int = std::conditional_t<sizeof(LaneOf<V>) == 8, int64_t,
                                 std::conditional_t<sizeof(LaneOf<V>) == 4, int32_t, int16_t>>;
  using Index [[maybe_unused]] = Vec<Int, kLanesOf<V>>;  // for GCC
  return ROPE_SHUFFLE(Index, a, b,
                      std::integral_constant<Int, kFrom(i, kLanesOf<V>, kGroup)>::value...);
}
template <From kFrom, int kGroup, class V>
ROPE_HOST_DEVICE V shuffle(const V& a, const V& b) {
  return shuffle<kFrom, kGroup>(a, b, std::make_integer_sequence<int, kLanesOf<V>>());
}

// The even lanes of a group of a, then those of the same group of b.
constexpr int even_lane(int i, int n, int group) {
  const int lane = i % group, half = group / 2;
  return i - lane + (lane < half ? 2 * lane : n + 2 * (lane - half));
}
constexpr int odd_lane(int i, int n, int group) { return even_lane(i, n, group) + 1; }
// Lanes of a and b in turn, from the lower half of each group; from the upper half.
constexpr int alternate_low(int i, int n, int group) {
  const int lane = i % group;
  return i - lane + lane / 2 + lane % 2 * n;
}
constexpr int alternate_high(int i, int n, int group) {
  return alternate_low(i, n, group) + group / 2;
}
// The natural order of what even_lane or odd_lane give.
constexpr int even_order(int i, int n, int group) {
  const int from = even_lane(i, n, group);
  return from < n ? from / 2 : n / 2 + (from - n) / 2;
}

// Lanes that are shuffled together: the whole vector or, which takes fewer instructions, 128 bits.
template <class V, bool kIn128Bits>
constexpr int kGroupOf = kIn128Bits ? 16 / sizeof(LaneOf<V>) : kLanesOf<V>;

// deinterleave: even lanes of (a, b) to x1, odd lanes to x2; interleave: the inverse. With
// kIn128Bits, x1 and x2 are in the order in which in_128_bits puts a vector.
template <bool kIn128Bits = false, class V>
ROPE_HOST_DEVICE void deinterleave(const V& a, const V& b, V& x1, V& x2) {
  if constexpr (kIsNative<V>) {
    x1 = shuffle<even_lane, kGroupOf<V, kIn128Bits>>(a, b);
    x2 = shuffle<odd_lane, kGroupOf<V, kIn128Bits>>(a, b);
  } else {
    Halves<V> h1, h2;
    deinterleave(split(a).low, split(a).high, h1.low, h2.low);
    deinterleave(split(b).low, split(b).high, h1.high, h2.high);
    x1 = bit_cast<V>(h1);
    x2 = bit_cast<V>(h2);
  }
}
template <bool kIn128Bits = false, class V>
ROPE_HOST_DEVICE void interleave(const V& x1, const V& x2, V& a, V& b) {
  if constexpr (kIsNative<V>) {
    a = shuffle<alternate_low, kGroupOf<V, kIn128Bits>>(x1, x2);
    b = shuffle<alternate_high, kGroupOf<V, kIn128Bits>>(x1, x2);
  } else {
    Halves<V> of_a, of_b;
    interleave(split(x1).low, split(x2).low, of_a.low, of_a.high);
    interleave(split(x1).high, split(x2).high, of_b.low, of_b.high);
    a = bit_cast<V>(of_a);
    b = bit_cast<V>(of_b);
  }
}
template <class V>
ROPE_HOST_DEVICE V in_128_bits(const V& v) {
  if constexpr (kIsNative<V>) {
    return shuffle<even_order, kGroupOf<V, true>>(v, v);
  } else {
    return v;
  }
}
