// How the rotations of one token are cut among threads: units of heads, each thread with its piece
// of the table row for all of its heads.
#pragma once

#include "cuda/parts/launch.cuh"
#include "cuda/parts/turns.cuh"
#include "cuda/parts/unit.cuh"
#include "math/index.h"

namespace rope::cuda {

struct Plan {
  RotaryGeometry geometry;
  UnitLayout in, out;
  TableLayout table;
  uint32_t rotate_units, copy_units;  // of one head
  uint32_t copy_vectors;              // of the channels that do not rotate; 0 in place
  uint32_t heads;                     // of q and k together
  uint32_t head_step;                 // of a thread
};

// One token, and the thread's first head of q and k counted together.
struct Place {
  uint32_t b, s, head;
};

// The thread's place and its unit of a head; false: it has none.
__device__ __forceinline__ bool find_place(const RotaryArgs& args, const Plan& plan, Place& place,
                                           uint32_t& unit) {
  const RotaryGeometry& g = plan.geometry;
  const uint32_t b = blockIdx.z * gridDim.y + blockIdx.y;
  const uint32_t lanes = g.unit_lanes * g.head_lanes;
  const uint32_t group_in_block = threadIdx.x / lanes;
  const uint32_t lane = threadIdx.x - group_in_block * lanes;
  const uint32_t group = blockIdx.x * g.groups_per_block + group_in_block;
  if (b >= args.batch || group_in_block >= g.groups_per_block || group >= g.groups) return false;

  const uint32_t s = group / g.parts;
  const uint32_t part = group - s * g.parts;
  const uint32_t split = part / g.unit_chunks;
  const uint32_t chunk = part - split * g.unit_chunks;
  const uint32_t head_lane = lane / g.unit_lanes;
  unit = chunk * g.unit_lanes + lane - head_lane * g.unit_lanes;
  if (unit >= plan.rotate_units + plan.copy_units) return false;
  place = {b, s, split * g.head_lanes + head_lane};
  return true;
}

// A position outside the table turns by NaN: the kernel can't raise without stopping the stream.
template <class U, bool kMixed, bool kFullWidth>
__device__ __forceinline__ void load_turns(TurnsOf<U, kFullWidth>& turns, const RotaryArgs& args,
                                           const Plan& plan, const Place& place, uint32_t unit) {
  using C = typename U::C;
  const int64_t row = entry_of(args.position_ids, place.b, place.s);
  if (!is_inside(row, args.table.rows)) {
    const C nan = static_cast<C>(NAN);
#pragma unroll
    for (int j = 0; j < U::kPairs; ++j) turns.set(j, {nan, nan, nan, nan});
    return;
  }
  constexpr bool kHalfSplit = !kMixed && !U::kNeighbours && U::kPairs > 1;
  const bool neighbours = kMixed ? args.table.interleaved : U::kNeighbours;
  const uint32_t column = unit * (kHalfSplit ? U::kPairs : plan.table.step);
  read_table<U, kFullWidth>(turns, args.table, neighbours, plan.table, place.b, row, column);
  if (args.inverse) {
#pragma unroll
    for (int j = 0; j < U::kPairs; ++j) turns.set(j, inverse_of(turns.at(j)));
  }
}

// What a thread moves of each of its heads: vectors, the first at `channel`, counted from the first
// that rotates, and the second, if there is one, `second` channels further.
struct Piece {
  int32_t channel;
  uint32_t second;
};

// Channels before and after those that rotate, as if they were a run of vectors of N: number
// `index` of it, and the one half of the run further (the last may have none: then itself once
// more).
template <int N, int kVectors>
__device__ __forceinline__ Piece copied_piece(const RotaryArgs& args, const Plan& plan,
                                              uint32_t index) {
  const auto channel_of = [&](uint32_t vector) {
    const int32_t channel = static_cast<int32_t>(vector * N - args.rotary_offset);
    return channel < 0 ? channel : channel + static_cast<int32_t>(args.rotary_dim);
  };
  const int32_t first = channel_of(index);
  if (kVectors == 1 || index + plan.copy_units >= plan.copy_vectors) return {first, 0};
  return {first, static_cast<uint32_t>(channel_of(index + plan.copy_units) - first)};
}

// Fills in the plan, of which heads and copy_vectors, in channels, are known; false: there is
// nothing to do.
template <class In, class Out, int N>
bool cut_into_units(Plan& plan, const RotaryArgs& args) {
  const Table& table = args.table;
  const bool neighbours = table.full_width && table.interleaved;
  plan.table.step = neighbours ? 2 * In::kPairs : In::kPairs;
  plan.table.second = neighbours ? 1 : static_cast<uint32_t>(args.rotary_dim / 2);
  const int64_t run = neighbours && N > 1 ? 2 * In::kPairs : In::kPairs;
  Alignment alignment(size_of(table.dtype));
  alignment.add_address(table.cos);
  alignment.add_address(table.sin);
  alignment.add_elements(table.cos_stride_row | table.sin_stride_row);
  alignment.add_elements(table.cos_stride_b | table.sin_stride_b);
  plan.table.aligned = alignment.allows(std::min<int64_t>(run * size_of(table.dtype), 16));

  plan.in = In::layout(args.rotary_dim, args.interleaved);
  plan.out = Out::layout(args.rotary_dim, args.interleaved_out);
  plan.rotate_units = static_cast<uint32_t>(args.rotary_dim / 2 / In::kPairs);
  plan.copy_vectors /= N;
  plan.copy_units = (plan.copy_vectors + In::kCount - 1) / In::kCount;
  const int64_t units = int64_t{plan.rotate_units} + plan.copy_units;
  if (units == 0) return false;
  plan.geometry = rotary_geometry(units, plan.heads, args.batch, args.seq, sm_count(args.op));
  plan.head_step = plan.geometry.splits * plan.geometry.head_lanes;
  return true;
}

template <class Pointer>
void skip(Pointer& data, int64_t bytes) {
  if (data) data = reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(data) + bytes);
}

