// The CPU kernels that append to a paged cache, part of test_kernels.cpp: the rotation, the cache
// and q as float8 must have the exact bits, or those of the float8 nearest to the quotient.
#include "kernel_cache.h"
#include "kernels.h"

using namespace kernel_cases;

namespace {

constexpr Sizes kKeysAndValues[] = {
    // B, S, heads of q, of k; channels before, pairs, channels after
    {"decoding", 3, 1, 4, 2, 0, 64, 0},
    {"less than a vector", 2, 3, 3, 1, 1, 1, 0},
    {"parts of vectors", 1, 7, 2, 3, 5, 17, 9},
    {"float8 of more than 256 channels", 1, 2, 1, 2, 3, 150, 0},
    {"more pairs than rows of the table are held for", 2, 2, 1, 1, 0, kManyPairs, 0},
    {"divided among threads", 2, 60, 4, 2, 0, 33, 4},
    {"keys alone", 2, 3, 0, 2, 0, 16, 0},
    {"queries alone", 2, 3, 2, 0, 0, 16, 0},
    {"no token", 2, 0, 3, 1, 0, 16, 0},
    {"no sequence", 0, 3, 3, 1, 5, 16, 0},
};

constexpr Sizes kLatents[] = {
    // B, S, heads of q, 1; channels of q before, pairs, 0; of the latent
    {"DeepSeek-V3", 2, 1, 5, 1, 128, 32, 0, 512},
    {"less than a vector", 2, 3, 3, 1, 2, 1, 0, 3},
    {"parts of vectors", 1, 7, 2, 1, 5, 17, 0, 21},
    {"more heads than there is room for copies of", 1, 2, 70, 1, 3, 32, 0, 40},
    {"as many channels as may change their order", 2, 2, 9, 1, 0, kMostReordered / 2, 0, 24},
    {"divided among threads", 2, 40, 6, 1, 8, 33, 0, 70},
    {"no latent", 1, 5, 2, 1, 4, 12, 0, 0},
    {"no query", 2, 3, 0, 1, 0, 16, 0, 48},
    {"no token", 2, 0, 3, 1, 0, 16, 0, 8},
    {"no sequence", 0, 3, 3, 1, 5, 16, 0, 8},
};

// The weights of a norm of q and of k.
struct Norm {
  RmsNorm args{};
  std::vector<Memory> weights;

  Norm(const Case& c, Random& random) {
    args.dtype = random.coin() ? c.dtype : DType::Float32;
    args.eps = 0.25;
    args.unit_offset = random.coin();
    args.all_heads = random.coin();
    args.q_stride_h = args.k_stride_h = args.all_heads ? c.dim() : 0;
    for (const int64_t heads : {c.heads_q, c.heads_k}) {
      const int64_t rows = args.all_heads ? std::max<int64_t>(heads, 1) : 1;
      weights.emplace_back(args.dtype, rows * c.dim(), c.any_bits, random);
    }
    args.q_weight = weights[0].data(c.before);
    args.k_weight = weights[1].data(c.before);
  }
};

// The heads of a tensor in memory, to be changed where they are.
RotatedHeads in_place(const View& x, Memory& memory, int64_t first_channel) {
  return {x.in<const void*>(memory, first_channel), x.in<void*>(memory, first_channel), x.heads};
}

enum class Kind { KeysAndValues, Latent, Normed };

void test(const Case& c, Kind kind, Random& random) {
  ++cases;
  const bool latent = kind == Kind::Latent, normed = kind == Kind::Normed;
  const auto cache_dtype = static_cast<CacheDType>(random.below(3));
  const bool float8 = cache_dtype != CacheDType::OfModel;
  const scalar::Float8Format format(cache_dtype == CacheDType::Float8E5M2);
  const int64_t channels = latent ? 2 * c.pairs : c.dim();
  Packed x = random_packed(
      c, {{c.heads_q, c.dim()}, {c.heads_k, channels}, {c.heads_k, latent ? c.rank : channels}},
      random.coin() ? kGuard : 0, random);
  const View &q = x.views[0], &k = x.views[1], &v = x.views[2];
  const int64_t tokens = c.batch * c.seq;
  Cache cache(k, v, latent, tokens, float8 ? 1 : size_of(c.dtype), random);
  const Slots slots(c, cache.blocks * cache.block_size, random);
  const Scales k_scales(latent ? 1 : k.heads, random);
  const Scales v_scales = latent ? k_scales : Scales(v.heads, random);
  const Rotation rotation(c, random);
  // Some quotients lie halfway between two float8, or next to that by less than float32 can tell.
  for (int64_t i = 0; i < tokens * v.heads * v.channels; ++i) {
    if (random.below(4) > 0) continue;
    const int64_t token = i / (v.heads * v.channels), h = i / v.channels % v.heads;
    const double quotient =
        format.tie(random.below(format.ties())) * (1 + (random.below(3) - 1) * 0x1p-40);
    x.memory.set_value(v.index(token / c.seq, token % c.seq, h, i % v.channels),
                       quotient * v_scales.of(h));
  }

  Case of_k = c;  // latent: all channels of k rotate
  if (latent) of_k.before = of_k.after = 0;
  RmsNormAppendArgs args{};
  AppendArgs& append = args.append;
  append.rotary = rotation.args(c);
  append.rotary.q = in_place(q, x.memory, c.before);
  append.rotary.k = in_place(k, x.memory, of_k.before);
  append.k = cache.stored(k, x.memory, cache.first_k);
  append.v = cache.stored(v, x.memory, cache.first_v);
  if (float8) k_scales.set(append.k), v_scales.set(append.v);
  append.latent = latent;
  append.cache_dtype = cache_dtype;
  append.blocks = cache.blocks, append.block_size = cache.block_size;
  append.slots = slots.ids(c);
  append.slots_seq = c.seq;
  append.slot_count = random.coin() ? tokens : random.below(tokens + 1);
  const Norm norm(c, random);
  args.norm = norm.args;
  const bool norm_v = normed && random.coin();
  if (norm_v) args.v = in_place(v, x.memory, c.before);

  Memory changed = x.memory;  // q, k and v before they are stored
  if (normed) {               // its own tests are in test_kernels_rms_norm.cpp
    RmsNormRotaryArgs alone{};
    alone.rotary = append.rotary;
    alone.norm = norm.args;
    alone.rotary.q = in_place(q, changed, c.before);
    alone.rotary.k = in_place(k, changed, c.before);
    cpu::rms_norm_rotary(alone);
    alone.rotary.q = {};
    alone.rotary.k = in_place(v, changed, c.before);
    alone.rotary.rotary_dim = 0;
    alone.norm.k_weight = nullptr;
    if (norm_v) cpu::rms_norm_rotary(alone);
  } else {
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t b = token / c.seq, s = token % c.seq;
      for (const View* each : {&q, &k}) {
        for (int64_t h = 0; h < each->heads; ++h) {
          const int64_t at = each->index(b, s, h, 0);
          rotate_head(each == &k ? of_k : c, rotation, b, s, x.memory, at, changed, at);
        }
      }
    }
  }
  Memory expected = changed;

