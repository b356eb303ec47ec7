// The table's values that one thread needs, read into registers.
#pragma once

#include "cuda/parts/unit.cuh"

namespace rope::cuda {

// Where the columns of the units lie in a row of the table: those of unit u begin at column
// u * step; with one angle a channel, the second columns of its pairs are `second` columns further.
struct TableLayout {
  uint32_t step, second;
  bool aligned;  // a unit's columns are aligned vectors
};

// The table's values for the pairs of a unit, kept over all heads of a thread. The second two may
// differ from the first two only where kFullWidth; else they take no registers.
template <class C, int kPairs, bool kFullWidth>
struct Turns {
  C c1[kPairs], s1[kPairs], c2[kPairs], s2[kPairs];

  __device__ __forceinline__ Turn<C> at(int j) const {
    if constexpr (kFullWidth) return {c1[j], s1[j], c2[j], s2[j]};
    return {c1[j], s1[j], c1[j], s1[j]};
  }
  __device__ __forceinline__ void set(int j, const Turn<C>& turn) {
    c1[j] = turn.c1;
    s1[j] = turn.s1;
    if constexpr (kFullWidth) {
      c2[j] = turn.c2;
      s2[j] = turn.s2;
    }
  }
};

template <class U, bool kFullWidth>
using TurnsOf = Turns<typename U::C, U::kPairs, kFullWidth>;

// cos, sin: the table row [W] from the unit's first column on. full_width, neighbours: one angle a
// channel, and the two columns of each pair side by side.
template <class U, bool kFullWidth, bool kAligned, class S>
__device__ __forceinline__ void read_turns(TurnsOf<U, kFullWidth>& turns, const S* cos,
                                           const S* sin, bool full_width, bool neighbours,
                                           TableLayout layout) {
  using C = typename U::C;
  constexpr int kPairs = U::kPairs;
  if (!kFullWidth || !full_width) {
    C c[kPairs], s[kPairs];
    load_values<C, kPairs, kAligned>(c, cos);
    load_values<C, kPairs, kAligned>(s, sin);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) turns.set(j, {c[j], s[j], c[j], s[j]});
  } else if (neighbours) {
    C c[2 * kPairs], s[2 * kPairs];
    load_values<C, 2 * kPairs, kAligned>(c, cos);
    load_values<C, 2 * kPairs, kAligned>(s, sin);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      turns.set(j, {c[2 * j], s[2 * j], c[2 * j + 1], s[2 * j + 1]});
    }
  } else {
    C c1[kPairs], s1[kPairs], c2[kPairs], s2[kPairs];
    load_values<C, kPairs, kAligned>(c1, cos);
    load_values<C, kPairs, kAligned>(s1, sin);
    load_values<C, kPairs, kAligned>(c2, cos + layout.second);
    load_values<C, kPairs, kAligned>(s2, sin + layout.second);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) turns.set(j, {c1[j], s1[j], c2[j], s2[j]});
  }
}

// Row `row` of the table of sequence b, from column `column` on.
template <class U, bool kFullWidth>
__device__ __forceinline__ void read_table(TurnsOf<U, kFullWidth>& turns, const Table& table,
                                           bool neighbours, TableLayout layout, uint32_t b,
                                           int64_t row, uint32_t column) {
  const int64_t cos_at = b * table.cos_stride_b + row * table.cos_stride_row + column;
  const int64_t sin_at = b * table.sin_stride_b + row * table.sin_stride_row + column;
  dispatch(table.dtype, [&](auto storage) {
    using S = decltype(storage);
    const S* cos = static_cast<const S*>(table.cos) + cos_at;
    const S* sin = static_cast<const S*>(table.sin) + sin_at;
    // Vectors of float64 on their way to float32 would take more registers than all the rest.
    constexpr bool kNarrowed = sizeof(S) > sizeof(typename U::C);
    if (!kNarrowed && layout.aligned) {
      read_turns<U, kFullWidth, !kNarrowed>(turns, cos, sin, table.full_width, neighbours, layout);
    } else {
      read_turns<U, kFullWidth, false>(turns, cos, sin, table.full_width, neighbours, layout);
    }
  });
}

}  // namespace rope::cuda
