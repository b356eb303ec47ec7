// apply_rotary on CUDA: q and k in one launch, the table row in registers.
#include "../kernels.h"
#include "launch.cuh"
#include "unit.cuh"

namespace rope::cuda {

namespace {

struct Plan {
  RotaryGeometry geometry;
  UnitLayout layout;
  int rotate_units, copy_units;  // of one head; copy_units == 0 in place
  int copy_bytes;                // of one copy unit
  bool table_aligned;            // table rows can be read by vectors
  int heads;                     // of q and k together
  int head_step;                 // of a thread, and what it is in elements:
  int64_t q_in_step, q_out_step, k_in_step, k_out_step;
};

// What one thread works on: every head_step-th head of one token, from `head` on.
struct Place {
  int64_t b, s;
  int head;
};

// Walks through the heads of q and then of k, at one channel.
template <class E>
struct HeadWalk {
  const E* in;
  E* out;
  int head;

  __device__ __forceinline__ HeadWalk(const RotaryArgs& args, const Place& place, int64_t channel) {
    head = place.head;
    const int q_heads = static_cast<int>(args.q.heads);
    if (head < q_heads) {
      move_to(args.q, place, head, channel);
    } else {
      move_to(args.k, place, head - q_heads, channel);
    }
  }

  __device__ __forceinline__ void move_to(const RotatedHeads& x, const Place& place, int h,
                                          int64_t channel) {
    in = static_cast<const E*>(x.in.data) + place.b * x.in.stride_b + place.s * x.in.stride_s +
         h * x.in.stride_h + channel;
    out = static_cast<E*>(x.out.data) + place.b * x.out.stride_b + place.s * x.out.stride_s +
          h * x.out.stride_h + channel;
  }

  // False after the last head.
  __device__ __forceinline__ bool next(const RotaryArgs& args, const Plan& plan, const Place& place,
                                       int64_t channel) {
    const int q_heads = static_cast<int>(args.q.heads);
    const bool was_q = head < q_heads;
    head += plan.head_step;
    if (head >= plan.heads) return false;
    if (was_q && head >= q_heads) {
      move_to(args.k, place, head - q_heads, channel);
    } else {
      in += was_q ? plan.q_in_step : plan.k_in_step;
      out += was_q ? plan.q_out_step : plan.k_out_step;
    }
    return true;
  }
};

__device__ __forceinline__ int64_t row_of(const PositionIds& ids, const Place& place) {
  if (ids.data == nullptr) return place.s;
  const int64_t at = place.b * ids.stride_b + place.s * ids.stride_s;
  return ids.int64 ? __ldg(static_cast<const int64_t*>(ids.data) + at)
                   : __ldg(static_cast<const int32_t*>(ids.data) + at);
}

// cos_row, sin_row: [W] of type S.
template <class U, bool kFullWidth, bool kAligned, class S>
__device__ __forceinline__ void read_turns(Turn<typename U::C> (&turns)[U::kPairs],
                                           const S* cos_row, const S* sin_row, bool full_width,
                                           int unit, UnitLayout layout) {
  using C = typename U::C;
  constexpr int kPairs = U::kPairs;
  const int64_t column = static_cast<int64_t>(unit) * (full_width ? layout.step : kPairs);
  cos_row += column;
  sin_row += column;
  if (!kFullWidth || !full_width) {
    C c[kPairs], s[kPairs];
    load_values<C, kPairs, kAligned>(c, cos_row);
    load_values<C, kPairs, kAligned>(s, sin_row);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) turns[j] = {c[j], s[j], c[j], s[j]};
  } else if constexpr (U::kNeighbours) {
    C c[2 * kPairs], s[2 * kPairs];
    load_values<C, 2 * kPairs, kAligned>(c, cos_row);
    load_values<C, 2 * kPairs, kAligned>(s, sin_row);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) turns[j] = {c[2 * j], s[2 * j], c[2 * j + 1], s[2 * j + 1]};
  } else {
    C c1[kPairs], s1[kPairs], c2[kPairs], s2[kPairs];
    load_values<C, kPairs, kAligned>(c1, cos_row);
    load_values<C, kPairs, kAligned>(s1, sin_row);
    load_values<C, kPairs, kAligned>(c2, cos_row + layout.second);
    load_values<C, kPairs, kAligned>(s2, sin_row + layout.second);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) turns[j] = {c1[j], s1[j], c2[j], s2[j]};
  }
}

