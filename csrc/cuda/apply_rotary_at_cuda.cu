// apply_rotary_at on CUDA: the angles of a token are computed by the threads of its group together,
// once for all of its heads, into shared memory, from where each takes those of its unit.
#include "../kernels.h"
#include "angles.cuh"
#include "rotate_heads.cuh"

namespace rope::cuda {

namespace {

// cos and sin of the pairs of a group: those of its units.
template <class C>
struct SharedTurns {
  C* cos;
  C* sin;
};

// Computes pairs [first, first + count) of the group's token, one a thread, as a table has them.
template <class C>
__device__ __forceinline__ void fill(const SharedTurns<C>& shared, const Angles& angles,
                                     const Place& place, int64_t first, uint32_t count,
                                     uint32_t thread, uint32_t threads) {
  const int64_t token = token_at(angles.positions, place.b, place.s);
  const bool has_axes = angles.axes.data != nullptr;
  const double of_all = has_axes ? 0 : position_at(angles.positions, token);
#pragma unroll 1
  for (uint32_t i = thread; i < count; i += threads) {
    const double inv_freq = value_at(angles.inv_freq, angles.inv_freq_dtype, first + i);
    const double position = has_axes ? position_of_pair(angles, token, first + i) : of_all;
    const SinCos value = sin_cos<std::is_same_v<C, double>>(position, inv_freq);
    shared.cos[i] = narrow<C>(value.cos * angles.attention_scaling);
    shared.sin[i] = narrow<C>(value.sin * angles.attention_scaling);
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
  extern __shared__ double shared_memory[];  // cos, sin: [groups_per_block, pairs of a group]
  const RotaryGeometry& g = plan.geometry;
  const uint32_t group_pairs = g.unit_lanes * In::kPairs;
  const Lane lane = lane_of(g);
  const bool works = has_token(args, g, lane);
  const Part part = part_of(g, lane);
  C* const cos = reinterpret_cast<C*>(shared_memory) + lane.in_block * group_pairs;
  const SharedTurns<C> shared{cos, cos + g.groups_per_block * group_pairs};
  if (works && part.first_unit < plan.rotate_units) {
    const uint32_t units = min(g.unit_lanes, plan.rotate_units - part.first_unit);
    fill(shared, args.angles, part.place, static_cast<int64_t>(part.first_unit) * In::kPairs,
         units * In::kPairs, lane.thread, g.unit_lanes * g.head_lanes);
  }
  __syncthreads();
  if (!works || part.unit >= plan.rotate_units + plan.copy_units) return;

  turn_heads<E, N, kInterleaved, kInterleavedOut, false, true>(
      args, plan, part.place, part.unit, [&](auto& turns) {
        const uint32_t first = (part.unit - part.first_unit) * In::kPairs;
#pragma unroll
        for (int j = 0; j < In::kPairs; ++j) {
          const C c = shared.cos[first + j], s = shared.sin[first + j];
          const Turn<C> turn{c, s, c, s};
          turns.set(j, args.inverse ? inverse_of(turn) : turn);
        }
      });
}

template <class E, int N, bool kInterleaved, bool kInterleavedOut>
void launch_units(RotaryAtArgs args, Plan plan, void* stream) {
  using In = UnitOf<E, N, kInterleaved, kInterleaved != kInterleavedOut>;
  if (!lay_out<E, N, kInterleaved, kInterleavedOut>(args, plan)) return;
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