inline void skip_tokens(PositionIds& ids, int64_t count) {
  skip(ids.data, count * ids.stride_s * (ids.int64 ? int64_t{8} : int64_t{4}));
}

// Tokens [first, first + seq) of the sequence.
inline RotaryArgs slice_of(RotaryArgs args, int64_t first, int64_t seq) {
  const int64_t element_bytes = size_of(args.dtype), table_bytes = size_of(args.table.dtype);
  for (RotatedHeads* x : {&args.q, &args.k}) {
    skip(x->in.data, first * x->in.stride_s * element_bytes);
    skip(x->out.data, first * x->out.stride_s * element_bytes);
  }
  if (args.position_ids.data) {
    skip_tokens(args.position_ids, first);
  } else {
    skip(args.table.cos, first * args.table.cos_stride_row * table_bytes);
    skip(args.table.sin, first * args.table.sin_stride_row * table_bytes);
    args.table.rows -= first;
  }
  args.seq = seq;
  return args;
}

// The same tokens with the axes of batch and sequence exchanged, where the sequence is one token.
inline RotaryArgs batch_as_sequence(RotaryArgs args) {
  args.seq = args.batch;
  args.batch = 1;
  for (RotatedHeads* x : {&args.q, &args.k}) {
    x->in.stride_s = x->in.stride_b;
    x->out.stride_s = x->out.stride_b;
  }
  if (args.position_ids.data) {
    args.position_ids.stride_s = args.position_ids.stride_b;
  } else {
    args.table.rows = args.seq;
    args.table.cos_stride_row = args.table.cos_stride_b;
    args.table.sin_stride_row = args.table.sin_stride_b;
  }
  return args;
}

}  // namespace rope::cuda