template <class U, bool kFullWidth>
__device__ __forceinline__ void load_turns(Turn<typename U::C> (&turns)[U::kPairs],
                                           const RotaryArgs& args, const Plan& plan,
                                           const Place& place, int unit) {
  using C = typename U::C;
  const Table& table = args.table;
  const int64_t row = row_of(args.position_ids, place);
  if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(table.rows)) {
    const C nan = static_cast<C>(NAN);
#pragma unroll
    for (int j = 0; j < U::kPairs; ++j) turns[j] = {nan, nan, nan, nan};
    return;
  }
  dispatch(table.dtype, [&](auto storage) {
    using S = decltype(storage);
    const S* cos = static_cast<const S*>(table.cos) + place.b * table.cos_stride_b +
                   row * table.cos_stride_row;
    const S* sin = static_cast<const S*>(table.sin) + place.b * table.sin_stride_b +
                   row * table.sin_stride_row;
    if (plan.table_aligned) {
      read_turns<U, kFullWidth, true>(turns, cos, sin, table.full_width, unit, plan.layout);
    } else {
      read_turns<U, kFullWidth, false>(turns, cos, sin, table.full_width, unit, plan.layout);
    }
  });
  if (args.inverse) {
#pragma unroll
    for (int j = 0; j < U::kPairs; ++j) turns[j] = inverse_of(turns[j]);
  }
}

template <class E, int N, bool kInterleaved, bool kFullWidth>
__device__ __forceinline__ void rotate_heads(const RotaryArgs& args, const Plan& plan,
                                             const Place& place, int unit) {
  using U = Unit<E, N, kInterleaved>;
  using C = typename U::C;
  const int64_t channel = static_cast<int64_t>(unit) * plan.layout.step;

  // The first head is asked for before the table: it does not wait for the position.
  HeadWalk<E> walk(args, place, channel);
  U channels;
  channels.load_from(walk.in, plan.layout);
  Turn<C> turns[U::kPairs];
  load_turns<U, kFullWidth>(turns, args, plan, place, unit);
#pragma unroll 1
  while (true) {
    C x1[U::kPairs], x2[U::kPairs];
    channels.unpack_to(x1, x2);
#pragma unroll
    for (int j = 0; j < U::kPairs; ++j) rotate(turns[j], x1[j], x2[j]);
    channels.pack_from(x1, x2);
    channels.store_to(walk.out, plan.layout);
    if (!walk.next(args, plan, place, channel)) return;
    channels.load_from(walk.in, plan.layout);
  }
}

// Channels past rotary_dim, N at a time.
template <class E, int N>
__device__ __forceinline__ void copy_heads(const RotaryArgs& args, const Plan& plan,
                                           const Place& place, int unit) {
  const int64_t channel = args.rotary_dim + static_cast<int64_t>(unit) * N;
  HeadWalk<E> walk(args, place, channel);
#pragma unroll 1
  do {
    Vector<E, N> v;
    load(v, walk.in);
    store(v, walk.out);
  } while (walk.next(args, plan, place, channel));
}

// kFullWidth: table.full_width is looked at; without it the table is known to have P columns.
template <class E, int N, bool kInterleaved, bool kFullWidth>
__global__ void __launch_bounds__(kBlockThreads)
    apply_rotary_kernel(const RotaryArgs args, const Plan plan) {
  const RotaryGeometry& g = plan.geometry;
  const int lanes = g.unit_lanes * g.head_lanes;
  const int group_in_block = threadIdx.x / lanes;
  const int lane = threadIdx.x - group_in_block * lanes;
  const int64_t group = block_index() * g.groups_per_block + group_in_block;
  if (group_in_block >= g.groups_per_block || group >= g.groups) return;

  const int64_t token = group / g.splits;
  const int split = static_cast<int>(group - token * g.splits);
  const int head_lane = lane / g.unit_lanes;
  Place place;
  place.b = token / args.seq;
  place.s = token - place.b * args.seq;
  place.head = split * g.head_lanes + head_lane;
  if (place.head >= plan.heads) return;

  const int units = plan.rotate_units + plan.copy_units;
#pragma unroll 1
  for (int unit = lane - head_lane * g.unit_lanes; unit < units; unit += g.unit_lanes) {
    if (unit < plan.rotate_units) {
      rotate_heads<E, N, kInterleaved, kFullWidth>(args, plan, place, unit);
    } else if (plan.copy_bytes == 16) {
      copy_heads<E, 16 / sizeof(E)>(args, plan, place, unit - plan.rotate_units);
    } else if (plan.copy_bytes == 8) {
      copy_heads<E, 8 / sizeof(E)>(args, plan, place, unit - plan.rotate_units);
    } else {
      copy_heads<E, 1>(args, plan, place, unit - plan.rotate_units);
    }
  }
}

