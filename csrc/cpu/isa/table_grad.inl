// The gradient of apply_rotary to its table.

// Adds the products of pairs [first, first + pairs) of one head: grad, x [R].
template <class T, bool kInterleaved, bool kInterleavedOut, class A>
ROPE_HOST_DEVICE void accumulate_head(const T* grad, const T* x, int64_t half, int64_t first,
                                      int64_t pairs, const TurnGrad<A*>& sums) {
  using PairsOfX = Pairs<T, kInterleaved>;
  using PairsOfGrad = Pairs<T, kInterleavedOut>;
  using V = typename Lanes<T>::Vector;
  constexpr int64_t kLanes = Lanes<T>::kLanes;
  constexpr int64_t kStepX = kInterleaved ? 2 : 1, kStepGrad = kInterleavedOut ? 2 : 1;
  const int64_t second_x = kInterleaved ? 0 : half, second_grad = kInterleavedOut ? 0 : half;
  x += kStepX * first;
  grad += kStepGrad * first;

  const auto add = [&](int64_t i, const T* g_first, const T* g_second, const T* x_first,
                       const T* x_second) ROPE_ALWAYS_INLINE {
    V g1, g2, x1, x2;
    PairsOfGrad::load(g_first, g_second, g1, g2);
    PairsOfX::load(x_first, x_second, x1, x2);
    TurnGrad<V> sum{read<V>(sums.g1x1 + i), read<V>(sums.g1x2 + i), read<V>(sums.g2x1 + i),
                    read<V>(sums.g2x2 + i)};
    accumulate(sum, g1, g2, x1, x2);
    write(sums.g1x1 + i, sum.g1x1);
    write(sums.g1x2 + i, sum.g1x2);
    write(sums.g2x1 + i, sum.g2x1);
    write(sums.g2x2 + i, sum.g2x2);
  };
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes) {
    add(i, grad + kStepGrad * i, grad + second_grad + i, x + kStepX * i, x + second_x + i);
  }
  if (i < pairs) {
    const int64_t rest = pairs - i;
    T g_tail[2 * kLanes] = {}, x_tail[2 * kLanes] = {};
    memcpy(g_tail, grad + kStepGrad * i, kStepGrad * rest * sizeof(T));
    memcpy(x_tail, x + kStepX * i, kStepX * rest * sizeof(T));
    if constexpr (!kInterleavedOut) {
      memcpy(g_tail + kLanes, grad + second_grad + i, rest * sizeof(T));
    }
    if constexpr (!kInterleaved) memcpy(x_tail + kLanes, x + second_x + i, rest * sizeof(T));
    add(i, g_tail, g_tail + kLanes, x_tail, x_tail + kLanes);
  }
}

// Adds the products of the heads of q and k of one token.
template <class T, bool kInterleaved, bool kInterleavedOut, class A>
ROPE_HOST_DEVICE void accumulate_token(const RotaryTableGradArgs& args, int64_t b, int64_t s,
                                       int64_t first, int64_t pairs, const TurnGrad<A*>& sums) {
  for (const GradHeads* heads : {&args.q, &args.k}) {
    const T* grad = static_cast<const T*>(heads->grad.data) + b * heads->grad.stride_b +
                    s * heads->grad.stride_s;
    const T* x =
        static_cast<const T*>(heads->x.data) + b * heads->x.stride_b + s * heads->x.stride_s;
    for (int64_t h = 0; h < heads->heads; ++h) {
      accumulate_head<T, kInterleaved, kInterleavedOut, A>(grad + h * heads->grad.stride_h,
                                                           x + h * heads->x.stride_h,
                                                           args.rotary_dim / 2, first, pairs, sums);
    }
  }
}

// Writes pairs [first, first + pairs) of one row of the gradient.
template <class A>
void write_row(const RotaryTableGradArgs& args, int64_t row, int64_t first, int64_t pairs,
               const TurnGrad<A*>& sums) {
  const int64_t half = args.rotary_dim / 2;
  const int64_t width = args.full_width ? args.rotary_dim : half;
  for (int64_t i = 0; i < pairs; ++i) {
    const Turn<A> turn =
        grad_of(TurnGrad<A>{sums.g1x1[i], sums.g1x2[i], sums.g2x1[i], sums.g2x2[i]}, args);
    const int64_t pair = first + i;
    if (args.full_width) {
      const int64_t at1 = row * width + (args.table_interleaved ? 2 * pair : pair);
      const int64_t at2 = at1 + (args.table_interleaved ? 1 : half);
      write_element(args.grad_cos, args.table_dtype, at1, turn.c1);
      write_element(args.grad_cos, args.table_dtype, at2, turn.c2);
      write_element(args.grad_sin, args.table_dtype, at1, turn.s1);
      write_element(args.grad_sin, args.table_dtype, at2, turn.s2);
    } else {
      write_element(args.grad_cos, args.table_dtype, row * width + pair, turn.c1 + turn.c2);
      write_element(args.grad_sin, args.table_dtype, row * width + pair, turn.s1 + turn.s2);
    }
  }
}

template <class T, bool kInterleaved, bool kInterleavedOut>
void rotary_table_grad_range(const RotaryTableGradArgs& args, int64_t begin, int64_t end) {
  using A = ArithmeticOf<T>;
  constexpr int64_t kPairs = 256;  // whose sums are held at a time
  const int64_t half = args.rotary_dim / 2;

  for (int64_t row = begin; row < end; ++row) {
    const int64_t grad_b = row / args.rows;
    const int64_t index = row - grad_b * args.rows;
    for (int64_t first = 0; first < half; first += kPairs) {
      const int64_t pairs = std::min(half - first, kPairs);
      alignas(64) A g1x1[kPairs] = {}, g1x2[kPairs] = {}, g2x1[kPairs] = {}, g2x2[kPairs] = {};
      const TurnGrad<A*> sums{g1x1, g1x2, g2x1, g2x2};
      const TokenRange tokens = tokens_of(args, grad_b, index);
      for (int64_t i = tokens.begin; i < tokens.end; ++i) {
        int64_t b, s;
        if (!find_token(args, index, i, b, s)) continue;
        accumulate_token<T, kInterleaved, kInterleavedOut, A>(args, b, s, first, pairs, sums);
      }
      write_row(args, row, first, pairs, sums);
    }
  }
}

void rotary_table_grad(const RotaryTableGradArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto storage) {
    using T = decltype(storage);
    dispatch_orders(args, [&](auto interleaved, auto interleaved_out) {
      rotary_table_grad_range<T, interleaved, interleaved_out>(args, begin, end);
    });
  });
}
