// The rotation of a thread's heads, and its launch: the same for rotations by a table and by
// angles.
#pragma once

#include "cuda/parts/heads.cuh"
#include "cuda/parts/rotary_plan.cuh"
#include "cuda/parts/sequence_slices.cuh"

namespace rope::cuda {

// Rotates a fragment of each of the thread's heads, or copies one. The threads of a warp load and
// store together, whichever they do in between.
// load_values(values): the table's values for the fragment. kFullWidth: four of them a pair.
// kCopies: some fragments may be of channels that do not rotate.
template <class F, bool kFullWidth, bool kCopies, class Load>
__device__ __forceinline__ void rotate_heads(const RotaryArgs& args, const RotaryPlan& plan,
                                             const ThreadWork& work, const Load& load_values) {
  using E = typename F::E;
  const bool rotates = !kCopies || work.fragment < plan.rotated_fragments;
  TableValues<F, kFullWidth> values;
  if (rotates) load_values(values);
  const FragmentPlace place = place_of<F>(args, plan, work.fragment, rotates);
#pragma unroll 1
  for (uint32_t head = work.head; head < plan.heads; head += plan.head_step) {
    const bool is_q = head < static_cast<uint32_t>(args.q.heads);
    F x;
    x.load_from(channel_of<E>(is_q, args.q.in, args.k.in, work.b, work.s, head, place.in.first),
                place.in.second);
    if (rotates) x = rotated(x, values, args);
    x.store_to(channel_of<E>(is_q, args.q.out, args.k.out, work.b, work.s, head, place.out.first),
               place.out.second);
  }
}

// Channels of a head that do not rotate and are copied: in place none.
inline int64_t copied_channels(const RotaryArgs& args) {
  const bool q_moves = args.q.heads > 0 && args.q.in.data != args.q.out.data;
  const bool k_moves = args.k.heads > 0 && args.k.in.data != args.k.out.data;
  return q_moves || k_moves ? args.head_dim - args.rotary_dim : 0;
}

inline Alignment alignment_of(const RotaryArgs& args) {
  Alignment alignment(size_of(args.dtype));
  for (const RotatedHeads* x : {&args.q, &args.k}) {
    if (x->heads == 0) continue;
    alignment.add(x->in, args.batch, args.seq, x->heads);
    alignment.add(x->out, args.batch, args.seq, x->heads);
  }
  return alignment;
}

}  // namespace rope::cuda
