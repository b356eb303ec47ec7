// apply_rotary_append: rotation in place, and the append to a paged cache.

// Divides elements by `scale` and rounds once, to float8.
template <class Format, class T>
void quantise(const T* from, uint8_t* to, int64_t count, float scale) {
  using A = ArithmeticOf<T>;
  constexpr int64_t kStep = 256;
  alignas(64) A wide[kStep];
  for (int64_t first = 0; first < count; first += kStep) {
    const int64_t n = std::min(count - first, kStep);
    convert<A, T>(from, first, n, wide);
    for (int64_t i = 0; i < n; ++i) {
      to[first + i] = float8_of<Format>(round_to_odd(wide[i] / static_cast<A>(scale)));
    }
  }
}

template <class T>
void quantise(CacheDType dtype, const T* from, void* to, int64_t count, float scale) {
  uint8_t* const bytes = static_cast<uint8_t*>(to);
  dtype == CacheDType::Float8E4M3 ? quantise<Float8E4M3>(from, bytes, count, scale)
                                  : quantise<Float8E5M2>(from, bytes, count, scale);
}

// Stores the heads of one token in its slot of the cache.
template <class T>
void store_heads(const AppendArgs& args, const StoredHeads& x, int64_t b, int64_t s, int64_t slot) {
  const int64_t block = slot / args.block_size;
  const int64_t offset = slot - block * args.block_size;
  const T* from = static_cast<const T*>(x.in.data) + b * x.in.stride_b + s * x.in.stride_s;
  const int64_t to = block * x.stride_block + offset * x.stride_offset;
  for (int64_t head = 0; head < x.heads; ++head) {
    const T* const channels = from + head * x.in.stride_h;
    const int64_t at = to + head * x.stride_h;
    const float scale = x.scale ? x.scale[head * x.scale_stride_h] : 1;
    if (args.cache_dtype == CacheDType::OfModel) {
      memcpy(static_cast<T*>(x.cache) + at, channels, x.channels * sizeof(T));
    } else {
      quantise(args.cache_dtype, channels, static_cast<uint8_t*>(x.cache) + at, x.channels, scale);
    }
  }
}

// The largest magnitude of `count` elements, rounded to float; NaN if one is NaN. The bits of
// floats above 0 are in the order of their values, and those of NaN come last.
template <class T>
float largest_magnitude(const T* x, int64_t count) {
  constexpr int64_t kStep = 256;
  alignas(64) float wide[kStep];
  uint32_t largest = 0;
  for (int64_t first = 0; first < count; first += kStep) {
    const int64_t n = std::min(count - first, kStep);
    convert<float, T>(x, first, n, wide);
    for (int64_t i = 0; i < n; ++i) {
      largest = std::max(largest, bit_cast<uint32_t>(wide[i]) & 0x7fffffffu);
    }
  }
  return bit_cast<float>(largest);
}

// Writes one rotated head of q, all its channels, as float8.
template <class T>
void write_float8(const Float8Heads& q, const T* channels, int64_t count, int64_t b, int64_t s,
                  int64_t head) {
  const auto at = [&](const auto& x) {
    return b * x.stride_b + s * x.stride_s + head * x.stride_h;
  };
  float scale = q.scale ? q.scale[head * q.scale_stride_h] : 1;
  if (q.own_scale.data) {
    scale = own_scale(largest_magnitude(channels, count), q.dtype == CacheDType::Float8E4M3);
    q.own_scale.data[at(q.own_scale)] = scale;
  }
  quantise(q.dtype, channels, static_cast<uint8_t*>(q.out.data) + at(q.out), count, scale);
}

// Stores k and v of one token, if it has a slot.
template <class T>
void store_token(const AppendArgs& args, int64_t b, int64_t s) {
  if (b * args.slots_seq + s >= args.slot_count) return;
  const int64_t slot = entry_of(args.slots, b, s);
  if (!is_inside(slot, args.blocks * args.block_size)) return;
  store_heads<T>(args, args.k, b, s, slot);
  store_heads<T>(args, args.v, b, s, slot);
}

