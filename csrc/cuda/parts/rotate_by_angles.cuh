// Rotations without a table: the threads of a token compute its angles together, once for all of
// its heads, into shared memory. Each thread then takes those of its fragment.
#pragma once

#include "cuda/parts/angles.cuh"
#include "cuda/parts/rotate_heads.cuh"

namespace rope::cuda {

// Computes cos and sin of pairs first, first + step, ... below last of a token, rounded as in a
// table. cos, sin: of pair `begin` and those after it.
template <class C, class AnglesOfToken>
__device__ __forceinline__ void compute_angles(C* cos, C* sin, const AnglesOfToken& angles,
                                               uint32_t begin, uint32_t first, uint32_t last,
                                               uint32_t step) {
#pragma unroll 1
  for (uint32_t pair = first; pair < last; pair += step) {
    const SinCos value = angles.template at<std::is_same_v<C, double>>(pair);
    cos[pair - begin] = narrow<C>(value.cos);
    sin[pair - begin] = narrow<C>(value.sin);
  }
}

// AnglesOfToken: made of (args, work), its at<kDouble>(pair) are sin and cos, scaled.
// find_heads(work): sets the b and s of the token's heads; false if it has none.
template <class F, class AnglesOfToken, bool kCopies, class Args, class Find>
__device__ __forceinline__ void rotate_by_angles(const Args& args, const RotaryPlan& plan,
                                                 const Find& find_heads) {
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
    compute_angles(cos, sin, AnglesOfToken(args, work), first, first + head_lane, first + kPairs,
                   g.head_lanes);
  }
  __syncthreads();
  if (!works || !find_heads(work)) return;
  rotate_heads<F, false, kCopies>(args, plan, work, [&](auto& values) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) values.set(j, {cos[j], sin[j], cos[j], sin[j]});
    values.apply_flags(args);
  });
}

// Launches a kernel of it.
template <class F, class Args>
void launch_by_angles(const Args& args, const RotaryPlan& plan, void (*kernel)(Args, RotaryPlan),
                      void* stream) {
  const RotaryGeometry& g = plan.geometry;
  // At most 16 KiB: 256 threads of 8 pairs.
  const size_t bytes =
      size_t{2} * g.groups_per_block * g.fragment_lanes * F::kPairs * sizeof(typename F::C);
  launch_with(bytes, args.op, kernel, g.grid, g.block_threads, stream, args, plan);
}

}  // namespace rope::cuda
