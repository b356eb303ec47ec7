// apply_rotary and apply_rotary_at.

// The entries of the row from pair i on, as vectors.
template <class P, bool kFullWidth, class A>
ROPE_HOST_DEVICE Turn<typename P::Vector> turn_at(const TableRow<const A>& row, int64_t i) {
  using V = typename P::Vector;
  const V c1 = read<V>(row.c1 + i), s1 = read<V>(row.s1 + i);
  if constexpr (!kFullWidth) return {c1, s1, c1, s1};
  return {c1, s1, read<V>(row.c2 + i), read<V>(row.s2 + i)};
}

// Rotates `pairs` pairs, which are whole vectors, of kHeads heads by the same row: in, out point at
// the first pair of the first head. Returns the next pair.
template <class P, bool kFullWidth, bool kStream, int kHeads, class T, class A>
ROPE_HOST_DEVICE int64_t rotate_vectors(const T* in, int64_t step_in, T* out, int64_t step_out,
                                        int64_t half, int64_t pairs, const TableRow<const A>& row) {
  using V = typename P::Vector;
  int64_t i = 0;
  for (; i <= pairs - P::kLanes; i += P::kLanes) {
    const Turn<V> turn = turn_at<P, kFullWidth>(row, i);
    for (int h = 0; h < kHeads; ++h) {
      V x1, x2;
      P::load(in + h * step_in + P::kStepIn * i, half, x1, x2);
      rotate(turn, x1, x2);
      P::template store<kStream>(out + h * step_out + P::kStepOut * i, half, x1, x2);
    }
  }
  return i;
}

// Rotates `pairs` >= kLanes pairs of one head: in, out point at the first of them.
template <class P, bool kFullWidth, bool kStream, class T, class A>
ROPE_HOST_DEVICE void rotate_head(const T* in, T* out, int64_t half, int64_t pairs,
                                  const TableRow<const A>& row) {
  // The tail is the last kLanes pairs, which overlap the last whole vector: loaded first, as that
  // may be written in place.
  const int64_t last = pairs - P::kLanes;
  const bool has_tail = pairs % P::kLanes != 0;
  typename P::Vector tail1, tail2;
  if (has_tail) P::load(in + P::kStepIn * last, half, tail1, tail2);
  const int64_t i = rotate_vectors<P, kFullWidth, kStream, 1>(in, 0, out, 0, half, pairs, row);
  if (has_tail) {
    rotate(turn_at<P, kFullWidth>(row, i), tail1, tail2);
    P::store(out + P::kStepOut * last, half, tail1, tail2);
  }
}

// Rotates pairs < kLanes pairs of one head, in a buffer.
template <class P, bool kFullWidth, class T, class A>
ROPE_HOST_DEVICE void rotate_few(const T* in, T* out, int64_t half, int64_t pairs,
                                 const TableRow<const A>& row) {
  constexpr int64_t kLanes = P::kLanes;
  T buffer[2 * kLanes];
  fill_few<P::kStepIn * kLanes>(buffer, in, P::kStepIn * pairs);
  if constexpr (P::kStepIn == 1) fill_few<kLanes>(buffer + kLanes, in + half, pairs);
  rotate_head<P, kFullWidth, false, T, A>(buffer, buffer, kLanes, kLanes, row);
  copy_few<P::kStepOut * kLanes>(out, buffer, P::kStepOut * pairs);
  if constexpr (P::kStepOut == 1) copy_few<kLanes>(out + half, buffer + kLanes, pairs);
}

// Heads at equal distances: those of a token, or the tokens of a head. in, out point at the first
// channel that rotates of the first one.
template <class T>
struct HeadSeries {
  const T* in;
  T* out;
  int64_t count;
  int64_t step_in, step_out;  // channels between neighbours
  int64_t step_row;           // entries between their rows of the table
  bool prefetch;              // lines that do not rotate lie between: the processor sees no stream
  bool cached;                // the call reads and writes no more than kCachedBytes
};

constexpr int64_t kLineBytes = 64;  // of a cache

