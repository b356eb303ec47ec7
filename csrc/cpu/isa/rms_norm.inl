// rms_norm_rotary: RMSNorm and rotation of q and k.

// Normalises and rotates one group of heads.
template <class T>
void norm_and_rotate(const RotaryArgs& args, const NormedHeads<T>& of, const NormGroup& group,
                     int64_t b, int64_t s, NormScratch<T>& scratch) {
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
  }
}

// Normalises and rotates all heads of one token.
template <class T>
void norm_and_rotate(const RotaryArgs& args, const RmsNorm& norm, const NormedHeads<T>& of,
                     int64_t b, int64_t s, NormScratch<T>& scratch) {
  for (int64_t i = 0; i < group_count(norm, of.heads); ++i) {
    norm_and_rotate(args, of, group_at(norm, of.heads, i), b, s, scratch);
  }
}

// q and k of one token.
template <class T>
void norm_token(const RotaryArgs& args, const RmsNorm& norm, int64_t b, int64_t s,
                NormScratch<T>& scratch) {
  norm_and_rotate(args, norm,
                  normed_heads<T>(args.q, args.q.in, b, s, norm.q_weight, norm.q_stride_h), b, s,
                  scratch);
  norm_and_rotate(args, norm,
                  normed_heads<T>(args.k, args.k.in, b, s, norm.k_weight, norm.k_stride_h), b, s,
                  scratch);
}

template <class T>
void rms_norm_rotary_range(const RmsNormRotaryArgs& args, int64_t begin, int64_t end) {
  const RotaryArgs& rotary = args.rotary;
  NormScratch<T> scratch(rotary, args.norm);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / rotary.seq, s = token - b * rotary.seq;
    norm_token(rotary, args.norm, b, s, scratch);
  }
}

void rms_norm_rotary(const RmsNormRotaryArgs& args, int64_t begin, int64_t end) {
  dispatch(args.rotary.dtype,
           [&](auto storage) { rms_norm_rotary_range<decltype(storage)>(args, begin, end); });
}
