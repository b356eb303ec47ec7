// apply_rotary_qkv: q, k and v out of one packed tensor, or into it.

// The heads of one token as they are, or zeros.
template <class T>
void move_heads(const RotaryArgs& args, const RotatedHeads& x, int64_t groups, int64_t b,
                int64_t s) {
  const size_t bytes = static_cast<size_t>(args.head_dim) * sizeof(T);
  const auto at = [&](const auto& heads, int64_t g, int64_t h) {
    return b * heads.stride_b + s * heads.stride_s + g * heads.stride_g + h * heads.stride_h -
           args.rotary_offset;
  };
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t h = 0; h < x.heads; ++h) {
      T* const to = static_cast<T*>(x.out.data) + at(x.out, g, h);
      if (x.in.data == nullptr) {
        memset(to, 0, bytes);
      } else {
        memcpy(to, static_cast<const T*>(x.in.data) + at(x.in, g, h), bytes);
      }
    }
  }
}

template <class T, bool kInterleaved, bool kInterleavedOut, bool kFullWidth>
void apply_rotary_qkv_range(const RotaryQkvArgs& args, int64_t begin, int64_t end) {
  const RotaryBlocks blocks{1, args.seq, false};
  RotaryArgs group = args;
  for (RotatedHeads* x : {&group.q, &group.k}) {
    if (x->in.data == nullptr) x->heads = 0;
  }
  const int64_t heads = group.q.heads + group.k.heads;
  const auto select = [&](RotatedHeads& to, const RotatedHeads& from, int64_t g) {
    if (to.heads == 0) return;
    to.in.data = static_cast<const T*>(from.in.data) + g * from.in.stride_g;
    to.out.data = static_cast<T*>(from.out.data) + g * from.out.stride_g;
  };
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t g = 0; g < args.groups && heads > 0; ++g) {
      select(group.q, args.q, g);
      select(group.k, args.k, g);
      apply_rotary_range<T, kInterleaved, kInterleavedOut, kFullWidth, false>(
          group, blocks, token * heads, (token + 1) * heads);
    }
    const int64_t b = token / args.seq, s = token - b * args.seq;
    for (const RotatedHeads* x : {&args.q, &args.k}) {
      if (x->in.data == nullptr) move_heads<T>(args, *x, args.groups, b, s);
    }
    move_heads<T>(args, args.v, args.groups, b, s);
  }
}

void apply_rotary_qkv(const RotaryQkvArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto storage) {
    using T = decltype(storage);
    dispatch_orders(args, [&](auto in, auto out) {
      args.table.full_width ? apply_rotary_qkv_range<T, in, out, true>(args, begin, end)
                            : apply_rotary_qkv_range<T, in, out, false>(args, begin, end);
    });
  });
}
