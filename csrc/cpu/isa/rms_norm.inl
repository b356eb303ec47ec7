// RMSNorm and rotation, forward and backward, inside one thread. Included by isa_body.h, in the
// namespace of an instruction set.
//
// A head is worked on in pieces that fit into scratch memory, in the type A of the arithmetic;
// heads of up to 1,024 rotating channels are one piece, or two where some do not rotate.

constexpr int64_t kPiecePairs = 512;

// Part of a head: pairs that rotate, whose channels are one run (interleaved) or two, or else one
// run of channels that do not. Channels count from the first that rotates. In scratch memory run j
// begins at j * kPiecePairs.
struct Piece {
  int64_t runs, channel[2], channels;  // of each run
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

  int64_t count() const { return of_pairs() + of_run(before_) + of_run(after_); }

  Piece at(int64_t index) const {
    const int64_t half = rotating_ / 2;
    if (index < of_pairs()) {
      const int64_t first = index * kPiecePairs, pairs = std::min(half - first, kPiecePairs);
      if (interleaved_) return {1, {2 * first, 0}, 2 * pairs, true, first, pairs};
      return {2, {first, half + first}, pairs, true, first, pairs};
    }
    index -= of_pairs();
    if (index < of_run(before_)) return run(-before_, before_, index);
    return run(rotating_, after_, index - of_run(before_));
  }

 private:
  static constexpr int64_t kRun = 2 * kPiecePairs;
  int64_t of_pairs() const { return (rotating_ / 2 + kPiecePairs - 1) / kPiecePairs; }
  static int64_t of_run(int64_t channels) { return (channels + kRun - 1) / kRun; }
  static Piece run(int64_t begin, int64_t channels, int64_t index) {
    const int64_t done = index * kRun;
    return {1, {begin + done, 0}, std::min(channels - done, kRun), false, 0, 0};
  }

  bool interleaved_;
  int64_t before_, rotating_, after_;
};

template <class T>
using ArithmeticOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// kLanes consecutive elements, or, where not kWhole, the first `count` and zeros.
template <bool kWhole, class T>
ROPE_HOST_DEVICE typename Lanes<T>::Vector load_lanes(const T* from, int64_t count) {
  typename Lanes<T>::Vector v;
  if constexpr (kWhole) {
    Lanes<T>::load(from, v);
  } else {
    constexpr int64_t kLanes = Pairs<T, false>::kLanes;
    T ends[kLanes] = {};
    copy_few<kLanes>(ends, from, count);
    Lanes<T>::load(ends, v);
  }
  return v;
}

template <bool kWhole, class T, class V>
ROPE_HOST_DEVICE void store_lanes(T* to, const V& v, int64_t count) {
  if constexpr (kWhole) {
    Lanes<T>::store(to, v);
  } else {
    constexpr int64_t kLanes = Pairs<T, false>::kLanes;
    T ends[kLanes];
    Lanes<T>::store(ends, v);
    copy_few<kLanes>(to, ends, count);
  }
}

// work(whole, turn, i, count) for the vectors of `channels` channels, `count` of them from i on:
// kLanes where `whole`. Four vectors in turn, so that sums may be four chains of additions.
template <int64_t kLanes, class Work>
ROPE_HOST_DEVICE void for_lanes(int64_t channels, const Work& work) {
  constexpr std::true_type kWhole;
  constexpr std::integral_constant<int, 0> kFirst;
  int64_t i = 0;
  for (; i + 4 * kLanes <= channels; i += 4 * kLanes) {
    work(kWhole, kFirst, i, kLanes);
    work(kWhole, std::integral_constant<int, 1>(), i + kLanes, kLanes);
    work(kWhole, std::integral_constant<int, 2>(), i + 2 * kLanes, kLanes);
    work(kWhole, std::integral_constant<int, 3>(), i + 3 * kLanes, kLanes);
  }
  for (; i + kLanes <= channels; i += kLanes) work(kWhole, kFirst, i, kLanes);
  if (i < channels) work(std::false_type(), kFirst, i, channels - i);
}

// A sum by lanes, of four chains, and then over these: in an order that is always the same.
template <class V>
struct LaneSums {
  V chain[4] = {};

