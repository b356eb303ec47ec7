// apply_rotary_quantize on CUDA: one launch, in which `lanes` threads have a head. They take its
// fragments from the last to the first, for the largest magnitude of each group of channels, and
// from the first, which they still have in registers, to the last again, to write them. So a head
// of at most kMostLanes fragments is read once.
#include "cuda/parts/cache_store.cuh"
#include "cuda/parts/norm_row.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

template <int N, class C>
__device__ __forceinline__ uint32_t largest_bits(const C* x) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    largest = max(largest, __float_as_uint(static_cast<float>(x[i])) & 0x7fffffffu);
  }
  return largest;
}

template <class Traits>
__global__ void __launch_bounds__(kMostLanes, resident_blocks<Traits>())
    quantize_kernel(const QuantizeArgs args, const NormPlan plan, const Float8Format format) {
  using F = typename Traits::F;
  using C = typename F::C;
  extern __shared__ uint32_t largest[];  // of the groups of each head, as bits of float
  const uint32_t group_size = static_cast<uint32_t>(args.group_size);
  const uint32_t groups = static_cast<uint32_t>(args.head_dim) / group_size;
  const uint32_t head_of_block = threadIdx.x / plan.lanes;
  const uint32_t lane = threadIdx.x - head_of_block * plan.lanes;
  const int64_t row = block_index() * plan.groups + head_of_block;
  const bool exists = row < plan.rows;
  const uint32_t token = static_cast<uint32_t>(row) / static_cast<uint32_t>(args.q.heads);
  const uint32_t head = static_cast<uint32_t>(row) - token * static_cast<uint32_t>(args.q.heads);
  const uint32_t b = token / static_cast<uint32_t>(args.seq);
  const uint32_t s = token - b * static_cast<uint32_t>(args.seq);
  uint32_t* const of_head = largest + head_of_block * groups;
  for (uint32_t i = threadIdx.x; i < plan.groups * groups; i += blockDim.x) largest[i] = 0;
  __syncthreads();

  const int32_t turn = plan.steps - 1;
#pragma unroll 1
  for (int32_t step = 0; step <= 2 * turn; ++step) {
    const uint32_t index = lane + static_cast<uint32_t>(abs(step - turn)) * plan.lanes;
    const bool active = exists && index < plan.fragments;
    const NormFragment in = norm_fragment<F>(args, plan.rotary, plan.rotary.in, index);
    NormFragment out = in;
    if (!F::kOneOrder) out = norm_fragment<F>(args, plan.rotary, plan.rotary.out, index);
    // Of the vectors of the result: the first channel of the head, and the group.
    const uint32_t channel = static_cast<uint32_t>(out.at.first + args.rotary_offset);
    const uint32_t second = channel + out.at.second;
    const bool both = F::kVectors == 2 && out.rotates;
    constexpr int kSecond = (F::kVectors - 1) * F::N;
    C x[F::kChannels];
    if (active) {
      load_channels<F>(x, channel_at<typename F::E>(args.q.in, b, s, head, 0), in);
      if (in.rotates) {
        TableValues<F, Traits::kFullWidth> values;
        load_table(values, args, plan.rotary.table, b, s, index);
        rotate_channels<F>(x, values, args.interleaved, args.interleaved_out);
      }
      if (step <= turn) {
        atomicMax(of_head + channel / group_size, largest_bits<F::N>(x));
        if (both) atomicMax(of_head + second / group_size, largest_bits<F::N>(x + kSecond));
      }
    }
    if (step == turn) __syncthreads();
    if (step < turn || !active) continue;
    const auto write = [&](const C* values, uint32_t first) {
      const uint32_t group = first / group_size;
      const float scale =
          group_scale(of_head[group], args.eps, args.float8_dtype == CacheDType::Float8E4M3,
                      args.power_of_two_scales);
      if (first == group * group_size) {
        const Heads<float*>& to = args.scales;
        to.data[b * to.stride_b + s * to.stride_s + head * to.stride_h +
                group * args.scales_stride_group] = scale;
      }
      uint8_t* const to = channel_at<uint8_t>(args.float8, b, s, head, static_cast<int32_t>(first));
      store_float8<F::N>(values, to, format, scale);
    };
    write(x, channel);
    if (both) write(x + kSecond, second);
  }
}

template <class Traits>
void launch_kernel(const QuantizeArgs& args, void* stream) {
  NormPlan plan = norm_plan<typename Traits::F>(args, RmsNorm{}, args.q.heads);
  plan.rows = static_cast<uint32_t>(args.batch * args.seq * args.q.heads);
  const size_t shared_bytes = sizeof(uint32_t) * plan.groups * (args.head_dim / args.group_size);
  launch_with(shared_bytes, args.op, quantize_kernel<Traits>,
              grid_of(ceil_div(plan.rows, plan.groups)), plan.groups * plan.lanes, stream, args,
              plan, float8_format(args.float8_dtype));
}

template <class E>
void launch_element(const QuantizeArgs& args, void* stream) {
  Alignment alignment(sizeof(E));
  alignment.add(args.q.in, args.batch, args.seq, args.q.heads);
  add_float8(alignment, args.float8, args);
  alignment.add_elements(args.group_size);
  dispatch_traits<E>(args, RmsNorm{}, alignment,
                     [&](auto traits) { launch_kernel<decltype(traits)>(args, stream); });
}

}  // namespace

void apply_rotary_quantize(const QuantizeArgs& args, void* stream) {
  if (args.batch == 0 || args.seq == 0 || args.q.heads == 0) return;
  check_rows(args, args.q.heads);
  dispatch(args.dtype, [&](auto storage) { launch_element<decltype(storage)>(args, stream); });
}

}  // namespace rope::cuda
