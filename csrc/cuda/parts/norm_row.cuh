// What the kernels that normalise have in common: how threads share a norm row, and its weight.
//
// A norm row is what shares one root mean square: a head, or all heads of a token. A group of
// `lanes` threads has a norm row. Its fragments are numbered, those of the first head first: of
// each head the fragments that rotate, then one for each vector of the channels that do not. Thread
// `lane` has the fragments lane, lane + lanes, ...
//
// A thread takes its fragments from the last to the first, for the sums of the norm row. It still
// has the first in registers when the sums are known, and goes on from there to the last again. So
// a norm row of at most kMostLanes fragments is read once; of a longer one, the rest is read twice.
#pragma once

#include "cuda/parts/heads.cuh"
#include "cuda/parts/rotary_plan.cuh"

namespace rope::cuda {

constexpr int kMostLanes = 512;

struct NormPlan {
  RotaryPlan rotary;
  uint32_t fragments;      // of one head
  uint32_t lanes, groups;  // threads of a norm row, a power of two; norm rows of a block at a time
  int32_t steps;           // fragments of a thread, at most
  uint32_t rows;           // norm rows in all (forward alone)
};

// The sum of `value` over the lanes of a group, of the same bits in each of them and always. All
// threads of the block take part; norm rows of more than a warp have the block for themselves.
template <class C>
__device__ __forceinline__ C sum_over_lanes(C value, uint32_t lanes, C* of_warps) {
#pragma unroll
  for (uint32_t step = kWarpThreads / 2; step > 0; step /= 2) {
    if (step < lanes) value += __shfl_xor_sync(0xffffffffu, value, static_cast<int>(step));
  }
  if (lanes <= kWarpThreads) return value;
  __syncthreads();  // the sum before this one has been read
  if (threadIdx.x % kWarpThreads == 0) of_warps[threadIdx.x / kWarpThreads] = value;
  __syncthreads();
  C sum = of_warps[0];
#pragma unroll 1
  for (uint32_t warp = 1; warp < lanes / kWarpThreads; ++warp) sum += of_warps[warp];
  return sum;
}

template <class C, int kChannels>
__device__ __forceinline__ C sum_of_squares(const C (&x)[kChannels]) {
  C sum = 0;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) sum += x[i] * x[i];
  return sum;
}

template <class F>
__device__ __forceinline__ typename F::C sum_of_squares(const F& fragment) {
  typename F::C x[F::kChannels];
  fragment.unpack_to(x);
  return sum_of_squares(x);
}

template <class C>
__device__ __forceinline__ C inverse_rms_of(C sum_of_squares, C channels, double eps) {
  return C(1) / sqrt(sum_of_squares / channels + static_cast<C>(eps));
}

// A fragment of a head, in a tensor of one order of the pairs. One that does not rotate is a single
// vector.
struct NormFragment {
  Offsets at;
  bool rotates;
};

template <class F>
__device__ __forceinline__ NormFragment norm_fragment(const RotaryArgs& args,
                                                      const RotaryPlan& plan, FragmentLayout layout,
                                                      uint32_t index) {
  if (index < plan.rotated_fragments) return {F::offsets(index, layout), true};
  const int32_t channel = static_cast<int32_t>((index - plan.rotated_fragments) * F::N) -
                          static_cast<int32_t>(args.rotary_offset);
  return {{channel < 0 ? channel : channel + static_cast<int32_t>(args.rotary_dim), 0}, false};
}

// from, to: the first channel of the head that rotates. Of a fragment that does not rotate, the
// second vector stays as it is.
template <class F>
__device__ __forceinline__ void load_fragment(F& x, const typename F::E* from,
                                              const NormFragment& fragment) {
  load(x.vectors[0], from + fragment.at.first);
  if (F::kVectors == 2 && fragment.rotates) {
    load(x.vectors[F::kVectors - 1], from + fragment.at.first + fragment.at.second);
  }
}

template <class F>
__device__ __forceinline__ void store_fragment(const F& x, typename F::E* to,
                                               const NormFragment& fragment) {
  store(x.vectors[0], to + fragment.at.first);
  if (F::kVectors == 2 && fragment.rotates) {
    store(x.vectors[F::kVectors - 1], to + fragment.at.first + fragment.at.second);
  }
}

// The channels in the order of memory. Zeros after the vector of one that does not rotate.
template <class F>
__device__ __forceinline__ void load_channels(typename F::C (&x)[F::kChannels],
                                              const typename F::E* from,
                                              const NormFragment& fragment) {
  F f{};
  load_fragment(f, from, fragment);
  f.unpack_to(x);
}

template <class F>
__device__ __forceinline__ void store_channels(const typename F::C (&x)[F::kChannels],
                                               typename F::E* to, const NormFragment& fragment) {
  F f;
  f.pack_from(x);
  store_fragment(f, to, fragment);
}

// Moves the fragments of a head of x that a thread has, or zeros where there is nothing to read.
template <class F>
__device__ __forceinline__ void move_head(const RotatedHeads& x, const RotaryArgs& args,
                                          const NormPlan& plan, uint32_t b, uint32_t s,
                                          uint32_t head, uint32_t group, uint32_t lane) {
  using E = typename F::E;
  const E* const from = channel_at<E>(x.in, b, s, head, 0, group);
  E* const to = channel_at<E>(x.out, b, s, head, 0, group);
#pragma unroll 1
  for (uint32_t index = lane; index < plan.fragments; index += plan.lanes) {
    const NormFragment at = norm_fragment<F>(args, plan.rotary, plan.rotary.in, index);
    F f{};
    if (x.in.data != nullptr) load_fragment(f, from, at);
    store_fragment(f, to, at);
  }
}

