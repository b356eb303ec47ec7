// Tables of cos and sin on CUDA, and their gradient to inv_freq. A thread for each angle.
#include "cuda/parts/angles.cuh"
#include "cuda/parts/launch.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

// One entry of a table [rows, columns].
struct TableEntry {
  int64_t row;
  int64_t column;  // the thread's first: it steps by column_lanes
  bool inside;
};

__device__ __forceinline__ TableEntry table_entry(const EntryGeometry& g, int64_t rows) {
  const int lane = static_cast<int>(threadIdx.x) / g.column_lanes;
  const int64_t row = block_index() * g.rows_per_block + lane;
  const int column = static_cast<int>(threadIdx.x) - lane * g.column_lanes;
  return {row, column, lane < g.rows_per_block && row < rows};
}

// kDouble: cos and sin are float64.
template <bool kDouble>
__global__ void __launch_bounds__(kBlockThreads)
    cos_sin_kernel(const CosSinArgs args, const EntryGeometry g) {
  const Angles& angles = args.angles;
  const TableEntry entry = table_entry(g, args.tokens);
  if (!entry.inside) return;
  const int64_t token = token_at(angles.positions, 0, entry.row);
  const bool has_axes = angles.axes.data != nullptr;
  const double of_all = has_axes ? 0 : position_at(angles.positions, token);
#pragma unroll 1
  for (int64_t pair = entry.column; pair < angles.pairs; pair += g.column_lanes) {
    const double inv_freq = value_at(angles.inv_freq, angles.inv_freq_dtype, pair);
    const double position = has_axes ? position_of_pair(angles, token, pair) : of_all;
    const SinCos value = sin_cos<kDouble>(position, inv_freq);
    const int64_t at = entry.row * angles.pairs + pair;
    const auto store_as = [&](auto storage) {
      using S = decltype(storage);
      static_cast<S*>(args.cos)[at] = narrow<S>(value.cos * angles.attention_scaling);
      static_cast<S*>(args.sin)[at] = narrow<S>(value.sin * angles.attention_scaling);
    };
    if constexpr (kDouble) {
      store_as(double{});
    } else {
      dispatch(args.dtype, store_as);
    }
  }
}

// 64 registers are enough without local memory, before sm_90 80.
constexpr int grad_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return resident_blocks(768);
#else
  return resident_blocks(1024);
#endif
}

// partial [chunks, P]: row i is the sum, in order, of chunk_tokens tokens from i * chunk_tokens on.
//   d cos / d inv_freq = -position scale sin(angle)
//   d sin / d inv_freq =  position scale cos(angle)
__global__ void __launch_bounds__(kBlockThreads, grad_blocks())
    cos_sin_grad_kernel(const CosSinGradArgs args, const EntryGeometry g) {
  const Angles& angles = args.angles;
  const TableEntry entry = table_entry(g, args.chunks);
  if (!entry.inside) return;
  const int64_t begin = entry.row * args.chunk_tokens;
  const int64_t end = min(begin + args.chunk_tokens, args.tokens);
  const bool has_axes = angles.axes.data != nullptr;
#pragma unroll 1
  for (int64_t pair = entry.column; pair < angles.pairs; pair += g.column_lanes) {
    const double inv_freq = value_at(angles.inv_freq, angles.inv_freq_dtype, pair);
    double sum = 0;
#pragma unroll 1
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = token_at(angles.positions, 0, row);
      const double position =
          has_axes ? position_of_pair(angles, token, pair) : position_at(angles.positions, token);
      const SinCos value = sin_cos<true>(position, inv_freq);
      const double scale = position * angles.attention_scaling;
      const int64_t at = row * angles.pairs + pair;
      const double grad_cos = value_at(args.grad_cos, args.grad_dtype, at);
      const double grad_sin = value_at(args.grad_sin, args.grad_dtype, at);
      sum += value.cos * scale * grad_sin - value.sin * scale * grad_cos;
    }
    args.partial[entry.row * angles.pairs + pair] = sum;
  }
}

// The sum of the partial sums, in order: a thread for each pair.
__global__ void __launch_bounds__(kBlockThreads)
    cos_sin_grad_sum_kernel(const CosSinGradArgs args) {
  const int64_t pairs = args.angles.pairs;
  const int64_t pair = block_index() * blockDim.x + threadIdx.x;
  if (pair >= pairs) return;
  double sum = 0;
#pragma unroll 8
  for (int64_t chunk = 0; chunk < args.chunks; ++chunk) {
    sum += __ldg(args.partial + chunk * pairs + pair);
  }
  dispatch(args.angles.inv_freq_dtype, [&](auto storage) {
    using S = decltype(storage);
    static_cast<S*>(args.grad_inv_freq)[pair] = narrow<S>(sum);
  });
}

}  // namespace

void cos_sin(const CosSinArgs& args, void* stream) {
  const Angles& angles = args.angles;
  if (args.tokens == 0 || angles.pairs == 0) return;
  const EntryGeometry g = entry_geometry(angles.pairs, args.tokens);
  const auto kernel = args.dtype == DType::Float64 ? cos_sin_kernel<true> : cos_sin_kernel<false>;
  launch(angles.op, kernel, g.grid, g.block_threads, stream, args, g);
}

void cos_sin_grad(const CosSinGradArgs& args, void* stream) {
  const char* const op = args.angles.op;
  const int64_t pairs = args.angles.pairs;
  if (pairs == 0) return;
  if (args.chunks > 0) {
    const EntryGeometry g = entry_geometry(pairs, args.chunks);
    launch(op, cos_sin_grad_kernel, g.grid, g.block_threads, stream, args, g);
  }
  const int64_t threads = min_of(whole_warps(pairs), kBlockThreads);
  launch(op, cos_sin_grad_sum_kernel, grid_of(ceil_div(pairs, threads)),
         static_cast<uint32_t>(threads), stream, args);
}

}  // namespace rope::cuda
