// The cos and sin that a thread needs of a row of the table, read into registers.
#pragma once

#include "cuda/parts/fragment.cuh"
#include "math/index.h"

namespace rope::cuda {

// Where the columns of the fragments lie in a row of the table: those of fragment i begin at column
// i * step. With one angle a channel a fragment has two vectors of columns, the second `second`
// columns after the first.
struct TableLayout {
  uint32_t step, second;
};

// The table's values for the pairs of a fragment, kept for all heads of a thread. c2, s2 may differ
// from c1, s1 only where kFullWidth; else they take no registers.
template <class F, bool kFullWidth>
struct TableValues {
  using C = typename F::C;
  C c1[F::kPairs], s1[F::kPairs], c2[F::kPairs], s2[F::kPairs];

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
  __device__ __forceinline__ void apply_flags(const RotationFlags& flags) {
    if (!changes_turns(flags)) return;
#pragma unroll
    for (int j = 0; j < F::kPairs; ++j) set(j, flagged(at(j), flags));
  }
};

// (first, second): columns in the order of memory, that of pairs (2j, 2j + 1). Sorts them so that
// first has the first column of each pair.
template <class C, int kPairs>
__device__ __forceinline__ void sort_neighbours(C (&first)[kPairs], C (&second)[kPairs]) {
  C columns[2 * kPairs];
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    columns[j] = first[j];
    columns[kPairs + j] = second[j];
  }
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    first[j] = columns[2 * j];
    second[j] = columns[2 * j + 1];
  }
}

// The values for fragment `index` of token s of sequence b. A position outside the table gives NaN:
// the kernel can't raise without stopping the stream.
template <class F, bool kFullWidth>
__device__ __forceinline__ void load_table(TableValues<F, kFullWidth>& values,
                                           const RotaryArgs& args, TableLayout layout, uint32_t b,
                                           uint32_t s, uint32_t index) {
  using C = typename F::C;
  constexpr int kPairs = F::kPairs;
  const Table& table = args.table;
  const int64_t row = entry_of(args.position_ids, b, s);
  if (!is_inside(row, table.rows)) {
    const C nan = static_cast<C>(NAN);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) values.set(j, {nan, nan, nan, nan});
    return;
  }
  const uint32_t column = index * (F::kOrder == Order::HalfSplit ? kPairs : layout.step);
  const int64_t cos_at = b * table.cos_stride_b + row * table.cos_stride_row + column;
  const int64_t sin_at = b * table.sin_stride_b + row * table.sin_stride_row + column;
  dispatch(table.dtype, [&](auto storage) {
    using S = decltype(storage);
    const S* cos = static_cast<const S*>(table.cos) + cos_at;
    const S* sin = static_cast<const S*>(table.sin) + sin_at;
    load_values<kPairs>(values.c1, cos);
    load_values<kPairs>(values.s1, sin);
    if constexpr (kFullWidth) {
      if (table.full_width) {
        load_values<kPairs>(values.c2, cos + layout.second);
        load_values<kPairs>(values.s2, sin + layout.second);
      }
    }
  });
  if constexpr (kFullWidth) {
    if (!table.full_width) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        values.c2[j] = values.c1[j];
        values.s2[j] = values.s1[j];
      }
    } else if (F::kOrder == Order::Interleaved ||
               (F::kOrder == Order::Either && table.interleaved)) {
      sort_neighbours(values.c1, values.c2);
      sort_neighbours(values.s1, values.s2);
    }
  }
  values.apply_flags(args);
}

}  // namespace rope::cuda
