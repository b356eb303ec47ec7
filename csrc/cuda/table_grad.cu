// Gradient of apply_rotary to its cos and sin on CUDA: one block sums one row, in a fixed order.
#include "cuda/parts/launch.cuh"
#include "cuda/parts/unit.cuh"
#include "kernels.h"
#include "math/index.h"

namespace rope::cuda {

namespace {

struct Plan {
  TableGradGeometry geometry;
  UnitLayout x, grad;
  uint32_t units;  // of one head
  uint32_t heads;  // of q and k together
};

// Adds what the thread's heads of one token give, of q and k counted together; the channels are the
// first of the units.
template <class UnitOfX, class UnitOfGrad, class E>
__device__ __forceinline__ void add_token(TurnGrad<typename UnitOfX::C> (&sums)[UnitOfX::kPairs],
                                          const RotaryTableGradArgs& args, const Plan& plan,
                                          uint32_t b, uint32_t s, uint32_t head_lane,
                                          uint32_t channel_x, uint32_t channel_grad) {
  using C = typename UnitOfX::C;
  constexpr int kPairs = UnitOfX::kPairs;
  const auto offset = [&](uint32_t head, int64_t stride_b, int64_t stride_s, int64_t stride_h,
                          uint32_t channel) {
    return b * stride_b + s * stride_s + head * stride_h + channel;
  };
#pragma unroll 1
  for (uint32_t head = head_lane; head < plan.heads; head += plan.geometry.head_lanes) {
    // Field by field: a choice between whole structs would put them into local memory.
    const bool is_q = head < static_cast<uint32_t>(args.q.heads);
    const GradHeads &q = args.q, &k = args.k;
    const E* grad = static_cast<const E*>(is_q ? q.grad.data : k.grad.data) +
                    offset(head, is_q ? q.grad.stride_b : k.grad.stride_b,
                           is_q ? q.grad.stride_s : k.grad.stride_s,
                           is_q ? q.grad.stride_h : k.grad.stride_h, channel_grad);
    const E* x =
        static_cast<const E*>(is_q ? q.x.data : k.x.data) +
        offset(head, is_q ? q.x.stride_b : k.x.stride_b, is_q ? q.x.stride_s : k.x.stride_s,
               is_q ? q.x.stride_h : k.x.stride_h, channel_x);
    UnitOfGrad grad_unit;
    UnitOfX x_unit;
    grad_unit.load_from(grad, plan.grad.second);
    x_unit.load_from(x, plan.x.second);
    C g1[kPairs], g2[kPairs], x1[kPairs], x2[kPairs];
    grad_unit.unpack_to(g1, g2);
    x_unit.unpack_to(x1, x2);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) accumulate(sums[j], g1[j], g2[j], x1[j], x2[j]);
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

// args.k.*.data point as far before k that heads can be counted on from those of q. N == 1: pairs
// in any order, in x and in grad.
template <class E, int N, bool kInterleaved, bool kInterleavedOut>
__global__ void __launch_bounds__(kBlockThreads, 1024 / kBlockThreads)
    rotary_table_grad_kernel(const RotaryTableGradArgs args, const Plan plan) {
  constexpr bool kMixed = kInterleaved != kInterleavedOut;
  using UnitOfX = UnitOf<E, N, kInterleaved, kMixed>;
  using UnitOfGrad = UnitOf<E, N, kInterleavedOut, kMixed>;
  using C = typename UnitOfX::C;
  constexpr int kPairs = UnitOfX::kPairs;
  __shared__ C shared[4 * kPairs][kBlockThreads];  // the four sums of each pair, a column a thread

  const int64_t row = block_index();  // of grad_batch * rows
  if (row >= args.grad_batch * args.rows) return;
  const TableGradGeometry& g = plan.geometry;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread / g.unit_lanes;
  const int head_lane = lane % g.head_lanes;
  const int token_lane = lane / g.head_lanes;
  const int lanes = g.head_lanes * g.token_lanes;
  const int64_t grad_b = row / args.rows, row_of_table = row - grad_b * args.rows;
  const TokenRange tokens = tokens_of(args, grad_b, row_of_table);

#pragma unroll 1
  for (uint32_t first = 0; first < plan.units; first += g.unit_lanes) {
    const uint32_t unit = first + thread - lane * g.unit_lanes;
    TurnGrad<C> sums[kPairs] = {};
    if (unit < plan.units && lane < lanes) {
      const uint32_t channel_x = UnitOfX::channel_of(unit, plan.x);
      const uint32_t channel_grad = UnitOfGrad::channel_of(unit, plan.grad);
#pragma unroll 1
      for (int64_t i = tokens.begin + token_lane; i < tokens.end; i += g.token_lanes) {
        int64_t b, s;
        if (!find_token(args, row_of_table, i, b, s)) continue;
        add_token<UnitOfX, UnitOfGrad, E>(sums, args, plan, static_cast<uint32_t>(b),
                                          static_cast<uint32_t>(s), head_lane, channel_x,
                                          channel_grad);
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
          shared[i][thread] += shared[i][thread + half * g.unit_lanes];
        }
      }
      __syncthreads();
    }

    // Neighbouring threads write neighbouring pairs.
    const int units = static_cast<int>(min(plan.units - first, g.unit_lanes));
#pragma unroll 1
    for (int pair = thread; pair < units * kPairs; pair += static_cast<int>(blockDim.x)) {
      const int column = pair / kPairs, at = 4 * (pair % kPairs);
      const TurnGrad<C> sum{shared[at][column], shared[at + 1][column], shared[at + 2][column],
                            shared[at + 3][column]};
      write_pair(args, row, static_cast<int64_t>(first) * kPairs + pair,
                 grad_of(sum, args.inverse));
    }
    __syncthreads();
  }
}

template <class E, int N, bool kInterleaved, bool kInterleavedOut>
void launch_units(RotaryTableGradArgs args, void* stream) {
  constexpr bool kMixed = kInterleaved != kInterleavedOut;
  using UnitOfX = UnitOf<E, N, kInterleaved, kMixed>;
  using UnitOfGrad = UnitOf<E, N, kInterleavedOut, kMixed>;
  const int64_t units = args.rotary_dim / 2 / UnitOfX::kPairs;
  const int64_t rows = args.grad_batch * args.rows;
  const int64_t tokens = args.batch * args.seq;
  Plan plan;
  plan.x = UnitOfX::layout(args.rotary_dim, args.interleaved);
  plan.grad = UnitOfGrad::layout(args.rotary_dim, args.interleaved_out);
  plan.units = static_cast<uint32_t>(units);
  plan.heads = static_cast<uint32_t>(args.q.heads + args.k.heads);
  plan.geometry = table_grad_geometry(units, std::max<int64_t>(plan.heads, 1), tokens / rows, rows);
  args.k.grad = counted_on(args.k.grad, args.q.heads, sizeof(E));
  args.k.x = counted_on(args.k.x, args.q.heads, sizeof(E));
  launch(args.op, rotary_table_grad_kernel<E, N, kInterleaved, kInterleavedOut>, plan.geometry.grid,
         plan.geometry.block_threads, stream, args, plan);
}

template <class E>
void launch_element(const RotaryTableGradArgs& args, void* stream) {
  Alignment alignment(sizeof(E));
  for (const GradHeads* x : {&args.q, &args.k}) {
    if (x->heads == 0) continue;
    alignment.add(x->grad, args.batch, args.seq, x->heads);
    alignment.add(x->x, args.batch, args.seq, x->heads);
  }
  const bool all_interleaved = args.interleaved && args.interleaved_out;
  alignment.add_elements(all_interleaved ? args.rotary_dim : args.rotary_dim / 2);
  // At most four pairs a thread, with four sums each: more would take more than 64 registers.
  constexpr int kWhole = 16 / sizeof(E), kHalfSplit = kWhole < 4 ? kWhole : 4;
  const bool mixed = args.interleaved != args.interleaved_out;
  if (all_interleaved && alignment.allows(16)) {
    launch_units<E, kWhole, true, true>(args, stream);
  } else if (mixed && args.interleaved && alignment.allows(16)) {
    launch_units<E, kHalfSplit, true, false>(args, stream);
  } else if (mixed && alignment.allows(16)) {
    launch_units<E, kHalfSplit, false, true>(args, stream);
  } else if (!mixed && !all_interleaved && alignment.allows(kHalfSplit * sizeof(E))) {
    launch_units<E, kHalfSplit, false, false>(args, stream);
  } else {
    launch_units<E, 1, false, false>(args, stream);
  }
}

}  // namespace

void rotary_table_grad(const RotaryTableGradArgs& args, void* stream) {
  if (args.grad_batch == 0 || args.rows == 0 || args.rotary_dim == 0) return;
  check_counts(args.op, args.q.heads + args.k.heads, args.rotary_dim, args.batch, args.seq);
  dispatch(args.dtype, [&](auto storage) { launch_element<decltype(storage)>(args, stream); });
}

}  // namespace rope::cuda
