// The gradients of rms_norm_rotary.
//
// With n = x / rms(x), g the gradient of the result rotated back, and m = mean(n g w) over the
// heads that are normalised together:
//   to x       (g w - n m) / rms(x)
//   to w       the sum of n g over tokens, and over heads that share it

// The gradients of one group of heads. Those to the weight are added to `sums`.
template <class T>
void norm_grad(const RotaryArgs& args, const NormedHeads<T>& of, const NormGroup& group, int64_t b,
               int64_t s, ArithmeticOf<T>* sums, NormScratch<T>& scratch) {
  using A = ArithmeticOf<T>;
  using V = typename Lanes<T>::Vector;
  const Pieces pieces(args, args.interleaved_out);

  // Rotates the gradient of one piece back, into scratch.values.
  const auto rotate_back = [&](int64_t h, const Piece& piece) {
    const T* const grad = of.in + h * of.in_stride_h;
    if (piece.rotates) {
      rotate_piece(args, grad + (args.interleaved ? 2 : 1) * piece.first, args.rotary_dim / 2,
                   scratch.values, kPiecePairs, piece.pairs, scratch.row_of(b, s, piece));
    } else {
      for_vectors<V>(piece.channels,
                     [&](auto whole, auto, int64_t i, int64_t count) ROPE_ALWAYS_INLINE {
                       const V v = load_lanes<whole>(grad + piece.channel[0] + i, count);
                       store_lanes<whole>(scratch.values + i, v, count);
                     });
    }
  };
  // work(whole, chain, channel, count, x, g, w) for the vectors of a piece.
  const auto for_piece = [&](int64_t h, const Piece& piece, const auto& work) ROPE_ALWAYS_INLINE {
    const T* const x = of.x + h * of.x_stride_h;
    const A* const weights = scratch.weight_of(of.weight, h * of.weight_stride_h, piece);
    for (int64_t j = 0; j < piece.spans; ++j) {
      const int64_t at = j * kPiecePairs, channel = piece.channel[j];
      for_vectors<V>(
          piece.channels, [&](auto whole, auto chain, int64_t i, int64_t count) ROPE_ALWAYS_INLINE {
            work(whole, chain, channel + i, count, load_lanes<whole>(x + channel + i, count),
                 load_lanes<whole>(scratch.values + at + i, count),
                 load_lanes<whole>(weights + at + i, count));
          });
    }
  };

  PartialSums<V> squares, products;
  for (int64_t h = group.first_head; h < group.first_head + group.heads; ++h) {
    for (int64_t index = 0; index < pieces.count(); ++index) {
      const Piece piece = pieces.at(index);
      rotate_back(h, piece);
      for_piece(h, piece,
                [&](auto, auto chain, int64_t, int64_t, const V& x, const V& g, const V& w)
                    ROPE_ALWAYS_INLINE {
                      squares.chain[chain] += x * x;
                      products.chain[chain] += g * w * x;
                    });
    }
  }
  const A inverse_rms = scratch.inverse_rms_of(squares.total(), group.heads);
  const A mean = products.total() * inverse_rms / scratch.channels_of(group.heads);

  const bool kept = group.heads == 1 && pieces.count() == 1;
  for (int64_t h = group.first_head; h < group.first_head + group.heads; ++h) {
    T* const out = of.out + h * of.out_stride_h;
    // A weight [H, D] has columns for each head.
    A* const columns = sums + args.rotary_offset + (group.heads > 1 ? h * args.head_dim : 0);
    for (int64_t index = 0; index < pieces.count(); ++index) {
      const Piece piece = pieces.at(index);
      if (!kept) rotate_back(h, piece);
      for_piece(h, piece,
                [&](auto whole, auto, int64_t channel, int64_t count, const V& x, const V& g,
                    const V& w) ROPE_ALWAYS_INLINE {
                  const V n = x * inverse_rms;
                  store_lanes<whole>(out + channel, (g * w - n * mean) * inverse_rms, count);
                  const V sum = load_lanes<whole>(columns + channel, count);
                  store_lanes<whole>(columns + channel, sum + g * n, count);
                });
    }
  }
}

template <class T>
void rms_norm_rotary_grad_range(const RmsNormRotaryGradArgs& args, int64_t begin, int64_t end) {
  using A = ArithmeticOf<T>;
  const RotaryArgs& rotary = args.rotary;
  const RmsNorm& norm = args.norm;
  NormScratch<T> scratch(rotary, norm);
  const int64_t tokens = rotary.batch * rotary.seq;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A* const sums = static_cast<A*>(args.partial) + chunk * args.columns;
    for (int64_t i = 0; i < args.columns; ++i) sums[i] = 0;
    const int64_t first = chunk * args.chunk_tokens;
    const int64_t past = std::min(first + args.chunk_tokens, tokens);
    for (int64_t token = first; token < past; ++token) {
      const int64_t b = token / rotary.seq, s = token - b * rotary.seq;
      for (int64_t g = 0; g < args.groups; ++g) {
        const NormedHeads<T> tensors[] = {
            normed_heads<T>(rotary.q, args.q, b, s, norm.q_weight, norm.q_stride_h, g),
            normed_heads<T>(rotary.k, args.k, b, s, norm.k_weight, norm.k_stride_h, g)};
        for (int which = 0; which < 2; ++which) {
          if ((which == 0 ? rotary.q : rotary.k).in.data == nullptr) continue;
          const NormedHeads<T>& each = tensors[which];
          for (int64_t i = 0; i < group_count(norm, each.heads); ++i) {
            norm_grad(rotary, each, group_at(norm, each.heads, i), b, s,
                      sums + (which == 0 ? 0 : args.q_columns), scratch);
          }
        }
      }
      for (const RotatedHeads* x : {&rotary.q, &rotary.k}) {
        if (x->in.data == nullptr) move_heads<T>(rotary, *x, args.groups, b, s);
      }
      move_heads<T>(rotary, args.v, args.groups, b, s);
    }
  }
}

void rms_norm_rotary_grad(const RmsNormRotaryGradArgs& args, int64_t begin, int64_t end) {
  dispatch(args.rotary.dtype,
           [&](auto storage) { rms_norm_rotary_grad_range<decltype(storage)>(args, begin, end); });
}

// Adds the partial sums of columns [begin, end), in order.
template <class A>
void rms_norm_rotary_grad_columns(const RmsNormRotaryGradArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 64;
  const A* const partial = static_cast<const A*>(args.partial);
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t count = std::min(end - first, kColumns);
    A sums[kColumns] = {};
    for (int64_t chunk = 0; chunk < args.chunks; ++chunk) {
      const A* const row = partial + chunk * args.columns + first;
      for (int64_t i = 0; i < count; ++i) sums[i] += row[i];
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = first + i;
      const bool of_q = column < args.q_columns;
      write_element(of_q ? args.grad_q_weight : args.grad_k_weight, args.norm.dtype,
                    of_q ? column : column - args.q_columns, sums[i]);
    }
  }
}

void rms_norm_rotary_grad_sum(const RmsNormRotaryGradArgs& args, int64_t begin, int64_t end) {
  args.rotary.dtype == DType::Float64 ? rms_norm_rotary_grad_columns<double>(args, begin, end)
                                      : rms_norm_rotary_grad_columns<float>(args, begin, end);
}
