// What the kernels that normalise have in common: how threads share a row, and its weight.
//
// A group of `lanes` threads has a row: a head, or all heads of a token. Its units are counted
// through, those of the first head first: of each head the units that rotate, then vectors of the
// channels that do not. Thread `lane` has the units lane, lane + lanes, ...; the first of them
// stays in registers. So where a row has at most kMostLanes units, it is read once; of a longer
// one, the rest is read twice.
#pragma once

#include "cuda/parts/rotary_plan.cuh"

namespace rope::cuda {

constexpr int kMostLanes = 512;

struct RowPlan {
  Plan rotary;
  uint32_t units;          // of one head
  uint32_t lanes, groups;  // threads of a row, a power of two; rows that a block has at a time
  uint32_t rows;           // in all (forward alone)
  bool weights_aligned;    // a unit's weights are aligned vectors
};

// The sum of `value` over the lanes of a group, of the same bits in each of them and always. All
// threads of the block take part; rows of more than a warp have the block for themselves.
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

template <class C>
__device__ __forceinline__ C inverse_rms_of(C sum_of_squares, C channels, double eps) {
  return C(1) / sqrt(sum_of_squares / channels + static_cast<C>(eps));
}

// A unit of a head, in a tensor of one order of pairs. One that does not rotate is a single vector.
struct Spot {
  int32_t channel;  // from the first that rotates
  uint32_t second;
  bool rotates;
};

template <class U, int N>
__device__ __forceinline__ Spot spot_of(const RotaryArgs& args, const Plan& plan, UnitLayout layout,
                                        uint32_t unit) {
  if (unit < plan.rotate_units) {
    return {static_cast<int32_t>(U::channel_of(unit, layout)), layout.second, true};
  }
  const int32_t channel = static_cast<int32_t>((unit - plan.rotate_units) * N) -
                          static_cast<int32_t>(args.rotary_offset);
  return {channel < 0 ? channel : channel + static_cast<int32_t>(args.rotary_dim), 0, false};
}

// The channels of a unit in the order of memory; zeros after the vector of one that does not
// rotate.
template <class U, int N, class E>
__device__ __forceinline__ void load_channels(typename U::C (&x)[U::kChannels], const E* from,
                                              const Spot& spot) {
  if (spot.rotates) {
    U unit;
    unit.load_from(from + spot.channel, spot.second);
    unit.values_to(x);
  } else {
    Vector<E, N> v;
    load(v, from + spot.channel);
    unpack(v, x);
#pragma unroll
    for (int i = N; i < U::kChannels; ++i) x[i] = 0;
  }
}

template <class U, int N, class E>
__device__ __forceinline__ void store_channels(const typename U::C (&x)[U::kChannels], E* to,
                                               const Spot& spot) {
  if (spot.rotates) {
    U unit;
    unit.pack_values(x);
    unit.store_to(to + spot.channel, spot.second);
  } else {
    Vector<E, N> v;
    pack(v, x);
    store(v, to + spot.channel);
  }
}

// The factors on the channels of a unit: its weights, plus 1 if the norm says so.
template <class U, int N, class W>
__device__ __forceinline__ void load_factors_of(typename U::C (&w)[U::kChannels], const W* weight,
                                                const Spot& spot, bool aligned, bool unit_offset) {
  using C = typename U::C;
  constexpr int kLength = U::kLength;
  const W* from = weight + spot.channel;
  const auto load_all = [&](auto is_aligned) {
    if (spot.rotates) {
#pragma unroll
      for (int i = 0; i < U::kCount; ++i) {
        load_values<C, kLength, decltype(is_aligned)::value>(w + i * kLength,
                                                             from + i * spot.second);
      }
    } else {
      load_values<C, N, decltype(is_aligned)::value>(w, from);
#pragma unroll
      for (int i = N; i < U::kChannels; ++i) w[i] = 0;
    }
  };
  aligned ? load_all(std::true_type()) : load_all(std::false_type());
  if (unit_offset) {
#pragma unroll
    for (int i = 0; i < U::kChannels; ++i) w[i] += C(1);
  }
}

template <class U, int N, class E>
__device__ __forceinline__ void load_factors(typename U::C (&w)[U::kChannels], const RmsNorm& norm,
                                             bool is_q, uint32_t head, const Spot& spot,
                                             bool aligned) {
  const void* const weight = is_q ? norm.q_weight : norm.k_weight;
  const int64_t at = head * (is_q ? norm.q_stride_h : norm.k_stride_h);
  if (norm.dtype == DType::Float32) {
    load_factors_of<U, N>(w, static_cast<const float*>(weight) + at, spot, aligned,
                          norm.unit_offset);
  } else {
    load_factors_of<U, N>(w, static_cast<const E*>(weight) + at, spot, aligned, norm.unit_offset);
  }
}

// A kernel's template arguments.
template <int N, bool kInterleaved, bool kInterleavedOut, bool kFull>
struct UnitShape {
  static constexpr int kN = N;
  static constexpr bool kIn = kInterleaved, kOut = kInterleavedOut, kFullWidth = kFull;
};

// Calls launch with the shape of the units for the alignment of all tensors. Eight channels a
// thread, of float64 four: twice as many would take twice the registers. N == 1: of any order.
template <class E, class Launch>
void dispatch_units(const RotaryArgs& args, Alignment alignment, const Launch& launch) {
  constexpr int kWhole = 16 / sizeof(E), kHalfSplit = kWhole < 4 ? kWhole : 4;
  const bool in = args.interleaved, out = args.interleaved_out;
  alignment.add_elements(in && out ? args.rotary_dim : args.rotary_dim / 2);
  alignment.add_elements(args.rotary_offset);
  alignment.add_elements(args.head_dim - args.rotary_dim);
  const bool aligned = alignment.allows(in || out ? 16 : kHalfSplit * sizeof(E));
  if (!aligned) {
    launch(UnitShape<1, false, false, true>());
  } else if (in && out) {
    launch(UnitShape<kWhole, true, true, true>());
  } else if (in) {
    launch(UnitShape<kHalfSplit, true, false, true>());
  } else if (out) {
    launch(UnitShape<kHalfSplit, false, true, true>());
  } else if (args.table.full_width) {
    launch(UnitShape<kHalfSplit, false, false, true>());
  } else {
    launch(UnitShape<kHalfSplit, false, false, false>());
  }
}

// Rows, heads and tokens are counted in 32 bits.
inline void check_rows(const RotaryArgs& args) {
  const int64_t heads = args.q.heads + args.k.heads;
  check_counts(args.op, heads, args.head_dim, args.batch, args.seq);
  const int64_t most = int64_t{0xffffffff} / (heads + 2);
  if (args.batch <= most / args.seq) return;
  throw std::runtime_error(std::string("rope::") + args.op +
                           ": on CUDA expected less than 2^32 heads of all tokens, got batch " +
                           std::to_string(args.batch) + ", sequence " + std::to_string(args.seq) +
                           " and " + std::to_string(heads) + " heads of a token");
}

// What a plan is made of, on the host: In, Out as in cut_into_units.
template <class In, class Out, int N>
RowPlan row_plan(const RotaryArgs& args, const RmsNorm& norm, int64_t most_heads) {
  RowPlan plan{};
  plan.rotary.heads = static_cast<uint32_t>(most_heads);
  plan.rotary.copy_vectors = static_cast<uint32_t>(args.head_dim - args.rotary_dim);
  cut_into_units<In, Out, N>(plan.rotary, args);
  plan.units = plan.rotary.rotate_units + plan.rotary.copy_vectors;
  const int64_t units = plan.units * (norm.all_heads ? most_heads : 1);
  int64_t lanes = 1;
  while (lanes < units && lanes < kMostLanes) lanes *= 2;
  plan.lanes = static_cast<uint32_t>(lanes);
  plan.groups = static_cast<uint32_t>(lanes > kWarpThreads ? 1 : kBlockThreads / lanes);
  const int64_t bytes = size_of(norm.dtype);
  Alignment alignment(bytes);
  alignment.add_address(norm.q_weight);
  alignment.add_address(norm.k_weight);
  alignment.add_elements(norm.q_stride_h | norm.k_stride_h);
  constexpr int64_t kLongest = In::kLength > Out::kLength ? In::kLength : Out::kLength;
  plan.weights_aligned = alignment.allows(std::min<int64_t>(kLongest * bytes, 16));
  return plan;
}

}  // namespace rope::cuda
