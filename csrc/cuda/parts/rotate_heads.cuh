// What the kernels that rotate have in common: how a thread goes through its heads, and how the
// work is laid out for it on the host. They differ in where the turns come from.
#pragma once

#include "cuda/parts/rotary_plan.cuh"

namespace rope::cuda {

// Calls work(in, out) for each of the thread's heads, at channels of theirs. Everything is computed
// again for each head from the kernel's arguments: pointers kept for q and k would cost registers.
template <class E, class Channel, class Work>
__device__ __forceinline__ void for_heads(const RotaryArgs& args, const Plan& plan,
                                          const Place& place, Channel channel_in,
                                          Channel channel_out, const Work& work) {
  const auto offset = [&](uint32_t head, int64_t stride_b, int64_t stride_s, int64_t stride_h,
                          Channel channel) {
    return place.b * stride_b + place.s * stride_s + head * stride_h + channel;
  };
#pragma unroll 1
  for (uint32_t head = place.head; head < plan.heads; head += plan.head_step) {
    // Field by field: a choice between whole structs would put them into local memory.
    const bool is_q = head < static_cast<uint32_t>(args.q.heads);
    const RotatedHeads &q = args.q, &k = args.k;
    const E* in =
        static_cast<const E*>(is_q ? q.in.data : k.in.data) +
        offset(head, is_q ? q.in.stride_b : k.in.stride_b, is_q ? q.in.stride_s : k.in.stride_s,
               is_q ? q.in.stride_h : k.in.stride_h, channel_in);
    E* out =
        static_cast<E*>(is_q ? q.out.data : k.out.data) +
        offset(head, is_q ? q.out.stride_b : k.out.stride_b, is_q ? q.out.stride_s : k.out.stride_s,
               is_q ? q.out.stride_h : k.out.stride_h, channel_out);
    work(in, out);
  }
}

// Rotates a unit of each head, or copies one: the threads of a warp load and store together,
// whichever they do in between.
// load_turns(turns): those of the unit. kFullWidth: with four values a pair; kCopies: units may be
// of channels that do not rotate.
template <class E, int N, bool kInterleaved, bool kInterleavedOut, bool kFullWidth, bool kCopies,
          class Load>
__device__ __forceinline__ void turn_heads(const RotaryArgs& args, const Plan& plan,
                                           const Place& place, uint32_t unit,
                                           const Load& load_turns) {
  constexpr bool kMixed = kInterleaved != kInterleavedOut;
  using In = UnitOf<E, N, kInterleaved, kMixed>;
  using Out = UnitOf<E, N, kInterleavedOut, kMixed>;
  using C = typename In::C;
  constexpr int kPairs = In::kPairs;
  static_assert(In::kCount == Out::kCount);
  const bool rotates = !kCopies || unit < plan.rotate_units;
  TurnsOf<In, kFullWidth> turns;
  Piece from, to;
  if (rotates) {
    load_turns(turns);
    from = {static_cast<int32_t>(In::channel_of(unit, plan.in)), plan.in.second};
    to = !kMixed && N > 1
             ? from
             : Piece{static_cast<int32_t>(Out::channel_of(unit, plan.out)), plan.out.second};
  } else {
    from = to = copied_piece<N, In::kCount>(args, plan, unit - plan.rotate_units);
  }
  for_heads<E>(args, plan, place, from.channel, to.channel, [&](const E* in, E* out) {
    In x;
    x.load_from(in, from.second);
    Out y;
    if (rotates) {
      C x1[kPairs], x2[kPairs];
      x.unpack_to(x1, x2);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) rotate(turns.at(j), x1[j], x2[j]);
      y.pack_from(x1, x2);
    } else {
      y.copy_from(x);
    }
    y.store_to(out, to.second);
  });
}

// What is known before the width of vectors is; and what that width may be, in bytes.
template <class E>
Plan plan_of(const RotaryArgs& args, int64_t& widest) {
  Alignment alignment(sizeof(E));
  bool in_place = true;
  for (const RotatedHeads* x : {&args.q, &args.k}) {
    if (x->heads == 0) continue;
    alignment.add(x->in, args.batch, args.seq, x->heads);
    alignment.add(x->out, args.batch, args.seq, x->heads);
    in_place = in_place && x->in.data == x->out.data;
  }
  const bool all_interleaved = args.interleaved && args.interleaved_out;
  alignment.add_elements(all_interleaved ? args.rotary_dim : args.rotary_dim / 2);
  const int64_t others = in_place ? 0 : args.head_dim - args.rotary_dim;
  if (others > 0) {
    alignment.add_elements(args.rotary_offset);
    alignment.add_elements(others);
  }
  widest = alignment.widest();
  Plan plan{};
  plan.heads = static_cast<uint32_t>(args.q.heads + args.k.heads);
  plan.copy_vectors = static_cast<uint32_t>(others);  // of one channel, until N is known
  return plan;
}

inline RotaryAtArgs slice_of(RotaryAtArgs args, int64_t first, int64_t seq) {
  static_cast<RotaryArgs&>(args) = slice_of(static_cast<const RotaryArgs&>(args), first, seq);
  TokenPositions& positions = args.angles.positions;
  if (positions.data) {
    skip(positions.data, first * positions.stride_s * size_of(positions.type));
  } else {
    positions.start += first * positions.stride_s;
  }
  return args;
}

inline RotaryAtArgs batch_as_sequence(RotaryAtArgs args) {
  static_cast<RotaryArgs&>(args) = batch_as_sequence(static_cast<const RotaryArgs&>(args));
  TokenPositions& positions = args.angles.positions;
  positions.stride_s = positions.stride_b;  // without data 0: the position of all is the first
  return args;
}

// Launches for sequences of at most so many tokens as a kernel can count.
template <class Args, class Launch>
void for_slices(const Args& given, const Launch& launch_slice) {
  if (given.batch == 0 || given.seq == 0 || given.q.heads + given.k.heads == 0) return;
  check_counts(given.op, given.q.heads + given.k.heads, given.head_dim, given.batch, given.seq);
  // Blocks do not reach over the end of a sequence: a decoding step would leave them almost empty.
  const Args args = given.seq == 1 ? batch_as_sequence(given) : given;
  const int64_t most = most_tokens(args.head_dim);
  for (int64_t first = 0; first < args.seq; first += most) {
    launch_slice(slice_of(args, first, std::min(most, args.seq - first)));
  }
}

}  // namespace rope::cuda
