// apply_rotary on CUDA: q and k in one launch, each thread's piece of the table row in registers.
#include "cuda/parts/rotate_heads.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

// Blocks that a multiprocessor should hold at a time, which bounds the registers of a thread: 1536
// threads (40 registers) where the kernel then needs no local memory. Eight pairs of a unit take 40
// to 48 registers, with four table values each 64, and a few more from one order to the other.
template <int N, bool kInterleaved, bool kInterleavedOut, bool kGeneral>
constexpr int resident_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  constexpr int kMost = 1024 / kBlockThreads, kEightPairs = kMost;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr int kMost = 1536 / kBlockThreads, kEightPairs = 1280 / kBlockThreads;
#else
  constexpr int kMost = 1536 / kBlockThreads, kEightPairs = kMost;
#endif
  if (N == 1 || (kInterleaved && kInterleavedOut)) return kMost;
  if (kInterleaved != kInterleavedOut && N == 8) return 768 / kBlockThreads;
  if (kGeneral) return 1024 / kBlockThreads;
  return N == 8 ? kEightPairs : kMost;
}

// Without kGeneral the table is known to have P columns, and no channel is copied. args.k.*.data
// point as far before k that heads can be counted on from those of q. N == 1: pairs in any order,
// before and after.
template <class E, int N, bool kInterleaved, bool kInterleavedOut, bool kGeneral>
__global__ void __launch_bounds__(kBlockThreads,
                                  (resident_blocks<N, kInterleaved, kInterleavedOut, kGeneral>()))
    apply_rotary_kernel(const RotaryArgs args, const Plan plan) {
  uint32_t unit;
  Place place;
  if (!find_place(args, plan, place, unit)) return;
  turn_heads<E, N, kInterleaved, kInterleavedOut, kGeneral, kGeneral>(
      args, plan, place, unit, [&](auto& turns) {
        constexpr bool kMixed = kInterleaved != kInterleavedOut;
        using In = UnitOf<E, N, kInterleaved, kMixed>;
        load_turns<In, kMixed, kGeneral>(turns, args, plan, place, unit);
      });
}

template <class E, int N, bool kInterleaved, bool kInterleavedOut, bool kGeneral>
void launch_units(RotaryArgs args, Plan plan, void* stream) {
  constexpr bool kMixed = kInterleaved != kInterleavedOut;
  using In = UnitOf<E, N, kInterleaved, kMixed>;
  using Out = UnitOf<E, N, kInterleavedOut, kMixed>;
  if (!cut_into_units<In, Out, N>(plan, args)) return;
  args.k.in = counted_on(args.k.in, args.q.heads, sizeof(E));
  args.k.out = counted_on(args.k.out, args.q.heads, sizeof(E));
  launch(args.op, apply_rotary_kernel<E, N, kInterleaved, kInterleavedOut, kGeneral>,
         plan.geometry.grid, plan.geometry.block_threads, stream, args, plan);
}

template <class E, int N>
void launch_layout(const RotaryArgs& args, const Plan& plan, void* stream) {
  if constexpr (N == 1) {
    launch_units<E, 1, false, false, true>(args, plan, stream);
  } else if (args.interleaved && args.interleaved_out) {
    launch_units<E, N, true, true, true>(args, plan, stream);
  } else if (N * sizeof(E) == 16 && args.interleaved != args.interleaved_out) {
    constexpr bool kWhole = N * sizeof(E) == 16;
    if (args.interleaved) {
      launch_units<E, N, true, !kWhole, true>(args, plan, stream);
    } else {
      launch_units<E, N, false, kWhole, true>(args, plan, stream);
    }
  } else if (!args.table.full_width && plan.copy_vectors == 0) {
    launch_units<E, N, false, false, false>(args, plan, stream);
  } else {
    launch_units<E, N, false, false, true>(args, plan, stream);
  }
}

template <class E>
void launch_element(const RotaryArgs& args, void* stream) {
  int64_t widest;
  const Plan plan = plan_of<E>(args, widest);
  if (widest == 16) {
    launch_layout<E, 16 / sizeof(E)>(args, plan, stream);
  } else if (sizeof(E) < 8 && widest == 8 && args.interleaved == args.interleaved_out) {
    launch_layout<E, 8 / sizeof(E)>(args, plan, stream);
  } else {
    launch_layout<E, 1>(args, plan, stream);
  }
}

}  // namespace

void apply_rotary(const RotaryArgs& args, void* stream) {
  for_slices(args, [&](const RotaryArgs& slice) {
    dispatch(args.dtype, [&](auto storage) { launch_element<decltype(storage)>(slice, stream); });
  });
}

}  // namespace rope::cuda
