// A fragment: the channels of one head that one thread holds in registers at a time.
#pragma once

#include "cuda/parts/vector.cuh"
#include "math/rotation.h"

namespace rope::cuda {

// The orders of the pairs in the tensor that is read and in the one that is written.
enum class Order {
  HalfSplit,    // in both: pair i is channels (i, i + P)
  Interleaved,  // in both: pair i is channels (2i, 2i + 1)
  Either,       // each of the two known at run time
  Any           // the same, for fragments of one pair, which need no aligned vectors
};

// The order that says most.
constexpr Order order_of(bool interleaved, bool interleaved_out) {
  if (interleaved != interleaved_out) return Order::Either;
  return interleaved ? Order::Interleaved : Order::HalfSplit;
}

// Where the fragments lie among the channels [R] of a head that rotate: fragment i begins at
// channel i * step, and its second vector `second` channels further. The same for every head, so it
// is computed on the host.
struct FragmentLayout {
  uint32_t step, second;
};

// Where the vectors of a fragment begin, counted from the first channel that rotates. The second
// vector begins `second` channels after the first.
struct Offsets {
  int32_t first;
  uint32_t second;
};

// One vector of N channels (Interleaved), or two: N pairs in either order.
template <class E_, int N_, Order kOrder_>
struct Fragment {
  using E = E_;
  using C = ArithmeticOf<E>;
  static constexpr int N = N_;
  static constexpr Order kOrder = kOrder_;
  static constexpr bool kOneOrder = kOrder == Order::HalfSplit || kOrder == Order::Interleaved;
  static_assert((N == 1) == (kOrder == Order::Any));
  static constexpr int kVectors = kOrder == Order::Interleaved ? 1 : 2;
  static constexpr int kChannels = kVectors * N, kPairs = kChannels / 2;

  Vector<E, N> vectors[kVectors];

  static FragmentLayout layout(int64_t rotary_dim, bool interleaved) {
    const uint32_t n = N, half = static_cast<uint32_t>(rotary_dim / 2);
    if (kOrder == Order::Interleaved) return {n, 0};
    return interleaved ? FragmentLayout{2 * n, n} : FragmentLayout{n, half};
  }

  static __device__ __forceinline__ Offsets offsets(uint32_t index, FragmentLayout layout) {
    return {static_cast<int32_t>(index * (kOneOrder ? N : layout.step)), layout.second};
  }

  // from, to: the first channel of the first vector. second: how far the second one is.
  __device__ __forceinline__ void load_from(const E* from, uint32_t second) {
    load(vectors[0], from);
    if constexpr (kVectors == 2) load(vectors[1], from + second);
  }

  __device__ __forceinline__ void store_to(E* to, uint32_t second) const {
    store(vectors[0], to);
    if constexpr (kVectors == 2) store(vectors[1], to + second);
  }

  // The channels in the order of memory.
  __device__ __forceinline__ void unpack_to(C (&x)[kChannels]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) unpack(vectors[i], x + i * N);
  }

  __device__ __forceinline__ void pack_from(const C (&x)[kChannels]) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) pack(vectors[i], x + i * N);
  }
};

// The channels of a fragment, in the order of memory, as pairs. interleaved: the order of the
// pairs, where the fragment does not say (Order::Either).
template <class F>
__device__ __forceinline__ void split_pairs(const typename F::C (&x)[F::kChannels],
                                            bool interleaved, typename F::C (&x1)[F::kPairs],
                                            typename F::C (&x2)[F::kPairs]) {
  const bool neighbours =
      F::kOrder == Order::Either ? interleaved : F::kOrder == Order::Interleaved;
#pragma unroll
  for (int j = 0; j < F::kPairs; ++j) {
    x1[j] = neighbours ? x[2 * j] : x[j];
    x2[j] = neighbours ? x[2 * j + 1] : x[F::kPairs + j];
  }
}

// The way back.
template <class F>
__device__ __forceinline__ void join_pairs(const typename F::C (&x1)[F::kPairs],
                                           const typename F::C (&x2)[F::kPairs], bool interleaved,
                                           typename F::C (&x)[F::kChannels]) {
  const bool neighbours =
      F::kOrder == Order::Either ? interleaved : F::kOrder == Order::Interleaved;
#pragma unroll
  for (int i = 0; i < F::kChannels; ++i) {
    const auto neighbour = i % 2 == 0 ? x1[i / 2] : x2[i / 2];
    const auto half = i < F::kPairs ? x1[i % F::kPairs] : x2[i % F::kPairs];
    x[i] = neighbours ? neighbour : half;
  }
}

// Rotates the channels of a fragment, given in the order of memory, where they are. interleaved,
// interleaved_out: the order of the pairs before and after, where the fragment does not say.
template <class F, class Values>
__device__ __forceinline__ void rotate_channels(typename F::C (&x)[F::kChannels],
                                                const Values& table, bool interleaved,
                                                bool interleaved_out) {
  typename F::C x1[F::kPairs], x2[F::kPairs];
  split_pairs<F>(x, interleaved, x1, x2);
#pragma unroll
  for (int j = 0; j < F::kPairs; ++j) rotate(table.at(j), x1[j], x2[j]);
  join_pairs<F>(x1, x2, interleaved_out, x);
}

template <class F, class Values>
__device__ __forceinline__ F rotated(const F& x, const Values& table, const RotaryArgs& args) {
  typename F::C channels[F::kChannels];
  x.unpack_to(channels);
  rotate_channels<F>(channels, table, args.interleaved, args.interleaved_out);
  F y;
  y.pack_from(channels);
  return y;
}

}  // namespace rope::cuda
