// apply_rotary_at on CUDA: the threads of a token compute its angles together, once for all of its
// heads, into shared memory. Each thread then takes those of its fragment.
#include "cuda/parts/angles.cuh"
#include "cuda/parts/rotate_heads.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

// 16-byte vectors, or fragments of one pair: the same kernels copy the channels that do not rotate,
// and vectors of 8 bytes are moved as single elements, as each further variant takes as long to
// compile.
template <class E, int N, Order kOrder>
struct RotationByAnglesTraits {
  using F = Fragment<E, N, kOrder>;

  // 64 registers a thread, and 80 for eight pairs whose order changes.
  static constexpr int blocks() {
    return resident_blocks(kOrder == Order::Either && N == 8 ? 768 : 1024);
  }
};

// Computes cos and sin of pairs first, first + step, ... below last of a token, scaled and rounded
// as in a table. cos, sin: of pair `begin` and those after it.
template <class C>
__device__ __forceinline__ void compute_angles(C* cos, C* sin, const Angles& angles,
                                               const ThreadWork& work, uint32_t begin,
                                               uint32_t first, uint32_t last, uint32_t step) {
  const int64_t token = token_at(angles.positions, work.b, work.s);
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

// args.k: as with_one_head_index has it.
template <class Traits>
__global__ void __launch_bounds__(kBlockThreads, Traits::blocks())
    apply_rotary_at_kernel(const RotaryAtArgs args, const RotaryPlan plan) {
  using F = typename Traits::F;
  using C = typename F::C;
  constexpr int kPairs = F::kPairs;
  extern __shared__ double shared_memory[];  // cos, sin: [groups_per_block, fragment_lanes, kPairs]
  const RotaryGeometry& g = plan.geometry;
  const uint32_t lanes = g.fragment_lanes * g.head_lanes;
  const uint32_t group = threadIdx.x / lanes, lane = threadIdx.x - group * lanes;
  const uint32_t head_lane = lane / g.fragment_lanes;
  const uint32_t fragment_lane = lane - head_lane * g.fragment_lanes;
  const uint32_t at = (group * g.fragment_lanes + fragment_lane) * kPairs;
  C* const cos = reinterpret_cast<C*>(shared_memory) + at;
  C* const sin = cos + g.groups_per_block * g.fragment_lanes * kPairs;

  ThreadWork work;
  const bool works = find_work(args, plan, work);
  if (works && work.fragment < plan.rotated_fragments) {
    // The threads that have this fragment of different heads share its pairs.
    const uint32_t first = work.fragment * kPairs;
    compute_angles(cos, sin, args.angles, work, first, first + head_lane, first + kPairs,
                   g.head_lanes);
  }
  __syncthreads();
  if (!works) return;
  rotate_heads<F, false, true>(args, plan, work, [&](auto& values) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) values.set(j, {cos[j], sin[j], cos[j], sin[j]});
    values.apply_flags(args);
  });
}

template <class E, int N, Order kOrder>
void launch_kernel(const RotaryAtArgs& given, void* stream) {
  using Traits = RotationByAnglesTraits<E, N, kOrder>;
  using F = typename Traits::F;
  const int64_t heads = given.q.heads + given.k.heads;
  const RotaryPlan plan = rotary_plan<F>(given, heads, copied_channels(given));
  if (is_empty(plan)) return;
  RotaryAtArgs args = given;
  static_cast<RotaryArgs&>(args) = with_one_head_index(given);
  const RotaryGeometry& g = plan.geometry;
  // At most 16 KiB: 256 threads of 8 pairs.
  const size_t bytes =
      size_t{2} * g.groups_per_block * g.fragment_lanes * F::kPairs * sizeof(typename F::C);
  launch_with(bytes, args.op, apply_rotary_at_kernel<Traits>, g.grid, g.block_threads, stream, args,
              plan);
}

template <class E>
void launch_element(const RotaryAtArgs& args, void* stream) {
  Alignment alignment = alignment_of(args);
  alignment.add_channels(args, copied_channels(args) > 0);
  // float64 is for comparison: one kernel is enough.
  constexpr int kWide = 16 / sizeof(E);
  if constexpr (kWide > 2) {
    if (alignment.allows(16)) {
      switch (order_of(args.interleaved, args.interleaved_out)) {
        case Order::HalfSplit: return launch_kernel<E, kWide, Order::HalfSplit>(args, stream);
        case Order::Interleaved: return launch_kernel<E, kWide, Order::Interleaved>(args, stream);
        default: return launch_kernel<E, kWide, Order::Either>(args, stream);
      }
    }
  }
  launch_kernel<E, 1, Order::Any>(args, stream);
}

}  // namespace

void apply_rotary_at(const RotaryAtArgs& args, void* stream) {
  for_slices(args, args, args.q.heads + args.k.heads, [&](const RotaryAtArgs& slice) {
    dispatch(args.dtype, [&](auto storage) { launch_element<decltype(storage)>(slice, stream); });
  });
}

}  // namespace rope::cuda
