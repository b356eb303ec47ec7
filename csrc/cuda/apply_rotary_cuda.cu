// apply_rotary on CUDA: q and k in one launch, each thread's piece of the table row in registers.
#include "../kernels.h"
#include "launch.cuh"
#include "rotary_plan.cuh"

namespace rope::cuda {

namespace {

// Calls work(in, out) for each of the thread's heads, at channels of theirs. Everything is computed
// again for each head from the kernel's arguments: pointers kept for q and k would cost registers.
template <class E, class Channel, class Work>
__device__ __forceinline__ void for_heads(const RotaryArgs& args, const Plan& plan,
                                          const Place& place, Channel channel_in,
                                          Channel channel_out, const Work& work) {
  const auto offset = [&](uint32_t head, int64_t stride_b, int64_t stride_s, int64_t stride_h,
                          Channel channel) {
    return place.b * stride_b + place.s * stride_s + head * stride_h + channel;
  };
#pragma unroll 1
  for (uint32_t head = place.head; head < plan.heads; head += plan.head_step) {
    // Field by field: a choice between whole structs would put them into local memory.
    const bool is_q = head < static_cast<uint32_t>(args.q.heads);
    const RotatedHeads &q = args.q, &k = args.k;
    const E* in =
        static_cast<const E*>(is_q ? q.in.data : k.in.data) +
        offset(head, is_q ? q.in.stride_b : k.in.stride_b, is_q ? q.in.stride_s : k.in.stride_s,
               is_q ? q.in.stride_h : k.in.stride_h, channel_in);
    E* out =
        static_cast<E*>(is_q ? q.out.data : k.out.data) +
        offset(head, is_q ? q.out.stride_b : k.out.stride_b, is_q ? q.out.stride_s : k.out.stride_s,
               is_q ? q.out.stride_h : k.out.stride_h, channel_out);
    work(in, out);
  }
}

// Rotates a unit of each head, or copies one: the threads of a warp load and store together,
// whichever they do in between.
template <class E, int N, bool kInterleaved, bool kInterleavedOut, bool kGeneral>
__device__ __forceinline__ void turn_heads(const RotaryArgs& args, const Plan& plan,
                                           const Place& place, uint32_t unit) {
  constexpr bool kMixed = kInterleaved != kInterleavedOut;
  using In = UnitOf<E, N, kInterleaved, kMixed>;
  using Out = UnitOf<E, N, kInterleavedOut, kMixed>;
  using C = typename In::C;
  constexpr int kPairs = In::kPairs;
  static_assert(In::kCount == Out::kCount);
  const bool rotates = !kGeneral || unit < plan.rotate_units;
  TurnsOf<In, kGeneral> turns;
  Piece from, to;
  if (rotates) {
    load_turns<In, kMixed, kGeneral>(turns, args, plan, place, unit);
    from = {static_cast<int32_t>(In::channel_of(unit, plan.in)), plan.in.second};
    to = !kMixed && N > 1
             ? from
             : Piece{static_cast<int32_t>(Out::channel_of(unit, plan.out)), plan.out.second};
  } else {
    from = to = copied_piece<N, In::kCount>(args, plan, unit - plan.rotate_units);
  }
  for_heads<E>(args, plan, place, from.channel, to.channel, [&](const E* in, E* out) {
    In x;
    x.load_from(in, from.second);
    Out y;
    if (rotates) {
      C x1[kPairs], x2[kPairs];
      x.unpack_to(x1, x2);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) rotate(turns.at(j), x1[j], x2[j]);
      y.pack_from(x1, x2);
    } else {
      y.copy_from(x);
    }
    y.store_to(out, to.second);
  });
}

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
  turn_heads<E, N, kInterleaved, kInterleavedOut, kGeneral>(args, plan, place, unit);
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
  Alignment alignment(sizeof(E));
  bool in_place = true;
  for (const RotatedHeads* x : {&args.q, &args.k}) {
    if (x->heads == 0) continue;
    alignment.add(x->in, args.batch, args.seq, x->heads);
    alignment.add(x->out, args.batch, args.seq, x->heads);
    in_place = in_place && x->in.data == x->out.data;
  }
  const bool all_interleaved = args.interleaved && args.interleaved_out;
  alignment.add_elements(all_interleaved ? args.rotary_dim : args.rotary_dim / 2);
  const int64_t others = in_place ? 0 : args.head_dim - args.rotary_dim;
  if (others > 0) {
    alignment.add_elements(args.rotary_offset);
    alignment.add_elements(others);
  }

  Plan plan{};
  plan.heads = static_cast<uint32_t>(args.q.heads + args.k.heads);
  plan.copy_vectors = static_cast<uint32_t>(others);  // of one channel, until N is known
  if (alignment.widest() == 16) {
    launch_layout<E, 16 / sizeof(E)>(args, plan, stream);
  } else if (sizeof(E) < 8 && alignment.widest() == 8 && args.interleaved == args.interleaved_out) {
    launch_layout<E, 8 / sizeof(E)>(args, plan, stream);
  } else {
    launch_layout<E, 1>(args, plan, stream);
  }
}

}  // namespace

void apply_rotary(const RotaryArgs& given, void* stream) {
  if (given.batch == 0 || given.seq == 0 || given.q.heads + given.k.heads == 0) return;
  check_counts(given.op, given.q.heads + given.k.heads, given.head_dim, given.batch, given.seq);
  // Blocks do not reach over the end of a sequence: a decoding step would leave them almost empty.
  const RotaryArgs args = given.seq == 1 ? batch_as_sequence(given) : given;
  const int64_t most = most_tokens(args.head_dim);
  for (int64_t first = 0; first < args.seq; first += most) {
    const RotaryArgs slice = slice_of(args, first, std::min(most, args.seq - first));
    dispatch(args.dtype, [&](auto storage) { launch_element<decltype(storage)>(slice, stream); });
  }
}

}  // namespace rope::cuda
