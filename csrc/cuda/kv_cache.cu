// apply_rotary_append on CUDA: q and k rotated, and k and v written to a paged cache, in one
// launch. Heads of q, k and v are counted together; each thread has the same channels of all of its
// heads.
#include "cuda/parts/launch.cuh"
#include "cuda/parts/rotary_plan.cuh"
#include "kernels.h"
#include "math/float8.h"

namespace rope::cuda {

namespace {

// A cache of k and v [blocks, block_size, H, D]. kGeneral: the table may have R columns, and there
// may be channels that do not rotate, which are stored too. Without kFloat8 the cache is known to
// be of the model's dtype.
template <bool kGeneral_, bool kFloat8_>
struct KeyValueCache {
  static constexpr bool kGeneral = kGeneral_, kFloat8 = kFloat8_;
  static constexpr bool kLatent = false, kReorders = false;
};

// A cache of latent rows: v, which is one head, comes in pieces as long as the channels that
// rotate. kReorders: the pairs change their order in place.
template <bool kReorders_>
struct LatentCache {
  static constexpr bool kGeneral = false, kFloat8 = true;
  static constexpr bool kLatent = true, kReorders = kReorders_;
};

struct Slot {
  int64_t block, offset;
  bool exists;  // else the token is not stored
};

__device__ __forceinline__ Slot slot_of(const AppendArgs& args, const Place& place) {
  const int64_t token = int64_t{place.b} * args.slots_seq + place.s;
  if (token >= args.slot_count) return {0, 0, false};
  const int64_t slot = entry_of(args.slots, place.b, place.s);
  const uint64_t index = static_cast<uint64_t>(slot), size = static_cast<uint64_t>(args.block_size);
  if (index >= static_cast<uint64_t>(args.blocks) * size) return {0, 0, false};
  // A division of 64 bits takes several times as long.
  const uint64_t block = (index | size) >> 32
                             ? index / size
                             : static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
  return {static_cast<int64_t>(block), static_cast<int64_t>(index - block * size), true};
}

// Which of the two vectors of a piece there are.
struct Present {
  bool first, second;
};

template <class U, class E>
__device__ __forceinline__ void load_present(U& unit, const E* from, uint32_t second,
                                             Present present) {
  if (present.first) load(unit.vectors[0], from);
  if constexpr (U::kCount == 2) {
    if (present.second) load(unit.vectors[1], from + second);
  }
}

template <class Format, class E, int N>
__device__ __forceinline__ Vector<uint8_t, N> quantised(const Vector<E, N>& v, float scale) {
  using C = ArithmeticOf<E>;
  C x[N];
  unpack(v, x);
  uint8_t bytes[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const C divided = x[j] / static_cast<C>(scale);
    if constexpr (std::is_same_v<C, double>) {
      bytes[j] = float8_of<Format>(round_to_odd(divided));
    } else {
      bytes[j] = float8_of<Format>(divided);
    }
  }
  Vector<uint8_t, N> out;
  memcpy(&out.word, bytes, sizeof(bytes));
  return out;
}

// cache: where the element of the unit's first channel goes, `at` elements from its beginning.
template <bool kFloat8, class U>
__device__ __forceinline__ void store_present(const AppendArgs& args, const U& unit, void* cache,
                                              int64_t at, uint32_t second, Present present,
                                              float scale) {
  using E = typename U::Element;
  const auto store_as = [&](auto* to, const auto& converted) {
    if (present.first) store(converted(unit.vectors[0]), to + at);
    if constexpr (U::kCount == 2) {
      if (present.second) store(converted(unit.vectors[1]), to + at + second);
    }
  };
  if (!kFloat8 || args.cache_dtype == CacheDType::OfModel) {
    store_as(static_cast<E*>(cache), [](const auto& v) { return v; });
  } else if (args.cache_dtype == CacheDType::Float8E4M3) {
    store_as(static_cast<uint8_t*>(cache),
             [&](const auto& v) { return quantised<Float8E4M3>(v, scale); });
  } else {
    store_as(static_cast<uint8_t*>(cache),
             [&](const auto& v) { return quantised<Float8E5M2>(v, scale); });
  }
}

template <class E, int N, bool kInterleaved, bool kInterleavedOut, class Cache>
__device__ __forceinline__ void append_heads(const AppendArgs& args, const Plan& plan,
                                             const Place& place, uint32_t unit, bool has_place) {
  constexpr bool kMixed = kInterleaved != kInterleavedOut;
  using In = UnitOf<E, N, kInterleaved, kMixed>;
  using Out = UnitOf<E, N, kInterleavedOut, kMixed>;
  using C = typename In::C;
  constexpr int kPairs = In::kPairs;
  const RotaryArgs& rotary = args.rotary;
  const uint32_t q_heads = static_cast<uint32_t>(rotary.q.heads);
  const uint32_t rotated_heads = q_heads + static_cast<uint32_t>(rotary.k.heads);
  const bool rotates = !Cache::kGeneral || unit < plan.rotate_units;
  TurnsOf<In, Cache::kGeneral> turns;
  Piece from, to;
  if (rotates) {
    if (has_place && place.head < rotated_heads) {
      load_turns<In, kMixed, Cache::kGeneral>(turns, rotary, plan, place, unit);
    }
    from = {static_cast<int32_t>(In::channel_of(unit, plan.in)), plan.in.second};
    to = !kMixed && N > 1
             ? from
             : Piece{static_cast<int32_t>(Out::channel_of(unit, plan.out)), plan.out.second};
  } else {
    from = to = copied_piece<N, In::kCount>(rotary, plan, unit - plan.rotate_units);
  }
  const Slot slot = has_place ? slot_of(args, place) : Slot{};

  // All threads of a block make the same number of steps, so that they can wait for each other.
#pragma unroll 1
  for (uint32_t first = 0; first < plan.heads; first += plan.head_step) {
    const uint32_t head = first + place.head;
    const bool is_q = head < q_heads, is_v = head >= rotated_heads;
    // Field by field: a choice between whole structs would put them into local memory.
    const auto of = [&](auto of_q, auto of_k, auto of_v) {
      return is_q ? of_q : is_v ? of_v : of_k;
    };
    const StoredHeads& stored_k = args.k;
    const StoredHeads& stored_v = args.v;
    const Heads<void*>& q = rotary.q.out;
    const Heads<void*>& k = rotary.k.out;
    const Heads<const void*>& v = stored_v.in;
    const uint32_t index = head - of(0u, q_heads, rotated_heads);
    const bool moves = of(rotates, rotates || slot.exists, slot.exists);
    const bool active = has_place && head < plan.heads && moves;
    const int64_t at = place.b * of(q.stride_b, k.stride_b, v.stride_b) +
                       place.s * of(q.stride_s, k.stride_s, v.stride_s) +
                       index * of(q.stride_h, k.stride_h, v.stride_h);
    // Only q and k are written.
    E* const x_head = static_cast<E*>(of(q.data, k.data, const_cast<void*>(v.data))) + at;
    Present present{active, active};
    if (Cache::kLatent && is_v) {
      const int64_t channel = index * rotary.rotary_dim + from.channel;
      present.first = active && channel < stored_v.channels;
      present.second = active && channel + from.second < stored_v.channels;
    }
    In x;
    load_present(x, x_head + from.channel, from.second, present);
    if constexpr (Cache::kReorders) __syncthreads();
    if (!active) continue;
    Out y;
    if (rotates && !is_v) {
      C x1[kPairs], x2[kPairs];
      x.unpack_to(x1, x2);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) rotate(turns.at(j), x1[j], x2[j]);
      y.pack_from(x1, x2);
      y.store_to(x_head + to.channel, to.second);
    } else {
      y.copy_from(x);
    }
    if (is_q || !slot.exists) continue;
    const Piece piece = is_v ? from : to;
    const int64_t cached_at =
        slot.block * (is_v ? stored_v.stride_block : stored_k.stride_block) +
        slot.offset * (is_v ? stored_v.stride_offset : stored_k.stride_offset) +
        index * (is_v ? stored_v.stride_h : stored_k.stride_h) + piece.channel;
    const float* const scales = is_v ? stored_v.scale : stored_k.scale;
    float scale = 1;
    if (Cache::kFloat8 && scales != nullptr) {
      scale = __ldg(scales + index * (is_v ? stored_v.scale_stride_h : stored_k.scale_stride_h));
    }
    store_present<Cache::kFloat8>(args, y, is_v ? stored_v.cache : stored_k.cache, cached_at,
                                  piece.second, present, scale);
  }
}

// Blocks that a multiprocessor should hold at a time, which bounds the registers of a thread: 1024
// threads (64 registers) where the kernel then needs no local memory. Eight half-split pairs take
// 80, and with four table values each and a conversion to float8 some more.
template <int N, bool kInterleaved, bool kInterleavedOut, class Cache>
constexpr int resident_blocks() {
  if (N < 8 || (kInterleaved && kInterleavedOut)) return 1024 / kBlockThreads;
  if (Cache::kGeneral && Cache::kFloat8) return 512 / kBlockThreads;
  return (Cache::kGeneral || Cache::kLatent ? 768 : 1024) / kBlockThreads;
}

// N == 1: pairs in any order, before and after.
template <class E, int N, bool kInterleaved, bool kInterleavedOut, class Cache>
__global__ void __launch_bounds__(kBlockThreads,
                                  (resident_blocks<N, kInterleaved, kInterleavedOut, Cache>()))
    append_kernel(const AppendArgs args, const Plan plan) {
  uint32_t unit = 0;
  Place place{};
  const bool has_place = find_place(args.rotary, plan, place, unit);
  if (!Cache::kReorders && !has_place) return;
  append_heads<E, N, kInterleaved, kInterleavedOut, Cache>(args, plan, place, unit, has_place);
}

template <class E, int N, bool kInterleaved, bool kInterleavedOut, class Cache>
void launch_units(const AppendArgs& args, Plan plan, void* stream) {
  constexpr bool kMixed = kInterleaved != kInterleavedOut;
  using In = UnitOf<E, N, kInterleaved, kMixed>;
  using Out = UnitOf<E, N, kInterleavedOut, kMixed>;
  if (!cut_into_units<In, Out, N>(plan, args.rotary)) return;
  launch(args.rotary.op, append_kernel<E, N, kInterleaved, kInterleavedOut, Cache>,
         plan.geometry.grid, plan.geometry.block_threads, stream, args, plan);
}

template <class E, int N>
void launch_key_value(const AppendArgs& args, const Plan& plan, void* stream) {
  const bool general = args.rotary.table.full_width || plan.copy_vectors > 0;
  const auto launch_for = [&](auto float8) {
    if constexpr (N == 1) {
      launch_units<E, 1, false, false, KeyValueCache<true, true>>(args, plan, stream);
    } else if (args.rotary.interleaved) {
      launch_units<E, N, true, true, KeyValueCache<true, float8>>(args, plan, stream);
    } else if (general) {
      launch_units<E, N, false, false, KeyValueCache<true, float8>>(args, plan, stream);
    } else {
      launch_units<E, N, false, false, KeyValueCache<false, float8>>(args, plan, stream);
    }
  };
  if (args.cache_dtype == CacheDType::OfModel) {
    launch_for(std::false_type());
  } else {
    launch_for(std::true_type());
  }
}

template <class E, int N>
void launch_latent(const AppendArgs& args, const Plan& plan, void* stream) {
  const bool interleaved = args.rotary.interleaved, out = args.rotary.interleaved_out;
  if constexpr (N == 1) {
    if (interleaved == out) {
      launch_units<E, 1, false, false, LatentCache<false>>(args, plan, stream);
    } else {
      launch_units<E, 1, false, false, LatentCache<true>>(args, plan, stream);
    }
  } else if (interleaved && out) {
    launch_units<E, N, true, true, LatentCache<false>>(args, plan, stream);
  } else if (interleaved) {
    launch_units<E, N, true, false, LatentCache<true>>(args, plan, stream);
  } else if (out) {
    launch_units<E, N, false, true, LatentCache<true>>(args, plan, stream);
  } else {
    launch_units<E, N, false, false, LatentCache<false>>(args, plan, stream);
  }
}

void add_cache(Alignment& alignment, const AppendArgs& args, const StoredHeads& x) {
  if (args.cache_dtype == CacheDType::OfModel) {
    alignment.add_address(x.cache);
  } else {  // its vectors have as many bytes as the model's have elements
    alignment.add_elements(reinterpret_cast<intptr_t>(x.cache));
  }
  if (args.blocks > 1) alignment.add_elements(x.stride_block);
  if (args.block_size > 1) alignment.add_elements(x.stride_offset);
  if (x.heads > 1) alignment.add_elements(x.stride_h);
}

template <class E>
void launch_element(const AppendArgs& args, void* stream) {
  const RotaryArgs& rotary = args.rotary;
  Alignment alignment(sizeof(E));
  for (const RotatedHeads* x : {&rotary.q, &rotary.k}) {
    if (x->heads > 0) alignment.add(x->out, rotary.batch, rotary.seq, x->heads);
  }
  if (args.v.heads > 0) alignment.add(args.v.in, rotary.batch, rotary.seq, args.v.heads);
  for (const StoredHeads* x : {&args.k, &args.v}) {
    if (x->heads > 0) add_cache(alignment, args, *x);
  }
  const bool all_interleaved = rotary.interleaved && rotary.interleaved_out;
  alignment.add_elements(all_interleaved ? rotary.rotary_dim : rotary.rotary_dim / 2);
  if (args.latent) alignment.add_elements(args.v.channels);
  const int64_t others = args.latent ? 0 : rotary.head_dim - rotary.rotary_dim;
  if (others > 0) {
    alignment.add_elements(rotary.rotary_offset);
    alignment.add_elements(others);
  }

  Plan plan{};
  plan.heads = static_cast<uint32_t>(rotary.q.heads + rotary.k.heads + args.v.heads);
  plan.copy_vectors = static_cast<uint32_t>(others);  // of one channel, until N is known
  // float64 is for comparison: one kernel is enough.
  constexpr int kWidest = sizeof(E) < 8 ? 16 / sizeof(E) : 1;
  const bool wide = alignment.widest() == 16;
  if (args.latent) {
    wide ? launch_latent<E, kWidest>(args, plan, stream) : launch_latent<E, 1>(args, plan, stream);
  } else {
    wide ? launch_key_value<E, kWidest>(args, plan, stream)
         : launch_key_value<E, 1>(args, plan, stream);
  }
}

// Tokens [first, first + seq) of the sequence.
AppendArgs tokens_of(AppendArgs args, int64_t first, int64_t seq) {
  const int64_t element_bytes = size_of(args.rotary.dtype);
  for (StoredHeads* x : {&args.k, &args.v})
    skip(x->in.data, first * x->in.stride_s * element_bytes);
  skip_tokens(args.slots, first);
  args.slot_count -= first;
  args.rotary = slice_of(args.rotary, first, seq);
  return args;
}

// As batch_as_sequence.
AppendArgs batch_of_appends_as_sequence(AppendArgs args) {
  for (StoredHeads* x : {&args.k, &args.v}) x->in.stride_s = x->in.stride_b;
  args.slots.stride_s = args.slots.stride_b;
  args.rotary = batch_as_sequence(args.rotary);
  return args;
}

// The channels of heads from the first that rotates on; of a latent row, heads of as many.
AppendArgs with_common_channels(AppendArgs args) {
  const RotaryArgs& rotary = args.rotary;
  if (args.latent) {
    args.v.heads = ceil_div(args.v.channels, rotary.rotary_dim);
    args.v.in.stride_h = args.v.stride_h = rotary.rotary_dim;
    return args;
  }
  const int64_t element_bytes = size_of(rotary.dtype);
  const int64_t cache_bytes = args.cache_dtype == CacheDType::OfModel ? element_bytes : 1;
  for (StoredHeads* x : {&args.k, &args.v}) {
    skip(x->in.data, rotary.rotary_offset * element_bytes);
    skip(x->cache, rotary.rotary_offset * cache_bytes);
  }
  return args;
}

}  // namespace

void apply_rotary_append(const AppendArgs& given, void* stream) {
  AppendArgs args = with_common_channels(given);
  const RotaryArgs& rotary = args.rotary;
  const int64_t heads = rotary.q.heads + rotary.k.heads + args.v.heads;
  if (rotary.batch == 0 || rotary.seq == 0 || heads == 0) return;
  check_counts(rotary.op, heads, rotary.head_dim, rotary.batch, rotary.seq);
  if (rotary.seq == 1) args = batch_of_appends_as_sequence(args);
  const int64_t most = most_tokens(rotary.head_dim);
  for (int64_t first = 0; first < rotary.seq; first += most) {
    const AppendArgs slice = tokens_of(args, first, std::min(most, rotary.seq - first));
    dispatch(rotary.dtype, [&](auto storage) { launch_element<decltype(storage)>(slice, stream); });
  }
}

}  // namespace rope::cuda