template <class E, int N, bool kInterleaved, bool kFullWidth>
void launch_units(const RotaryArgs& args, Plan plan, void* stream) {
  using U = Unit<E, N, kInterleaved>;
  const Table& table = args.table;
  const int64_t run = U::kNeighbours && table.full_width ? 2 * U::kPairs : U::kPairs;
  const int64_t table_bytes = size_of(table.dtype);
  Alignment alignment(table_bytes);
  alignment.add_address(table.cos);
  alignment.add_address(table.sin);
  alignment.add_elements(table.cos_stride_row | table.sin_stride_row);
  alignment.add_elements(table.cos_stride_b | table.sin_stride_b);
  plan.table_aligned = alignment.allows(std::min<int64_t>(run * table_bytes, 16));

  plan.rotate_units = static_cast<int>(args.rotary_dim / 2 / U::kPairs);
  const int64_t units = plan.rotate_units + plan.copy_units;
  if (units == 0) return;
  plan.layout = U::layout(args.rotary_dim, args.interleaved);
  plan.geometry = rotary_geometry(units, plan.heads, args.batch * args.seq, sm_count(args.op));
  plan.head_step = plan.geometry.splits * plan.geometry.head_lanes;
  plan.q_in_step = plan.head_step * args.q.in.stride_h;
  plan.q_out_step = plan.head_step * args.q.out.stride_h;
  plan.k_in_step = plan.head_step * args.k.in.stride_h;
  plan.k_out_step = plan.head_step * args.k.out.stride_h;
  launch(args.op, apply_rotary_kernel<E, N, kInterleaved, kFullWidth>, plan.geometry.grid,
         plan.geometry.block_threads, stream, args, plan);
}

template <class E, int N>
void launch_layout(const RotaryArgs& args, const Plan& plan, void* stream) {
  // Eight pairs with four table values each need more than 40 registers: only where they differ.
  constexpr bool kManyPairs = N == 8;
  if (args.interleaved && N > 1) {
    launch_units<E, N, N != 1, true>(args, plan, stream);
  } else if (kManyPairs && !args.table.full_width) {
    launch_units<E, N, false, !kManyPairs>(args, plan, stream);
  } else {
    launch_units<E, N, false, true>(args, plan, stream);
  }
}

template <class E>
void launch_element(const RotaryArgs& args, void* stream) {
  Alignment alignment(sizeof(E));
  bool in_place = true;
  for (const RotatedHeads* x : {&args.q, &args.k}) {
    if (x->heads == 0) continue;
    alignment.add(x->in, args.batch, args.seq, x->heads);
    alignment.add(x->out, args.batch, args.seq, x->heads);
    in_place = in_place && x->in.data == x->out.data;
  }
  Alignment rotated = alignment, copied = alignment;
  rotated.add_elements(args.interleaved ? args.rotary_dim : args.rotary_dim / 2);
  copied.add_elements(args.rotary_dim);
  copied.add_elements(args.head_dim - args.rotary_dim);

  Plan plan{};
  plan.heads = static_cast<int>(args.q.heads + args.k.heads);
  plan.copy_bytes = static_cast<int>(copied.widest());
  const int64_t past_bytes = (args.head_dim - args.rotary_dim) * static_cast<int64_t>(sizeof(E));
  plan.copy_units = in_place ? 0 : static_cast<int>(past_bytes / plan.copy_bytes);

  if (rotated.widest() == 16) {
    launch_layout<E, 16 / sizeof(E)>(args, plan, stream);
  } else if (sizeof(E) < 8 && rotated.widest() == 8) {
    launch_layout<E, 8 / sizeof(E)>(args, plan, stream);
  } else {
    launch_layout<E, 1>(args, plan, stream);
  }
}

}  // namespace

void apply_rotary(const RotaryArgs& args, void* stream) {
  if (args.batch == 0 || args.seq == 0 || args.q.heads + args.k.heads == 0) return;
  check_counts(args.op, args.q.heads + args.k.heads, args.head_dim);
  dispatch(args.dtype, [&](auto storage) { launch_element<decltype(storage)>(args, stream); });
}

}  // namespace rope::cuda
