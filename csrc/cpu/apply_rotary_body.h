// apply_rotary inside one thread. Included by isa_*.cpp, in the namespace of an instruction set.

// Pairs of one block of tokens whose table rows are held in the thread's scratch memory at a time.
constexpr int64_t kScratchPairs = 1024;

// Rows of the table for one token: c1[i], s1[i], c2[i], s2[i] belong to pair i.
template <class A>
struct Row {
  const A *c1, *s1, *c2, *s2;
};

// Table entries [first, first + n) of one row, as A.
template <class A, class S>
ROPE_HOST_DEVICE void convert(const void* row, int64_t first, int64_t n, A* to) {
  const S* from = static_cast<const S*>(row) + first;
  if constexpr (sizeof(S) >= 4) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
  } else {
    Float8 v;
    for (int64_t i = 0; i < n; i += 8) {
      const int64_t lanes = n - i < 8 ? n - i : 8;
      S padded[8] = {};
      memcpy(padded, from + i, lanes * sizeof(S));
      Lanes<S>::load(padded, v);
      for (int64_t lane = 0; lane < lanes; ++lane) to[i + lane] = v[lane];
    }
  }
}

template <class A>
void convert(DType dtype, const void* row, int64_t first, int64_t n, A* to) {
  switch (dtype) {
    case DType::Float64: return convert<A, double>(row, first, n, to);
    case DType::Float32: return convert<A, float>(row, first, n, to);
    case DType::Float16: return convert<A, Half>(row, first, n, to);
    case DType::BFloat16: return convert<A, BFloat16>(row, first, n, to);
  }
}

// Scratch memory for the rows of a block of tokens, and its filling.
template <class A>
struct RowScratch {
  alignas(64) A c1[kScratchPairs], s1[kScratchPairs], c2[kScratchPairs], s2[kScratchPairs];
  int64_t stride;  // between tokens: the pairs of a chunk, rounded up to whole vectors
  bool full_width;

  Row<A> row(int64_t token) const {
    const int64_t at = token * stride;
    if (full_width) return {c1 + at, s1 + at, c2 + at, s2 + at};
    return {c1 + at, s1 + at, c1 + at, s1 + at};
  }

  // Pairs [first, first + pairs) of the row of `token`.
  void fill(int64_t token, const RotaryArgs& args, int64_t b, int64_t s, int64_t first,
            int64_t pairs) {
    const Table& table = args.table;
    const int64_t index = row_index(args.position_ids, b, s);
    const int64_t size = size_of(table.dtype);
    const char* cos = static_cast<const char*>(table.cos) +
                      (b * table.cos_stride_b + index * table.cos_stride_row) * size;
    const char* sin = static_cast<const char*>(table.sin) +
                      (b * table.sin_stride_b + index * table.sin_stride_row) * size;
    const int64_t at = token * stride;
    if (!full_width) {
      convert(table.dtype, cos, first, pairs, c1 + at);
      convert(table.dtype, sin, first, pairs, s1 + at);
    } else if (!table.interleaved) {
      const int64_t half = args.rotary_dim / 2;
      convert(table.dtype, cos, first, pairs, c1 + at);
      convert(table.dtype, sin, first, pairs, s1 + at);
      convert(table.dtype, cos, half + first, pairs, c2 + at);
      convert(table.dtype, sin, half + first, pairs, s2 + at);
    } else {
      A both[2 * kScratchPairs];
      convert(table.dtype, cos, 2 * first, 2 * pairs, both);
      for (int64_t i = 0; i < pairs; ++i) c1[at + i] = both[2 * i], c2[at + i] = both[2 * i + 1];
      convert(table.dtype, sin, 2 * first, 2 * pairs, both);
      for (int64_t i = 0; i < pairs; ++i) s1[at + i] = both[2 * i], s2[at + i] = both[2 * i + 1];
    }
    if (args.inverse) invert(at, pairs);
    // The last vector of a row works on whole lanes.
    for (int64_t i = pairs; i < stride; ++i) c1[at + i] = s1[at + i] = c2[at + i] = s2[at + i] = 0;
  }

  void invert(int64_t at, int64_t pairs) {
    for (int64_t i = at; i < at + pairs; ++i) {
      const A other = full_width ? s2[i] : s1[i];
      const Turn<A> turn = inverse_of(Turn<A>{c1[i], s1[i], c1[i], other});
      s1[i] = turn.s1;
      if (full_width) s2[i] = turn.s2;
    }
  }

  // Into the order of RotationPairs.
  void to_even_odd(int64_t token) {
    const int64_t at = token * stride;
    reorder(c1 + at, stride);
    reorder(s1 + at, stride);
    if (full_width) reorder(c2 + at, stride);
    if (full_width) reorder(s2 + at, stride);
  }

  static int64_t row_index(const PositionIds& ids, int64_t b, int64_t s) {
    if (!ids.data) return s;
    const int64_t at = b * ids.stride_b + s * ids.stride_s;
    return ids.int64 ? static_cast<const int64_t*>(ids.data)[at]
                     : static_cast<const int32_t*>(ids.data)[at];
  }
};

// Copies count < kBelow elements (kBelow a power of two) by moves of a fixed size each, which take
// a fraction of the time of a memcpy whose size is not known.
template <int64_t kBelow, class T>
ROPE_HOST_DEVICE void copy_few(T* to, const T* from, int64_t count) {
  if constexpr (kBelow > 1) {
    constexpr int64_t kHalf = kBelow / 2;
    if (count & kHalf) {
      memcpy(to, from, kHalf * sizeof(T));
      to += kHalf;
      from += kHalf;
    }
    copy_few<kHalf>(to, from, count);
  }
}

