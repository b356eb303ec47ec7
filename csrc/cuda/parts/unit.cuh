// A unit: the channels of one head that one thread holds at a time.
#pragma once

#include "cuda/parts/vector.cuh"
#include "math/rotation.h"

namespace rope::cuda {

// Where the units lie among the channels [R] of a head that rotate: unit u begins at channel
// u * step, and its second vector, if it has one, `second` channels further. The same for every
// head, so it is computed on the host.
struct UnitLayout {
  uint32_t step, second;
};

// Both channels of a pair within one vector of N.
constexpr bool are_neighbours(int n, bool interleaved) { return interleaved && n > 1; }

// N > 1: half-split, N channels of the first half and their partners in the second; interleaved, N
// neighbouring channels, or twice as many. N == 1: one pair of either order, chosen at run time.
template <class E, int N, bool kInterleaved, int kVectors = are_neighbours(N, kInterleaved) ? 1 : 2>
struct Unit {
  static constexpr bool kNeighbours = are_neighbours(N, kInterleaved);
  static constexpr int kCount = kVectors;
  static constexpr int kPairs = kVectors * N / 2;
  using Element = E;
  static constexpr int kLength = N, kChannels = kVectors * N;
  using C = ArithmeticOf<E>;

  Vector<E, N> vectors[kVectors];

  static UnitLayout layout(int64_t rotary_dim, bool interleaved) {
    if (kNeighbours) return {kVectors * N, N};
    if (N == 1 && interleaved) return {2, 1};
    return {N, static_cast<uint32_t>(rotary_dim / 2)};
  }

  // The first channel of unit `index`.
  static __device__ __forceinline__ uint32_t channel_of(uint32_t index, UnitLayout layout) {
    return index * (N == 1 ? layout.step : kNeighbours ? kVectors * N : N);
  }

  // from, to: the unit's first channel.
  __device__ __forceinline__ void load_from(const E* from, uint32_t second) {
    load(vectors[0], from);
    if constexpr (kVectors == 2) load(vectors[1], from + second);
  }

  __device__ __forceinline__ void store_to(E* to, uint32_t second) const {
    store(vectors[0], to);
    if constexpr (kVectors == 2) store(vectors[1], to + second);
  }

  // The same channels, whatever the order of pairs.
  template <class Other>
  __device__ __forceinline__ void copy_from(const Other& other) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i] = other.vectors[i];
  }

  // The channels in the order of memory.
  __device__ __forceinline__ void values_to(C (&x)[kChannels]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) unpack(vectors[i], x + i * N);
  }

  __device__ __forceinline__ void pack_values(const C (&x)[kChannels]) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) pack(vectors[i], x + i * N);
  }

  // As pairs, and back.
  static __device__ __forceinline__ void split(const C (&x)[kChannels], C (&x1)[kPairs],
                                               C (&x2)[kPairs]) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      x1[j] = x[kNeighbours ? 2 * j : j];
      x2[j] = x[kNeighbours ? 2 * j + 1 : j + N];
    }
  }

  static __device__ __forceinline__ void join(const C (&x1)[kPairs], const C (&x2)[kPairs],
                                              C (&x)[kChannels]) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      x[kNeighbours ? 2 * j : j] = x1[j];
      x[kNeighbours ? 2 * j + 1 : j + N] = x2[j];
    }
  }

  __device__ __forceinline__ void unpack_to(C (&x1)[kPairs], C (&x2)[kPairs]) const {
    C x[kChannels];
    values_to(x);
    split(x, x1, x2);
  }

  __device__ __forceinline__ void pack_from(const C (&x1)[kPairs], const C (&x2)[kPairs]) {
    C x[kChannels];
    join(x1, x2, x);
    pack_values(x);
  }
};

// The unit that reads or writes pairs in one order; kMixed: beside another one that has the same N
// pairs in the other order, half-split in two vectors of N, interleaved in as many channels.
template <class E, int N, bool kInterleaved, bool kMixed>
struct UnitIn {
  using Type = Unit<E, N, kInterleaved>;
};
template <class E, int N>
struct UnitIn<E, N, false, true> {
  using Type = Unit<E, N, false>;
};
template <class E, int N>
struct UnitIn<E, N, true, true> {
  static constexpr int kWhole = 16 / sizeof(E), kLength = 2 * N < kWhole ? 2 * N : kWhole;
  using Type = Unit<E, kLength, true, 2 * N / kLength>;
};
template <class E, int N, bool kInterleaved, bool kMixed>
using UnitOf = typename UnitIn<E, N, kInterleaved, kMixed>::Type;

// k as the kernels see it: with its heads counted on from those of q, from further before k.
template <class Pointer>
Heads<Pointer> counted_on(Heads<Pointer> k, int64_t q_heads, int64_t element_bytes) {
  const uintptr_t skipped = static_cast<uintptr_t>(q_heads * k.stride_h * element_bytes);
  k.data = reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(k.data) - skipped);
  return k;
}

// Widest vectors that the addresses allow, on the host.
class Alignment {
 public:
  explicit Alignment(int64_t element_bytes) : element_bytes_(element_bytes) {}

  void add_address(const void* data) { bits_ |= reinterpret_cast<uintptr_t>(data); }
  // A stride, or the length of a run, in elements.
  void add_elements(int64_t count) { bits_ |= static_cast<uint64_t>(count * element_bytes_); }

  // The strides of axes of length 1 are never used.
  template <class Pointer>
  void add(const Heads<Pointer>& x, int64_t batch, int64_t seq, int64_t heads) {
    add_address(x.data);
    if (batch > 1) add_elements(x.stride_b);
    if (seq > 1) add_elements(x.stride_s);
    if (heads > 1) add_elements(x.stride_h);
  }

  bool allows(int64_t bytes) const { return bits_ % bytes == 0; }

  // 16 or 8, or else one element.
  int64_t widest() const { return allows(16) ? 16 : allows(8) ? 8 : element_bytes_; }

 private:
  int64_t element_bytes_;
  uint64_t bits_ = 0;
};

}  // namespace rope::cuda
