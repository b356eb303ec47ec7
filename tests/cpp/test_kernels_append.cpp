// The CPU kernels that rotate in place and append to a paged cache, part of test_kernels.cpp: the
// rotation and the cache must have the exact bits, or those of the float8 nearest to the quotient.
#include <numeric>

#include "kernel_cases.h"
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

constexpr int64_t kNegative = 3;  // slots from -3 on

// A slot of the cache for each token, [B, S], each slot at most once. Some are negative or outside
// the cache: those tokens are not stored.
struct Slots {
  int64_t capacity, stride;  // the entries between would store nothing
  bool int64;
  std::vector<int32_t> narrow;
  std::vector<int64_t> wide;

  Slots(const Case& c, int64_t capacity, Random& random)
      : capacity(capacity), stride(1 + random.below(2)), int64(random.coin()) {
    const int64_t tokens = c.batch * c.seq;
    std::vector<int64_t> free(capacity);
    std::iota(free.begin(), free.end(), 0);
    wide.reserve(tokens * stride), narrow.reserve(tokens * stride);
    for (int64_t i = 0; i < tokens * stride; ++i) {
      const bool stored = i % stride == 0 && random.below(5) > 0;
      wide.push_back(-1 - random.below(kNegative));
      if (c.outside && random.coin()) wide.back() = index_outside(capacity, int64, random);
      if (stored) {
        std::swap(free[random.below(static_cast<int64_t>(free.size()))], free.back());
        wide.back() = free.back();
        free.pop_back();
      }
      narrow.push_back(static_cast<int32_t>(wide.back()));
    }
  }
  int64_t of(int64_t token) const { return wide[token * stride]; }
  bool stores(int64_t token) const { return of(token) >= 0 && of(token) < capacity; }
  PositionIds ids(const Case& c) const {
    if (int64) return {wide.data(), true, c.seq * stride, stride};
    return {narrow.data(), false, c.seq * stride, stride};
  }
};

// A cache of k and v in one memory, with gaps, [blocks, block_size, ...]: in each block the keys,
// then the values, by token or by head; latent: for each token the latent, then the key.
struct Cache {
  int64_t blocks, block_size, element;  // element: its bytes
  int64_t stride_block, stride_offset, stride_h, first_k, first_v;
  std::vector<uint8_t, Aligned<uint8_t>> bytes;

  Cache(const View& k, const View& v, bool latent, int64_t tokens, int64_t element, Random& random)
      : block_size(1 + random.below(6)), element(element) {
    blocks = tokens / block_size + 2;
    const auto with_gap = [&](int64_t channels) { return channels + random.below(3); };
    const bool by_head = random.coin();
    const int64_t row = with_gap(latent ? v.channels + k.channels : k.channels);
    const int64_t rows = latent ? 1 : k.heads;
    stride_offset = by_head ? row : rows * row;
    stride_h = by_head ? block_size * row : row;
    const int64_t part = with_gap(block_size * rows * row);
    stride_block = with_gap(latent ? part : 2 * part);
    const int64_t guard = kGuard + kNegative * stride_block;  // finds tokens stored there
    first_k = guard + (latent ? v.channels : 0);
    first_v = guard + (latent ? 0 : part);
    bytes.resize((2 * guard + blocks * stride_block) * element);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.any_bits());
  }
  int64_t index(int64_t first, int64_t slot, int64_t h, int64_t channel) const {
    return first + slot / block_size * stride_block + slot % block_size * stride_offset +
           h * stride_h + channel;
  }
  StoredHeads stored(const View& x, Memory& memory, int64_t first) {
    return {x.in<const void*>(memory, 0),
            x.heads,
            x.channels,
            bytes.data() + first * element,
            stride_block,
            stride_offset,
            stride_h,
            nullptr,
            0};
  }
};

// One scale for each head, or for all. The quotients lie below, in and above the range of float8.
struct Scales {
  std::vector<float> values;
  bool given, of_each;