// Whole heads that are rotated together, so that the vectors of their row are loaded once: where
// arithmetic does not take longer, or the processor has the registers. More data come from memory,
// which is fastest head by head: each head is two streams of reads and two of writes.
constexpr int64_t kCachedBytes = int64_t{4} << 20;
template <class T>
constexpr int kHeadsTogether = std::is_arithmetic_v<T> || kVectorBytes >= 64 ? 4 : 1;

// With `prefetch`, a head is fetched so many heads before it rotates.
constexpr int64_t kHeadsAhead = 32;

// Rotates `pairs` pairs of each head, by `row` and those that follow it; kFew: less than P::kLanes.
template <class P, bool kFullWidth, bool kStream, bool kFew, class T, class A>
ROPE_HOST_DEVICE void rotate_series(const HeadSeries<T>& heads, int64_t half, int64_t pairs,
                                    TableRow<const A> row) {
  const T* in = heads.in;
  T* out = heads.out;
  int64_t i = 0;
  // Not with kStream: lines that are stored past the caches are written whole, one after the other.
  constexpr int kTogether = kFew || kStream ? 1 : kHeadsTogether<T>;
  const bool along_heads = heads.step_row == 0 && !heads.prefetch;
  if (kTogether > 1 && heads.cached && along_heads && pairs % P::kLanes == 0) {
    for (; i + kTogether <= heads.count; i += kTogether) {
      rotate_vectors<P, kFullWidth, kStream, kTogether>(in, heads.step_in, out, heads.step_out,
                                                        half, pairs, row);
      in += kTogether * heads.step_in;
      out += kTogether * heads.step_out;
    }
  }
  for (; i < heads.count; ++i) {
    if (heads.prefetch) {
      const int64_t ahead = kHeadsAhead * heads.step_in * static_cast<int64_t>(sizeof(T));
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(in) + ahead), 1);
    }
    if constexpr (kFew) {
      rotate_few<P, kFullWidth>(in, out, half, pairs, row);
    } else {
      rotate_head<P, kFullWidth, kStream>(in, out, half, pairs, row);
    }
    in += heads.step_in;
    out += heads.step_out;
    row = row.plus(heads.step_row);
  }
}

// Copies the channels of each head before and after those that rotate.
template <class T>
__attribute__((noinline)) void copy_others(const RotaryArgs& args, const HeadSeries<T>& heads) {
  const int64_t before = args.rotary_offset, past = args.rotary_dim;
  const int64_t after = args.head_dim - before - past;
  const T* in = heads.in;
  T* out = heads.out;
  for (int64_t i = 0; i < heads.count; ++i) {
    if (before > 0) memcpy(out - before, in - before, before * sizeof(T));
    if (after > 0) memcpy(out + past, in + past, after * sizeof(T));
    in += heads.step_in;
    out += heads.step_out;
  }
}

// A block of tokens of sequence b, and a range of its heads: those of q, then those of k.
struct Block {
  int64_t b, s, tokens;
  int64_t head_begin, head_end;
};

