// shift_cached_k.

// The key of a token, from the first channel of its first head that rotates on; nullptr if the
// cache has no such slot.
template <class T>
T* key_of(const ShiftArgs& args, int64_t token) {
  const int64_t slot = entry_of(args.slots, 0, token);
  if (!is_inside(slot, args.blocks * args.block_size)) return nullptr;
  const int64_t block = slot / args.block_size, offset = slot - block * args.block_size;
  const Heads<void*>& keys = args.q.out;
  return static_cast<T*>(keys.data) + block * keys.stride_b + offset * keys.stride_s;
}

template <class T>
void shift_range(const ShiftArgs& given, int64_t begin, int64_t end) {
  ShiftArgs args = given;
  args.q.in.stride_s = args.q.out.stride_s = 0;  // the pointer is that of the token
  const RotaryBlocks blocks{1, args.seq, false};
  const int64_t heads = args.q.heads;
  dispatch_orders(args, [&](auto in, auto out) {
    if constexpr (in == out) {
      for (int64_t token = begin; token < end; ++token) {
        T* const key = key_of<T>(given, token);
        if (key == nullptr) continue;
        args.q.in.data = args.q.out.data = key;
        apply_rotary_range<T, in, out, false, false>(args, blocks, token * heads,
                                                     (token + 1) * heads);
      }
    }
  });
}

// Without vectors of float8: in loops that the compiler makes vectors of.
template <class Format, bool kInterleaved>
void shift_float8_range(const ShiftArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kStep = kInterleaved ? 2 : 1;
  const int64_t half = args.rotary_dim / 2, second = kInterleaved ? 1 : half;
  alignas(64) float c[kAnglePairs], s[kAnglePairs], x1[kAnglePairs], x2[kAnglePairs];
  for (int64_t first = 0; first < half; first += kAnglePairs) {
    ShiftAngles angles(args, first, std::min(half - first, kAnglePairs));
    const int64_t pairs = angles.pairs;
    for (int64_t token = begin; token < end; ++token) {
      uint8_t* key = key_of<uint8_t>(args, token);
      if (key == nullptr) continue;
      angles.compute<false>(0, token);
      for (int64_t i = 0; i < pairs; ++i) c[i] = static_cast<float>(angles.cos[i]);
      for (int64_t i = 0; i < pairs; ++i) s[i] = static_cast<float>(angles.sin[i]);
      for (int64_t head = 0; head < args.q.heads; ++head, key += args.q.out.stride_h) {
        uint8_t* const at1 = key + first * kStep;
        uint8_t* const at2 = at1 + second;
        for (int64_t i = 0; i < pairs; ++i) x1[i] = float8_value<Format>(at1[i * kStep]);
        for (int64_t i = 0; i < pairs; ++i) x2[i] = float8_value<Format>(at2[i * kStep]);
        for (int64_t i = 0; i < pairs; ++i)
          rotate(Turn<float>{c[i], s[i], c[i], s[i]}, x1[i], x2[i]);
        for (int64_t i = 0; i < pairs; ++i) at1[i * kStep] = float8_of<Format>(x1[i]);
        for (int64_t i = 0; i < pairs; ++i) at2[i * kStep] = float8_of<Format>(x2[i]);
      }
    }
  }
}

template <class Format>
void shift_float8(const ShiftArgs& args, int64_t begin, int64_t end) {
  args.interleaved ? shift_float8_range<Format, true>(args, begin, end)
                   : shift_float8_range<Format, false>(args, begin, end);
}

void shift_cached_k(const ShiftArgs& args, int64_t begin, int64_t end) {
  switch (args.cache_dtype) {
    case CacheDType::Float8E4M3: return shift_float8<Float8E4M3>(args, begin, end);
    case CacheDType::Float8E5M2: return shift_float8<Float8E5M2>(args, begin, end);
    case CacheDType::OfModel: break;
  }
  dispatch(args.dtype, [&](auto storage) { shift_range<decltype(storage)>(args, begin, end); });
}
