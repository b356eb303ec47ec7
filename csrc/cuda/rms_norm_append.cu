// RMSNorm, rotation and the append to a paged cache on CUDA: q, k and v in one launch. Of each
// token the norm rows of q come first, then those of k, then those of v.
#include "cuda/parts/cache_store.cuh"
#include "cuda/parts/norm_row.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

struct AppendRow {
  uint32_t b, s, first_head, heads;  // heads == 0: no norm row
  bool is_q, is_v;
};

struct AppendRowPlan : NormPlan {
  Float8Format float8;  // of the cache, if it has one
};

// Norm rows of a tensor with so many heads, of one token.
__host__ __device__ __forceinline__ uint32_t norm_rows(const RmsNorm& norm, int64_t heads) {
  return norm.all_heads ? 1 : static_cast<uint32_t>(heads);
}

__device__ __forceinline__ AppendRow row_at(const RmsNormAppendArgs& args,
                                            const AppendRowPlan& plan, int64_t index) {
  if (index >= plan.rows) return {};
  const RotaryArgs& rotary = args.append.rotary;
  const uint32_t q_rows = norm_rows(args.norm, rotary.q.heads);
  const uint32_t k_rows = norm_rows(args.norm, rotary.k.heads);
  const uint32_t rows = q_rows + 2 * k_rows;
  const uint32_t token = static_cast<uint32_t>(index) / rows;
  uint32_t row = static_cast<uint32_t>(index) - token * rows;
  const uint32_t b = token / static_cast<uint32_t>(rotary.seq);
  const uint32_t s = token - b * static_cast<uint32_t>(rotary.seq);
  const bool is_q = row < q_rows, is_v = row >= q_rows + k_rows;
  row -= is_q ? 0 : is_v ? q_rows + k_rows : q_rows;
  const int64_t heads = is_q ? rotary.q.heads : rotary.k.heads;
  if (args.norm.all_heads) return {b, s, 0, static_cast<uint32_t>(heads), is_q, is_v};
  return {b, s, row, 1, is_q, is_v};
}

template <class Traits>
__global__ void __launch_bounds__(kMostLanes, resident_blocks<Traits>())
    rms_norm_append_kernel(const RmsNormAppendArgs args, const AppendRowPlan plan) {
  using F = typename Traits::F;
  using E = typename F::E;
  using C = typename F::C;
  __shared__ C of_warps[kMostLanes / kWarpThreads];
  const RotaryArgs& rotary = args.append.rotary;
  const StoredHeads &k = args.append.k, &v = args.append.v;
  const uint32_t group = threadIdx.x / plan.lanes;
  const uint32_t lane = threadIdx.x - group * plan.lanes;
  const AppendRow row = row_at(args, plan, block_index() * plan.groups + group);
  const bool is_normed = !row.is_v || args.v.heads > 0;
  const uint32_t fragments = row.heads * plan.fragments;
  const Heads<void*> of_v{const_cast<void*>(v.in.data), v.in.stride_b, v.in.stride_s,
                          v.in.stride_h};

  C squares = 0, inverse_rms = 0;
#pragma unroll 1
  for (int32_t step = 1 - plan.steps; step < plan.steps; ++step) {
    const uint32_t index = lane + static_cast<uint32_t>(abs(step)) * plan.lanes;
    const bool active = index < fragments;
    const uint32_t head_of_row = index / plan.fragments;
    const uint32_t head = row.first_head + head_of_row;
    const uint32_t in_head = index - head_of_row * plan.fragments;
    const NormFragment at = norm_fragment<F>(rotary, plan.rotary, plan.rotary.in, in_head);
    const Heads<void*> heads = choose(row.is_v, of_v, choose(row.is_q, rotary.q.out, rotary.k.out));
    E* const data = channel_at<E>(heads, row.b, row.s, head, 0);
    F x{};
    if (active && is_normed) {
      load_fragment(x, data, at);
      if (step <= 0) squares += sum_of_squares(x);
    }
    if (step == 0) {
      const C channels = static_cast<C>(row.heads * rotary.head_dim);
      squares = sum_over_lanes(squares, plan.lanes, of_warps);
      inverse_rms = inverse_rms_of(squares, channels, args.norm.eps);
    }
    if (step < 0 || !active) continue;
    if (is_normed) {
      C y[F::kChannels];
      x.unpack_to(y);
#pragma unroll
      for (int i = 0; i < F::kChannels; ++i) y[i] *= inverse_rms;
      if (!row.is_v) {
        C w[F::kChannels];
        load_factors<F>(w, args.norm, row.is_q, head, at);
#pragma unroll
        for (int i = 0; i < F::kChannels; ++i) y[i] *= w[i];
        if (at.rotates) {
          TableValues<F, Traits::kFullWidth> values;
          load_table(values, rotary, plan.rotary.table, row.b, row.s, in_head);
          rotate_channels<F>(y, values, rotary.interleaved, rotary.interleaved);
        }
      }
      x.pack_from(y);
      store_fragment(x, data, at);
    }
    const Slot slot = row.is_q ? Slot{} : slot_of(args.append, row.b, row.s);
    if (!slot.exists) continue;
    if (!is_normed) load_fragment(x, data, at);
    store_cached<true>(x, choose(row.is_v, v, k), args.append.cache_dtype, plan.float8, slot, head,
                       at.at.first, at.at.second, {true, at.rotates});
  }
}

template <class Traits>
void launch_kernel(const RmsNormAppendArgs& args, void* stream) {
  const RotaryArgs& rotary = args.append.rotary;
  const int64_t most_heads = max_of(rotary.q.heads, rotary.k.heads);
  AppendRowPlan plan{norm_plan<typename Traits::F>(rotary, args.norm, most_heads),
                     float8_format(args.append.cache_dtype)};
  const int64_t of_token =
      norm_rows(args.norm, rotary.q.heads) + 2 * norm_rows(args.norm, rotary.k.heads);
  plan.rows = static_cast<uint32_t>(rotary.batch * rotary.seq * of_token);
  launch(rotary.op, rms_norm_append_kernel<Traits>, grid_of(ceil_div(plan.rows, plan.groups)),
         plan.groups * plan.lanes, stream, args, plan);
}

template <class E>
void launch_element(const RmsNormAppendArgs& args, void* stream) {
  const RotaryArgs& rotary = args.append.rotary;
  dispatch_traits<E>(rotary, args.norm, alignment_of_append(args.append),
                     [&](auto traits) { launch_kernel<decltype(traits)>(args, stream); });
}

}  // namespace

void rms_norm_rotary_append(const RmsNormAppendArgs& given, void* stream) {
  RmsNormAppendArgs args = given;
  args.append = with_common_channels(args.append);
  const RotaryArgs& rotary = args.append.rotary;
  if (rotary.batch == 0 || rotary.seq == 0 || rotary.q.heads + rotary.k.heads == 0) return;
  check_rows(rotary, rotary.q.heads + 2 * rotary.k.heads);
  dispatch(rotary.dtype, [&](auto storage) { launch_element<decltype(storage)>(args, stream); });
}

}  // namespace rope::cuda
