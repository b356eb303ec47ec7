// What rms_norm_rotary, its gradient and apply_rotary_quantize share: the pieces of a head, sums
// over it, and scratch memory.
//
// A head is processed in pieces that fit into scratch memory, in the type A of the arithmetic.
// Heads of up to 1,024 rotating channels are one piece, or two or three if some do not rotate.

constexpr int64_t kPiecePairs = 512;

// Part of a head: pairs that rotate, which are one span of channels if interleaved and else two, or
// one span of channels that do not rotate. Channels count from the first one that rotates. In
// scratch memory, span j begins at j * kPiecePairs.
struct Piece {
  int64_t spans, channel[2], channels;  // of each span: its first channel, and how many
  bool rotates;
  int64_t first, pairs;
};

// All pieces of a head, the pairs first.
class Pieces {
 public:
  // interleaved: the order of the pairs in the tensor that is normalised.
  Pieces(const RotaryArgs& args, bool interleaved)
      : interleaved_(interleaved),
        before_(args.rotary_offset),
        rotating_(args.rotary_dim),
        after_(args.head_dim - args.rotary_offset - args.rotary_dim) {}

  int64_t count() const { return pair_pieces() + span_pieces(before_) + span_pieces(after_); }

  Piece at(int64_t index) const {
    const int64_t half = rotating_ / 2;
    if (index < pair_pieces()) {
      const int64_t first = index * kPiecePairs, pairs = std::min(half - first, kPiecePairs);
      if (interleaved_) return {1, {2 * first, 0}, 2 * pairs, true, first, pairs};
      return {2, {first, half + first}, pairs, true, first, pairs};
    }
    index -= pair_pieces();
    if (index < span_pieces(before_)) return span(-before_, before_, index);
    return span(rotating_, after_, index - span_pieces(before_));
  }

 private:
  static constexpr int64_t kSpan = 2 * kPiecePairs;
  int64_t pair_pieces() const { return (rotating_ / 2 + kPiecePairs - 1) / kPiecePairs; }
  static int64_t span_pieces(int64_t channels) { return (channels + kSpan - 1) / kSpan; }
  static Piece span(int64_t begin, int64_t channels, int64_t index) {
    const int64_t done = index * kSpan;
    return {1, {begin + done, 0}, std::min(channels - done, kSpan), false, 0, 0};
  }

  bool interleaved_;
  int64_t before_, rotating_, after_;
};

// Loads kLanes consecutive elements or, without kWhole, count < kLanes elements and zeros.
template <bool kWhole, class T>
ROPE_HOST_DEVICE typename Lanes<T>::Vector load_lanes(const T* from, int64_t count) {
  typename Lanes<T>::Vector v;
  if constexpr (kWhole) {
    Lanes<T>::load(from, v);
  } else {
    constexpr int64_t kLanes = Lanes<T>::kLanes;
    T buffer[kLanes];
    fill_few<kLanes>(buffer, from, count);
    Lanes<T>::load(buffer, v);
  }
  return v;
}

template <bool kWhole, class T, class V>
ROPE_HOST_DEVICE void store_lanes(T* to, const V& v, int64_t count) {
  if constexpr (kWhole) {
    Lanes<T>::store(to, v);
  } else {
    constexpr int64_t kLanes = Lanes<T>::kLanes;
    T buffer[kLanes];
    Lanes<T>::store(buffer, v);
    copy_few<kLanes>(to, buffer, count);
  }
}

// Calls f(0), ..., f(kCount - 1), with constants.
template <class F, int... i>
ROPE_HOST_DEVICE void unroll(const F& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>()), ...);
}
template <int kCount, class F>
ROPE_HOST_DEVICE void unroll(const F& f) {
  unroll(f, std::make_integer_sequence<int, kCount>());
}

// A sum over channels is 128 bytes of partial sums, which are added up at the end. Channels are
// added in steps of kPartialSums, channel i of a step to partial sum i; what remains, in steps of a
// quarter of that. So the order of the additions does not depend on the width of the vectors.
template <class A>
constexpr int kPartialSums = 128 / sizeof(A);

template <class V>
struct PartialSums {
  using A = LaneOf<V>;
  static constexpr int kChains = kPartialSums<A> / kLanesOf<V>, kQuarter = kPartialSums<A> / 4;

  V chain[kChains] = {};  // of additions, which do not wait for one another

