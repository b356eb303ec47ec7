// Gradients of RMSNorm and rotation on CUDA. One launch computes those to q and k, and partial sums
// of those to the weights; a second one adds the partial sums. The reciprocals of the root mean
// squares are computed again: x is read anyway, for its gradient.
#include "cuda/parts/norm_row.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

// A block has at most kMostLanes threads. A launch bound of more is how the registers of a thread
// are bounded: to 64 for few channels (in float64 of any order 72), to 80, or to 104 in float64 or
// with four table values a pair. The kernel then needs no local memory.
template <class Traits, bool kPacked>
constexpr int bound_threads() {
  using F = typename Traits::F;
  constexpr bool kDouble = sizeof(typename F::C) == 8;
  if (kPacked) return kMostLanes;
  if (kDouble && F::kOrder == Order::Any) return 896;
  if (F::kChannels <= (kDouble ? 2 : 4)) return 1024;
  return kDouble || Traits::kFullWidth ? 608 : 768;
}

// Moves the heads of x of one chunk of tokens.
template <class F>
__device__ __forceinline__ void move_chunk(const RotatedHeads& x, const RmsNormRotaryGradArgs& args,
                                           const NormPlan& plan, int64_t chunk) {
  const uint32_t seq = static_cast<uint32_t>(args.rotary.seq);
  const uint32_t heads = static_cast<uint32_t>(x.heads);
  const uint32_t of_token = static_cast<uint32_t>(args.groups) * heads;
  const int64_t first_token = chunk * args.chunk_tokens;
  const int64_t tokens = min(args.chunk_tokens, args.rotary.batch * args.rotary.seq - first_token);
  const uint32_t rows = static_cast<uint32_t>(tokens) * of_token;
  const uint32_t first = threadIdx.x / plan.lanes, lane = threadIdx.x - first * plan.lanes;
#pragma unroll 1
  for (uint32_t row = first; row < rows; row += plan.groups) {
    const uint32_t token_of_chunk = row / of_token, index = row - token_of_chunk * of_token;
    const uint32_t token = static_cast<uint32_t>(first_token) + token_of_chunk;
    const uint32_t group = index / heads, b = token / seq;
    move_head<F>(x, args.rotary, plan, b, token - b * seq, index - group * heads, group, lane);
  }
}

