// rms_norm_rotary: RMSNorm and rotation of q and k, beside which v may be moved.

// Normalises and rotates one group of heads, and calls written(head) after each.
template <class T, class Written>
void norm_and_rotate(const RotaryArgs& args, const NormedHeads<T>& of, const NormGroup& group,
                     int64_t b, int64_t s, NormScratch<T>& scratch, const Written& written) {
  using A = ArithmeticOf<T>;
  using V = typename Lanes<T>::Vector;
  const Pieces pieces(args, args.interleaved);
  const A inverse_rms =
      scratch.inverse_rms(of.x + group.first_head * of.x_stride_h, of.x_stride_h, group.heads);
  for (int64_t h = group.first_head; h < group.first_head + group.heads; ++h) {
    const T* const x = of.x + h * of.x_stride_h;
    T* const out = of.out + h * of.out_stride_h;
    for (int64_t index = 0; index < pieces.count(); ++index) {
      const Piece piece = pieces.at(index);
      const A* const weights = scratch.weight_of(of.weight, h * of.weight_stride_h, piece);
      const auto norm_to = [&](int64_t span, auto* to) ROPE_ALWAYS_INLINE {
        for_vectors<V>(
            piece.channels, [&](auto whole, auto, int64_t i, int64_t count) ROPE_ALWAYS_INLINE {
              const V v = load_lanes<whole>(x + piece.channel[span] + i, count) * inverse_rms;
              const V w = load_lanes<whole>(weights + span * kPiecePairs + i, count);
              store_lanes<whole>(to + i, v * w, count);
            });
      };
      if (!piece.rotates) {
        norm_to(0, out + piece.channel[0]);
        continue;
      }
      for (int64_t j = 0; j < piece.spans; ++j) norm_to(j, scratch.values + j * kPiecePairs);
      rotate_piece(args, scratch.values, kPiecePairs,
                   out + (args.interleaved_out ? 2 : 1) * piece.first, args.rotary_dim / 2,
                   piece.pairs, scratch.row_of(b, s, piece));
    }
    written(h);
  }
}

// All heads of q, k or v of one token.
template <class T, class Written>
void norm_and_rotate(const RotaryArgs& args, const RmsNorm& norm, const NormedHeads<T>& of,
                     int64_t b, int64_t s, NormScratch<T>& scratch, const Written& written) {
  for (int64_t i = 0; i < group_count(norm, of.heads); ++i) {
    norm_and_rotate(args, of, group_at(norm, of.heads, i), b, s, scratch, written);
  }
}

// Where nothing more is done with a head that has been written.
constexpr auto kNothing = [](int64_t) {};

template <class T>
void rms_norm_rotary_range(const RmsNormRotaryArgs& args, int64_t begin, int64_t end) {
  const RotaryArgs& rotary = args.rotary;
  const RmsNorm& norm = args.norm;
  NormScratch<T> scratch(rotary, norm);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / rotary.seq, s = token - b * rotary.seq;
    for (int64_t g = 0; g < args.groups; ++g) {
      const NormedHeads<T> tensors[] = {
          normed_heads<T>(rotary.q, rotary.q.in, b, s, norm.q_weight, norm.q_stride_h, g),
          normed_heads<T>(rotary.k, rotary.k.in, b, s, norm.k_weight, norm.k_stride_h, g)};
      for (const NormedHeads<T>& each : tensors) {
        norm_and_rotate(rotary, norm, each, b, s, scratch, kNothing);
      }
    }
    move_heads<T>(rotary, args.v, args.groups, b, s);
  }
}

void rms_norm_rotary(const RmsNormRotaryArgs& args, int64_t begin, int64_t end) {
  dispatch(args.rotary.dtype,
           [&](auto storage) { rms_norm_rotary_range<decltype(storage)>(args, begin, end); });
}
