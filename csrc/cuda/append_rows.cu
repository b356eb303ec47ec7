// rms_norm_rotary_append on CUDA, and apply_rotary_append where q becomes float8: one launch, in
// which a group of threads has a head of q, k or v, or all of them where they share a norm. Of each
// token the rows of q come first, then those of k, then those of v.
//
// A group takes the fragments of its row up to three times: for the sum of squares, for the largest
// magnitude of each head where q is divided by scales of its own, and to write them. At each turn
// it goes on with the fragment that it has in registers, so a row of at most kMostLanes fragments
// is read once.
#include "cuda/parts/cache_store.cuh"
#include "cuda/parts/norm_row.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

struct AppendRow {
  uint32_t b, s, first_head, fragments;  // fragments == 0: nothing to do
  bool is_q, is_v;
};

struct AppendRowPlan : NormPlan {
  uint32_t q_rows, k_rows, v_rows;  // of a token
  Float8Format cache, q;            // of the cache and of q, if they are float8
  bool is_normed, reorders, own_scales;
  uint32_t scaled_heads;  // of a row of q, if each head has a scale of its own
};

// kFloat8Q: q becomes float8. kLatent: v is one head of any length, without norms; each of its rows
// has as many channels as a head of q has fragments, times their vectors' N.
template <class Traits_, bool kFloat8Q_, bool kLatent_>
struct AppendRowTraits {
  using F = typename Traits_::F;
  static constexpr bool kFullWidth = Traits_::kFullWidth;
  static constexpr bool kFloat8Q = kFloat8Q_, kLatent = kLatent_;
};

template <class Traits>
__device__ __forceinline__ AppendRow row_at(const RmsNormAppendArgs& args,
                                            const AppendRowPlan& plan, int64_t index) {
  if (index >= plan.rows) return {};
  const RotaryArgs& rotary = args.append.rotary;
  const uint32_t rows = plan.q_rows + plan.k_rows + plan.v_rows;
  const uint32_t token = static_cast<uint32_t>(index) / rows;
  uint32_t row = static_cast<uint32_t>(index) - token * rows;
  const uint32_t b = token / static_cast<uint32_t>(rotary.seq);
  const uint32_t s = token - b * static_cast<uint32_t>(rotary.seq);
  const bool is_q = row < plan.q_rows, is_v = row >= plan.q_rows + plan.k_rows;
  row -= is_q ? 0 : is_v ? plan.q_rows + plan.k_rows : plan.q_rows;
  if (args.norm.all_heads) {
    const int64_t heads = is_q ? rotary.q.heads : rotary.k.heads;
    return {b, s, 0, static_cast<uint32_t>(heads) * plan.fragments, is_q, is_v};
  }
  uint32_t fragments = plan.fragments;
  if (Traits::kLatent && !is_q) {
    const uint32_t of_v = static_cast<uint32_t>(args.append.v.channels) / Traits::F::N;
    fragments = is_v ? min(fragments, of_v - row * fragments) : plan.rotary.rotated_fragments;
  }
  return {b, s, row, fragments, is_q, is_v};
}

template <class F>
__device__ __forceinline__ uint32_t largest_bits(const F& x, bool both) {
  typename F::C channels[F::kChannels];
  x.unpack_to(channels);
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < F::kChannels; ++i) {
    const uint32_t bits = __float_as_uint(static_cast<float>(channels[i])) & 0x7fffffffu;
    if (i < F::N || both) largest = max(largest, bits);
  }
  return largest;
}

