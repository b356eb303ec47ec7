// apply_rotary_append on CUDA: q and k rotated, and k and v written to a paged cache, in one
// launch. Heads of q, k and v have one index, in this order; each thread has the same channels of
// all of its heads.
#include "cuda/parts/cache_store.cuh"
#include "cuda/parts/rotate_heads.cuh"
#include "kernels.h"

namespace rope::cuda {

namespace {

// A cache of k and v [blocks, block_size, H, D]. kGeneral: the table may have R columns, and there
// may be channels that do not rotate, which are stored too. Without kFloat8 the cache is known to
// have the model's dtype.
template <bool kGeneral_, bool kFloat8_>
struct KeyValueCache {
  static constexpr bool kGeneral = kGeneral_, kFloat8 = kFloat8_, kLatent = false;
};

// A cache of latent vectors: v, which is one head of any length, is divided into heads of R
// channels.
struct LatentCache {
  static constexpr bool kGeneral = false, kFloat8 = true, kLatent = true;
};

struct AppendPlan : RotaryPlan {
  Float8Format float8;  // of the cache, if it has one
};

template <class E, int N, Order kOrder, class Cache_>
struct AppendTraits {
  using F = Fragment<E, N, kOrder>;
  using Cache = Cache_;
  // The order of the pairs may change in place: a thread then writes channels that others read.
  static constexpr bool kMayConvert =
      Cache::kLatent && (kOrder == Order::Either || kOrder == Order::Any);

