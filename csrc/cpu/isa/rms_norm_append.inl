// rms_norm_rotary_append: RMSNorm, rotation and the append to a paged cache.

template <class T>
void rms_norm_append_range(const RmsNormAppendArgs& args, int64_t begin, int64_t end) {
  const RotaryArgs& rotary = args.append.rotary;
  RotaryArgs of_v = rotary;
  of_v.rotary_dim = 0;
  NormScratch<T> scratch(rotary, args.norm), v_scratch(of_v, args.norm);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / rotary.seq, s = token - b * rotary.seq;
    norm_token(rotary, args.norm, b, s, scratch);
    norm_and_rotate(of_v, args.norm, normed_heads<T>(args.v, args.v.in, b, s, nullptr, 0), b, s,
                    v_scratch);
    store_token<T>(args.append, b, s);
  }
}

void rms_norm_rotary_append(const RmsNormAppendArgs& args, int64_t begin, int64_t end) {
  dispatch(args.append.rotary.dtype,
           [&](auto storage) { rms_norm_append_range<decltype(storage)>(args, begin, end); });
}
