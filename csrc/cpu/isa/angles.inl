// cos_sin, which makes tables and rows, and its gradient to inv_freq.

template <class T>
void cos_sin_range(const CosSinArgs& args, int64_t begin, int64_t end) {
  const int64_t row = args.angles.pairs;
  for (int64_t first = 0; first < row; first += kAnglePairs) {
    TokenAngles angles(args.angles, first, std::min(row - first, kAnglePairs));
    for (int64_t token = begin; token < end; ++token) {
      angles.compute<std::is_same_v<T, double>>(0, token);
      T* const cos_out = static_cast<T*>(args.cos) + token * row + first;
      T* const sin_out = static_cast<T*>(args.sin) + token * row + first;
      for (int64_t i = 0; i < angles.pairs; ++i) cos_out[i] = narrow<T>(angles.cos[i]);
      for (int64_t i = 0; i < angles.pairs; ++i) sin_out[i] = narrow<T>(angles.sin[i]);
    }
  }
}

void cos_sin(const CosSinArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto storage) { cos_sin_range<decltype(storage)>(args, begin, end); });
}

void cos_sin_grad(const CosSinGradArgs& args, int64_t begin, int64_t end) {
  const int64_t row = args.angles.pairs, row_bytes = row * size_of(args.grad_dtype);
  alignas(64) double grad_cos[kAnglePairs], grad_sin[kAnglePairs];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t token_begin = chunk * args.chunk_tokens;
    const int64_t token_end = std::min(token_begin + args.chunk_tokens, args.tokens);
    for (int64_t first = 0; first < row; first += kAnglePairs) {
      TokenAngles angles(args.angles, first, std::min(row - first, kAnglePairs));
      double* const sum = args.partial + chunk * row + first;
      for (int64_t i = 0; i < angles.pairs; ++i) sum[i] = 0;
      for (int64_t token = token_begin; token < token_end; ++token) {
        angles.compute<true, true>(0, token);
        convert(args.grad_dtype, static_cast<const char*>(args.grad_cos) + token * row_bytes, first,
                angles.pairs, grad_cos);
        convert(args.grad_dtype, static_cast<const char*>(args.grad_sin) + token * row_bytes, first,
                angles.pairs, grad_sin);
        for (int64_t i = 0; i < angles.pairs; ++i) {
          sum[i] += angles.cos[i] * grad_sin[i] - angles.sin[i] * grad_cos[i];
        }
      }
    }
  }
}

// The sum of the partial sums, in order.
void cos_sin_grad_sum(const CosSinGradArgs& args) {
  for (int64_t pair = 0; pair < args.angles.pairs; ++pair) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < args.chunks; ++chunk) {
      sum += args.partial[chunk * args.angles.pairs + pair];
    }
    write_element(args.grad_inv_freq, args.angles.inv_freq_dtype, pair, sum);
  }
}