  // The most that leave the kernel enough registers to need no local memory: 1024 threads have 64
  // each, 1280 threads 48. Eight half-split pairs take 80, and with four table values a pair and a
  // conversion to float8 some more.
  static constexpr int blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    constexpr int kEightLatent = 1024;
#else
    constexpr int kEightLatent = 1280;
#endif
    constexpr bool kPlain = !Cache::kGeneral && !Cache::kFloat8;
    if (kOrder == Order::Any) return resident_blocks(sizeof(E) == 8 ? 1024 : 1536);
    if (kOrder == Order::Interleaved) {
      return resident_blocks(N < 8 ? 1280 : Cache::kLatent ? kEightLatent : 1024);
    }
    if (N < 8) return resident_blocks(kPlain ? 1280 : 1024);
    if (kPlain) return resident_blocks(1024);
    if (Cache::kLatent) return resident_blocks(768);
    return resident_blocks(!Cache::kGeneral ? 1024 : Cache::kFloat8 ? 512 : 768);
  }
};

template <class Traits>
__global__ void __launch_bounds__(kBlockThreads, Traits::blocks())
    append_kernel(const AppendArgs args, const AppendPlan plan) {
  using F = typename Traits::F;
  using E = typename F::E;
  using Cache = typename Traits::Cache;
  const RotaryArgs& rotary = args.rotary;
  ThreadWork work{};
  const bool works = find_work(rotary, plan, work);
  if (!Traits::kMayConvert && !works) return;

  const uint32_t q_heads = static_cast<uint32_t>(rotary.q.heads);
  const uint32_t rotated_heads = q_heads + static_cast<uint32_t>(rotary.k.heads);
  const bool rotates = !Cache::kGeneral || work.fragment < plan.rotated_fragments;
  TableValues<F, Cache::kGeneral> values;
  if (rotates && works && work.head < rotated_heads) {
    load_table(values, rotary, plan.table, work.b, work.s, work.fragment);
  }
  const FragmentPlace place = place_of<F>(rotary, plan, work.fragment, rotates);
  const Slot slot = works ? slot_of(args, work.b, work.s) : Slot{};
  const Heads<void*> v{const_cast<void*>(args.v.in.data), args.v.in.stride_b, args.v.in.stride_s,
                       args.v.in.stride_h};  // never written

  // All threads of a block make the same number of steps, so that they can wait for each other.
#pragma unroll 1
  for (uint32_t first = 0; first < plan.heads; first += plan.head_step) {
    const uint32_t any_head = first + work.head;
    const bool is_q = any_head < q_heads, is_v = any_head >= rotated_heads;
    const uint32_t head = any_head - (is_q ? 0 : is_v ? rotated_heads : q_heads);
    const bool moves = is_q ? rotates : is_v ? slot.exists : rotates || slot.exists;
    const bool active = works && any_head < plan.heads && moves;
    const Heads<void*> heads = choose(is_v, v, choose(is_q, rotary.q.out, rotary.k.out));
    Present present{active, active};
    if (Cache::kLatent && is_v) {  // the last head may have fewer channels than R
      const int64_t channel = head * rotary.rotary_dim + place.in.first;
      present.first = active && channel < args.v.channels;
      present.second = active && channel + place.in.second < args.v.channels;
    }
    E* const data = channel_at<E>(heads, work.b, work.s, head, 0);
    F x;
    load_present(x, data + place.in.first, place.in.second, present);
    if constexpr (Traits::kMayConvert) __syncthreads();
    if (!active) continue;
    const bool turns = rotates && !is_v;
    if (turns) {
      x = rotated(x, values, rotary);
      x.store_to(data + place.out.first, place.out.second);
    }
    if (is_q || !slot.exists) continue;
    const Offsets at = is_v ? place.in : place.out;
    store_cached<Cache::kFloat8>(x, choose(is_v, args.v, args.k), args.cache_dtype, plan.float8,
                                 slot, head, at.first, at.second, present);
  }
}

template <class E, int N, Order kOrder, class Cache>
void launch_kernel(const AppendArgs& args, void* stream) {
  using Traits = AppendTraits<E, N, kOrder, Cache>;
  const RotaryArgs& rotary = args.rotary;
  const int64_t heads = rotary.q.heads + rotary.k.heads + args.v.heads;
  const AppendPlan plan{rotary_plan<typename Traits::F>(rotary, heads, stored_beside(args)),
                        float8_format(args.cache_dtype)};
  if (is_empty(plan)) return;
  launch(rotary.op, append_kernel<Traits>, plan.geometry.grid, plan.geometry.block_threads, stream,
         args, plan);
}

template <class E, int N>
void launch_key_value(const AppendArgs& args, void* stream) {
  const bool general = args.rotary.table.full_width || stored_beside(args) > 0;
  const auto launch_for = [&](auto float8) {
    if (args.rotary.interleaved) {
      launch_kernel<E, N, Order::Interleaved, KeyValueCache<true, float8>>(args, stream);
    } else if (general) {
      launch_kernel<E, N, Order::HalfSplit, KeyValueCache<true, float8>>(args, stream);
    } else {
      launch_kernel<E, N, Order::HalfSplit, KeyValueCache<false, float8>>(args, stream);
    }
  };
  if (args.cache_dtype == CacheDType::OfModel) {
    launch_for(std::false_type());
  } else {
    launch_for(std::true_type());
  }
}

template <class E, int N>
void launch_latent(const AppendArgs& args, void* stream) {
  switch (order_of(args.rotary.interleaved, args.rotary.interleaved_out)) {
    case Order::HalfSplit: return launch_kernel<E, N, Order::HalfSplit, LatentCache>(args, stream);
    case Order::Interleaved:
      return launch_kernel<E, N, Order::Interleaved, LatentCache>(args, stream);
    default: return launch_kernel<E, N, Order::Either, LatentCache>(args, stream);
  }
}

template <class E>
void launch_element(const AppendArgs& args, void* stream) {
  const RotaryArgs& rotary = args.rotary;
  const Alignment alignment = alignment_of_append(args);

  // float64 is for comparison: one kernel is enough.
  constexpr int kWide = 16 / sizeof(E);
  if constexpr (kWide > 2) {
    if (fits(alignment, rotary, kWide)) {
      return args.latent ? launch_latent<E, kWide>(args, stream)
                         : launch_key_value<E, kWide>(args, stream);
    }
  }
  args.latent ? launch_kernel<E, 1, Order::Any, LatentCache>(args, stream)
              : launch_kernel<E, 1, Order::Any, KeyValueCache<true, true>>(args, stream);
}

// A latent vector as heads of R channels.
void divide_latent(AppendArgs& args) {
  args.v.heads = ceil_div(args.v.channels, args.rotary.rotary_dim);
  args.v.in.stride_h = args.v.stride_h = args.rotary.rotary_dim;
}

}  // namespace

void apply_rotary_append(const AppendArgs& given, void* stream) {
  if (given.float8_q.out.data != nullptr) return rms_norm_rotary_append({given, {}, {}}, stream);
  AppendArgs args = with_common_channels(given);
  if (args.latent) divide_latent(args);
  const RotaryArgs& rotary = args.rotary;
  const int64_t heads = rotary.q.heads + rotary.k.heads + args.v.heads;
  for_slices(args, rotary, heads, [&](const AppendArgs& slice) {
    dispatch(rotary.dtype, [&](auto storage) { launch_element<decltype(storage)>(slice, stream); });
  });
}

}  // namespace rope::cuda