// Rotates pairs [first, first + pairs) of one head: in, out [R], rows of those pairs.
template <class T, bool kInterleaved, bool kInterleavedOut, class A>
ROPE_HOST_DEVICE void rotate_head(const T* in, T* out, int64_t half, int64_t first, int64_t pairs,
                                  const Row<A>& row) {
  using P = RotationPairs<T, kInterleaved, kInterleavedOut>;
  using V = typename P::Vector;
  constexpr int64_t kLanes = sizeof(V) / sizeof(A);
  constexpr int64_t kStepIn = kInterleaved ? 2 : 1;  // channels between neighbouring pairs
  constexpr int64_t kStepOut = kInterleavedOut ? 2 : 1;
  const int64_t second_in = kInterleaved ? 0 : half;
  const int64_t second_out = kInterleavedOut ? 0 : half;
  in += kStepIn * first;
  out += kStepOut * first;

  const auto turn_at = [&](int64_t i) ROPE_ALWAYS_INLINE {
    return Turn<V>{read<V>(row.c1 + i), read<V>(row.s1 + i), read<V>(row.c2 + i),
                   read<V>(row.s2 + i)};
  };
  V x1, x2;
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes) {
    P::load(in + kStepIn * i, in + second_in + i, x1, x2);
    rotate(turn_at(i), x1, x2);
    P::store(out + kStepOut * i, out + second_out + i, x1, x2);
  }
  if (i < pairs) {
    const int64_t rest = pairs - i;
    T ends[2 * kLanes] = {};
    T* const ends2 = ends + kLanes;
    copy_few<kStepIn * kLanes>(ends, in + kStepIn * i, kStepIn * rest);
    if constexpr (!kInterleaved) copy_few<kLanes>(ends2, in + second_in + i, rest);
    P::load(ends, ends2, x1, x2);
    rotate(turn_at(i), x1, x2);
    P::store(ends, ends2, x1, x2);
    copy_few<kStepOut * kLanes>(out + kStepOut * i, ends, kStepOut * rest);
    if constexpr (!kInterleavedOut) copy_few<kLanes>(out + second_out + i, ends2, rest);
  }
}

// Copies the channels of one head before and after those that rotate, at which in and out point.
template <class T>
__attribute__((noinline)) void copy_others(const RotaryArgs& args, const T* in, T* out) {
  const int64_t before = args.rotary_offset, past = args.rotary_dim;
  const int64_t after = args.head_dim - before - past;
  if (before > 0) memcpy(out - before, in - before, before * sizeof(T));
  if (after > 0) memcpy(out + past, in + past, after * sizeof(T));
}

template <class T, bool kInterleaved, bool kInterleavedOut>
void apply_rotary_range(const RotaryArgs& args, const TokenBlocks& blocks, int64_t begin,
                        int64_t end) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using P = RotationPairs<T, kInterleaved, kInterleavedOut>;
  constexpr int64_t kLanes = sizeof(typename P::Vector) / sizeof(A);
  const int64_t heads = args.q.heads + args.k.heads;
  const int64_t half = args.rotary_dim / 2;
  const int64_t others = args.head_dim - args.rotary_dim;
  static_assert(kScratchPairs >= kMaxBlockTokens * kLanes, "a chunk holds a vector of each token");
  const int64_t chunk = kScratchPairs / blocks.tokens / kLanes * kLanes;  // rows are whole vectors
  RowScratch<A> rows;
  rows.full_width = args.table.full_width;

  for (int64_t item = begin; item < end;) {
    const int64_t block = item / heads;
    const int64_t head_begin = item - block * heads;
    const int64_t head_end = head_begin + (end - item) < heads ? head_begin + (end - item) : heads;
    item += head_end - head_begin;
    const int64_t b = block / blocks.per_batch;
    const int64_t s_begin = (block - b * blocks.per_batch) * blocks.tokens;
    const int64_t tokens = args.seq - s_begin < blocks.tokens ? args.seq - s_begin : blocks.tokens;

    for (int64_t first = 0; first < half; first += chunk) {
      const int64_t pairs = half - first < chunk ? half - first : chunk;
      rows.stride = (pairs + kLanes - 1) / kLanes * kLanes;
      for (int64_t t = 0; t < tokens; ++t) {
        rows.fill(t, args, b, s_begin + t, first, pairs);
        if constexpr (P::kEvenOddRows) rows.to_even_odd(t);
      }
      for (int64_t head = head_begin; head < head_end; ++head) {
        const bool is_q = head < args.q.heads;
        const RotatedHeads& x = is_q ? args.q : args.k;
        const int64_t h = is_q ? head : head - args.q.heads;
        const T* in = static_cast<const T*>(x.in.data) + b * x.in.stride_b +
                      s_begin * x.in.stride_s + h * x.in.stride_h;
        T* out = static_cast<T*>(x.out.data) + b * x.out.stride_b + s_begin * x.out.stride_s +
                 h * x.out.stride_h;
        for (int64_t t = 0; t < tokens; ++t) {
          rotate_head<T, kInterleaved, kInterleavedOut, A>(in, out, half, first, pairs,
                                                           rows.row(t));
          if (first == 0 && others > 0 && in != out) copy_others(args, in, out);
          in += x.in.stride_s;
          out += x.out.stride_s;
        }
      }
    }
  }
}

void apply_rotary(const RotaryArgs& args, const TokenBlocks& blocks, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto storage) {
    using T = decltype(storage);
    dispatch_orders(
        args, [&](auto in, auto out) { apply_rotary_range<T, in, out>(args, blocks, begin, end); });
  });
}
