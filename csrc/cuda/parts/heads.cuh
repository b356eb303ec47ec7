// Addresses of heads of q and k.
#pragma once

#include <cstdint>
#include <type_traits>

#include "args.h"

namespace rope::cuda {

// One of two tensors, field by field: a choice between whole structs would put them into local
// memory.
template <class Pointer>
__device__ __forceinline__ Heads<Pointer> choose(bool first, const Heads<Pointer>& a,
                                                 const Heads<Pointer>& b) {
  return {first ? a.data : b.data, first ? a.stride_b : b.stride_b, first ? a.stride_s : b.stride_s,
          first ? a.stride_h : b.stride_h, first ? a.stride_g : b.stride_g};
}

// A channel of head `head` of token s of sequence b, counted from the first that rotates; group: of
// the heads.
template <class E, class Pointer>
__device__ __forceinline__ auto* channel_at(const Heads<Pointer>& x, uint32_t b, uint32_t s,
                                            uint32_t head, int32_t channel, uint32_t group = 0) {
  using Element = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const E, E>;
  return static_cast<Element*>(x.data) +
         (b * x.stride_b + s * x.stride_s + group * x.stride_g + head * x.stride_h + channel);
}

// Of q or of k. Computed again for each head from the kernel's arguments: pointers kept for q and k
// would cost registers.
template <class E, class Pointer>
__device__ __forceinline__ auto* channel_of(bool is_q, const Heads<Pointer>& q,
                                            const Heads<Pointer>& k, uint32_t b, uint32_t s,
                                            uint32_t head, int32_t channel, uint32_t group = 0) {
  return channel_at<E>(choose(is_q, q, k), b, s, head, channel, group);
}

// k with its pointer moved back by q_heads heads, so that one head index serves q and k: k's first
// head has the index q_heads.
template <class Pointer>
Heads<Pointer> indexed_after_q(Heads<Pointer> k, int64_t q_heads, int64_t element_bytes) {
  const uintptr_t skipped = static_cast<uintptr_t>(q_heads * k.stride_h * element_bytes);
  k.data = reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(k.data) - skipped);
  return k;
}

inline RotaryArgs with_one_head_index(RotaryArgs args) {
  args.k.in = indexed_after_q(args.k.in, args.q.heads, size_of(args.dtype));
  args.k.out = indexed_after_q(args.k.out, args.q.heads, size_of(args.dtype));
  return args;
}

}  // namespace rope::cuda