// A block has the norm rows of q or of k of one chunk of tokens, or moves its heads of v. kPacked:
// q, k and v are parts of one tensor, in which what has no gradient becomes zeros.
template <class Traits, bool kPacked>
__global__ void __launch_bounds__(bound_threads<Traits, kPacked>(), 1)
    rms_norm_rotary_grad_kernel(const RmsNormRotaryGradArgs args, const NormPlan plan) {
  using F = typename Traits::F;
  using E = typename F::E;
  using C = typename F::C;
  constexpr int kChannels = F::kChannels;
  __shared__ C of_warps[kMostLanes / kWarpThreads];
  // The gradient to the weights of each thread's first fragment. It would take too many registers.
  __shared__ C sums[kChannels][kMostLanes];

  const RotaryArgs& rotary = args.rotary;
  const bool all_heads = args.norm.all_heads;
  constexpr uint32_t kParts = kPacked ? 3 : 2;
  const int64_t chunk = block_index() / kParts;
  const uint32_t part = static_cast<uint32_t>(block_index() - chunk * kParts);
  if (chunk >= args.chunks) return;
  if (kPacked && part == 2) return move_chunk<F>(args.v, args, plan, chunk);
  const bool is_q = part == 0;
  const uint32_t heads = static_cast<uint32_t>(is_q ? rotary.q.heads : rotary.k.heads);
  if ((is_q ? args.q_columns : args.columns - args.q_columns) == 0) {  // it has no gradient
    if (!kPacked) return;
    return is_q ? move_chunk<F>(rotary.q, args, plan, chunk)
                : move_chunk<F>(rotary.k, args, plan, chunk);
  }
  C* const partial = static_cast<C*>(args.partial) + chunk * args.columns +
                     (is_q ? 0 : args.q_columns) + rotary.rotary_offset;
  const uint32_t group = threadIdx.x / plan.lanes;
  const uint32_t lane = threadIdx.x - group * plan.lanes;
  const uint32_t fragments = plan.fragments * (all_heads ? heads : 1);
  const int64_t first_token = chunk * args.chunk_tokens;
  const int64_t tokens = min(args.chunk_tokens, rotary.batch * rotary.seq - first_token);
  const uint32_t groups = kPacked ? static_cast<uint32_t>(args.groups) : 1;
  const uint32_t of_token = groups * (all_heads ? min(heads, 1u) : heads);
  const uint32_t rows = static_cast<uint32_t>(tokens) * of_token;
  const RotatedHeads &q = rotary.q, &k = rotary.k;

  // Where fragment `index` of a norm row is: its head, and among the channels of grad and of x.
  struct RowFragment {
    uint32_t head, in_head;
    NormFragment grad, x;
  };
  const auto fragment_at = [&](uint32_t first_head, uint32_t index) {
    const uint32_t head = index / plan.fragments, in_head = index - head * plan.fragments;
    const NormFragment x = norm_fragment<F>(rotary, plan.rotary, plan.rotary.out, in_head);
    return RowFragment{
        first_head + head, in_head,
        F::kOneOrder ? x : norm_fragment<F>(rotary, plan.rotary, plan.rotary.in, in_head), x};
  };
  const auto column_of = [&](const RowFragment& at, int i) {
    const int64_t of_head = all_heads ? at.head * rotary.head_dim : 0;
    return of_head + at.x.at.first + i / F::N * at.x.at.second + i % F::N;
  };
  const auto channels_of = [&](const RowFragment& at) { return at.x.rotates ? kChannels : F::N; };

#pragma unroll
  for (int i = 0; i < kChannels; ++i) sums[i][threadIdx.x] = 0;
#pragma unroll 1
  for (uint32_t first = 0; first < rows; first += plan.groups) {
    const bool inside = first + group < rows;
    const uint32_t row = inside ? first + group : 0;
    const uint32_t token_of_chunk = all_heads ? row : row / of_token;
    const uint32_t head_of_token = all_heads ? 0 : row - token_of_chunk * of_token;
    const uint32_t head_group = groups == 1 ? 0 : head_of_token / heads;
    const uint32_t first_head = head_of_token - head_group * heads;
    const uint32_t token = static_cast<uint32_t>(first_token) + token_of_chunk;
    const uint32_t b = token / static_cast<uint32_t>(rotary.seq);
    const uint32_t s = token - b * static_cast<uint32_t>(rotary.seq);
    const uint32_t past = inside ? fragments : 0;

    C squares = 0, products = 0, inverse_rms = 0, mean = 0;
#pragma unroll 1
    for (int32_t step = 1 - plan.steps; step < plan.steps; ++step) {
      const uint32_t index = lane + static_cast<uint32_t>(abs(step)) * plan.lanes;
      const bool active = index < past;
      const RowFragment at = fragment_at(first_head, index);
      // g: the gradient to the rotation, rotated back, in x's order.
      C x[kChannels], g[kChannels], w[kChannels];
      if (active) {
        load_channels<F>(x, channel_of<E>(is_q, args.q, args.k, b, s, at.head, 0, head_group),
                         at.x);
        load_channels<F>(g, channel_of<E>(is_q, q.in, k.in, b, s, at.head, 0, head_group), at.grad);
        if (at.grad.rotates) {
          TableValues<F, Traits::kFullWidth> values;
          load_table(values, rotary, plan.rotary.table, b, s, at.in_head);
          rotate_channels<F>(g, values, rotary.interleaved, rotary.interleaved_out);
        }
        load_factors<F>(w, args.norm, is_q, at.head, at.x);
      }
      if (active && step <= 0) {
        squares += sum_of_squares(x);
        C product = 0;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) product += g[i] * w[i] * x[i];
        products += product;
      }
      if (step == 0) {
        const C channels = static_cast<C>((all_heads ? heads : 1) * rotary.head_dim);
        squares = sum_over_lanes(squares, plan.lanes, of_warps);
        products = sum_over_lanes(products, plan.lanes, of_warps);
        inverse_rms = inverse_rms_of(squares, channels, args.norm.eps);
        mean = products * inverse_rms / channels;
      }
      if (step < 0 || !active) continue;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        const C n = x[i] * inverse_rms;
        x[i] = (g[i] * w[i] - n * mean) * inverse_rms;
        g[i] *= n;
      }
      store_channels<F>(x, channel_of<E>(is_q, q.out, k.out, b, s, at.head, 0, head_group), at.x);
      if (step == 0) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) sums[i][threadIdx.x] += g[i];
      } else {  // norm rows of more fragments than lanes have the block for themselves, and its
                // sums
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          if (i >= channels_of(at)) continue;
          C& sum = partial[column_of(at, i)];
          sum = first == 0 ? g[i] : sum + g[i];
        }
      }
    }
  }

  __syncthreads();
  if (group > 0) return;
  C total[kChannels] = {};  // of the groups, in order
