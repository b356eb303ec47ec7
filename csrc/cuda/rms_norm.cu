// RMSNorm and rotation on CUDA: q and k in one launch.
#include "cuda/parts/norm_rows.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

struct Row {
  uint32_t b, s, first_head, heads;  // heads == 0: no row
  bool is_q;
};

__device__ __forceinline__ Row row_at(const RmsNormRotaryArgs& args, const RowPlan& plan,
                                      int64_t index) {
  if (index >= plan.rows) return {0, 0, 0, 0, true};
  const uint32_t q_heads = static_cast<uint32_t>(args.rotary.q.heads);
  const uint32_t k_heads = static_cast<uint32_t>(args.rotary.k.heads);
  const bool all_heads = args.norm.all_heads;
  const uint32_t rows = all_heads ? 2 : q_heads + k_heads;  // of a token
  const uint32_t token = static_cast<uint32_t>(index) / rows;
  const uint32_t part = static_cast<uint32_t>(index) - token * rows;
  const uint32_t b = token / static_cast<uint32_t>(args.rotary.seq);
  const uint32_t s = token - b * static_cast<uint32_t>(args.rotary.seq);
  const bool is_q = part < (all_heads ? 1 : q_heads);
  if (all_heads) return {b, s, 0, is_q ? q_heads : k_heads, is_q};
  return {b, s, is_q ? part : part - q_heads, 1, is_q};
}

// Blocks that a multiprocessor should hold at a time, which bounds the registers of a thread: 64
// where the kernel then needs no local memory.
template <class E, bool kFullWidth>
constexpr int resident_blocks() {
  return sizeof(E) == 2 && !kFullWidth ? 1024 / kMostLanes : 1;
}

// N == 1: pairs in any order, before and after.
template <class E, int N, bool kInterleaved, bool kInterleavedOut, bool kFullWidth>
__global__ void __launch_bounds__(kMostLanes, (resident_blocks<E, kFullWidth>()))
    rms_norm_rotary_kernel(const RmsNormRotaryArgs args, const RowPlan plan) {
  constexpr bool kMixed = kInterleaved != kInterleavedOut;
  using In = UnitOf<E, N, kInterleaved, kMixed>;
  using Out = UnitOf<E, N, kInterleavedOut, kMixed>;
  using C = typename In::C;
  constexpr int kPairs = In::kPairs, kChannels = In::kChannels;
  __shared__ C of_warps[kMostLanes / kWarpThreads];
  const RotaryArgs& rotary = args.rotary;
  const uint32_t group = threadIdx.x / plan.lanes;
  const uint32_t lane = threadIdx.x - group * plan.lanes;
  const Row row = row_at(args, plan, block_index() * plan.groups + group);
  const uint32_t units = row.heads * plan.units;
  const RotatedHeads &q = rotary.q, &k = rotary.k;

  const auto head_of = [&](uint32_t index) { return row.first_head + index / plan.units; };
  const auto load_unit = [&](C(&x)[kChannels], uint32_t index) {
    const uint32_t head = head_of(index), unit = index - index / plan.units * plan.units;
    const E* from = static_cast<const E*>(row.is_q ? q.in.data : k.in.data) +
                    row.b * (row.is_q ? q.in.stride_b : k.in.stride_b) +
                    row.s * (row.is_q ? q.in.stride_s : k.in.stride_s) +
                    head * (row.is_q ? q.in.stride_h : k.in.stride_h);
    load_channels<In, N>(x, from, spot_of<In, N>(rotary, plan.rotary, plan.rotary.in, unit));
  };

  // x: of the thread's first unit, until the row has its root mean square.
  C x[kChannels] = {};
  if (lane < units) load_unit(x, lane);
  C squares = sum_of_squares(x);
#pragma unroll 1
  for (uint32_t index = lane + plan.lanes; index < units; index += plan.lanes) {
    C other[kChannels];
    load_unit(other, index);
    squares += sum_of_squares(other);
  }
  squares = sum_over_lanes(squares, plan.lanes, of_warps);
  const C channels = static_cast<C>(row.heads * rotary.head_dim);
  const C inverse_rms = inverse_rms_of(squares, channels, args.norm.eps);

#pragma unroll 1
  for (uint32_t index = lane; index < units;) {
    const uint32_t head = head_of(index), unit = index - index / plan.units * plan.units;
    C w[kChannels];
    load_factors<In, N, E>(w, args.norm, row.is_q, head,
                           spot_of<In, N>(rotary, plan.rotary, plan.rotary.in, unit),
                           plan.weights_aligned);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] = x[i] * inverse_rms * w[i];
    C y[kChannels];
    const Spot spot = spot_of<Out, N>(rotary, plan.rotary, plan.rotary.out, unit);
    if (spot.rotates) {
      TurnsOf<In, kFullWidth> turns;
      load_turns<In, kMixed, kFullWidth>(turns, rotary, plan.rotary, Place{row.b, row.s, 0}, unit);
      C x1[kPairs], x2[kPairs];
      In::split(x, x1, x2);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) rotate(turns.at(j), x1[j], x2[j]);
      Out::join(x1, x2, y);
    } else {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) y[i] = x[i];
    }
    E* to = static_cast<E*>(row.is_q ? q.out.data : k.out.data) +
            row.b * (row.is_q ? q.out.stride_b : k.out.stride_b) +
            row.s * (row.is_q ? q.out.stride_s : k.out.stride_s) +
            head * (row.is_q ? q.out.stride_h : k.out.stride_h);
    store_channels<Out, N>(y, to, spot);
    index += plan.lanes;
    if (index < units) load_unit(x, index);
  }
}

