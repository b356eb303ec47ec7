// How a rotation is divided among threads: each thread has one fragment of each of its heads of a
// token, and keeps the table's values for it.
#pragma once

#include "cuda/parts/alignment.h"
#include "cuda/parts/fragment.cuh"
#include "cuda/parts/launch.cuh"
#include "cuda/parts/table_values.cuh"

namespace rope::cuda {

// What the host computes for one launch.
struct RotaryPlan {
  RotaryGeometry geometry;
  FragmentLayout in, out;
  TableLayout table;
  uint32_t rotated_fragments, copied_fragments;  // of one head
  uint32_t copied_vectors;                       // of one head; 0 in place
  uint32_t heads;                                // of all tensors
  uint32_t head_step;                            // from a thread's head to its next
};

// A thread's token, its first head, counted over all tensors, and its fragment of each head.
struct ThreadWork {
  uint32_t b, s, head, fragment;
};

// false: the thread has no work.
__device__ __forceinline__ bool find_work(const RotaryArgs& args, const RotaryPlan& plan,
                                          ThreadWork& work) {
  const RotaryGeometry& g = plan.geometry;
  const uint32_t b = blockIdx.z * gridDim.y + blockIdx.y;
  const uint32_t lanes = g.fragment_lanes * g.head_lanes;
  const uint32_t group_in_block = threadIdx.x / lanes;
  const uint32_t lane = threadIdx.x - group_in_block * lanes;
  const uint32_t group = blockIdx.x * g.groups_per_block + group_in_block;
  if (b >= args.batch || group_in_block >= g.groups_per_block || group >= g.groups) return false;

  const uint32_t s = group / g.parts;
  const uint32_t part = group - s * g.parts;
  const uint32_t split = part / g.fragment_chunks;
  const uint32_t chunk = part - split * g.fragment_chunks;
  const uint32_t head_lane = lane / g.fragment_lanes;
  const uint32_t fragment = chunk * g.fragment_lanes + lane - head_lane * g.fragment_lanes;
  if (fragment >= plan.rotated_fragments + plan.copied_fragments) return false;
  work = {b, s, split * g.head_lanes + head_lane, fragment};
  return true;
}

// The vectors of the channels before and after those that rotate are numbered together. Copied
// fragment `index` has vector `index` and, if fragments have two, vector index + copied_fragments.
// Where that does not exist, the fragment moves its first vector twice.
template <class F>
__device__ __forceinline__ Offsets copied_offsets(const RotaryArgs& args, const RotaryPlan& plan,
                                                  uint32_t index) {
  const auto channel_of = [&](uint32_t vector) {
    const int32_t channel = static_cast<int32_t>(vector * F::N - args.rotary_offset);
    return channel < 0 ? channel : channel + static_cast<int32_t>(args.rotary_dim);
  };
  const int32_t first = channel_of(index);
  const uint32_t second = index + plan.copied_fragments;
  if (F::kVectors == 1 || second >= plan.copied_vectors) return {first, 0};
  return {first, static_cast<uint32_t>(channel_of(second) - first)};
}

// Where a thread's fragment lies in what is read and in what is written.
struct FragmentPlace {
  Offsets in, out;
};

template <class F>
__device__ __forceinline__ FragmentPlace place_of(const RotaryArgs& args, const RotaryPlan& plan,
                                                  uint32_t fragment, bool rotates) {
  if (!rotates) {
    const Offsets copied = copied_offsets<F>(args, plan, fragment - plan.rotated_fragments);
    return {copied, copied};
  }
  const Offsets in = F::offsets(fragment, plan.in);
  return {in, F::kOneOrder ? in : F::offsets(fragment, plan.out)};
}

// Fragments<F> of `heads` heads, of which `copied_channels` channels do not rotate but are moved.
template <class F>
RotaryPlan rotary_plan(const RotaryArgs& args, int64_t heads, int64_t copied_channels) {
  const Table& table = args.table;
  const bool neighbours = table.full_width && table.interleaved;
  const int64_t half = args.rotary_dim / 2;
  RotaryPlan plan{};
  plan.in = F::layout(args.rotary_dim, args.interleaved);
  plan.out = F::layout(args.rotary_dim, args.interleaved_out);
  plan.table.step = neighbours ? 2 * F::kPairs : F::kPairs;
  plan.table.second = neighbours ? F::kPairs : static_cast<uint32_t>(half);
  plan.rotated_fragments = static_cast<uint32_t>(half / F::kPairs);
  plan.copied_vectors = static_cast<uint32_t>(copied_channels / F::N);
  plan.copied_fragments = (plan.copied_vectors + F::kVectors - 1) / F::kVectors;
  plan.heads = static_cast<uint32_t>(heads);
  const int64_t fragments = int64_t{plan.rotated_fragments} + plan.copied_fragments;
  if (fragments == 0) return plan;
  plan.geometry = rotary_geometry(fragments, heads, args.batch, args.seq, sm_count(args.op));
  plan.head_step = plan.geometry.splits * plan.geometry.head_lanes;
  return plan;
}

inline bool is_empty(const RotaryPlan& plan) {
  return plan.rotated_fragments + plan.copied_fragments == 0;
}

// Whether the tensors and the table allow fragments with vectors of n channels.
inline bool fits(const Alignment& alignment, const RotaryArgs& args, int n) {
  const bool interleaved = args.interleaved && args.interleaved_out;
  return alignment.allows(n * size_of(args.dtype)) &&
         table_allows(args.table, args.dtype, interleaved ? n / 2 : n);
}

}  // namespace rope::cuda