  ROPE_HOST_DEVICE auto total() const {
    const V v = (chain[0] + chain[1]) + (chain[2] + chain[3]);
    std::remove_const_t<std::remove_reference_t<decltype(v[0])>> lanes[sizeof(V) / sizeof(v[0])];
    memcpy(lanes, &v, sizeof(v));
    for (int half = sizeof(V) / sizeof(v[0]) / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }
};

// Rotates `pairs` pairs from memory of one type to other memory of another, the halves of
// half-split ones half_in and half_out channels apart.
template <bool kInterleaved, bool kInterleavedOut, bool kFullWidth, class In, class Out, class A>
ROPE_HOST_DEVICE void rotate_across(const In* in, int64_t half_in, Out* out, int64_t half_out,
                                    int64_t pairs, const Row<const A>& row) {
  using V = typename Lanes<A>::Vector;
  constexpr int64_t kLanes = Pairs<A, false>::kLanes;
  constexpr int64_t kStepIn = kInterleaved ? 2 : 1, kStepOut = kInterleavedOut ? 2 : 1;
  if (pairs < kLanes) {
    In ends_in[2 * kLanes] = {};
    Out ends_out[2 * kLanes];
    copy_few<kStepIn * kLanes>(ends_in, in, kStepIn * pairs);
    if constexpr (!kInterleaved) copy_few<kLanes>(ends_in + kLanes, in + half_in, pairs);
    rotate_across<kInterleaved, kInterleavedOut, kFullWidth>(ends_in, kLanes, ends_out, kLanes,
                                                             kLanes, row);
    copy_few<kStepOut * kLanes>(out, ends_out, kStepOut * pairs);
    if constexpr (!kInterleavedOut) copy_few<kLanes>(out + half_out, ends_out + kLanes, pairs);
    return;
  }
  for (int64_t i = 0; i < pairs; i += kLanes) {
    // The last vector begins among the pairs of the one before it, and so does its row.
    const int64_t at = std::min(i, pairs - kLanes);
    V x1, x2;
    Pairs<In, kInterleaved>::load(in + kStepIn * at, in + half_in + at, x1, x2);
    Turn<V> turn{read<V>(row.c1 + i), read<V>(row.s1 + i), {}, {}};
    turn.c2 = kFullWidth ? read<V>(row.c2 + i) : turn.c1;
    turn.s2 = kFullWidth ? read<V>(row.s2 + i) : turn.s1;
    rotate(turn, x1, x2);
    // Not the stores of Pairs: those of bfloat16 ask that no NaN has a lower half.
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

// Rotates the pairs of a piece: from memory of one type to other memory of another.
template <class In, class Out, class A>
__attribute__((noinline)) void rotate_piece(const RotaryArgs& args, const In* in, int64_t half_in,
                                            Out* out, int64_t half_out, int64_t pairs,
                                            const Row<const A>& row) {
  dispatch_orders(args, [&](auto from, auto to) {
    args.table.full_width ? rotate_across<from, to, true>(in, half_in, out, half_out, pairs, row)
                          : rotate_across<from, to, false>(in, half_in, out, half_out, pairs, row);
  });
}

// The scratch memory of a thread: the weight and the rows of the table for one piece, which most
// often are the same for the heads that follow.
template <class T>
class NormScratch {
 public:
  using A = ArithmeticOf<T>;
  using V = typename Lanes<T>::Vector;
  static constexpr int64_t kLanes = Pairs<T, false>::kLanes;

  alignas(64) A values[2 * kPiecePairs];

  NormScratch(const RotaryArgs& rotary, const RmsNorm& norm) : rotary_(rotary), norm_(norm) {}

  // 1 / sqrt(mean(x^2) + eps) of `heads` heads.
  A inverse_rms(const T* x, int64_t stride_h, int64_t heads) const {
    LaneSums<V> squares;
    for (int64_t h = 0; h < heads; ++h) {
      const T* const head = x + h * stride_h - rotary_.rotary_offset;
      for_lanes<kLanes>(rotary_.head_dim,
                        [&](auto whole, auto turn, int64_t i, int64_t count) ROPE_ALWAYS_INLINE {
                          const V v = load_lanes<whole>(head + i, count);
                          squares.chain[turn] += v * v;
                        });
    }
    return inverse_rms_of(squares.total(), heads);
  }
  A inverse_rms_of(A sum_of_squares, int64_t heads) const {
    return A(1) / std::sqrt(sum_of_squares / channels_of(heads) + static_cast<A>(norm_.eps));
  }
  A channels_of(int64_t heads) const { return static_cast<A>(heads * rotary_.head_dim); }

  // The weight of one head at the channels of a piece, plus 1 if the norm says so.
  const A* weight_of(const void* weight, int64_t at, const Piece& piece) {
    if (weight != weight_ || at != weight_at_ || piece.channel[0] != weight_channel_) {
      for (int64_t j = 0; j < piece.runs; ++j) {
        A* const to = weights_ + j * kPiecePairs;
        convert(norm_.dtype, weight, at + piece.channel[j], piece.channels, to);
        for (int64_t i = 0; norm_.unit_offset && i < piece.channels; ++i) to[i] += A(1);
      }
      weight_ = weight, weight_at_ = at, weight_channel_ = piece.channel[0];
    }
    return weights_;
  }

  // The rows of the table for the pairs of a piece.
  Row<const A> row_of(int64_t b, int64_t s, const Piece& piece) {
    if (b != row_b_ || s != row_s_ || piece.first != row_first_) {
      if (rotary_.table.full_width) {
        full_width_.fill(rotary_, b, s, 1, piece.first, piece.pairs);
      } else {
        rows_.fill(rotary_, b, s, 1, piece.first, piece.pairs);
      }
      row_b_ = b, row_s_ = s, row_first_ = piece.first;
    }
    return rotary_.table.full_width ? full_width_.row() : rows_.row();
  }

 private:
  const RotaryArgs& rotary_;
  const RmsNorm& norm_;
  alignas(64) A weights_[2 * kPiecePairs + kLanes] = {};
  RowScratch<A, kLanes, PairOrder::Natural, false, false> rows_;
  RowScratch<A, kLanes, PairOrder::Natural, false, true> full_width_;  // one of them is used
  const void* weight_ = nullptr;
  int64_t weight_at_ = 0, weight_channel_ = 0;
  int64_t row_b_ = -1, row_s_ = -1, row_first_ = -1;
};

// A row: one head of a token, or all of them.
struct NormRow {
  int64_t first_head, heads;
};
ROPE_HOST_DEVICE int64_t rows_of(const RmsNorm& norm, int64_t heads) {
  return norm.all_heads ? std::min<int64_t>(heads, 1) : heads;
}
ROPE_HOST_DEVICE NormRow row_at(const RmsNorm& norm, int64_t heads, int64_t index) {
  return norm.all_heads ? NormRow{0, heads} : NormRow{index, 1};
}

// One tensor of a token, and its weight.
template <class T>
struct NormedHeads {
  const T *x, *in;  // in: what rotates, x itself or its gradient
  T* out;
  int64_t x_stride_h, in_stride_h, out_stride_h, heads;
  const void* weight;
  int64_t weight_stride_h;
};

template <class T>
NormedHeads<T> normed_heads(const RotatedHeads& rotated, const Heads<const void*>& x, int64_t b,
                            int64_t s, const void* weight, int64_t weight_stride_h) {
  const auto at = [&](const auto& heads) { return b * heads.stride_b + s * heads.stride_s; };
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

// Writes the row normalised and rotated.
template <class T>
void norm_and_rotate_row(const RotaryArgs& args, const NormedHeads<T>& of, const NormRow& row,
                         int64_t b, int64_t s, NormScratch<T>& scratch) {
  using A = ArithmeticOf<T>;
  constexpr int64_t kLanes = NormScratch<T>::kLanes;
  const Pieces pieces(args, args.interleaved);
  const A inverse_rms =
      scratch.inverse_rms(of.x + row.first_head * of.x_stride_h, of.x_stride_h, row.heads);
  for (int64_t h = row.first_head; h < row.first_head + row.heads; ++h) {
    const T* const x = of.x + h * of.x_stride_h;
    T* const out = of.out + h * of.out_stride_h;
    for (int64_t index = 0; index < pieces.count(); ++index) {
      const Piece piece = pieces.at(index);
      const A* const weights = scratch.weight_of(of.weight, h * of.weight_stride_h, piece);
      const auto norm_to = [&](int64_t run, auto* to) ROPE_ALWAYS_INLINE {
        for_lanes<kLanes>(
            piece.channels, [&](auto whole, auto, int64_t i, int64_t count) ROPE_ALWAYS_INLINE {
              const auto v = load_lanes<whole>(x + piece.channel[run] + i, count) * inverse_rms;
              const auto w = load_lanes<whole>(weights + run * kPiecePairs + i, count);
              store_lanes<whole>(to + i, v * w, count);
            });
      };
      if (!piece.rotates) {
        norm_to(0, out + piece.channel[0]);
        continue;
      }
      for (int64_t j = 0; j < piece.runs; ++j) norm_to(j, scratch.values + j * kPiecePairs);
      rotate_piece(args, scratch.values, kPiecePairs,
                   out + (args.interleaved_out ? 2 : 1) * piece.first, args.rotary_dim / 2,
                   piece.pairs, scratch.row_of(b, s, piece));
    }
  }
}

template <class T>
void rms_norm_rotary_range(const RmsNormRotaryArgs& args, int64_t begin, int64_t end) {
  const RotaryArgs& rotary = args.rotary;
  const RmsNorm& norm = args.norm;
  NormScratch<T> scratch(rotary, norm);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / rotary.seq, s = token - b * rotary.seq;
    const NormedHeads<T> tensors[] = {
        normed_heads<T>(rotary.q, rotary.q.in, b, s, norm.q_weight, norm.q_stride_h),
        normed_heads<T>(rotary.k, rotary.k.in, b, s, norm.k_weight, norm.k_stride_h)};
    for (const NormedHeads<T>& each : tensors) {
      for (int64_t i = 0; i < rows_of(norm, each.heads); ++i) {
        norm_and_rotate_row(rotary, each, row_at(norm, each.heads, i), b, s, scratch);
      }
    }
  }
}

void rms_norm_rotary(const RmsNormRotaryArgs& args, int64_t begin, int64_t end) {
  dispatch(args.rotary.dtype,
           [&](auto storage) { rms_norm_rotary_range<decltype(storage)>(args, begin, end); });
}
