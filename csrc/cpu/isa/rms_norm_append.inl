// rms_norm_rotary_append: RMSNorm, rotation and the append to a paged cache.

template <class T>
void rms_norm_append_range(const RmsNormAppendArgs& args, int64_t begin, int64_t end,
                           void* scratch_memory) {
  const RotaryArgs& rotary = args.append.rotary;
  const RmsNorm& norm = args.norm;
  const Float8Heads& float8_q = args.append.float8_q;
  RotaryArgs of_v = rotary;
  of_v.rotary_dim = 0;
  NormScratch<T> scratch(rotary, norm), v_scratch(of_v, norm);
  T* const head = static_cast<T*>(scratch_memory);  // of q, on its way to float8
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / rotary.seq, s = token - b * rotary.seq;
    NormedHeads<T> q = normed_heads<T>(rotary.q, rotary.q.in, b, s, norm.q_weight, norm.q_stride_h);
    if (head == nullptr) {
      norm_and_rotate(rotary, norm, q, b, s, scratch, kNothing);
    } else {
      q.out = head + rotary.rotary_offset;
      q.out_stride_h = 0;
      norm_and_rotate(rotary, norm, q, b, s, scratch,
                      [&](int64_t h) { write_float8(float8_q, head, rotary.head_dim, b, s, h); });
    }
    const NormedHeads<T> k =
        normed_heads<T>(rotary.k, rotary.k.in, b, s, norm.k_weight, norm.k_stride_h);
    norm_and_rotate(rotary, norm, k, b, s, scratch, kNothing);
    const NormedHeads<T> v = normed_heads<T>(args.v, args.v.in, b, s, nullptr, 0);
    norm_and_rotate(of_v, norm, v, b, s, v_scratch, kNothing);
    store_token<T>(args.append, b, s);
  }
}

void rms_norm_rotary_append(const RmsNormAppendArgs& args, int64_t begin, int64_t end,
                            void* scratch) {
  dispatch(args.append.rotary.dtype, [&](auto storage) {
    rms_norm_append_range<decltype(storage)>(args, begin, end, scratch);
  });
}
