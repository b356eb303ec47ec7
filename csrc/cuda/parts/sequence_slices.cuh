// Launches for parts of long sequences: a kernel counts the tokens of one launch in 32 bits.
#pragma once

#include "args.h"
#include "cuda/parts/launch.cuh"

namespace rope::cuda {

template <class Pointer>
void advance(Pointer& data, int64_t bytes) {
  if (data) data = reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(data) + bytes);
}

inline void advance_tokens(PositionIds& ids, int64_t count) {
  advance(ids.data, count * ids.stride_s * (ids.int64 ? int64_t{8} : int64_t{4}));
}

inline void advance_tokens(TokenPositions& positions, int64_t count) {
  if (positions.data) {
    advance(positions.data, count * positions.stride_s * size_of(positions.type));
  } else {
    positions.start += count * positions.stride_s;
  }
}

// Tokens [first, first + seq) of the sequence.
inline RotaryArgs slice_of(RotaryArgs args, int64_t first, int64_t seq) {
  const int64_t element_bytes = size_of(args.dtype), table_bytes = size_of(args.table.dtype);
  for (RotatedHeads* x : {&args.q, &args.k}) {
    advance(x->in.data, first * x->in.stride_s * element_bytes);
    advance(x->out.data, first * x->out.stride_s * element_bytes);
  }
  if (args.position_ids.data) {
    advance_tokens(args.position_ids, first);
  } else {
    advance(args.table.cos, first * args.table.cos_stride_row * table_bytes);
    advance(args.table.sin, first * args.table.sin_stride_row * table_bytes);
    args.table.rows -= first;
  }
  args.seq = seq;
  return args;
}

inline RotaryAtArgs slice_of(RotaryAtArgs args, int64_t first, int64_t seq) {
  static_cast<RotaryArgs&>(args) = slice_of(static_cast<const RotaryArgs&>(args), first, seq);
  advance_tokens(args.angles.positions, first);
  return args;
}

inline AppendArgs slice_of(AppendArgs args, int64_t first, int64_t seq) {
  const int64_t element_bytes = size_of(args.rotary.dtype);
  for (StoredHeads* x : {&args.k, &args.v}) {
    advance(x->in.data, first * x->in.stride_s * element_bytes);
  }
  advance_tokens(args.slots, first);
  args.slot_count -= first;
  args.rotary = slice_of(args.rotary, first, seq);
  return args;
}

// The same tokens with batch and sequence exchanged, where the sequence is one token.
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

inline RotaryAtArgs batch_as_sequence(RotaryAtArgs args) {
  static_cast<RotaryArgs&>(args) = batch_as_sequence(static_cast<const RotaryArgs&>(args));
  TokenPositions& positions = args.angles.positions;
  positions.stride_s = positions.stride_b;  // without data 0: all have the first token's position
  return args;
}

inline AppendArgs batch_as_sequence(AppendArgs args) {
  for (StoredHeads* x : {&args.k, &args.v}) x->in.stride_s = x->in.stride_b;
  args.slots.stride_s = args.slots.stride_b;
  args.rotary = batch_as_sequence(args.rotary);
  return args;
}

// Calls launch_slice with args of at most so many tokens a sequence as a kernel can count. rotary:
// that of `given`; heads: of all tensors.
template <class Args, class Launch>
void for_slices(const Args& given, const RotaryArgs& rotary, int64_t heads,
                const Launch& launch_slice) {
  if (rotary.batch == 0 || rotary.seq == 0 || heads == 0) return;
  check_counts(rotary.op, heads, rotary.head_dim, rotary.batch, rotary.seq);
  // A block stays within one sequence: at a decoding step, of one token each, it would be almost
  // empty.
  const bool one_token = rotary.seq == 1;
  const Args args = one_token ? batch_as_sequence(given) : given;
  const int64_t seq = one_token ? rotary.batch : rotary.seq;
  const int64_t most = most_tokens(rotary.head_dim);
  for (int64_t first = 0; first < seq; first += most) {
    launch_slice(slice_of(args, first, min_of(most, seq - first)));
  }
}

}  // namespace rope::cuda