// Rotates token s of sequence b in place where the pairs change their order: from copies of its
// heads, as many at a time as the buffer holds.
template <class T>
void rotate_token_from_copies(const RotaryArgs& args, const RotaryBlocks& blocks, int64_t b,
                              int64_t s) {
  constexpr int64_t kChannels = 4096;
  static_assert(kChannels >= kMostReordered, "at least one head");
  alignas(64) T copies[kChannels];
  const int64_t dim = args.rotary_dim, heads = args.q.heads + args.k.heads;
  const int64_t first_item = (b * args.seq + s) * heads;
  for (const RotatedHeads* x : {&args.q, &args.k}) {
    const T* const from =
        static_cast<const T*>(x->in.data) + b * x->in.stride_b + s * x->in.stride_s;
    const int64_t most = kChannels / dim;
    for (int64_t head = 0; head < x->heads; head += most) {
      const int64_t count = std::min(x->heads - head, most);
      for (int64_t i = 0; i < count; ++i) {
        memcpy(copies + i * dim, from + (head + i) * x->in.stride_h, dim * sizeof(T));
      }
      // The copied heads alone, as heads of q.
      RotaryArgs part = args;
      part.head_dim = dim;
      part.rotary_offset = 0;
      part.k.heads = 0;
      part.q.heads = heads;
      part.q.in = {copies, 0, 0, dim};
      part.q.out = x->out;
      part.q.out.data = static_cast<T*>(x->out.data) + head * x->out.stride_h;
      apply_rotary(part, blocks, first_item, first_item + count);
    }
  }
}

// Rotates q of token s of sequence b, as many heads at a time as scratch memory has room for, and
// writes it as float8.
template <class T>
void rotate_to_float8(const AppendArgs& args, const RotaryBlocks& blocks, int64_t b, int64_t s,
                      T* scratch) {
  const RotatedHeads& q = args.rotary.q;
  const int64_t dim = args.rotary.head_dim, most = heads_in_scratch(args.rotary);
  const T* const from = static_cast<const T*>(q.in.data) + b * q.in.stride_b + s * q.in.stride_s;
  RotaryArgs part = args.rotary;
  part.k.heads = 0;
  part.q.out = {scratch + part.rotary_offset, 0, 0, dim};
  for (int64_t head = 0; head < q.heads; head += most) {
    part.q.in = {from + head * q.in.stride_h, 0, 0, q.in.stride_h};
    const int64_t count = std::min(q.heads - head, most);
    const int64_t first_item = (b * part.seq + s) * q.heads;
    apply_rotary(part, blocks, first_item, first_item + count);
    for (int64_t i = 0; i < count; ++i) {
      write_float8(args.float8_q, scratch + i * dim, dim, b, s, head + i);
    }
  }
}

template <class T>
void apply_rotary_append_range(const AppendArgs& args, int64_t begin, int64_t end, void* scratch) {
  RotaryArgs rotary = args.rotary;  // what rotates in place
  const bool to_float8 = args.float8_q.out.data != nullptr;
  if (to_float8) rotary.q.heads = 0;
  const RotaryBlocks blocks{1, rotary.seq, false};
  const int64_t heads = rotary.q.heads + rotary.k.heads;
  const bool reorders = rotary.interleaved != rotary.interleaved_out;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / rotary.seq, s = token - b * rotary.seq;
    if (to_float8) rotate_to_float8(args, blocks, b, s, static_cast<T*>(scratch));
    if (reorders) {
      rotate_token_from_copies<T>(rotary, blocks, b, s);
    } else if (heads > 0) {
      apply_rotary(rotary, blocks, token * heads, (token + 1) * heads);
    }
    store_token<T>(args, b, s);
  }
}

void apply_rotary_append(const AppendArgs& args, int64_t begin, int64_t end, void* scratch) {
  dispatch(args.rotary.dtype, [&](auto storage) {
    apply_rotary_append_range<decltype(storage)>(args, begin, end, scratch);
  });
}
