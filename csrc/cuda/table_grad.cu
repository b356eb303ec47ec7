// Gradient of apply_rotary to its cos and sin on CUDA: one block sums one row, in a fixed order.
#include "cuda/parts/alignment.h"
#include "cuda/parts/fragment.cuh"
#include "cuda/parts/heads.cuh"
#include "cuda/parts/launch.cuh"
#include "kernels.h"
#include "math/index.h"

namespace rope::cuda {

namespace {

struct TableGradPlan {
  TableGradGeometry geometry;
  FragmentLayout x, grad;
  uint32_t fragments;  // of one head
  uint32_t heads;      // of q and k
};

// Adds the thread's heads of one token, of q and k by one head index; x_at, grad_at: where their
// fragments begin.
template <class F>
__device__ __forceinline__ void add_token(TurnGrad<typename F::C> (&sums)[F::kPairs],
                                          const RotaryTableGradArgs& args,
                                          const TableGradPlan& plan, uint32_t b, uint32_t s,
                                          uint32_t head_lane, Offsets x_at, Offsets grad_at) {
  using E = typename F::E;
  using C = typename F::C;
#pragma unroll 1
  for (uint32_t head = head_lane; head < plan.heads; head += plan.geometry.head_lanes) {
    const bool is_q = head < static_cast<uint32_t>(args.q.heads);
    F grad, x;
    grad.load_from(channel_of<E>(is_q, args.q.grad, args.k.grad, b, s, head, grad_at.first),
                   grad_at.second);
    x.load_from(channel_of<E>(is_q, args.q.x, args.k.x, b, s, head, x_at.first), x_at.second);
    C channels[F::kChannels], g1[F::kPairs], g2[F::kPairs], x1[F::kPairs], x2[F::kPairs];
    grad.unpack_to(channels);
    split_pairs<F>(channels, args.interleaved_out, g1, g2);
    x.unpack_to(channels);
    split_pairs<F>(channels, args.interleaved, x1, x2);
#pragma unroll
    for (int j = 0; j < F::kPairs; ++j) accumulate(sums[j], g1[j], g2[j], x1[j], x2[j]);
  }
}

// grad_cos, grad_sin: [grad_batch, rows, W]; `row` counts both leading axes together.
template <class C>
__device__ __forceinline__ void write_pair(const RotaryTableGradArgs& args, int64_t row,
                                           int64_t pair, const Turn<C>& turn) {
  const int64_t pairs = args.rotary_dim / 2;
  dispatch(args.table_dtype, [&](auto storage) {
    using S = decltype(storage);
    S* grad_cos = static_cast<S*>(args.grad_cos);
    S* grad_sin = static_cast<S*>(args.grad_sin);
    if (!args.full_width) {
      grad_cos[row * pairs + pair] = narrow<S>(turn.c1 + turn.c2);
      grad_sin[row * pairs + pair] = narrow<S>(turn.s1 + turn.s2);
      return;
    }
    const int64_t first = row * args.rotary_dim + (args.table_interleaved ? 2 * pair : pair);
    const int64_t second = first + (args.table_interleaved ? 1 : pairs);
    grad_cos[first] = narrow<S>(turn.c1);
    grad_cos[second] = narrow<S>(turn.c2);
    grad_sin[first] = narrow<S>(turn.s1);
    grad_sin[second] = narrow<S>(turn.s2);
  });
}

// args.k: as indexed_after_q has it.
template <class F>
__global__ void __launch_bounds__(kBlockThreads, 1024 / kBlockThreads)
    rotary_table_grad_kernel(const RotaryTableGradArgs args, const TableGradPlan plan) {
  using C = typename F::C;
  constexpr int kPairs = F::kPairs;
  __shared__ C shared[4 * kPairs][kBlockThreads];  // the four sums of each pair, a column a thread

  const int64_t row = block_index();  // of grad_batch * rows
  if (row >= args.grad_batch * args.rows) return;
  const TableGradGeometry& g = plan.geometry;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread / g.fragment_lanes;
  const int head_lane = lane % g.head_lanes;
  const int token_lane = lane / g.head_lanes;
  const int lanes = g.head_lanes * g.token_lanes;
  const int64_t grad_b = row / args.rows, row_of_table = row - grad_b * args.rows;
  const TokenRange tokens = tokens_of(args, grad_b, row_of_table);

#pragma unroll 1
  for (uint32_t first = 0; first < plan.fragments; first += g.fragment_lanes) {
    const uint32_t fragment = first + thread - lane * g.fragment_lanes;
    TurnGrad<C> sums[kPairs] = {};
    if (fragment < plan.fragments && lane < lanes) {
      const Offsets x_at = F::offsets(fragment, plan.x), grad_at = F::offsets(fragment, plan.grad);
#pragma unroll 1
      for (int64_t i = tokens.begin + token_lane; i < tokens.end; i += g.token_lanes) {
        int64_t b, s;
        if (!find_token(args, row_of_table, i, b, s)) continue;
        add_token<F>(sums, args, plan, static_cast<uint32_t>(b), static_cast<uint32_t>(s),
                     head_lane, x_at, grad_at);
      }
    }

    // A tree over the lanes, whose number is a power of two.
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      shared[4 * j][thread] = sums[j].g1x1;
      shared[4 * j + 1][thread] = sums[j].g1x2;
      shared[4 * j + 2][thread] = sums[j].g2x1;
      shared[4 * j + 3][thread] = sums[j].g2x2;
    }
    __syncthreads();
#pragma unroll 1
    for (int half = lanes / 2; half > 0; half /= 2) {
      if (lane < half) {
#pragma unroll
        for (int i = 0; i < 4 * kPairs; ++i) {
          shared[i][thread] += shared[i][thread + half * g.fragment_lanes];
        }
      }
      __syncthreads();
    }

    // Neighbouring threads write neighbouring pairs.
    const int fragments = static_cast<int>(min(plan.fragments - first, g.fragment_lanes));
#pragma unroll 1
    for (int pair = thread; pair < fragments * kPairs; pair += static_cast<int>(blockDim.x)) {
      const int column = pair / kPairs, at = 4 * (pair % kPairs);
      const TurnGrad<C> sum{shared[at][column], shared[at + 1][column], shared[at + 2][column],
                            shared[at + 3][column]};
      write_pair(args, row, static_cast<int64_t>(first) * kPairs + pair, grad_of(sum, args));
    }
    __syncthreads();
  }
}

template <class F>
void launch_kernel(RotaryTableGradArgs args, void* stream) {
  const int64_t fragments = args.rotary_dim / 2 / F::kPairs;
  const int64_t rows = args.grad_batch * args.rows;
  const int64_t heads = args.q.heads + args.k.heads;
  TableGradPlan plan;
  plan.x = F::layout(args.rotary_dim, args.interleaved);
  plan.grad = F::layout(args.rotary_dim, args.interleaved_out);
  plan.fragments = static_cast<uint32_t>(fragments);
  plan.heads = static_cast<uint32_t>(heads);
  plan.geometry =
      table_grad_geometry(fragments, max_of(heads, 1), args.batch * args.seq / rows, rows);
  args.k.grad = indexed_after_q(args.k.grad, args.q.heads, size_of(args.dtype));
  args.k.x = indexed_after_q(args.k.x, args.q.heads, size_of(args.dtype));
  launch(args.op, rotary_table_grad_kernel<F>, plan.geometry.grid, plan.geometry.block_threads,
         stream, args, plan);
}

template <class E>
void launch_element(const RotaryTableGradArgs& args, void* stream) {
  Alignment alignment(sizeof(E));
  for (const GradHeads* x : {&args.q, &args.k}) {
    if (x->heads == 0) continue;
    alignment.add(x->grad, args.batch, args.seq, x->heads);
    alignment.add(x->x, args.batch, args.seq, x->heads);
  }
  const Order order = order_of(args.interleaved, args.interleaved_out);
  alignment.add_elements(order == Order::Interleaved ? args.rotary_dim : args.rotary_dim / 2);
  // At most four pairs a thread, with four sums each: more would take more than 64 registers.
  constexpr int kWhole = 16 / sizeof(E), kHalfSplit = kWhole < 4 ? kWhole : 4;
  if (!alignment.allows(order == Order::HalfSplit ? kHalfSplit * sizeof(E) : 16)) {
    launch_kernel<Fragment<E, 1, Order::Any>>(args, stream);
  } else if (order == Order::Interleaved) {
    launch_kernel<Fragment<E, kWhole, Order::Interleaved>>(args, stream);
  } else if (order == Order::Either) {
    launch_kernel<Fragment<E, kHalfSplit, Order::Either>>(args, stream);
  } else {
    launch_kernel<Fragment<E, kHalfSplit, Order::HalfSplit>>(args, stream);
  }
}

}  // namespace

void rotary_table_grad(const RotaryTableGradArgs& args, void* stream) {
  if (args.grad_batch == 0 || args.rows == 0 || args.rotary_dim == 0) return;
  check_counts(args.op, args.q.heads + args.k.heads, args.rotary_dim, args.batch, args.seq);
  dispatch(args.dtype, [&](auto storage) { launch_element<decltype(storage)>(args, stream); });
}

}  // namespace rope::cuda
