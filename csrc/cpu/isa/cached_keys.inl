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

// Pair by pair: there are no vectors of float8.
template <class Format>
void shift_float8_range(const ShiftArgs& args, int64_t begin, int64_t end) {
  const int64_t half = args.rotary_dim / 2;
  const int64_t step = args.interleaved ? 2 : 1, second = args.interleaved ? 1 : half;
  for (int64_t first = 0; first < half; first += kAnglePairs) {
    ShiftAngles angles(args, first, std::min(half - first, kAnglePairs));
    for (int64_t token = begin; token < end; ++token) {
      uint8_t* key = key_of<uint8_t>(args, token);
      if (key == nullptr) continue;
      angles.compute<false>(0, token);
      for (int64_t head = 0; head < args.q.heads; ++head, key += args.q.out.stride_h) {
        for (int64_t i = 0; i < angles.pairs; ++i) {
          uint8_t* const pair = key + (first + i) * step;
          const float c = static_cast<float>(angles.cos[i]), s = static_cast<float>(angles.sin[i]);
          float x1 = float8_value<Format>(pair[0]), x2 = float8_value<Format>(pair[second]);
          rotate(Turn<float>{c, s, c, s}, x1, x2);
          pair[0] = float8_of<Format>(x1);
          pair[second] = float8_of<Format>(x2);
        }
      }
    }
  }
}

void shift_cached_k(const ShiftArgs& args, int64_t begin, int64_t end) {
  switch (args.cache_dtype) {
    case CacheDType::Float8E4M3: return shift_float8_range<Float8E4M3>(args, begin, end);
    case CacheDType::Float8E5M2: return shift_float8_range<Float8E5M2>(args, begin, end);
    case CacheDType::OfModel: break;
  }
  dispatch(args.dtype, [&](auto storage) { shift_range<decltype(storage)>(args, begin, end); });
}
