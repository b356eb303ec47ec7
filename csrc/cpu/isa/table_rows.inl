// Rows of the table as the rotation uses them, in scratch memory of the thread: converted,
// inverted, in the order of the pairs. They are read from a table, or computed from angles.

// Pairs whose rows are held at a time, of all tokens of a block.
constexpr int64_t kRowPairs = 1024;

// The row of one token: c1[i], s1[i], c2[i], s2[i] belong to pair i. With one angle a pair, c2 and
// s2 are not used.
template <class E>
struct TableRow {
  E *c1, *s1, *c2, *s2;

  ROPE_HOST_DEVICE TableRow plus(int64_t n) const { return {c1 + n, s1 + n, c2 + n, s2 + n}; }
};

// A row is stored as whole vectors of kLanes pairs. Where the pairs are no multiple of kLanes, the
// last vector holds the last kLanes pairs, some of which the vector before it holds too. A row
// shorter than a vector is filled up with zeros.
// kEmptyNan: every NaN gets a lower half of zero (see pack).
template <class A, int64_t kLanes, PairOrder kOrder, bool kEmptyNan, bool kFullWidth>
struct TableRows {
  static constexpr int64_t kParts = kFullWidth ? 4 : 2;  // c1, s1, c2, s2 of a token lie together

  alignas(64) A entries[kParts * kRowPairs];
  int64_t length;  // of each part

  int64_t stride() const { return kParts * length; }         // between tokens
  TableRow<const A> row() const { return row_at(entries); }  // of the first token