  ROPE_HOST_DEVICE A total() const {
    A sums[kPartialSums<A>];
    unroll<kChains>([&](auto i) ROPE_ALWAYS_INLINE { write(sums + i * kLanesOf<V>, chain[i]); });
    // GCC would else keep chains that are wider than a quarter in memory, from the first addition.
    asm volatile("" : : "r"(sums) : "memory");
    const auto quarter = [&](int i) ROPE_ALWAYS_INLINE {
      return read<Vec<A, kQuarter>>(sums + i * kQuarter);
    };
    write(sums, (quarter(0) + quarter(1)) + (quarter(2) + quarter(3)));
    for (int half = kQuarter / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
  }
};

// Calls work(whole, chain, i, count) for the vectors of `channels` channels, in that order:
// channels [i, i + count), of which there are kLanes if `whole`. `chain`: the index in
// PartialSums::chain.
template <class V, class Work>
ROPE_HOST_DEVICE void for_vectors(int64_t channels, const Work& work) {
  constexpr int64_t kLanes = kLanesOf<V>, kStep = kPartialSums<LaneOf<V>>, kQuarter = kStep / 4;
  int64_t i = 0;
  for (; i + kStep <= channels; i += kStep) {
    unroll<kStep / kLanes>([&](auto chain) ROPE_ALWAYS_INLINE {
      work(std::true_type(), chain, i + chain * kLanes, kLanes);
    });
  }
  constexpr int64_t kCount = std::min(kLanes, kQuarter), kVectors = kQuarter / kCount;
  for (; i + kQuarter <= channels; i += kQuarter) {
    unroll<kVectors>([&](auto chain) ROPE_ALWAYS_INLINE {
      work(std::bool_constant<kCount == kLanes>(), chain, i + chain * kCount, kCount);
    });
  }
  if (i == channels) return;
  unroll<kVectors>([&](auto chain) ROPE_ALWAYS_INLINE {
    const int64_t at = i + chain * kCount, count = channels - at;
    if (kVectors == 1 || (0 < count && count < kLanes)) {
      work(std::false_type(), chain, at, count);
    } else if (count > 0) {
      work(std::true_type(), chain, at, kLanes);
    }
  });
}

// Rotates `pairs` pairs out of place, from one type to another; half_in, half_out: channels between
// the two of a half-split pair.
template <bool kInterleaved, bool kInterleavedOut, bool kFullWidth, class In, class Out, class A>
ROPE_HOST_DEVICE void rotate_across(const In* in, int64_t half_in, Out* out, int64_t half_out,
                                    int64_t pairs, const TableRow<const A>& row) {
  using V = typename Lanes<A>::Vector;
  constexpr int64_t kLanes = Lanes<A>::kLanes;
  constexpr int64_t kStepIn = kInterleaved ? 2 : 1, kStepOut = kInterleavedOut ? 2 : 1;
  if (pairs < kLanes) {
    In buffer_in[2 * kLanes];
    Out buffer_out[2 * kLanes];
    fill_few<kStepIn * kLanes>(buffer_in, in, kStepIn * pairs);
    if constexpr (!kInterleaved) fill_few<kLanes>(buffer_in + kLanes, in + half_in, pairs);
    rotate_across<kInterleaved, kInterleavedOut, kFullWidth>(buffer_in, kLanes, buffer_out, kLanes,
                                                             kLanes, row);
    copy_few<kStepOut * kLanes>(out, buffer_out, kStepOut * pairs);
    if constexpr (!kInterleavedOut) copy_few<kLanes>(out + half_out, buffer_out + kLanes, pairs);
    return;
  }
  for (int64_t i = 0; i < pairs; i += kLanes) {
    // The last vector ends with the last pair, and may overlap the one before it.
    const int64_t at = std::min(i, pairs - kLanes);
    V x1, x2;
    Pairs<In, kInterleaved>::load(in + kStepIn * at, in + half_in + at, x1, x2);
    Turn<V> turn{read<V>(row.c1 + i), read<V>(row.s1 + i), {}, {}};
    turn.c2 = kFullWidth ? read<V>(row.c2 + i) : turn.c1;
    turn.s2 = kFullWidth ? read<V>(row.s2 + i) : turn.s1;
    rotate(turn, x1, x2);
    // Not by Pairs, whose store of bfloat16 allows no NaN with a lower half.
    if constexpr (kInterleavedOut) {
      V a, b;
      interleave(x1, x2, a, b);
      Lanes<Out>::store(out + 2 * at, a);
      Lanes<Out>::store(out + 2 * at + kLanes, b);
    } else {
      Lanes<Out>::store(out + at, x1);
      Lanes<Out>::store(out + half_out + at, x2);
    }
  }
}

// Rotates the pairs of a piece, out of place, from one type to another.
template <class In, class Out, class A>
__attribute__((noinline)) void rotate_piece(const RotaryArgs& args, const In* in, int64_t half_in,
                                            Out* out, int64_t half_out, int64_t pairs,
                                            const TableRow<const A>& row) {
  dispatch_orders(args, [&](auto from, auto to) {
    args.table.full_width ? rotate_across<from, to, true>(in, half_in, out, half_out, pairs, row)
                          : rotate_across<from, to, false>(in, half_in, out, half_out, pairs, row);
  });
}

// The row of the table for one piece, which most often serves the next heads too.
template <class A, int64_t kLanes>
class PieceRow {
 public:
  TableRow<const A> at(const RotaryArgs& args, int64_t b, int64_t s, const Piece& piece) {
    const bool full_width = args.table.full_width;
    if (b != b_ || s != s_ || piece.first != first_) {
      full_width ? full_width_.fill(args, b, s, 1, piece.first, piece.pairs)
                 : rows_.fill(args, b, s, 1, piece.first, piece.pairs);
      b_ = b, s_ = s, first_ = piece.first;
    }
    return full_width ? full_width_.row() : rows_.row();
  }

