// apply_rotary_at on CUDA.
#include "cuda/parts/rotate_by_angles.cuh"
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

class AnglesOfToken {
 public:
  __device__ __forceinline__ AnglesOfToken(const RotaryAtArgs& args, const ThreadWork& work)
      : angles_(args.angles),
        token_(token_at(angles_.positions, work.b, work.s)),
        has_axes_(angles_.axes.data != nullptr),
        of_all_(has_axes_ ? 0 : position_at(angles_.positions, token_)) {}

  template <bool kDouble>
  __device__ __forceinline__ SinCos at(uint32_t pair) const {
    const double inv_freq = value_at(angles_.inv_freq, angles_.inv_freq_dtype, pair);
    const double position = has_axes_ ? position_of_pair(angles_, token_, pair) : of_all_;
    return scaled(sin_cos<kDouble>(position, inv_freq), angles_.attention_scaling);
  }

 private:
  const Angles& angles_;
  const int64_t token_;
  const bool has_axes_;
  const double of_all_;
};

// args.k: as with_one_head_index has it.
template <class Traits>
__global__ void __launch_bounds__(kBlockThreads, Traits::blocks())
    apply_rotary_at_kernel(const RotaryAtArgs args, const RotaryPlan plan) {
  rotate_by_angles<typename Traits::F, AnglesOfToken, true>(args, plan,
                                                            [](ThreadWork&) { return true; });
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
  launch_by_angles<F>(args, plan, apply_rotary_at_kernel<Traits>, stream);
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
