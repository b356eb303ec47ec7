// apply_rotary on CUDA: q and k in one launch, each thread's piece of the table row in registers.
#include "../kernels.h"
#include "rotate_heads.cuh"

namespace rope::cuda {

namespace {

__device__ __forceinline__ int64_t row_of(const PositionIds& ids, const Place& place) {
  if (ids.data == nullptr) return place.s;
  const int64_t at = place.b * ids.stride_b + place.s * ids.stride_s;
  return ids.int64 ? __ldg(static_cast<const int64_t*>(ids.data) + at)
                   : __ldg(static_cast<const int32_t*>(ids.data) + at);
}

// A position outside the table turns by NaN: the kernel can't raise without stopping the stream.
template <class U, bool kMixed, bool kFullWidth>
__device__ __forceinline__ void load_turns(TurnsOf<U, kFullWidth>& turns, const RotaryArgs& args,
                                           const Plan& plan, const Place& place, uint32_t unit) {
  using C = typename U::C;
  const int64_t row = row_of(args.position_ids, place);
  if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(args.table.rows)) {
    const C nan = static_cast<C>(NAN);
#pragma unroll
    for (int j = 0; j < U::kPairs; ++j) turns.set(j, {nan, nan, nan, nan});
    return;
  }
  constexpr bool kHalfSplit = !kMixed && !U::kNeighbours && U::kPairs > 1;
  const bool neighbours = kMixed ? args.table.interleaved : U::kNeighbours;
  const uint32_t column = unit * (kHalfSplit ? U::kPairs : plan.table.step);
  read_table<U, kFullWidth>(turns, args.table, neighbours, plan.table, place.b, row, column);
  if (args.inverse) {
#pragma unroll
    for (int j = 0; j < U::kPairs; ++j) turns.set(j, inverse_of(turns.at(j)));
  }
}

// What a thread moves of each of its heads: vectors, the first at `channel`, counted from the first
// that rotates, and the second, if there is one, `second` channels further.
struct Piece {
  int32_t channel;
  uint32_t second;
};

// Channels before and after those that rotate, as if they were a run of vectors of N: number
// `index` of it, and the one half of the run further (the last may have none: then itself once
// more).
template <int N, int kVectors>
__device__ __forceinline__ Piece copied_piece(const RotaryArgs& args, const Plan& plan,
                                              uint32_t index) {
  const auto channel_of = [&](uint32_t vector) {
    const int32_t channel = static_cast<int32_t>(vector * N - args.rotary_offset);
    return channel < 0 ? channel : channel + static_cast<int32_t>(args.rotary_dim);
  };
  const int32_t first = channel_of(index);
  if (kVectors == 1 || index + plan.copy_units >= plan.copy_vectors) return {first, 0};
  return {first, static_cast<uint32_t>(channel_of(index + plan.copy_units) - first)};
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
  const Lane lane = lane_of(plan.geometry);
  if (!has_token(args, plan.geometry, lane)) return;
  const Part part = part_of(plan.geometry, lane);
  const uint32_t unit = part.unit;
  if (unit >= plan.rotate_units + plan.copy_units) return;
  turn_heads<E, N, kInterleaved, kInterleavedOut, kGeneral, kGeneral>(
      args, plan, part.place, unit, [&](auto& turns) {
        constexpr bool kMixed = kInterleaved != kInterleavedOut;
        using In = UnitOf<E, N, kInterleaved, kMixed>;
        load_turns<In, kMixed, kGeneral>(turns, args, plan, part.place, unit);
      });
}

template <class E, int N, bool kInterleaved, bool kInterleavedOut, bool kGeneral>
void launch_units(RotaryArgs args, Plan plan, void* stream) {
  constexpr bool kMixed = kInterleaved != kInterleavedOut;
  using In = UnitOf<E, N, kInterleaved, kMixed>;
  const Table& table = args.table;
  const bool neighbours = table.full_width && table.interleaved;
  plan.table.step = neighbours ? 2 * In::kPairs : In::kPairs;
  plan.table.second = neighbours ? 1 : static_cast<uint32_t>(args.rotary_dim / 2);
  const int64_t run = neighbours && N > 1 ? 2 * In::kPairs : In::kPairs;
  Alignment alignment(size_of(table.dtype));
  alignment.add_address(table.cos);
  alignment.add_address(table.sin);
  alignment.add_elements(table.cos_stride_row | table.sin_stride_row);
  alignment.add_elements(table.cos_stride_b | table.sin_stride_b);
  plan.table.aligned = alignment.allows(std::min<int64_t>(run * size_of(table.dtype), 16));

  if (!lay_out<E, N, kInterleaved, kInterleavedOut>(args, plan)) return;
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
