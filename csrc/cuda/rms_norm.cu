// RMSNorm and rotation on CUDA: one tensor, or q and k, in one launch.
#include "cuda/parts/norm_row.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

struct NormRow {
  uint32_t b, s, group, first_head, heads;  // heads == 0: no norm row
  bool is_q, is_v;                          // is_v: head first_head is moved as it is
};

// kPacked: q, k and v are parts of one tensor.
template <bool kPacked>
__device__ __forceinline__ NormRow row_at(const RmsNormRotaryArgs& args, const NormPlan& plan,
                                          int64_t index) {
  if (index >= plan.rows) return {0, 0, 0, 0, 0, true, false};
  const uint32_t q_heads = static_cast<uint32_t>(args.rotary.q.heads);
  const uint32_t k_heads = static_cast<uint32_t>(args.rotary.k.heads);
  const bool all_heads = args.norm.all_heads;
  const uint32_t q_rows =
      all_heads ? min(q_heads, 1u) : q_heads;  // of a token, or of a group of it
  const uint32_t qk_rows = q_rows + (all_heads ? min(k_heads, 1u) : k_heads);
  const uint32_t rows = qk_rows + (kPacked ? static_cast<uint32_t>(args.v.heads) : 0);
  const uint32_t group_of_all = static_cast<uint32_t>(index) / rows;
  const uint32_t part = static_cast<uint32_t>(index) - group_of_all * rows;
  const uint32_t groups = kPacked ? static_cast<uint32_t>(args.groups) : 1;
  const uint32_t token = group_of_all / groups, group = group_of_all - token * groups;
  const uint32_t b = token / static_cast<uint32_t>(args.rotary.seq);
  const uint32_t s = token - b * static_cast<uint32_t>(args.rotary.seq);
  const bool is_q = part < q_rows;
  if (kPacked && part >= qk_rows) return {b, s, group, part - qk_rows, 0, false, true};
  if (all_heads) return {b, s, group, 0, is_q ? q_heads : k_heads, is_q, false};
  return {b, s, group, is_q ? part : part - q_heads, 1, is_q, false};
}

template <class Traits, bool kPacked>
__global__ void __launch_bounds__(kMostLanes, resident_blocks<Traits, kPacked>())
    rms_norm_rotary_kernel(const RmsNormRotaryArgs args, const NormPlan plan) {
  using F = typename Traits::F;
  using E = typename F::E;
  using C = typename F::C;
  constexpr int kChannels = F::kChannels;
  __shared__ C of_warps[kMostLanes / kWarpThreads];
  const RotaryArgs& rotary = args.rotary;
  const uint32_t group = threadIdx.x / plan.lanes;
  const uint32_t lane = threadIdx.x - group * plan.lanes;
  const NormRow row = row_at<kPacked>(args, plan, block_index() * plan.groups + group);
  const uint32_t fragments = row.heads * plan.fragments;
  const RotatedHeads &q = rotary.q, &k = rotary.k;

  C squares = 0, inverse_rms = 0;
#pragma unroll 1
  for (int32_t step = 1 - plan.steps; step < plan.steps; ++step) {
    const uint32_t index = lane + static_cast<uint32_t>(abs(step)) * plan.lanes;
    const bool active = index < fragments;
    const uint32_t head_of_row = index / plan.fragments;
    const uint32_t head = row.first_head + head_of_row;
    const uint32_t in_head = index - head_of_row * plan.fragments;
    const NormFragment in = norm_fragment<F>(rotary, plan.rotary, plan.rotary.in, in_head);
    C x[kChannels];
    if (active) {
      load_channels<F>(x, channel_of<E>(row.is_q, q.in, k.in, row.b, row.s, head, 0, row.group),
                       in);
      if (step <= 0) squares += sum_of_squares(x);
    }
    if (step == 0) {
      const C channels = static_cast<C>(row.heads * rotary.head_dim);
      squares = sum_over_lanes(squares, plan.lanes, of_warps);
      inverse_rms = inverse_rms_of(squares, channels, args.norm.eps);
    }
    if (step < 0 || !active) continue;
    C w[kChannels];
    load_factors<F>(w, args.norm, row.is_q, head, in);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] = x[i] * inverse_rms * w[i];
    if (in.rotates) {
      TableValues<F, Traits::kFullWidth> values;
      load_table(values, rotary, plan.rotary.table, row.b, row.s, in_head);
      rotate_channels<F>(x, values, rotary.interleaved, rotary.interleaved_out);
    }
    store_channels<F>(x, channel_of<E>(row.is_q, q.out, k.out, row.b, row.s, head, 0, row.group),
                      norm_fragment<F>(rotary, plan.rotary, plan.rotary.out, in_head));
  }
  if (kPacked && row.is_v) {
    move_head<F>(args.v, rotary, plan, row.b, row.s, row.first_head, row.group, lane);
  }
}

template <class Traits>
void launch_kernel(const RmsNormRotaryArgs& args, void* stream) {
  const RotaryArgs& rotary = args.rotary;
  const int64_t q_heads = rotary.q.heads, k_heads = rotary.k.heads;
  NormPlan plan = norm_plan<typename Traits::F>(rotary, args.norm, max_of(q_heads, k_heads));
  const int64_t of_qk =
      args.norm.all_heads ? min_of(q_heads, 1) + min_of(k_heads, 1) : q_heads + k_heads;
  const int64_t of_token = args.groups * (of_qk + args.v.heads);
  plan.rows = static_cast<uint32_t>(rotary.batch * rotary.seq * of_token);
  const auto kernel = args.v.heads > 0 ? rms_norm_rotary_kernel<Traits, true>
                                       : rms_norm_rotary_kernel<Traits, false>;
  launch(rotary.op, kernel, grid_of(ceil_div(plan.rows, plan.groups)), plan.groups * plan.lanes,
         stream, args, plan);
}

template <class E>
void launch_element(const RmsNormRotaryArgs& args, void* stream) {
  const RotaryArgs& rotary = args.rotary;
  Alignment alignment(sizeof(E));
  for (const RotatedHeads* x : {&rotary.q, &rotary.k, &args.v}) {
    if (x->heads == 0) continue;
    alignment.add(x->in, rotary.batch, rotary.seq, x->heads);
    alignment.add(x->out, rotary.batch, rotary.seq, x->heads);
  }
  dispatch_traits<E>(rotary, args.norm, alignment,
                     [&](auto traits) { launch_kernel<decltype(traits)>(args, stream); });
}

}  // namespace

void rms_norm_rotary(const RmsNormRotaryArgs& args, void* stream) {
  const RotaryArgs& rotary = args.rotary;
  if (rotary.batch == 0 || rotary.seq == 0 || rotary.q.heads + rotary.k.heads == 0) return;
  check_rows(rotary, args.groups * (rotary.q.heads + rotary.k.heads + args.v.heads));
  dispatch(rotary.dtype, [&](auto storage) { launch_element<decltype(storage)>(args, stream); });
}

}  // namespace rope::cuda