#pragma unroll 1
  for (uint32_t each = 0; each < plan.groups; ++each) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) total[i] += sums[i][each * plan.lanes + lane];
  }
#pragma unroll 1
  for (uint32_t index = lane; index < fragments; index += plan.lanes) {
    const RowFragment at = fragment_at(0, index);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      if (i < channels_of(at) && (index == lane || rows == 0)) partial[column_of(at, i)] = total[i];
    }
  }
}

constexpr uint32_t kColumns = 32, kColumnLanes = kBlockThreads / kColumns;

// The sums of the partial sums: each lane of a column adds every kColumnLanes-th chunk, and then
// the first lane adds the sums of the lanes.
template <class C>
__global__ void __launch_bounds__(kBlockThreads)
    rms_norm_rotary_grad_sum_kernel(const RmsNormRotaryGradArgs args) {
  __shared__ C shared[kColumnLanes][kColumns];
  const uint32_t lane = threadIdx.x / kColumns, in_block = threadIdx.x % kColumns;
  const int64_t column = block_index() * kColumns + in_block;
  const C* const partial = static_cast<const C*>(args.partial);
  C sum = 0;
  if (column < args.columns) {
#pragma unroll 4
    for (int64_t chunk = lane; chunk < args.chunks; chunk += kColumnLanes) {
      sum += __ldg(partial + chunk * args.columns + column);
    }
  }
  shared[lane][in_block] = sum;
  __syncthreads();
  if (lane > 0 || column >= args.columns) return;
#pragma unroll
  for (uint32_t other = 1; other < kColumnLanes; ++other) sum += shared[other][in_block];
  const bool of_q = column < args.q_columns;
  dispatch(args.norm.dtype, [&](auto storage) {
    using S = decltype(storage);
    S* const to = static_cast<S*>(of_q ? args.grad_q_weight : args.grad_k_weight);
    to[of_q ? column : column - args.q_columns] = narrow<S>(sum);
  });
}

template <class Traits>
void launch_kernel(const RmsNormRotaryGradArgs& args, void* stream) {
  const RotaryArgs& rotary = args.rotary;
  const int64_t heads = max_of(max_of(rotary.q.heads, rotary.k.heads), 1);
  const NormPlan plan = norm_plan<typename Traits::F>(rotary, args.norm, heads);
  const bool is_packed = args.v.heads > 0;
  const auto kernel = is_packed ? rms_norm_rotary_grad_kernel<Traits, true>
                                : rms_norm_rotary_grad_kernel<Traits, false>;
  launch(rotary.op, kernel, grid_of((is_packed ? 3 : 2) * args.chunks), plan.groups * plan.lanes,
         stream, args, plan);
}

template <class E>
void launch_element(const RmsNormRotaryGradArgs& args, void* stream) {
  const RotaryArgs& rotary = args.rotary;
  Alignment alignment(sizeof(E));
  const auto add = [&](const RotatedHeads& x, const Heads<const void*>& forward) {
    if (x.heads == 0) return;
    alignment.add(x.in, rotary.batch, rotary.seq, x.heads);
    alignment.add(x.out, rotary.batch, rotary.seq, x.heads);
    alignment.add(forward, rotary.batch, rotary.seq, x.heads);
  };
  add(args.v, {});
  add(rotary.q, args.q);
  add(rotary.k, args.k);
  dispatch_traits<E>(rotary, args.norm, alignment,
                     [&](auto traits) { launch_kernel<decltype(traits)>(args, stream); });
}

}  // namespace

void rms_norm_rotary_grad(const RmsNormRotaryGradArgs& args, void* stream) {
  const RotaryArgs& rotary = args.rotary;
  if (args.chunks > 0) {
    check_rows(rotary, args.groups * (rotary.q.heads + rotary.k.heads + args.v.heads));
    dispatch(rotary.dtype, [&](auto storage) { launch_element<decltype(storage)>(args, stream); });
  }
  if (args.columns == 0) return;
  const Grid grid = grid_of(ceil_div(args.columns, kColumns));
  if (rotary.dtype == DType::Float64) {
    launch(rotary.op, rms_norm_rotary_grad_sum_kernel<double>, grid, kBlockThreads, stream, args);
  } else {
    launch(rotary.op, rms_norm_rotary_grad_sum_kernel<float>, grid, kBlockThreads, stream, args);
  }
}

}  // namespace rope::cuda
