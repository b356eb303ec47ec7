// Pairs (x1, x2) of a head as the rotation takes them, in one order or another. Included by
// isa_body.h, in the namespace of an instruction set.
#include "cpu/isa/vec.h"

// kLanes pairs: `first` and `second` point at the first halves and the second halves of the pairs;
// when interleaved, `first` points at the 2 * kLanes channels and `second` is not used.
template <class T, bool kInterleaved>
struct Pairs {
  using Vector = typename Lanes<T>::Vector;
  static constexpr int kLanes = sizeof(Vector) / sizeof(Vector{}[0]);
  static ROPE_HOST_DEVICE void load(const T* first, const T* second, Vector& x1, Vector& x2) {
    if constexpr (kInterleaved) {
      Vector a, b;
      Lanes<T>::load(first, a);
      Lanes<T>::load(first + kLanes, b);
      deinterleave(a, b, x1, x2);
    } else {
      Lanes<T>::load(first, x1);
      Lanes<T>::load(second, x2);
    }
  }
  template <bool kStream>
  static ROPE_HOST_DEVICE void store(T* first, T* second, const Vector& x1, const Vector& x2) {
    if constexpr (kInterleaved) {
      Vector a, b;
      interleave(x1, x2, a, b);
      Lanes<T>::template store<kStream>(first, a);
      Lanes<T>::template store<kStream>(first + kLanes, b);
    } else {
      Lanes<T>::template store<kStream>(first, x1);
      Lanes<T>::template store<kStream>(second, x2);
    }
  }
};

// Two bfloat16 in each 32-bit word: they become floats, and words again, without moving a lane.
ROPE_HOST_DEVICE void unpack(const Uint8& words, Float8& low, Float8& high) {
  low = bit_cast<Float8>(words << 16);
  high = bit_cast<Float8>(words & 0xffff0000u);
}

#if defined(ROPE_ISA_WIDE)
// The lower half of each word from `low`, the upper one from `high`.
ROPE_HOST_DEVICE Short16 halves(const Uint8& low, const Uint8& high) {
  return ROPE_SHUFFLE(SignedShort16, bit_cast<Short16>(low), bit_cast<Short16>(high), 0, 17, 2, 19,
                      4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31);
}

// Rounds both floats of each word at once, in 16-bit lanes: the half that stays takes a carry where
// the half that goes is more than half a unit, or is half a unit and the one that stays is odd.
// A NaN must have an empty lower half, as those of a rotation have whose x is bfloat16 and whose
// table has no other NaN: it stays NaN.
ROPE_HOST_DEVICE Uint8 pack(const Float8& low, const Float8& high) {
  const Uint8 a = bit_cast<Uint8>(low), b = bit_cast<Uint8>(high);
  const Short16 stays = halves(a >> 16, b);
  const Short16 goes = halves(a, b << 16);
  const SignedShort16 above_half = bit_cast<SignedShort16>(goes ^ uint16_t{0x8000});  // if > 0
  const SignedShort16 odd = bit_cast<SignedShort16>(stays & uint16_t{1});
  return bit_cast<Uint8>(stays - bit_cast<Short16>(above_half > -odd));
}
#else
// The same in 32-bit lanes, where there is no blend of 16-bit lanes.
ROPE_HOST_DEVICE Uint8 pack(const Float8& low, const Float8& high) {
  return (nearest_bfloat16(low) >> 16) | (nearest_bfloat16(high) & 0xffff0000u);
}
#endif

// An interleaved pair is one word, x1 below x2.
template <>
struct Pairs<BFloat16, true> {
  using Vector = Float8;
  static constexpr int kLanes = 8;
  static ROPE_HOST_DEVICE void load(const BFloat16* first, const BFloat16*, Vector& x1,
                                    Vector& x2) {
    unpack(read<Uint8>(first), x1, x2);
  }
  template <bool kStream>
  static ROPE_HOST_DEVICE void store(BFloat16* first, BFloat16*, const Vector& x1,
                                     const Vector& x2) {
    write<kStream>(first, pack(x1, x2));
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
  template <bool kStream>
  static ROPE_HOST_DEVICE void store(BFloat16* first, BFloat16* second, const EvenOdd& x1,
                                     const EvenOdd& x2) {
    if constexpr (kInterleaved) {
      Float8 low, high;
      interleave(bit_cast<Float8>(pack(x1.even, x2.even)), bit_cast<Float8>(pack(x1.odd, x2.odd)),
                 low, high);
      write<kStream>(first, low);
      write<kStream>(first + 16, high);
    } else {
      write<kStream>(first, pack(x1.even, x1.odd));
      write<kStream>(second, pack(x2.even, x2.odd));
    }
  }
};

// Interleaved pairs of other types, in the order of in_lane_order.
template <class T>
struct InLanePairs {
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  static constexpr int kLanes = Pairs<T, true>::kLanes;
  static ROPE_HOST_DEVICE void load(const T* first, const T*, Vector& x1, Vector& x2) {
    Vector a, b;
    L::load(first, a);
    L::load(first + kLanes, b);
    deinterleave_in_lanes(a, b, x1, x2);
  }
  template <bool kStream>
  static ROPE_HOST_DEVICE void store(T* first, T*, const Vector& x1, const Vector& x2) {
    Vector a, b;
    interleave_in_lanes(x1, x2, a, b);
    L::template store<kStream>(first, a);
    L::template store<kStream>(first + kLanes, b);
  }
};

// The order of the pairs in a vector, and so of the rows of the table.
enum class PairOrder { Natural, EvenOdd, InLane };

// The pairs as the rotation takes them, and puts them back. kWide: bfloat16 that are or become
// half-split go 16 at a time, else 8.
template <class T, bool kInterleaved, bool kInterleavedOut, bool kWide>
struct RotationPairs {
  static constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
  static constexpr bool kBothInterleaved = kInterleaved && kInterleavedOut;
  static constexpr PairOrder kOrder = kBFloat16 && kWide && !kBothInterleaved ? PairOrder::EvenOdd
                                      : !kBFloat16 && kBothInterleaved        ? PairOrder::InLane
                                                                              : PairOrder::Natural;
  static constexpr bool kEvenOdd = kOrder == PairOrder::EvenOdd;
  template <bool kIsInterleaved>
  using InOrder = std::conditional_t<
      kEvenOdd, EvenOddPairs<kIsInterleaved>,
      std::conditional_t<kOrder == PairOrder::InLane, InLanePairs<T>, Pairs<T, kIsInterleaved>>>;
  using Vector = std::conditional_t<kEvenOdd, EvenOdd, typename Lanes<T>::Vector>;
  static constexpr int64_t kLanes = kEvenOdd ? 16 : Pairs<T, true>::kLanes;
  static constexpr int64_t kStepIn = kInterleaved ? 2 : 1;  // channels between neighbouring pairs
  static constexpr int64_t kStepOut = kInterleavedOut ? 2 : 1;

  // `half`: the channels between the halves of a half-split pair.
  static ROPE_HOST_DEVICE void load(const T* in, int64_t half, Vector& x1, Vector& x2) {
    InOrder<kInterleaved>::load(in, in + half, x1, x2);
  }
  template <bool kStream = false>
  static ROPE_HOST_DEVICE void store(T* out, int64_t half, const Vector& x1, const Vector& x2) {
    InOrder<kInterleavedOut>::template store<kStream>(out, out + half, x1, x2);
  }
};
