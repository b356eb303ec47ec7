// Writing fragments to a paged cache: a token's slot, the conversion to float8, and on the host the
// common alignment of the tensors and the caches.
#pragma once

#include "cuda/parts/alignment.h"
#include "cuda/parts/fragment.cuh"
#include "cuda/parts/sequence_slices.cuh"
#include "math/float8.h"
#include "math/index.h"

namespace rope::cuda {

struct Slot {
  int64_t block, offset;
  bool exists;  // else the token is not stored
};

// args: of a paged cache.
template <class Args>
__device__ __forceinline__ Slot slot_at(const Args& args, int64_t slot) {
  const uint64_t index = static_cast<uint64_t>(slot), size = static_cast<uint64_t>(args.block_size);
  if (index >= static_cast<uint64_t>(args.blocks) * size) return {0, 0, false};
  // A division of 64 bits takes several times as long as one of 32.
  const uint64_t block = (index | size) >> 32
                             ? index / size
                             : static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
  return {static_cast<int64_t>(block), static_cast<int64_t>(index - block * size), true};
}

__device__ __forceinline__ Slot slot_of(const AppendArgs& args, uint32_t b, uint32_t s) {
  const int64_t token = int64_t{b} * args.slots_seq + s;
  if (token >= args.slot_count) return {0, 0, false};
  return slot_at(args, entry_of(args.slots, b, s));
}

// k or v, field by field: a choice between whole structs would put them into local memory.
__device__ __forceinline__ StoredHeads choose(bool first, const StoredHeads& a,
                                              const StoredHeads& b) {
  StoredHeads chosen{};
  chosen.cache = first ? a.cache : b.cache;
  chosen.stride_block = first ? a.stride_block : b.stride_block;
  chosen.stride_offset = first ? a.stride_offset : b.stride_offset;
  chosen.stride_h = first ? a.stride_h : b.stride_h;
  chosen.scale = first ? a.scale : b.scale;
  chosen.scale_stride_h = first ? a.scale_stride_h : b.scale_stride_h;
  return chosen;
}

// Which vectors of a fragment exist.
struct Present {
  bool first, second;
};

template <class F>
__device__ __forceinline__ void load_present(F& x, const typename F::E* from, uint32_t second,
                                             Present present) {
  if (present.first) load(x.vectors[0], from);
  if constexpr (F::kVectors == 2) {
    if (present.second) load(x.vectors[1], from + second);
  }
}

template <int N, class C>
__device__ __forceinline__ void store_float8(const C* x, uint8_t* to, const Float8Format& format,
                                             float scale) {
  uint8_t bytes[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const C divided = x[j] / static_cast<C>(scale);
    if constexpr (std::is_same_v<C, double>) {
      bytes[j] = float8_of(format, round_to_odd(divided));
    } else {
      bytes[j] = float8_of(format, divided);
    }
  }
  Vector<uint8_t, N> out;
  memcpy(&out.word, bytes, sizeof(bytes));
  store(out, to);
}

template <class E, int N>
__device__ __forceinline__ void store_float8(const Vector<E, N>& v, uint8_t* to,
                                             const Float8Format& format, float scale) {
  ArithmeticOf<E> x[N];
  unpack(v, x);
  store_float8<N>(x, to, format, scale);
}

// Writes x to the head `head` of a cache, from `channel` on. kFloat8: the cache may be of float8.
template <bool kFloat8, class F>
__device__ __forceinline__ void store_cached(const F& x, const StoredHeads& heads, CacheDType dtype,
                                             const Float8Format& format, const Slot& slot,
                                             uint32_t head, int32_t channel, uint32_t second,
                                             Present present) {
  const int64_t at = slot.block * heads.stride_block + slot.offset * heads.stride_offset +
                     head * heads.stride_h + channel;
  if (!kFloat8 || dtype == CacheDType::OfModel) {
    typename F::E* const to = static_cast<typename F::E*>(heads.cache) + at;
    if (present.first) store(x.vectors[0], to);
    if constexpr (F::kVectors == 2) {
      if (present.second) store(x.vectors[1], to + second);
    }
    return;
  }
  const float scale = heads.scale == nullptr ? 1 : __ldg(heads.scale + head * heads.scale_stride_h);
  uint8_t* const to = static_cast<uint8_t*>(heads.cache) + at;
  if (present.first) store_float8(x.vectors[0], to, format, scale);
  if constexpr (F::kVectors == 2) {
    if (present.second) store_float8(x.vectors[1], to + second, format, scale);
  }
}

// --------------------------------------------------------------------------------------- the host

// Of any value for a cache of the model's dtype.
inline Float8Format float8_format(CacheDType dtype) {
  return dtype == CacheDType::Float8E4M3 ? Float8E4M3::kFormat : Float8E5M2::kFormat;
}

// Channels of k that do not rotate and are stored, and those of q beside them.
inline int64_t stored_beside(const AppendArgs& args) {
  return args.latent ? 0 : args.rotary.head_dim - args.rotary.rotary_dim;
}

inline void add_cache(Alignment& alignment, const AppendArgs& args, const StoredHeads& x) {
  if (args.cache_dtype == CacheDType::OfModel) {
    alignment.add_address(x.cache);
  } else {  // its vectors have as many bytes as the model's have elements
    alignment.add_elements(reinterpret_cast<intptr_t>(x.cache));
  }
  if (args.blocks > 1) alignment.add_elements(x.stride_block);
  if (args.block_size > 1) alignment.add_elements(x.stride_offset);
  if (x.heads > 1) alignment.add_elements(x.stride_h);
}

// A tensor of float8, whose vectors have as many bytes as those of the model have elements.
inline void add_float8(Alignment& alignment, const Heads<void*>& x, const RotaryArgs& rotary) {
  alignment.add_elements(reinterpret_cast<intptr_t>(x.data));
  if (rotary.batch > 1) alignment.add_elements(x.stride_b);
  if (rotary.seq > 1) alignment.add_elements(x.stride_s);
  if (rotary.q.heads > 1) alignment.add_elements(x.stride_h);
}

// Of q and k as they are written, of v and of the caches.
inline Alignment alignment_of_append(const AppendArgs& args) {
  const RotaryArgs& rotary = args.rotary;
  Alignment alignment(size_of(rotary.dtype));
  for (const RotatedHeads* x : {&rotary.q, &rotary.k}) {
    if (x->heads > 0) alignment.add(x->out, rotary.batch, rotary.seq, x->heads);
  }
  if (args.float8_q.out.data != nullptr) add_float8(alignment, args.float8_q.out, rotary);
  if (args.v.heads > 0) alignment.add(args.v.in, rotary.batch, rotary.seq, args.v.heads);
  for (const StoredHeads* x : {&args.k, &args.v}) {
    if (x->heads > 0) add_cache(alignment, args, *x);
  }
  alignment.add_channels(rotary, stored_beside(args) > 0 || args.float8_q.out.data != nullptr);
  if (args.latent) alignment.add_elements(args.v.channels);
  return alignment;
}

// q's float8, v and the caches from the first channel that rotates on, as q and k are; but a latent
// vector and its cache from their first channel on.
inline AppendArgs with_common_channels(AppendArgs args) {
  const RotaryArgs& rotary = args.rotary;
  advance(args.float8_q.out.data, rotary.rotary_offset);
  if (args.latent) return args;
  const int64_t element_bytes = size_of(rotary.dtype);
  const int64_t cache_bytes = args.cache_dtype == CacheDType::OfModel ? element_bytes : 1;
  for (StoredHeads* x : {&args.k, &args.v}) {
    advance(x->in.data, rotary.rotary_offset * element_bytes);
    advance(x->cache, rotary.rotary_offset * cache_bytes);
  }
  return args;
}

}  // namespace rope::cuda
