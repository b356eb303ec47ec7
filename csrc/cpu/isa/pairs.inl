// Pairs (x1, x2) of a head as the rotation uses them, in one order or another.

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

// kLanes pairs: `first` and `second` point at the first and the second channels of the pairs;
// interleaved, `first` points at the 2 * kLanes channels and `second` is not used. kIn128Bits: in
// the order of in_128_bits.
template <class T, bool kInterleaved, bool kIn128Bits = false>
struct Pairs {
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  static ROPE_HOST_DEVICE void load(const T* first, const T* second, Vector& x1, Vector& x2) {
    if constexpr (kInterleaved) {
      Vector a, b;
      L::load(first, a);
      L::load(first + L::kLanes, b);
      deinterleave<kIn128Bits>(a, b, x1, x2);
    } else {
      L::load(first, x1);
      L::load(second, x2);
    }
  }
  template <bool kStream>
  static ROPE_HOST_DEVICE void store(T* first, T* second, const Vector& x1, const Vector& x2) {
    if constexpr (kInterleaved) {
      Vector a, b;
      interleave<kIn128Bits>(x1, x2, a, b);
      L::template store<kStream>(first, a);
      L::template store<kStream>(first + L::kLanes, b);
    } else {
      L::template store<kStream>(first, x1);
      L::template store<kStream>(second, x2);
    }
  }
};

// Two bfloat16 in each 32-bit word become floats without moving a lane.
ROPE_HOST_DEVICE void unpack(const U32& words, F32& low, F32& high) {
  low = bit_cast<F32>(words << 16);
  high = bit_cast<F32>(words & 0xffff0000u);
}

// An interleaved pair is one word, x1 below x2.
template <>
struct Pairs<BFloat16, true> {
  using Vector = F32;
  static ROPE_HOST_DEVICE void load(const BFloat16* first, const BFloat16*, F32& x1, F32& x2) {
    unpack(read<U32>(first), x1, x2);
  }
  template <bool kStream>
  static ROPE_HOST_DEVICE void store(BFloat16* first, BFloat16*, const F32& x1, const F32& x2) {
    write<kStream>(first, pack(x1, x2));
  }
};

// Half-split, both channels of a pair are rounded as the halves of one word, if that is faster.
template <>
struct Pairs<BFloat16, false> {
  using Vector = F32;
  static ROPE_HOST_DEVICE void load(const BFloat16* first, const BFloat16* second, F32& x1,
                                    F32& x2) {
    Lanes<BFloat16>::load(first, x1);
    Lanes<BFloat16>::load(second, x2);
  }
  template <bool kStream>
  static ROPE_HOST_DEVICE void store(BFloat16* first, BFloat16* second, const F32& x1,
                                     const F32& x2) {
    if constexpr (kBFloat16InWords) {
      const U32 words = pack(x1, x2);
      write<kStream>(first, __builtin_convertvector(words, U16));
      write<kStream>(second, __builtin_convertvector(words >> 16, U16));
    } else {
      Lanes<BFloat16>::store<kStream>(first, x1);
      Lanes<BFloat16>::store<kStream>(second, x2);
    }
  }
};

// Consecutive channels as those of even and those of odd index: twice the lanes of F32.
struct EvenOdd {
  F32 even, odd;

  EvenOdd() = default;
  ROPE_HOST_DEVICE EvenOdd(const F32& even, const F32& odd) : even(even), odd(odd) {}
  // Whole vectors: GCC copies a struct through memory.
  ROPE_HOST_DEVICE EvenOdd(const EvenOdd& other) : EvenOdd(other.even, other.odd) {}
  ROPE_HOST_DEVICE EvenOdd& operator=(const EvenOdd& other) {
    even = other.even;
    odd = other.odd;
    return *this;
  }
};
template <>
ROPE_HOST_DEVICE EvenOdd read<EvenOdd>(const void* from) {  // whole vectors: GCC copies by 16 bytes
  return {read<F32>(from), read<F32>(static_cast<const float*>(from) + kFloats)};
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

// Pairs of bfloat16, twice the lanes of F32, even and odd by the index of the pair: half-split, no
// lane moves; interleaved, whole words do.
template <bool kInterleaved>
struct EvenOddPairs {
  static ROPE_HOST_DEVICE void load(const BFloat16* first, const BFloat16* second, EvenOdd& x1,
                                    EvenOdd& x2) {
    if constexpr (kInterleaved) {
      F32 even, odd;
      deinterleave(read<F32>(first), read<F32>(first + 2 * kFloats), even, odd);
      unpack(bit_cast<U32>(even), x1.even, x2.even);
      unpack(bit_cast<U32>(odd), x1.odd, x2.odd);
    } else {
      unpack(read<U32>(first), x1.even, x1.odd);
      unpack(read<U32>(second), x2.even, x2.odd);
    }
  }
  template <bool kStream>
  static ROPE_HOST_DEVICE void store(BFloat16* first, BFloat16* second, const EvenOdd& x1,
                                     const EvenOdd& x2) {
    if constexpr (kInterleaved) {
      F32 low, high;
      interleave(bit_cast<F32>(pack(x1.even, x2.even)), bit_cast<F32>(pack(x1.odd, x2.odd)), low,
                 high);
      write<kStream>(first, low);
      write<kStream>(first + 2 * kFloats, high);
    } else {
      write<kStream>(first, pack(x1.even, x1.odd));
      write<kStream>(second, pack(x2.even, x2.odd));
    }
  }
};

// The order of the pairs in a vector, and so of the entries of a row of the table.
enum class PairOrder { Natural, EvenOdd, In128Bits };

// The pairs as the rotation loads and stores them. kWide: bfloat16 that are or become half-split
// are rotated two vectors at a time.
template <class T, bool kInterleaved, bool kInterleavedOut, bool kWide>
struct RotationPairs {
  static constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
  static constexpr bool kBothInterleaved = kInterleaved && kInterleavedOut;
  static constexpr bool kInWords = kBFloat16 && kBFloat16InWords && !kBothInterleaved;
  static constexpr PairOrder kOrder = kInWords && kWide                ? PairOrder::EvenOdd
                                      : !kBFloat16 && kBothInterleaved ? PairOrder::In128Bits
                                                                       : PairOrder::Natural;
  static constexpr bool kEvenOdd = kOrder == PairOrder::EvenOdd;
  template <bool kIsInterleaved>
  using InOrder = std::conditional_t<kEvenOdd, EvenOddPairs<kIsInterleaved>,
                                     Pairs<T, kIsInterleaved, kOrder == PairOrder::In128Bits>>;
  using Vector = std::conditional_t<kEvenOdd, EvenOdd, typename Lanes<T>::Vector>;
  static constexpr int64_t kLanes = (kEvenOdd ? 2 : 1) * Lanes<T>::kLanes;
  static constexpr int64_t kStepIn = kInterleaved ? 2 : 1;  // channels between neighbouring pairs
  static constexpr int64_t kStepOut = kInterleavedOut ? 2 : 1;

  // half: channels between the two of a half-split pair.
  static ROPE_HOST_DEVICE void load(const T* in, int64_t half, Vector& x1, Vector& x2) {
    InOrder<kInterleaved>::load(in, in + half, x1, x2);
  }
  template <bool kStream = false>
  static ROPE_HOST_DEVICE void store(T* out, int64_t half, const Vector& x1, const Vector& x2) {
    InOrder<kInterleavedOut>::template store<kStream>(out, out + half, x1, x2);
  }
};