template <class E, int N, bool kInterleaved, bool kInterleavedOut, bool kFullWidth>
void launch_units(const RmsNormRotaryArgs& args, void* stream) {
  constexpr bool kMixed = kInterleaved != kInterleavedOut;
  using In = UnitOf<E, N, kInterleaved, kMixed>;
  using Out = UnitOf<E, N, kInterleavedOut, kMixed>;
  const RotaryArgs& rotary = args.rotary;
  RowPlan plan = row_plan<In, Out, N>(rotary, args.norm, std::max(rotary.q.heads, rotary.k.heads));
  const int64_t of_token = args.norm.all_heads ? 2 : rotary.q.heads + rotary.k.heads;
  plan.rows = static_cast<uint32_t>(rotary.batch * rotary.seq * of_token);
  launch(rotary.op, rms_norm_rotary_kernel<E, N, kInterleaved, kInterleavedOut, kFullWidth>,
         grid_of(ceil_div(plan.rows, plan.groups)), plan.groups * plan.lanes, stream, args, plan);
}

template <class E>
void launch_element(const RmsNormRotaryArgs& args, void* stream) {
  const RotaryArgs& rotary = args.rotary;
  Alignment alignment(sizeof(E));
  for (const RotatedHeads* x : {&rotary.q, &rotary.k}) {
    if (x->heads == 0) continue;
    alignment.add(x->in, rotary.batch, rotary.seq, x->heads);
    alignment.add(x->out, rotary.batch, rotary.seq, x->heads);
  }
  dispatch_units<E>(rotary, alignment, [&](auto shape) {
    using S = decltype(shape);
    launch_units<E, S::kN, S::kIn, S::kOut, S::kFullWidth>(args, stream);
  });
}

}  // namespace

void rms_norm_rotary(const RmsNormRotaryArgs& args, void* stream) {
  const RotaryArgs& rotary = args.rotary;
  if (rotary.batch == 0 || rotary.seq == 0 || rotary.q.heads + rotary.k.heads == 0) return;
  check_rows(rotary);
  dispatch(rotary.dtype, [&](auto storage) { launch_element<decltype(storage)>(args, stream); });
}

}  // namespace rope::cuda
