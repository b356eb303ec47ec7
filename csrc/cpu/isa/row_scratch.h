// Rows of the table as apply_rotary uses them, in the thread's scratch memory: converted, inverted,
// in the order of the pairs. Read from a table, or made of angles. Included by apply_rotary_body.h.

// Pairs of one block of tokens whose table rows are held at a time.
constexpr int64_t kScratchPairs = 1024;

// Rows of the table for one token: c1[i], s1[i], c2[i], s2[i] belong to pair i. One angle a pair:
// c2, s2 are not used.
template <class E>
struct Row {
  E *c1, *s1, *c2, *s2;

  ROPE_HOST_DEVICE Row plus(int64_t n) const { return {c1 + n, s1 + n, c2 + n, s2 + n}; }
};

// A row is cut into whole vectors of kLanes pairs. The last one ends where the row ends: where the
// pairs are not a multiple of kLanes it has some of the pairs of the one before it again. A row of
// less than a vector is filled up with zeros.
// kEmptyNan: no NaN of a row may have a lower half (see pack).
template <class A, int64_t kLanes, PairOrder kOrder, bool kEmptyNan, bool kFullWidth>
struct RowScratch {
  static constexpr int64_t kParts = kFullWidth ? 4 : 2;  // c1, s1, c2, s2 of a token lie together

  alignas(64) A entries[kParts * kScratchPairs];
  int64_t length;  // of each part

  int64_t stride() const { return kParts * length; }    // between tokens
  Row<const A> row() const { return row_at(entries); }  // of the first token

  // Pairs [first, first + pairs) of the rows of tokens s, s + 1, ... of batch row b: NaN where the
  // position is outside the table.
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
        put(args, cos, sin, first, pairs, row_at(to));
      } else {
        put(args, cos, sin, first, whole, row_at(to));
        if (whole < pairs) {
          put(args, cos, sin, first + pairs - kLanes, kLanes, row_at(to).plus(whole));
        }
      }
      if constexpr (kOrder != PairOrder::Natural || kEmptyNan) prepare(to);
    }
  }

  // The same of angles, with the bits that a table of them has.
  __attribute__((noinline)) void fill(const RotaryAtArgs& args, int64_t b, int64_t s,
                                      int64_t tokens, int64_t first, int64_t pairs) {
    static_assert(!kFullWidth, "one angle a pair");
    const int64_t whole = lay_out(pairs);
    if (whole == 0) {
      for (int64_t i = 0; i < tokens * stride(); ++i) entries[i] = 0;
    }
    for (int64_t done = 0; done < pairs; done += kAngleChunk) {
      AngleChunk chunk(args.angles, first + done, std::min(pairs - done, kAngleChunk));
      for (int64_t t = 0; t < tokens; ++t) {
        chunk.turn<std::is_same_v<A, double>>(b, s + t);
        const Row<A> to = row_at(entries + t * stride()).plus(done);
        for (int64_t i = 0; i < chunk.pairs; ++i) to.c1[i] = static_cast<A>(chunk.cos[i]);
        for (int64_t i = 0; i < chunk.pairs; ++i) to.s1[i] = static_cast<A>(chunk.sin[i]);
        if (args.inverse) invert(chunk.pairs, to);
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
  // The pairs of a row that are whole vectors.
  int64_t lay_out(int64_t pairs) {
    const int64_t whole = pairs / kLanes * kLanes;
    length = whole < pairs ? whole + kLanes : whole;
    return whole;
  }

  template <class E>
  Row<E> row_at(E* to) const {
    return {to, to + length, to + 2 * length, to + 3 * length};
  }

  // Pairs [first, first + pairs) of one row.
  static void put(const RotaryArgs& args, const void* cos, const void* sin, int64_t first,
                  int64_t pairs, const Row<A>& to) {
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
      put_neighbours(dtype, cos, first, pairs, to.c1, to.c2);
      put_neighbours(dtype, sin, first, pairs, to.s1, to.s2);
    }
    if (args.inverse) invert(pairs, to);
  }

  static void invert(int64_t pairs, const Row<A>& to) {
    for (int64_t i = 0; i < pairs; ++i) {
      const A s2 = kFullWidth ? to.s2[i] : to.s1[i];
      const Turn<A> turn = inverse_of(Turn<A>{to.c1[i], to.s1[i], to.c1[i], s2});
      to.s1[i] = turn.s1;
      if constexpr (kFullWidth) to.s2[i] = turn.s2;
    }
  }

  // Entries (2i, 2i + 1) of a row to (t1[i], t2[i]).
  static void put_neighbours(DType dtype, const void* row, int64_t first, int64_t pairs, A* t1,
                             A* t2) {
    constexpr int64_t kPairs = 32;
    A both[2 * kPairs] = {};
    for (int64_t at = 0; at < pairs; at += kPairs) {
      const int64_t n = std::min(pairs - at, kPairs);
      convert(dtype, row, 2 * (first + at), 2 * n, both);
      for (int64_t i = 0; i < n; ++i) t1[at + i] = both[2 * i], t2[at + i] = both[2 * i + 1];
    }
  }

  void prepare(A* row) const {
    using V = std::conditional_t<std::is_same_v<A, double>, Double4, Float8>;
    for (int64_t i = 0; i < stride(); i += kLanes) {
      if constexpr (kOrder == PairOrder::EvenOdd) {
        V even, odd;
        deinterleave(checked<V>(row + i), checked<V>(row + i + 8), even, odd);
        write(row + i, even);
        write(row + i + 8, odd);
      } else if constexpr (kOrder == PairOrder::InLane) {
        write(row + i, in_lane_order(checked<V>(row + i)));
      } else {
        write(row + i, checked<V>(row + i));
      }
    }
  }

  template <class V>
  static V checked(const A* from) {
    const V v = read<V>(from);
    if constexpr (kEmptyNan) {
      return bit_cast<V>(where_nan(v, Uint8{} + 0x7fc00000u, bit_cast<Uint8>(v)));
    } else {
      return v;
    }
  }
};
