// Tables of cos and sin, and their gradient to inv_freq, inside one thread. Included by isa_*.cpp,
// in the namespace of an instruction set.

// Pairs worked on at a time: sin and cos stay in the first cache.
constexpr int64_t kAngleChunk = 128;

ROPE_HOST_DEVICE double position_of(const Angles& angles, int64_t token) {
  if (!angles.position_ids) return static_cast<double>(angles.start + token);
  return angles.position_int64
             ? static_cast<double>(static_cast<const int64_t*>(angles.position_ids)[token])
             : static_cast<double>(static_cast<const int32_t*>(angles.position_ids)[token]);
}

template <bool kDouble>
ROPE_HOST_DEVICE void sin_cos_of(double position, const double* inv_freq, int64_t pairs,
                                 double scale, double* sin, double* cos) {
  for (int64_t i = 0; i < pairs; ++i) {
    const SinCos value = sin_cos<kDouble>(position, inv_freq[i]);
    sin[i] = value.sin * scale;
    cos[i] = value.cos * scale;
  }
}

template <class T>
void cos_sin_range(const CosSinArgs& args, int64_t begin, int64_t end) {
  const Angles& angles = args.angles;
  alignas(64) double inv_freq[kAngleChunk], sin[kAngleChunk], cos[kAngleChunk];
  for (int64_t first = 0; first < angles.pairs; first += kAngleChunk) {
    const int64_t rest = angles.pairs - first;
    const int64_t pairs = rest < kAngleChunk ? rest : kAngleChunk;
    convert(angles.inv_freq_dtype, angles.inv_freq, first, pairs, inv_freq);
    for (int64_t token = begin; token < end; ++token) {
      sin_cos_of<std::is_same_v<T, double>>(position_of(angles, token), inv_freq, pairs,
                                            angles.attention_scaling, sin, cos);
      T* const cos_out = static_cast<T*>(args.cos) + token * angles.pairs + first;
      T* const sin_out = static_cast<T*>(args.sin) + token * angles.pairs + first;
      for (int64_t i = 0; i < pairs; ++i) cos_out[i] = narrow<T>(cos[i]);
      for (int64_t i = 0; i < pairs; ++i) sin_out[i] = narrow<T>(sin[i]);
    }
  }
}

void cos_sin(const CosSinArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto storage) { cos_sin_range<decltype(storage)>(args, begin, end); });
}

// d cos / d inv_freq = -position scale sin(angle), d sin / d inv_freq = position scale cos(angle).
void cos_sin_grad(const CosSinGradArgs& args, int64_t begin, int64_t end) {
  const Angles& angles = args.angles;
  alignas(64) double inv_freq[kAngleChunk], sin[kAngleChunk], cos[kAngleChunk];
  alignas(64) double grad_cos[kAngleChunk], grad_sin[kAngleChunk];
  const int64_t row_bytes = angles.pairs * size_of(args.grad_dtype);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t token_begin = chunk * args.chunk_tokens;
    const int64_t rest_tokens = angles.tokens - token_begin;
    const int64_t token_end =
        token_begin + (rest_tokens < args.chunk_tokens ? rest_tokens : args.chunk_tokens);
    for (int64_t first = 0; first < angles.pairs; first += kAngleChunk) {
      const int64_t rest = angles.pairs - first;
      const int64_t pairs = rest < kAngleChunk ? rest : kAngleChunk;
      double* const sum = args.partial + chunk * angles.pairs + first;
      for (int64_t i = 0; i < pairs; ++i) sum[i] = 0;
      convert(angles.inv_freq_dtype, angles.inv_freq, first, pairs, inv_freq);
      for (int64_t token = token_begin; token < token_end; ++token) {
        const double position = position_of(angles, token);
        sin_cos_of<true>(position, inv_freq, pairs, position * angles.attention_scaling, sin, cos);
        convert(args.grad_dtype, static_cast<const char*>(args.grad_cos) + token * row_bytes, first,
                pairs, grad_cos);
        convert(args.grad_dtype, static_cast<const char*>(args.grad_sin) + token * row_bytes, first,
                pairs, grad_sin);
        for (int64_t i = 0; i < pairs; ++i) sum[i] += cos[i] * grad_sin[i] - sin[i] * grad_cos[i];
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
    write_entry(args.grad_inv_freq, args.angles.inv_freq_dtype, pair, sum);
  }
}
