// apply_rotary on CUDA: q and k in one launch, with each thread's table values in registers.
#include "cuda/parts/rotate_heads.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

// Without kGeneral the table has P columns, and no channel is copied.
template <class E, int N, Order kOrder, bool kGeneral_>
struct RotationTraits {
  using F = Fragment<E, N, kOrder>;
  static constexpr bool kGeneral = kGeneral_;

  // 1536 threads have 40 registers each. That is the aim where the kernel then needs no local
  // memory. Eight pairs take 40 to 48 registers, with four table values a pair 64, and a few more
  // if their order changes.
  static constexpr int blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    constexpr int kEightPairs = 1280;
#else
    constexpr int kEightPairs = 1536;
#endif
    if (kOrder == Order::Any || kOrder == Order::Interleaved) return resident_blocks(1536);
    if (kOrder == Order::Either && N == 8) return resident_blocks(768);
    if (kGeneral) return resident_blocks(1024);
    return resident_blocks(N == 8 ? kEightPairs : 1536);
  }
};

// args.k: as with_one_head_index has it.
template <class Traits>
__global__ void __launch_bounds__(kBlockThreads, Traits::blocks())
    apply_rotary_kernel(const RotaryArgs args, const RotaryPlan plan) {
  using F = typename Traits::F;
  constexpr bool kGeneral = Traits::kGeneral;
  ThreadWork work;
  if (!find_work(args, plan, work)) return;
  rotate_heads<F, kGeneral, kGeneral>(args, plan, work, [&](auto& values) {
    load_table(values, args, plan.table, work.b, work.s, work.fragment);
  });
}

template <class E, int N, Order kOrder, bool kGeneral>
void launch_kernel(const RotaryArgs& args, void* stream) {
  using Traits = RotationTraits<E, N, kOrder, kGeneral>;
  const int64_t heads = args.q.heads + args.k.heads;
  const RotaryPlan plan = rotary_plan<typename Traits::F>(args, heads, copied_channels(args));
  if (is_empty(plan)) return;
  launch(args.op, apply_rotary_kernel<Traits>, plan.geometry.grid, plan.geometry.block_threads,
         stream, with_one_head_index(args), plan);
}

template <class E, int N>
void launch_same_order(const RotaryArgs& args, void* stream) {
  if (args.interleaved) {
    launch_kernel<E, N, Order::Interleaved, true>(args, stream);
  } else if (args.table.full_width || copied_channels(args) > 0) {
    launch_kernel<E, N, Order::HalfSplit, true>(args, stream);
  } else {
    launch_kernel<E, N, Order::HalfSplit, false>(args, stream);
  }
}

template <class E>
void launch_element(const RotaryArgs& args, void* stream) {
  constexpr int kWide = 16 / sizeof(E), kNarrow = 8 / sizeof(E);
  Alignment alignment = alignment_of(args);
  alignment.add_channels(args, copied_channels(args) > 0);
  const bool converts = args.interleaved != args.interleaved_out;
  if (fits(alignment, args, kWide)) {
    converts ? launch_kernel<E, kWide, Order::Either, true>(args, stream)
             : launch_same_order<E, kWide>(args, stream);
    return;
  }
  if constexpr (kNarrow > 1) {
    if (!converts && fits(alignment, args, kNarrow)) {
      return launch_same_order<E, kNarrow>(args, stream);
    }
  }
  launch_kernel<E, 1, Order::Any, true>(args, stream);
}

}  // namespace

void apply_rotary(const RotaryArgs& args, void* stream) {
  for_slices(args, args, args.q.heads + args.k.heads, [&](const RotaryArgs& slice) {
    dispatch(args.dtype, [&](auto storage) { launch_element<decltype(storage)>(slice, stream); });
  });
}

}  // namespace rope::cuda