  // Reads pairs [first, first + pairs) of the rows of tokens s, s + 1, ... of sequence b: NaN where
  // the position is outside the table.
  __attribute__((noinline)) void fill(const RotaryArgs& args, int64_t b, int64_t s, int64_t tokens,
                                      int64_t first, int64_t pairs) {
    const Table& table = args.table;
    const int64_t size = size_of(table.dtype);
    const int64_t whole = lay_out(pairs);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t index = entry_of(args.position_ids, b, s + t);
      A* const to = entries + t * stride();
      if (!is_inside(index, table.rows)) {
        for (int64_t i = 0; i < stride(); ++i) to[i] = static_cast<A>(NAN);
        continue;
      }
      const char* cos = static_cast<const char*>(table.cos) +
                        (b * table.cos_stride_b + index * table.cos_stride_row) * size;
      const char* sin = static_cast<const char*>(table.sin) +
                        (b * table.sin_stride_b + index * table.sin_stride_row) * size;
      if (whole == 0) {
        for (int64_t i = 0; i < stride(); ++i) to[i] = 0;
        read_row(args, cos, sin, first, pairs, row_at(to));
      } else {
        read_row(args, cos, sin, first, whole, row_at(to));
        if (whole < pairs) {
          read_row(args, cos, sin, first + pairs - kLanes, kLanes, row_at(to).plus(whole));
        }
      }
      if constexpr (kOrder != PairOrder::Natural || kEmptyNan) prepare(to);
    }
  }

  // Computes them from angles: the bits of a table made of these.
  template <class Args>
  __attribute__((noinline)) void fill(const Args& args, int64_t b, int64_t s, int64_t tokens,
                                      int64_t first, int64_t pairs) {
    static_assert(!kFullWidth, "one angle a pair");
    const int64_t whole = lay_out(pairs);
    if (whole == 0) {
      for (int64_t i = 0; i < tokens * stride(); ++i) entries[i] = 0;
    }
    for (int64_t done = 0; done < pairs; done += kAnglePairs) {
      auto angles = angles_of(args, first + done, std::min(pairs - done, kAnglePairs));
      for (int64_t t = 0; t < tokens; ++t) {
        angles.template compute<std::is_same_v<A, double>>(b, s + t);
        const TableRow<A> to = row_at(entries + t * stride()).plus(done);
        for (int64_t i = 0; i < angles.pairs; ++i) to.c1[i] = static_cast<A>(angles.cos[i]);
        for (int64_t i = 0; i < angles.pairs; ++i) to.s1[i] = static_cast<A>(angles.sin[i]);
        apply_flags(args, angles.pairs, to);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      A* const to = entries + t * stride();
      if (0 < whole && whole < pairs) {
        for (A* const part : {row_at(to).c1, row_at(to).s1}) {
          memmove(part + whole, part + pairs - kLanes, kLanes * sizeof(A));
        }
      }
      if constexpr (kOrder != PairOrder::Natural || kEmptyNan) prepare(to);
    }
  }

 private:
  // Sets the length for rows of `pairs` pairs; returns how many of these are in whole vectors.
  int64_t lay_out(int64_t pairs) {
    const int64_t whole = pairs / kLanes * kLanes;
    length = whole < pairs ? whole + kLanes : whole;
    return whole;
  }

  template <class E>
  TableRow<E> row_at(E* to) const {
    return {to, to + length, to + 2 * length, to + 3 * length};
  }

  // Reads pairs [first, first + pairs) of one row.
  static void read_row(const RotaryArgs& args, const void* cos, const void* sin, int64_t first,
                       int64_t pairs, const TableRow<A>& to) {
    const DType dtype = args.table.dtype;
    if constexpr (!kFullWidth) {
      convert(dtype, cos, first, pairs, to.c1);
      convert(dtype, sin, first, pairs, to.s1);
    } else if (!args.table.interleaved) {
      const int64_t half = args.rotary_dim / 2;
      convert(dtype, cos, first, pairs, to.c1);
      convert(dtype, sin, first, pairs, to.s1);
      convert(dtype, cos, half + first, pairs, to.c2);
      convert(dtype, sin, half + first, pairs, to.s2);
    } else {
      split_neighbours(dtype, cos, first, pairs, to.c1, to.c2);
      split_neighbours(dtype, sin, first, pairs, to.s1, to.s2);
    }
    apply_flags(args, pairs, to);
  }

  static void apply_flags(const RotationFlags& flags, int64_t pairs, const TableRow<A>& to) {
    if (!changes_turns(flags)) return;
    for (int64_t i = 0; i < pairs; ++i) {
      const A c2 = kFullWidth ? to.c2[i] : to.c1[i], s2 = kFullWidth ? to.s2[i] : to.s1[i];
      const Turn<A> turn = flagged(Turn<A>{to.c1[i], to.s1[i], c2, s2}, flags);
      to.c1[i] = turn.c1, to.s1[i] = turn.s1;
      if constexpr (kFullWidth) to.c2[i] = turn.c2, to.s2[i] = turn.s2;
    }
  }

  // Reads entries (2i, 2i + 1) of a row into (t1[i], t2[i]).
  static void split_neighbours(DType dtype, const void* row, int64_t first, int64_t pairs, A* t1,
                               A* t2) {
    constexpr int64_t kStep = 32;
    A both[2 * kStep] = {};
    for (int64_t at = 0; at < pairs; at += kStep) {
      const int64_t n = std::min(pairs - at, kStep);
      convert(dtype, row, 2 * (first + at), 2 * n, both);
      for (int64_t i = 0; i < n; ++i) t1[at + i] = both[2 * i], t2[at + i] = both[2 * i + 1];
    }
  }

  // Puts a row in the order of the pairs.
  void prepare(A* row) const {
    using V = Vec<A>;
    for (int64_t i = 0; i < stride(); i += kLanes) {
      if constexpr (kOrder == PairOrder::EvenOdd) {
        V even, odd;
        deinterleave(checked<V>(row + i), checked<V>(row + i + kLanes / 2), even, odd);
        write(row + i, even);
        write(row + i + kLanes / 2, odd);
      } else if constexpr (kOrder == PairOrder::In128Bits) {
        write(row + i, in_128_bits(checked<V>(row + i)));
      } else {
        write(row + i, checked<V>(row + i));
      }
    }
  }

  template <class V>
  static V checked(const A* from) {
    const V v = read<V>(from);
    if constexpr (kEmptyNan) {
      return bit_cast<V>(where_nan(v, U32{} + 0x7fc00000u, bit_cast<U32>(v)));
    } else {
      return v;
    }
  }
};
