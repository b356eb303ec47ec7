// apply_rotary on CUDA: q and k in one launch, each thread's piece of the table row in registers.
#include "../kernels.h"
#include "launch.cuh"
#include "turns.cuh"
#include "unit.cuh"

namespace rope::cuda {

namespace {

struct Plan {
  RotaryGeometry geometry;
  UnitLayout in, out;
  TableLayout table;
  uint32_t rotate_units, copy_units;  // of one head
  uint32_t copy_vectors;              // of the channels that do not rotate; 0 in place
  uint32_t heads;                     // of q and k together
  uint32_t head_step;                 // of a thread
};

// One token, and the thread's first head of q and k counted together.
struct Place {
  uint32_t b, s, head;
};

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
  const RotaryGeometry& g = plan.geometry;
  const uint32_t b = blockIdx.z * gridDim.y + blockIdx.y;
  const uint32_t lanes = g.unit_lanes * g.head_lanes;
  const uint32_t group_in_block = threadIdx.x / lanes;
  const uint32_t lane = threadIdx.x - group_in_block * lanes;
  const uint32_t group = blockIdx.x * g.groups_per_block + group_in_block;
  if (b >= args.batch || group_in_block >= g.groups_per_block || group >= g.groups) return;

  const uint32_t s = group / g.parts;
  const uint32_t part = group - s * g.parts;
  const uint32_t split = part / g.unit_chunks;
  const uint32_t chunk = part - split * g.unit_chunks;
  const uint32_t head_lane = lane / g.unit_lanes;
  const uint32_t unit = chunk * g.unit_lanes + lane - head_lane * g.unit_lanes;
  const Place place{b, s, split * g.head_lanes + head_lane};

  if (unit >= plan.rotate_units + plan.copy_units) return;
  turn_heads<E, N, kInterleaved, kInterleavedOut, kGeneral>(args, plan, place, unit);
}

template <class E, int N, bool kInterleaved, bool kInterleavedOut, bool kGeneral>
void launch_units(RotaryArgs args, Plan plan, void* stream) {
  constexpr bool kMixed = kInterleaved != kInterleavedOut;
  using In = UnitOf<E, N, kInterleaved, kMixed>;
  using Out = UnitOf<E, N, kInterleavedOut, kMixed>;
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

  plan.in = In::layout(args.rotary_dim, args.interleaved);
  plan.out = Out::layout(args.rotary_dim, args.interleaved_out);
  plan.rotate_units = static_cast<uint32_t>(args.rotary_dim / 2 / In::kPairs);
  plan.copy_vectors /= N;
  plan.copy_units = (plan.copy_vectors + In::kCount - 1) / In::kCount;
  const int64_t units = int64_t{plan.rotate_units} + plan.copy_units;
  if (units == 0) return;
  plan.geometry = rotary_geometry(units, plan.heads, args.batch, args.seq, sm_count(args.op));
  plan.head_step = plan.geometry.splits * plan.geometry.head_lanes;

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

// Tokens [first, first + seq) of the sequence.
RotaryArgs slice_of(RotaryArgs args, int64_t first, int64_t seq) {
  const auto skip = [](auto& data, int64_t bytes) {
    using Pointer = std::remove_reference_t<decltype(data)>;
    if (data) data = reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(data) + bytes);
  };
  const int64_t element_bytes = size_of(args.dtype), table_bytes = size_of(args.table.dtype);
  for (RotatedHeads* x : {&args.q, &args.k}) {
    skip(x->in.data, first * x->in.stride_s * element_bytes);
    skip(x->out.data, first * x->out.stride_s * element_bytes);
  }
  if (args.position_ids.data) {
    skip(args.position_ids.data,
         first * args.position_ids.stride_s * (args.position_ids.int64 ? int64_t{8} : int64_t{4}));
  } else {
    skip(args.table.cos, first * args.table.cos_stride_row * table_bytes);
    skip(args.table.sin, first * args.table.sin_stride_row * table_bytes);
    args.table.rows -= first;
  }
  args.seq = seq;
  return args;
}

// The same tokens with the axes of batch and sequence exchanged, where the sequence is one token.
RotaryArgs batch_as_sequence(RotaryArgs args) {
  args.seq = args.batch;
  args.batch = 1;
  for (RotatedHeads* x : {&args.q, &args.k}) {
    x->in.stride_s = x->in.stride_b;
    x->out.stride_s = x->out.stride_b;
  }
  if (args.position_ids.data) {
    args.position_ids.stride_s = args.position_ids.stride_b;
  } else {
    args.table.rows = args.seq;
    args.table.cos_stride_row = args.table.cos_stride_b;
    args.table.sin_stride_row = args.table.sin_stride_b;
  }
  return args;
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