 private:
  TableRows<A, kLanes, PairOrder::Natural, false, false> rows_;
  TableRows<A, kLanes, PairOrder::Natural, false, true> full_width_;  // one of them is used
  int64_t b_ = -1, s_ = -1, first_ = -1;
};

// The scratch memory of a thread: the weight and the row of the table for one piece, which most
// often serve the next heads too.
template <class T>
class NormScratch {
 public:
  using A = ArithmeticOf<T>;
  using V = typename Lanes<T>::Vector;
  static constexpr int64_t kLanes = Lanes<T>::kLanes;

  alignas(64) A values[2 * kPiecePairs];

  NormScratch(const RotaryArgs& rotary, const RmsNorm& norm) : rotary_(rotary), norm_(norm) {
    std::fill_n(weights_, 2 * kPiecePairs + kLanes, A(1));
  }

  // 1 / sqrt(mean(x^2) + eps) of `heads` heads.
  A inverse_rms(const T* x, int64_t stride_h, int64_t heads) const {
    PartialSums<V> squares;
    for (int64_t h = 0; h < heads; ++h) {
      const T* const head = x + h * stride_h - rotary_.rotary_offset;
      for_vectors<V>(rotary_.head_dim,
                     [&](auto whole, auto chain, int64_t i, int64_t count) ROPE_ALWAYS_INLINE {
                       const V v = load_lanes<whole>(head + i, count);
                       squares.chain[chain] += v * v;
                     });
    }
    return inverse_rms_of(squares.total(), heads);
  }
  A inverse_rms_of(A sum_of_squares, int64_t heads) const {
    return A(1) / std::sqrt(sum_of_squares / channels_of(heads) + static_cast<A>(norm_.eps));
  }
  A channels_of(int64_t heads) const { return static_cast<A>(heads * rotary_.head_dim); }

  // The weight of one head at the channels of a piece, plus 1 if the norm says so. nullptr: ones.
  const A* weight_of(const void* weight, int64_t at, const Piece& piece) {
    if (weight == nullptr) return weights_;
    if (weight != weight_ || at != weight_at_ || piece.channel[0] != weight_channel_) {
      for (int64_t j = 0; j < piece.spans; ++j) {
        A* const to = weights_ + j * kPiecePairs;
        convert(norm_.dtype, weight, at + piece.channel[j], piece.channels, to);
        for (int64_t i = 0; norm_.unit_offset && i < piece.channels; ++i) to[i] += A(1);
      }
      weight_ = weight, weight_at_ = at, weight_channel_ = piece.channel[0];
    }
    return weights_;
  }

  // The row of the table for the pairs of a piece.
  TableRow<const A> row_of(int64_t b, int64_t s, const Piece& piece) {
    return row_.at(rotary_, b, s, piece);
  }

 private:
  const RotaryArgs& rotary_;
  const RmsNorm& norm_;
  alignas(64) A weights_[2 * kPiecePairs + kLanes];
  PieceRow<A, kLanes> row_;
  const void* weight_ = nullptr;
  int64_t weight_at_ = 0, weight_channel_ = 0;
};

// Heads of a token that are normalised together: one, or all of them.
struct NormGroup {
  int64_t first_head, heads;
};
ROPE_HOST_DEVICE int64_t group_count(const RmsNorm& norm, int64_t heads) {
  return norm.all_heads ? std::min<int64_t>(heads, 1) : heads;
}
ROPE_HOST_DEVICE NormGroup group_at(const RmsNorm& norm, int64_t heads, int64_t index) {
  return norm.all_heads ? NormGroup{0, heads} : NormGroup{index, 1};
}

// The heads of q or k of one token, and of one group, and their weight.
template <class T>
struct NormedHeads {
  const T *x, *in;  // in: what rotates: x itself, or the gradient of the result
  T* out;
  int64_t x_stride_h, in_stride_h, out_stride_h, heads;
  const void* weight;
  int64_t weight_stride_h;
};

template <class T>
NormedHeads<T> normed_heads(const RotatedHeads& rotated, const Heads<const void*>& x, int64_t b,
                            int64_t s, const void* weight, int64_t weight_stride_h, int64_t g = 0) {
  const auto at = [&](const auto& heads) {
    return b * heads.stride_b + s * heads.stride_s + g * heads.stride_g;
  };
  return {static_cast<const T*>(x.data) + at(x),
          static_cast<const T*>(rotated.in.data) + at(rotated.in),
          static_cast<T*>(rotated.out.data) + at(rotated.out),
          x.stride_h,
          rotated.in.stride_h,
          rotated.out.stride_h,
          rotated.heads,
          weight,
          weight_stride_h};
}
