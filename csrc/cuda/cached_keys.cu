// shift_cached_k on CUDA: a rotation by angles of keys that are found by their slots.
#include "cuda/parts/cache_store.cuh"
#include "cuda/parts/rotate_by_angles.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

// Vectors of up to 16 bytes and 8 elements, or fragments of one pair.
template <class E, int N, Order kOrder>
struct ShiftTraits {
  using F = Fragment<E, N, kOrder>;
  static constexpr int blocks() { return resident_blocks(1024); }  // 64 registers a thread
};

class AnglesOfKey {
 public:
  __device__ __forceinline__ AnglesOfKey(const ShiftArgs& args, const ThreadWork& work)
      : args_(args), from_(position(args.old, work)), to_(position(args.angles, work)) {}

  template <bool kDouble>
  __device__ __forceinline__ SinCos at(uint32_t pair) const {
    const Angles& angles = args_.angles;
    const double inv_freq = value_at(angles.inv_freq, angles.inv_freq_dtype, pair);
    if (args_.same_frequencies) {
      return scaled(sin_cos<kDouble>(to_ - from_, inv_freq), angles.attention_scaling);
    }
    const Angles& old = args_.old;
    const double old_inv_freq = value_at(old.inv_freq, old.inv_freq_dtype, pair);
    const SinCos to = scaled(sin_cos<kDouble>(to_, inv_freq), angles.attention_scaling);
    return difference(to, sin_cos<kDouble>(from_, old_inv_freq));
  }

 private:
  static __device__ __forceinline__ double position(const Angles& angles, const ThreadWork& work) {
    return position_at(angles.positions, token_at(angles.positions, work.b, work.s));
  }

  const ShiftArgs& args_;
  const double from_, to_;
};

template <class Traits>
__global__ void __launch_bounds__(kBlockThreads, Traits::blocks())
    shift_kernel(const ShiftArgs args, const RotaryPlan plan) {
  rotate_by_angles<typename Traits::F, AnglesOfKey, false>(args, plan, [&](ThreadWork& work) {
    const Slot slot = slot_at(args, entry_of(args.slots, work.b, work.s));
    work.b = static_cast<uint32_t>(slot.block);
    work.s = static_cast<uint32_t>(slot.offset);
    return slot.exists;
  });
}

template <class E, int N, Order kOrder>
void launch_kernel(const ShiftArgs& args, void* stream) {
  using Traits = ShiftTraits<E, N, kOrder>;
  using F = typename Traits::F;
  const RotaryPlan plan = rotary_plan<F>(args, args.q.heads, 0);
  if (!is_empty(plan)) launch_by_angles<F>(args, plan, shift_kernel<Traits>, stream);
}

template <class E>
void launch_element(const ShiftArgs& args, void* stream) {
  Alignment alignment(sizeof(E));
  alignment.add(args.q.out, args.blocks, args.block_size, args.q.heads);
  alignment.add_channels(args, false);
  // float64 is for comparison: one kernel is enough.
  constexpr int kWide = sizeof(E) == 1 ? 8 : 16 / sizeof(E);
  if constexpr (kWide > 2) {
    if (alignment.allows(kWide * sizeof(E))) {
      return args.interleaved ? launch_kernel<E, kWide, Order::Interleaved>(args, stream)
                              : launch_kernel<E, kWide, Order::HalfSplit>(args, stream);
    }
  }
  launch_kernel<E, 1, Order::Any>(args, stream);
}

void launch_any(const ShiftArgs& args, void* stream) {
  switch (args.cache_dtype) {
    case CacheDType::Float8E4M3: return launch_element<Float8<Float8E4M3>>(args, stream);
    case CacheDType::Float8E5M2: return launch_element<Float8<Float8E5M2>>(args, stream);
    case CacheDType::OfModel: break;
  }
  dispatch(args.dtype, [&](auto storage) { launch_element<decltype(storage)>(args, stream); });
}

}  // namespace

void shift_cached_k(const ShiftArgs& args, void* stream) {
  check_counts(args.op, args.q.heads, args.head_dim, args.blocks, args.block_size);
  if (args.q.heads == 0) return;
  const int64_t most = most_tokens(args.head_dim);
  for (int64_t first = 0; first < args.seq; first += most) {
    ShiftArgs slice = args;
    slice.seq = min_of(most, args.seq - first);
    advance_tokens(slice.slots, first);
    advance_tokens(slice.old.positions, first);
    advance_tokens(slice.angles.positions, first);
    launch_any(slice, stream);
  }
}

}  // namespace rope::cuda