  Scales(int64_t heads, Random& random) : given(random.below(3) > 0), of_each(random.coin()) {
    for (int64_t h = 0; h < std::max<int64_t>(heads, 1); ++h) {
      const double mantissa = scalar::value_of(DType::Float32, random.ordinary(DType::Float32));
      const int exponent = static_cast<int>(random.below(33)) - 16;
      values.push_back(static_cast<float>(std::ldexp(std::fabs(mantissa), exponent)));
    }
    values.resize(of_each ? values.size() : 1);
    values.shrink_to_fit();
  }
  double of(int64_t h) const { return given ? values[of_each ? h : 0] : 1; }
  void set(StoredHeads& stored) const {
    stored.scale = given ? values.data() : nullptr;
    stored.scale_stride_h = of_each ? 1 : 0;
  }
};

void test(const Case& c, bool latent, Random& random) {
  ++cases;
  const auto cache_dtype = static_cast<CacheDType>(random.below(3));
  const bool float8 = cache_dtype != CacheDType::OfModel;
  const bool e5m2 = cache_dtype == CacheDType::Float8E5M2;
  const scalar::Float8Format format(e5m2 ? 2 : 3, e5m2 ? 0x7b : 0x7e);
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
  Memory expected = x.memory;
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t b = token / c.seq, s = token % c.seq;
    for (const View* each : {&q, &k}) {
      for (int64_t h = 0; h < each->heads; ++h) {
        const int64_t at = each->index(b, s, h, 0);
        rotate_head(each == &k ? of_k : c, rotation, b, s, x.memory, at, expected, at);
      }
    }
  }
  auto expected_bytes = cache.bytes;

  AppendArgs args{};
  args.rotary = rotation.args(c);
  args.rotary.q = {q.in<const void*>(x.memory, c.before), q.in<void*>(x.memory, c.before), q.heads};
  args.rotary.k = {k.in<const void*>(x.memory, of_k.before), k.in<void*>(x.memory, of_k.before),
                   k.heads};
  args.k = cache.stored(k, x.memory, cache.first_k);
  args.v = cache.stored(v, x.memory, cache.first_v);
  if (float8) k_scales.set(args.k), v_scales.set(args.v);
  args.latent = latent;
  args.cache_dtype = cache_dtype;
  args.blocks = cache.blocks, args.block_size = cache.block_size;
  args.slots = slots.ids(c);
  args.slots_seq = c.seq;
  args.slot_count = random.coin() ? tokens : random.below(tokens + 1);
  cpu::apply_rotary_append(args);
  expect_same(expected, x.memory, text(c));

  // k is stored as it is after the rotation.
  const auto store = [&](const View& view, int64_t first, const Scales& scales, int64_t token) {
    for (int64_t h = 0; h < view.heads; ++h) {
      for (int64_t i = 0; i < view.channels; ++i) {
        const int64_t from = view.index(token / c.seq, token % c.seq, h, i);
        const int64_t to = cache.index(first, slots.of(token), h, i);
        if (float8) {
          const double quotient = scalar::computed(c.dtype, x.memory.value(from) / scales.of(h));
          expected_bytes[to] = format.bits_of(quotient);
          // A NaN of either sign.
          if (std::isnan(quotient)) expected_bytes[to] |= cache.bytes[to] & 0x80;
        } else {
          scalar::write_bits(c.dtype, expected_bytes.data(), to, x.memory.bits(from));
        }
      }
    }
  };
  for (int64_t token = 0; token < tokens; ++token) {
    if (token >= args.slot_count || !slots.stores(token)) continue;
    store(k, cache.first_k, k_scales, token);
    store(v, cache.first_v, v_scales, token);
  }
  const auto wrong = std::mismatch(cache.bytes.begin(), cache.bytes.end(), expected_bytes.begin());
  if (wrong.first == cache.bytes.end()) return;
  const char* const formats[] = {"its dtype", "float8_e4m3fn", "float8_e5m2"};
  expect(false, text(c) + text(", a cache of %s: byte %d: expected %#x, got %#x",
                               formats[static_cast<int>(cache_dtype)],
                               int(wrong.first - cache.bytes.begin()), int(*wrong.second),
                               int(*wrong.first)));
}

}  // namespace

void kernel_cases::test_append(Random& random) {
  for_each_size("apply_rotary_append_kv", kKeysAndValues, random, [](Case c, Random& random) {
    c.interleaved_out = c.interleaved;
    test(c, false, random);
  });
  for_each_size("apply_rotary_mla_append", kLatents, random, [](Case c, Random& random) {
    c.full_width = c.table_interleaved = false;
    test(c, true, random);
  });
}