// The factors on the channels of a fragment: its weights, plus 1 if the norm says so.
template <class F>
__device__ __forceinline__ void load_factors(typename F::C (&w)[F::kChannels], const RmsNorm& norm,
                                             bool is_q, uint32_t head,
                                             const NormFragment& fragment) {
  using C = typename F::C;
  const void* const weight = is_q ? norm.q_weight : norm.k_weight;
  const int64_t at = head * (is_q ? norm.q_stride_h : norm.k_stride_h) + fragment.at.first;
  const auto load_as = [&](auto* data) {
    load_values<F::N>(w, data + at);
    if constexpr (F::kVectors == 2) {
      if (fragment.rotates) load_values<F::N>(w + F::N, data + at + fragment.at.second);
    }
  };
  if constexpr (F::kVectors == 2) {
#pragma unroll
    for (int i = F::N; i < F::kChannels; ++i) w[i] = 0;
  }
  if (norm.dtype == DType::Float32) {
    load_as(static_cast<const float*>(weight));
  } else if constexpr (!std::is_same_v<typename F::E, float>) {
    load_as(static_cast<const typename F::E*>(weight));
  }
  if (norm.unit_offset) {
#pragma unroll
    for (int i = 0; i < F::kChannels; ++i) w[i] += C(1);
  }
}

// The template parameters of a kernel.
template <class E, int N, Order kOrder, bool kFullWidth_>
struct NormTraits {
  using F = Fragment<E, N, kOrder>;
  static constexpr bool kFullWidth = kFullWidth_;
};

// Blocks that a multiprocessor should hold at a time, which bounds the registers of a thread: 64
// where the kernel then needs no local memory.
template <class Traits, bool kPacked = false>
constexpr int resident_blocks() {
  const bool two = sizeof(typename Traits::F::E) == 2 && !Traits::kFullWidth && !kPacked;
  return two ? 1024 / kMostLanes : 1;
}

inline bool weights_allow(const RmsNorm& norm, int n) {
  const int64_t bytes = size_of(norm.dtype);
  Alignment alignment(bytes);
  alignment.add_address(norm.q_weight);
  alignment.add_address(norm.k_weight);
  alignment.add_elements(norm.q_stride_h | norm.k_stride_h);
  return alignment.allows(min_of(n * bytes, 16));
}

// Calls launch with the traits for the alignment of all tensors. Eight channels a thread, of
// float64 four: twice as many would take twice the registers.
template <class E, class Launch>
void dispatch_traits(const RotaryArgs& args, const RmsNorm& norm, Alignment alignment,
                     const Launch& launch) {
  constexpr int kWhole = 16 / sizeof(E), kHalfSplit = kWhole < 4 ? kWhole : 4;
  const Order order = order_of(args.interleaved, args.interleaved_out);
  const int n = order == Order::Interleaved ? kWhole : kHalfSplit;
  alignment.add_channels(args, true);
  const bool aligned = alignment.allows(order == Order::HalfSplit ? kHalfSplit * sizeof(E) : 16);
  if (!aligned || !fits(alignment, args, n) || !weights_allow(norm, n)) {
    launch(NormTraits<E, 1, Order::Any, true>());
  } else if (order == Order::Interleaved) {
    launch(NormTraits<E, kWhole, Order::Interleaved, true>());
  } else if (order == Order::HalfSplit && !args.table.full_width) {
    launch(NormTraits<E, kHalfSplit, Order::HalfSplit, false>());
  } else {
    launch(NormTraits<E, kHalfSplit, Order::Either, true>());
  }
}

// Norm rows, heads and tokens are counted in 32 bits. heads: of all tensors.
inline void check_rows(const RotaryArgs& args, int64_t heads) {
  check_counts(args.op, heads, args.head_dim, args.batch, args.seq);
  const int64_t most = int64_t{0xffffffff} / (heads + 3);
  if (args.batch <= most / args.seq) return;
  throw_too_many_rows(args.op, heads, args.batch, args.seq);
}

// most_heads: of q or of k, whichever has more.
template <class F>
NormPlan norm_plan(const RotaryArgs& args, const RmsNorm& norm, int64_t most_heads) {
  NormPlan plan{};
  plan.rotary = rotary_plan<F>(args, most_heads, args.head_dim - args.rotary_dim);
  plan.fragments = plan.rotary.rotated_fragments + plan.rotary.copied_vectors;
  const int64_t fragments = plan.fragments * (norm.all_heads ? most_heads : 1);
  int64_t lanes = 1;
  while (lanes < fragments && lanes < kMostLanes) lanes *= 2;
  plan.lanes = static_cast<uint32_t>(lanes);
  plan.groups = static_cast<uint32_t>(lanes > kWarpThreads ? 1 : kBlockThreads / lanes);
  plan.steps = static_cast<int32_t>(ceil_div(fragments, lanes));
  return plan;
}

}  // namespace rope::cuda
