// Lanes of vectors moved and selected. Included by vec.h, in the namespace of an instruction set.
//
// GCC moves, compares and selects the lanes of a vector wider than the processor's one by one,
// through memory: without ROPE_ISA_WIDE, for vectors of 32 bytes, it gets the halves.

template <class V>
struct Halves {
  using Lane = std::remove_reference_t<decltype(V{}[0])>;
  typedef Lane Half __attribute__((vector_size(sizeof(V) / 2)));
  Half low, high;
};
template <class V>
ROPE_HOST_DEVICE Halves<V> split(const V& v) {
  return bit_cast<Halves<V>>(v);
}

// select(v...), which works lane by lane.
template <class Select, class... V>
ROPE_HOST_DEVICE Uint8 by_lanes(const Select& select, const V&... v) {
#if defined(ROPE_ISA_WIDE)
  return select(v...);
#else
  return bit_cast<Uint8>(Halves<Uint8>{select(split(v).low...), select(split(v).high...)});
#endif
}

// v is NaN ? yes : no
ROPE_HOST_DEVICE Uint8 where_nan(const Float8& v, const Uint8& yes, const Uint8& no) {
  const auto select = [](const auto& v, const auto& yes, const auto& no)
                          ROPE_ALWAYS_INLINE { return v != v ? yes : no; };
  return by_lanes(select, v, yes, no);
}

// a < b ? yes : no
ROPE_HOST_DEVICE Uint8 where_less(const Int8& a, const Int8& b, const Uint8& yes, const Uint8& no) {
  const auto select = [](const auto& a, const auto& b, const auto& yes, const auto& no)
                          ROPE_ALWAYS_INLINE { return a < b ? yes : no; };
  return by_lanes(select, a, b, yes, no);
}

// deinterleave: even lanes of (a, b) to x1, odd ones to x2; interleave: back. With _in_lanes in an
// order that is cheap, of which in_lane_order says where each lane is.
#if defined(ROPE_ISA_WIDE)

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

// Each 128 bits of a with the same 128 bits of b.
ROPE_HOST_DEVICE void deinterleave_in_lanes(const Float8& a, const Float8& b, Float8& x1,
                                            Float8& x2) {
  x1 = ROPE_SHUFFLE(Int8, a, b, 0, 2, 8, 10, 4, 6, 12, 14);
  x2 = ROPE_SHUFFLE(Int8, a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
ROPE_HOST_DEVICE void interleave_in_lanes(const Float8& x1, const Float8& x2, Float8& a,
                                          Float8& b) {
  a = ROPE_SHUFFLE(Int8, x1, x2, 0, 8, 1, 9, 4, 12, 5, 13);
  b = ROPE_SHUFFLE(Int8, x1, x2, 2, 10, 3, 11, 6, 14, 7, 15);
}
ROPE_HOST_DEVICE Float8 in_lane_order(const Float8& v) {
  return ROPE_SHUFFLE(Int8, v, v, 0, 1, 4, 5, 2, 3, 6, 7);
}
ROPE_HOST_DEVICE void deinterleave_in_lanes(const Double4& a, const Double4& b, Double4& x1,
                                            Double4& x2) {
  x1 = ROPE_SHUFFLE(Long4, a, b, 0, 4, 2, 6);
  x2 = ROPE_SHUFFLE(Long4, a, b, 1, 5, 3, 7);
}
ROPE_HOST_DEVICE void interleave_in_lanes(const Double4& x1, const Double4& x2, Double4& a,
                                          Double4& b) {
  a = ROPE_SHUFFLE(Long4, x1, x2, 0, 4, 2, 6);
  b = ROPE_SHUFFLE(Long4, x1, x2, 1, 5, 3, 7);
}
ROPE_HOST_DEVICE Double4 in_lane_order(const Double4& v) {
  return ROPE_SHUFFLE(Long4, v, v, 0, 2, 1, 3);
}

#else

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));
typedef int64_t Long2 __attribute__((vector_size(16)));

ROPE_HOST_DEVICE Halves<Float8> even_odd(const Float4& a, const Float4& b) {
  return {ROPE_SHUFFLE(Int4, a, b, 0, 2, 4, 6), ROPE_SHUFFLE(Int4, a, b, 1, 3, 5, 7)};
}
ROPE_HOST_DEVICE Halves<Float8> alternate(const Float4& a, const Float4& b) {
  return {ROPE_SHUFFLE(Int4, a, b, 0, 4, 1, 5), ROPE_SHUFFLE(Int4, a, b, 2, 6, 3, 7)};
}
ROPE_HOST_DEVICE Halves<Double4> even_odd(const Double2& a, const Double2& b) {
  return {ROPE_SHUFFLE(Long2, a, b, 0, 2), ROPE_SHUFFLE(Long2, a, b, 1, 3)};
}
ROPE_HOST_DEVICE Halves<Double4> alternate(const Double2& a, const Double2& b) {
  return even_odd(a, b);
}

template <class V>
ROPE_HOST_DEVICE void deinterleave(const V& a, const V& b, V& x1, V& x2) {
  const Halves<V> of_a = even_odd(split(a).low, split(a).high);
  const Halves<V> of_b = even_odd(split(b).low, split(b).high);
  x1 = bit_cast<V>(Halves<V>{of_a.low, of_b.low});
  x2 = bit_cast<V>(Halves<V>{of_a.high, of_b.high});
}
template <class V>
ROPE_HOST_DEVICE void interleave(const V& x1, const V& x2, V& a, V& b) {
  a = bit_cast<V>(alternate(split(x1).low, split(x2).low));
  b = bit_cast<V>(alternate(split(x1).high, split(x2).high));
}

template <class V>
ROPE_HOST_DEVICE void deinterleave_in_lanes(const V& a, const V& b, V& x1, V& x2) {
  deinterleave(a, b, x1, x2);
}
template <class V>
ROPE_HOST_DEVICE void interleave_in_lanes(const V& x1, const V& x2, V& a, V& b) {
  interleave(x1, x2, a, b);
}
template <class V>
ROPE_HOST_DEVICE V in_lane_order(const V& v) {
  return v;
}

#endif
