// apply_rotary_at on CUDA: the angles of a token are computed by the threads of its group together,
// once for all of its heads, into shared memory, from where each thread takes those of its unit.
#include "cuda/parts/angles.cuh"
#include "cuda/parts/rotate_heads.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

// Computes those of pairs first, first + step, ... before last of a token's angles, as a table has
// them, into cos and sin, which begin with pair `begin`.
template <class C>
__device__ __forceinline__ void fill(C* cos, C* sin, const Angles& angles, const Place& place,
                                     uint32_t begin, uint32_t first, uint32_t last, uint32_t step) {
  const int64_t token = token_at(angles.positions, place.b, place.s);
  const bool has_axes = angles.axes.data != nullptr;
  const double of_all = has_axes ? 0 : position_at(angles.positions, token);
#pragma unroll 1
  for (uint32_t pair = first; pair < last; pair += step) {
    const double inv_freq = value_at(angles.inv_freq, angles.inv_freq_dtype, pair);
    const double position = has_axes ? position_of_pair(angles, token, pair) : of_all;
    const SinCos value = sin_cos<std::is_same_v<C, double>>(position, inv_freq);
    cos[pair - begin] = narrow<C>(value.cos * angles.attention_scaling);
    sin[pair - begin] = narrow<C>(value.sin * angles.attention_scaling);
  }
}

// 64 registers, as for kernels with four values a pair; 80 for eight pairs from order to order.
template <int N, bool kInterleaved, bool kInterleavedOut>
constexpr int resident_blocks() {
  return (kInterleaved != kInterleavedOut && N == 8 ? 768 : 1024) / kBlockThreads;
}

// Units of whole 16-byte vectors, or of one pair in any order (N == 1): channels that do not rotate
// are copied by the same kernel, and vectors of 8 bytes moved as single elements, as each variant
// more takes as long to compile.
template <class E, int N, bool kInterleaved, bool kInterleavedOut>
__global__ void __launch_bounds__(kBlockThreads,
                                  (resident_blocks<N, kInterleaved, kInterleavedOut>()))
    apply_rotary_at_kernel(const RotaryAtArgs args, const Plan plan) {
  using In = UnitOf<E, N, kInterleaved, kInterleaved != kInterleavedOut>;
  using C = typename In::C;
  constexpr int kPairs = In::kPairs;
  extern __shared__ double shared_memory[];  // cos, sin: [groups_per_block, unit_lanes, kPairs]
  const RotaryGeometry& g = plan.geometry;
  const uint32_t lanes = g.unit_lanes * g.head_lanes;
  const uint32_t group = threadIdx.x / lanes, lane = threadIdx.x - group * lanes;
  const uint32_t head_lane = lane / g.unit_lanes, unit_lane = lane - head_lane * g.unit_lanes;
  const uint32_t at = (group * g.unit_lanes + unit_lane) * kPairs;  // of the unit's pairs
  C* const cos = reinterpret_cast<C*>(shared_memory) + at;
  C* const sin = cos + g.groups_per_block * g.unit_lanes * kPairs;

  uint32_t unit;
  Place place;
  const bool works = find_place(args, plan, place, unit);
  if (works && unit < plan.rotate_units) {  // the threads of a unit share its pairs
    const uint32_t first = unit * kPairs;
    fill(cos, sin, args.angles, place, first, first + head_lane, first + kPairs, g.head_lanes);
  }
  __syncthreads();
  if (!works) return;
  turn_heads<E, N, kInterleaved, kInterleavedOut, false, true>(
      args, plan, place, unit, [&](auto& turns) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const Turn<C> turn{cos[j], sin[j], cos[j], sin[j]};
          turns.set(j, args.inverse ? inverse_of(turn) : turn);
        }
      });
}

template <class E, int N, bool kInterleaved, bool kInterleavedOut>
void launch_units(RotaryAtArgs args, Plan plan, void* stream) {
  constexpr bool kMixed = kInterleaved != kInterleavedOut;
  using In = UnitOf<E, N, kInterleaved, kMixed>;
  using Out = UnitOf<E, N, kInterleavedOut, kMixed>;
  if (!cut_into_units<In, Out, N>(plan, args)) return;
  args.k.in = counted_on(args.k.in, args.q.heads, sizeof(E));
  args.k.out = counted_on(args.k.out, args.q.heads, sizeof(E));
  const RotaryGeometry& g = plan.geometry;
  // At most 16 KiB: 256 threads of 8 pairs.
  const size_t bytes =
      size_t{2} * g.groups_per_block * g.unit_lanes * In::kPairs * sizeof(typename In::C);
  launch_with(bytes, args.op, apply_rotary_at_kernel<E, N, kInterleaved, kInterleavedOut>, g.grid,
              g.block_threads, stream, args, plan);
}

template <class E>
void launch_element(const RotaryAtArgs& args, void* stream) {
  constexpr int kWhole = 16 / sizeof(E);
  int64_t widest;
  const Plan plan = plan_of<E>(args, widest);
  if (widest < 16) {
    launch_units<E, 1, false, false>(args, plan, stream);
  } else if (args.interleaved) {
    args.interleaved_out ? launch_units<E, kWhole, true, true>(args, plan, stream)
                         : launch_units<E, kWhole, true, false>(args, plan, stream);
  } else {
    args.interleaved_out ? launch_units<E, kWhole, false, true>(args, plan, stream)
                         : launch_units<E, kWhole, false, false>(args, plan, stream);
  }
}

}  // namespace

void apply_rotary_at(const RotaryAtArgs& args, void* stream) {
  for_slices(args, [&](const RotaryAtArgs& slice) {
    dispatch(args.dtype, [&](auto storage) { launch_element<decltype(storage)>(slice, stream); });
  });
}

}  // namespace rope::cuda
