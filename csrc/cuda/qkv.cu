// apply_rotary_qkv on CUDA: q, k and v out of one packed tensor or into it, in one launch.
#include "cuda/parts/rotate_heads.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

template <class E, int N, Order kOrder, bool kFullWidth_>
struct QkvTraits {
  using F = Fragment<E, N, kOrder>;
  static constexpr bool kFullWidth = kFullWidth_;

  static constexpr int blocks() {
    return resident_blocks(kOrder == Order::Either && N == 8 ? 768 : 1024);
  }
};

// From a thread's head to its next: so many groups, and so many heads of a group.
struct GroupStep {
  uint32_t groups, heads;
};

// The heads of q, k and v of a group are counted together: args.k and args.v have their pointers
// moved back by those before them.
template <class Traits>
__global__ void __launch_bounds__(kBlockThreads, Traits::blocks())
    apply_rotary_qkv_kernel(const RotaryQkvArgs args, const RotaryPlan plan, const GroupStep step) {
  using F = typename Traits::F;
  using E = typename F::E;
  ThreadWork work;
  if (!find_work(args, plan, work)) return;
  const bool rotates = work.fragment < plan.rotated_fragments;
  TableValues<F, Traits::kFullWidth> values;
  if (rotates) load_table(values, args, plan.table, work.b, work.s, work.fragment);
  const FragmentPlace place = place_of<F>(args, plan, work.fragment, rotates);
  const uint32_t first_k = static_cast<uint32_t>(args.q.heads);
  const uint32_t first_v = first_k + static_cast<uint32_t>(args.k.heads);
  const uint32_t of_group = first_v + static_cast<uint32_t>(args.v.heads);
  uint32_t group = work.head / of_group, head = work.head - group * of_group;
#pragma unroll 1
  while (group < static_cast<uint32_t>(args.groups)) {
    const bool is_q = head < first_k, is_v = head >= first_v;
    const auto from = choose(is_q, args.q.in, choose(is_v, args.v.in, args.k.in));
    const auto to = choose(is_q, args.q.out, choose(is_v, args.v.out, args.k.out));
    const Offsets at = is_v ? place.in : place.out;
    F x{};
    if (from.data != nullptr) {
      x.load_from(channel_at<E>(from, work.b, work.s, head, place.in.first, group),
                  place.in.second);
      if (rotates && !is_v) x = rotated(x, values, args);
    }
    x.store_to(channel_at<E>(to, work.b, work.s, head, at.first, group), at.second);
    head += step.heads;
    const bool passed = head >= of_group;
    head -= passed ? of_group : 0;
    group += step.groups + (passed ? 1 : 0);
  }
}

RotaryQkvArgs with_one_index_of_heads(RotaryQkvArgs args) {
  const int64_t bytes = size_of(args.dtype);
  const auto move = [&](RotatedHeads& x, int64_t before) {
    if (x.in.data != nullptr) x.in = indexed_after_q(x.in, before, bytes);
    x.out = indexed_after_q(x.out, before, bytes);
  };
  move(args.k, args.q.heads);
  move(args.v, args.q.heads + args.k.heads);
  return args;
}

template <class E, int N, Order kOrder, bool kFullWidth>
void launch_kernel(const RotaryQkvArgs& args, int64_t heads, void* stream) {
  using Traits = QkvTraits<E, N, kOrder, kFullWidth>;
  const RotaryPlan plan =
      rotary_plan<typename Traits::F>(args, heads, args.head_dim - args.rotary_dim);
  const uint32_t of_group = plan.heads / static_cast<uint32_t>(args.groups);
  const GroupStep step{plan.head_step / of_group, plan.head_step % of_group};
  launch(args.op, apply_rotary_qkv_kernel<Traits>, plan.geometry.grid, plan.geometry.block_threads,
         stream, with_one_index_of_heads(args), plan, step);
}

template <class E>
void launch_element(const RotaryQkvArgs& args, int64_t heads, void* stream) {
  constexpr int kWide = 16 / sizeof(E);
  Alignment alignment = alignment_of(args);
  alignment.add(args.v.in, args.batch, args.seq, args.v.heads);
  alignment.add(args.v.out, args.batch, args.seq, args.v.heads);
  alignment.add_channels(args, true);
  if (!fits(alignment, args, kWide)) {
    launch_kernel<E, 1, Order::Any, true>(args, heads, stream);
  } else if (args.interleaved != args.interleaved_out) {
    launch_kernel<E, kWide, Order::Either, true>(args, heads, stream);
  } else if (args.interleaved) {
    launch_kernel<E, kWide, Order::Interleaved, true>(args, heads, stream);
  } else if (args.table.full_width) {
    launch_kernel<E, kWide, Order::HalfSplit, true>(args, heads, stream);
  } else {
    launch_kernel<E, kWide, Order::HalfSplit, false>(args, heads, stream);
  }
}

}  // namespace

void apply_rotary_qkv(const RotaryQkvArgs& args, void* stream) {
  const int64_t heads = args.groups * (args.q.heads + args.k.heads + args.v.heads);
  for_slices(args, args, heads, [&](const RotaryQkvArgs& slice) {
    dispatch(args.dtype,
             [&](auto storage) { launch_element<decltype(storage)>(slice, heads, stream); });
  });
}

}  // namespace rope::cuda