template <class Traits>
__global__ void __launch_bounds__(kMostLanes, Traits::kFloat8Q ? 1 : resident_blocks<Traits>())
    append_row_kernel(const RmsNormAppendArgs args, const AppendRowPlan plan) {
  using F = typename Traits::F;
  using E = typename F::E;
  using C = typename F::C;
  constexpr bool kFloat8Q = Traits::kFloat8Q, kLatent = Traits::kLatent;
  __shared__ C of_warps[kMostLanes / kWarpThreads];
  extern __shared__ uint32_t largest[];  // of each head of q of each group, as bits of float
  const RotaryArgs& rotary = args.append.rotary;
  const StoredHeads &k = args.append.k, &v = args.append.v;
  const uint32_t group = threadIdx.x / plan.lanes;
  const uint32_t lane = threadIdx.x - group * plan.lanes;
  const AppendRow row = row_at<Traits>(args, plan, block_index() * plan.groups + group);
  const bool norms = !kLatent && (!kFloat8Q || plan.is_normed);
  const bool is_normed = norms && (!row.is_v || args.v.heads > 0);
  const bool writes = !row.is_v || is_normed;  // a tensor, not the cache alone
  const Heads<void*> of_v{const_cast<void*>(v.in.data), v.in.stride_b, v.in.stride_s,
                          v.in.stride_h};
  if (kFloat8Q && plan.own_scales) {
    const uint32_t count = plan.groups * plan.scaled_heads;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) largest[i] = 0;
    __syncthreads();
  }

  C squares = 0, inverse_rms = 0;
  const int32_t sums = plan.steps - 1, maxima = 2 * sums;  // the steps at the turns
  const int32_t first_store = kFloat8Q && plan.own_scales ? maxima : sums;
#pragma unroll 1
  for (int32_t step = 0; step <= first_store + sums; ++step) {
    const int32_t of_thread = kFloat8Q && step > maxima ? maxima + sums - step : abs(step - sums);
    const uint32_t index = lane + static_cast<uint32_t>(of_thread) * plan.lanes;
    const bool active = index < row.fragments;
    const uint32_t head_of_row = index / plan.fragments;
    const uint32_t in_head = index - head_of_row * plan.fragments;
    uint32_t head = row.first_head + head_of_row;
    NormFragment in = norm_fragment<F>(rotary, plan.rotary, plan.rotary.in, in_head);
    NormFragment out = in;
    if (kLatent && !F::kOneOrder) {
      out = norm_fragment<F>(rotary, plan.rotary, plan.rotary.out, in_head);
    }
    if (kLatent && row.is_v) {
      in = out = {{static_cast<int32_t>((row.first_head * plan.fragments + index) * F::N), 0},
                  false};
      head = 0;
    }
    const Heads<void*> heads = choose(row.is_v, of_v, choose(row.is_q, rotary.q.out, rotary.k.out));
    E* const data = channel_at<E>(heads, row.b, row.s, head, 0);
    F x{};
    if (active && writes && (is_normed || step >= sums)) {
      load_fragment(x, data, in);
      if (is_normed && step <= sums) squares += sum_of_squares(x);
    }
    if (kLatent && plan.reorders) __syncthreads();  // a thread writes channels that others read
    if (norms && step == sums) {
      const C channels = static_cast<C>(row.fragments / plan.fragments * rotary.head_dim);
      squares = sum_over_lanes(squares, plan.lanes, of_warps);
      inverse_rms = inverse_rms_of(squares, channels, args.norm.eps);
    }
    if (active && writes && step >= sums) {
      C y[F::kChannels];
      x.unpack_to(y);
      if (is_normed) {
#pragma unroll
        for (int i = 0; i < F::kChannels; ++i) y[i] *= inverse_rms;
        if (!row.is_v) {
          C w[F::kChannels];
          load_factors<F>(w, args.norm, row.is_q, head, in);
#pragma unroll
          for (int i = 0; i < F::kChannels; ++i) y[i] *= w[i];
        }
      }
      const bool turns = in.rotates && !row.is_v;
      if (turns) {
        TableValues<F, Traits::kFullWidth> values;
        load_table(values, rotary, plan.rotary.table, row.b, row.s, in_head);
        rotate_channels<F>(y, values, rotary.interleaved, rotary.interleaved_out);
      }
      if (is_normed || turns) x.pack_from(y);
    }
    if constexpr (kFloat8Q) {
      if (plan.own_scales) {
        uint32_t* const of_head = largest + group * plan.scaled_heads + head_of_row;
        if (active && row.is_q && step >= sums && step <= maxima) {
          atomicMax(of_head, largest_bits(x, out.rotates));
        }
        if (step == maxima) __syncthreads();
      }
    }
    if (step < first_store || !active) continue;
    if (kFloat8Q && row.is_q) {
      const Float8Heads& q = args.append.float8_q;
      float scale = q.scale == nullptr ? 1 : __ldg(q.scale + head * q.scale_stride_h);
      if (plan.own_scales) {
        const uint32_t bits = largest[group * plan.scaled_heads + head_of_row];
        scale = own_scale(__uint_as_float(bits), q.dtype == CacheDType::Float8E4M3);
        const Heads<float*>& to = q.own_scale;
        if (in_head == 0) {
          to.data[row.b * to.stride_b + row.s * to.stride_s + head * to.stride_h] = scale;
        }
      }
      uint8_t* const to = channel_at<uint8_t>(q.out, row.b, row.s, head, out.at.first);
      store_float8(x.vectors[0], to, plan.q, scale);
      if (F::kVectors == 2 && out.rotates) {
        store_float8(x.vectors[F::kVectors - 1], to + out.at.second, plan.q, scale);
      }
      continue;
    }
    if (is_normed || (!row.is_v && in.rotates)) store_fragment(x, data, out);  // else as before
    const Slot slot = row.is_q ? Slot{} : slot_of(args.append, row.b, row.s);
    if (!slot.exists) continue;
    if (!writes) load_fragment(x, data, in);
    store_cached<true>(x, choose(row.is_v, v, k), args.append.cache_dtype, plan.cache, slot, head,
                       out.at.first, out.at.second, {true, out.rotates});
  }
}