// Rotates pairs [first, first + pairs) of the heads of a block.
template <class T, class P, bool kFullWidth, bool kStream, bool kFew = false, class Args>
void rotate_block(const Args& args, const Block& block, int64_t first, int64_t pairs) {
  TableRows<ArithmeticOf<T>, P::kLanes, P::kOrder, P::kBFloat16, kFullWidth> rows;
  rows.fill(args, block.b, block.s, block.tokens, first, pairs);
  const int64_t half = args.rotary_dim / 2;
  int64_t heads_before = 0;
  for (const RotatedHeads* x : {&args.q, &args.k}) {
    const int64_t begin = std::max<int64_t>(block.head_begin - heads_before, 0);
    const int64_t end = std::min(block.head_end - heads_before, x->heads);
    heads_before += x->heads;
    if (begin >= end) continue;
    HeadSeries<T> series;
    series.in = static_cast<const T*>(x->in.data) + block.b * x->in.stride_b +
                block.s * x->in.stride_s + begin * x->in.stride_h;
    series.out = static_cast<T*>(x->out.data) + block.b * x->out.stride_b +
                 block.s * x->out.stride_s + begin * x->out.stride_h;
    const bool copies = first == 0 && args.head_dim > args.rotary_dim && series.in != series.out;
    const bool along_heads = block.tokens == 1;
    series.count = along_heads ? end - begin : block.tokens;
    series.step_in = along_heads ? x->in.stride_h : x->in.stride_s;
    series.step_out = along_heads ? x->out.stride_h : x->out.stride_s;
    series.step_row = along_heads ? 0 : rows.stride();
    series.prefetch =
        (args.head_dim - args.rotary_dim) * static_cast<int64_t>(sizeof(T)) >= 2 * kLineBytes;
    series.cached = args.batch * args.seq * (args.q.heads + args.k.heads) * args.head_dim *
                        static_cast<int64_t>(sizeof(T)) <=
                    kCachedBytes;
    const int64_t count = along_heads ? 1 : end - begin;
    for (int64_t i = 0; i < count; ++i) {
      if (copies) copy_others(args, series);
      HeadSeries<T> from_first = series;
      from_first.in += P::kStepIn * first;
      from_first.out += P::kStepOut * first;
      rotate_series<P, kFullWidth, kStream, kFew>(from_first, half, pairs, rows.row());
      series.in += x->in.stride_h;
      series.out += x->out.stride_h;
    }
  }
}

template <class T, bool kInterleaved, bool kInterleavedOut, bool kFullWidth, bool kStream,
          class Args>
void apply_rotary_range(const Args& args, const RotaryBlocks& blocks, int64_t begin, int64_t end) {
  using Wide = RotationPairs<T, kInterleaved, kInterleavedOut, true>;
  using Narrow = RotationPairs<T, kInterleaved, kInterleavedOut, false>;
  const int64_t heads = args.q.heads + args.k.heads;
  const int64_t half = args.rotary_dim / 2;
  static_assert(kRowPairs >= 2 * kMaxBlockTokens * Wide::kLanes, "rows are whole vectors");
  const int64_t most = kRowPairs / blocks.tokens / Wide::kLanes * Wide::kLanes;

  for (int64_t item = begin; item < end;) {
    const int64_t index = item / heads;
    Block block;
    block.b = index / blocks.per_sequence;
    block.s = (index - block.b * blocks.per_sequence) * blocks.tokens;
    block.tokens = std::min(args.seq - block.s, blocks.tokens);
    block.head_begin = item - index * heads;
    block.head_end = std::min(block.head_begin + (end - item), heads);
    item += block.head_end - block.head_begin;

    for (int64_t first = 0; first < half; first += most) {
      const int64_t pairs = std::min(half - first, most);
      if (pairs >= Wide::kLanes) {
        rotate_block<T, Wide, kFullWidth, kStream>(args, block, first, pairs);
      } else if (pairs >= Narrow::kLanes) {
        rotate_block<T, Narrow, kFullWidth, false>(args, block, first, pairs);
      } else {
        rotate_block<T, Narrow, kFullWidth, false, true>(args, block, first, pairs);
      }
    }
  }
  if constexpr (kStream) finish_streaming();
}

void apply_rotary(const RotaryArgs& args, const RotaryBlocks& blocks, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto storage) {
    using T = decltype(storage);
    dispatch_orders(args, [&](auto in, auto out) {
      const auto rotate_range = [&](auto full_width, auto stream) {
        apply_rotary_range<T, in, out, full_width, stream>(args, blocks, begin, end);
      };
      if (args.table.full_width) {
        rotate_range(std::true_type(), std::false_type());
      } else if (blocks.stream) {
        rotate_range(std::false_type(), std::true_type());
      } else {
        rotate_range(std::false_type(), std::false_type());
      }
    });
  });
}

// Its results are new or in place: nothing is stored past the caches.
void apply_rotary_at(const RotaryAtArgs& args, const RotaryBlocks& blocks, int64_t begin,
                     int64_t end) {
  dispatch(args.dtype, [&](auto storage) {
    dispatch_orders(args, [&](auto in, auto out) {
      apply_rotary_range<decltype(storage), in, out, false, false>(args, blocks, begin, end);
    });
  });
}