  HeadsAsFloat8 float8_q(c, q.heads, random);
  const Scales q_scales(q.heads, random);
  WrittenScales own_scales(tokens * q.heads, random);
  const bool q_to_float8 = random.coin(), own = random.coin();
  if (q_to_float8) {
    const int64_t stride_s = q.heads, stride_b = c.seq * q.heads;
    append.float8_q = {float8_q.heads(), float8_q.dtype(), nullptr, 0, {}};
    if (own) append.float8_q.own_scale = {own_scales.data(), stride_b, stride_s, 1};
    if (!own && q_scales.given) {
      append.float8_q.scale = q_scales.values.data();
      append.float8_q.scale_stride_h = q_scales.of_each;
    }
    for (int64_t i = 0; i < tokens * q.heads; ++i) {
      const int64_t b = i / stride_b, s = i / stride_s % c.seq, h = i % q.heads;
      const int64_t first = q.index(b, s, h, 0);
      float largest = 0;
      for (int64_t at = first; at < first + c.dim(); ++at) {
        largest = larger_magnitude(largest, changed.value(at));
        expected.set(at, x.memory.bits(at));
      }
      const float computed = largest / float8_q.format().largest();
      const float scale = own ? (computed == 0 ? 1 : computed) : static_cast<float>(q_scales.of(h));
      if (own) own_scales.set(i, scale);
      for (int64_t channel = 0; channel < c.dim(); ++channel) {
        float8_q.expect(c.dtype, b, s, h, channel, changed.value(first + channel), scale);
      }
    }
  }
  const auto store = [&](const View& view, int64_t first, const Scales& scales, int64_t token,
                         Bytes& bytes) {
    for (int64_t h = 0; h < view.heads; ++h) {
      for (int64_t i = 0; i < view.channels; ++i) {
        const int64_t from = view.index(token / c.seq, token % c.seq, h, i);
        const int64_t to = cache.index(first, slots.of(token), h, i);
        if (float8) {
          bytes[to] = format.bits_of(scalar::computed(c.dtype, changed.value(from) / scales.of(h)));
        } else {
          scalar::write_bits(c.dtype, bytes.data(), to, changed.bits(from));
        }
      }
    }
  };
  Bytes expected_bytes = cache.bytes;
  for (int64_t token = 0; token < tokens; ++token) {
    if (token >= append.slot_count || !slots.stores(token)) continue;
    store(k, cache.first_k, k_scales, token, expected_bytes);
    store(v, cache.first_v, v_scales, token, expected_bytes);
  }

  normed ? cpu::rms_norm_rotary_append(args) : cpu::apply_rotary_append(append);
  const char* const formats[] = {"its dtype", "float8_e4m3fn", "float8_e5m2"};
  const std::string what =
      text(c) + text(", a cache of %s%s", formats[static_cast<int>(cache_dtype)],
                     q_to_float8 ? ", q as float8" : "");
  expect_same(expected, x.memory, what);
  expect_same(expected_bytes, cache.bytes, cache_dtype, c.dtype, what);
  float8_q.check(what + ", q");
  own_scales.check(what);
}

}  // namespace

void kernel_cases::test_append(Random& random) {
  const auto keys_and_values = [](Kind kind) {
    return [kind](Case c, Random& random) {
      c.interleaved_out = c.interleaved;
      test(c, kind, random);
    };
  };
  for_each_size("apply_rotary_append_kv", kKeysAndValues, random,
                keys_and_values(Kind::KeysAndValues));
  for_each_size("rms_norm_rotary_append_kv", kKeysAndValues, random, keys_and_values(Kind::Normed));
  for_each_size("apply_rotary_mla_append", kLatents, random, [](Case c, Random& random) {
    c.full_width = c.table_interleaved = false;
    test(c, Kind::Latent, random);
  });
}