template <class Traits>
void launch_kernel(const RmsNormAppendArgs& args, void* stream) {
  using F = typename Traits::F;
  const AppendArgs& append = args.append;
  const RotaryArgs& rotary = append.rotary;
  const bool all_heads = args.norm.all_heads,
             own_scales = append.float8_q.own_scale.data != nullptr;
  const auto rows_of = [&](int64_t heads) { return all_heads ? 1 : static_cast<uint32_t>(heads); };
  AppendRowPlan plan{norm_plan<F>(rotary, args.norm, max_of(rotary.q.heads, rotary.k.heads)),
                     rows_of(rotary.q.heads),
                     rows_of(rotary.k.heads),
                     rows_of(rotary.k.heads),
                     float8_format(append.cache_dtype),
                     float8_format(append.float8_q.dtype),
                     args.norm.q_weight != nullptr,
                     rotary.interleaved != rotary.interleaved_out,
                     own_scales,
                     all_heads ? static_cast<uint32_t>(rotary.q.heads) : 1};
  if (Traits::kLatent) {
    plan.v_rows = static_cast<uint32_t>(ceil_div(append.v.channels, plan.fragments * F::N));
  }
  const int64_t of_token = int64_t{plan.q_rows} + plan.k_rows + plan.v_rows;
  plan.rows = static_cast<uint32_t>(rotary.batch * rotary.seq * of_token);
  const size_t shared_bytes = own_scales ? sizeof(uint32_t) * plan.groups * plan.scaled_heads : 0;
  launch_with(shared_bytes, rotary.op, append_row_kernel<Traits>,
              grid_of(ceil_div(plan.rows, plan.groups)), plan.groups * plan.lanes, stream, args,
              plan);
}

template <class E>
void launch_element(const RmsNormAppendArgs& args, void* stream) {
  const AppendArgs& append = args.append;
  dispatch_traits<E>(append.rotary, args.norm, alignment_of_append(append), [&](auto traits) {
    using Traits = decltype(traits);
    if (append.latent) {
      launch_kernel<AppendRowTraits<Traits, true, true>>(args, stream);
    } else if (append.float8_q.out.data != nullptr) {
      launch_kernel<AppendRowTraits<Traits, true, false>>(args, stream);
    } else {
      launch_kernel<AppendRowTraits<Traits, false, false>>(args, stream);
    }
  });
}

}  // namespace

void rms_norm_rotary_append(const RmsNormAppendArgs& given, void* stream) {
  RmsNormAppendArgs args = given;
  args.append = with_common_channels(args.append);
  const RotaryArgs& rotary = args.append.rotary;
  if (rotary.batch == 0 || rotary.seq == 0 || rotary.q.heads + rotary.k.heads == 0) return;
  const int64_t of_v = args.append.latent ? args.append.v.channels : rotary.k.heads;
  check_rows(rotary, rotary.q.heads + rotary.k.heads + of_v);
  dispatch(rotary.dtype, [&](auto storage) { launch_element<decltype(storage)>(args, stream); });
}

}  // namespace rope::cuda
