// The CPU kernel that moves the keys of a paged cache, part of test_kernels.cpp: the bits of the
// rotation by rows that cos_sin has computed.
#include "kernel_cache.h"
#include "kernels.h"

using namespace kernel_cases;

namespace {

constexpr Sizes kSizes[] = {
    // 1, tokens, 0, heads; channels before, pairs, channels after
    {"a model's", 1, 7, 0, 2, 0, 64, 0},
    {"less than a vector", 1, 3, 0, 1, 1, 1, 1},
    {"parts of vectors", 1, 7, 0, 3, 5, 17, 9},
    {"more pairs than angles are held for", 1, 4, 0, 1, 3, 150, 0},
    {"divided among threads", 1, 300, 0, 4, 3, 33, 4},
    {"no token", 1, 0, 0, 3, 0, 16, 0},
};

Memory frequencies(int64_t pairs, Random& random) {
  Memory inv_freq(DType::Float32, pairs, false, random);
  for (int64_t i = 0; i < pairs; ++i) {
    inv_freq.set_value(i, std::fabs(inv_freq.value(i)) * std::pow(10000.0, -double(i) / pairs));
  }
  return inv_freq;
}

Angles angles_of(const Memory& inv_freq, const std::vector<int64_t>& positions, double scaling) {
  Angles angles{};
  angles.op = "shift_cached_k";
  angles.inv_freq = inv_freq.data();
  angles.inv_freq_dtype = inv_freq.dtype();
  angles.pairs = inv_freq.count();
  angles.positions = {positions.data(), PositionType::Int64, 1, 0, 0, 1, 0};
  angles.attention_scaling = scaling;
  return angles;
}

void test(Case c, Random& random) {
  ++cases;
  c.inverse = c.full_width = c.table_interleaved = false;
  c.interleaved_out = c.interleaved;
  c.rows = Rows::PerToken;
  const auto cache_dtype = static_cast<CacheDType>(random.below(3));
  const bool float8 = cache_dtype != CacheDType::OfModel;
  const scalar::Float8Format format(cache_dtype == CacheDType::Float8E5M2);
  if (float8) c.dtype = DType::Float32;
  c.table_dtype = c.dtype == DType::Float64 ? DType::Float64 : DType::Float32;
  const View keys{c.heads_k, c.dim()};
  Cache cache(keys, keys, false, c.seq, float8 ? 1 : size_of(c.dtype), random);
  const Slots slots(c, cache.blocks * cache.block_size, random);

  // Where the frequencies change, from position 0: then the angle is the new one.
  const bool same = random.coin();
  const Memory inv_freq = frequencies(c.pairs, random), changed = frequencies(c.pairs, random);
  std::vector<int64_t> old, current, distance;
  for (int64_t token = 0; token < c.seq; ++token) {
    old.push_back(same ? random.below(1 << 20) : 0);
    current.push_back(random.below(1 << 20));
    distance.push_back(current.back() - old.back());
  }
  ShiftArgs args{};
  args.op = c.op;
  args.dtype = c.dtype;
  args.batch = 1, args.seq = c.seq;
  args.head_dim = c.dim(), args.rotary_dim = 2 * c.pairs, args.rotary_offset = c.before;
  args.interleaved = args.interleaved_out = c.interleaved;
  args.same_frequencies = same;
  args.old = angles_of(inv_freq, old, 1);
  args.angles = angles_of(same ? inv_freq : changed, current, 0.875);
  args.cache_dtype = cache_dtype;
  args.blocks = cache.blocks, args.block_size = cache.block_size;
  args.slots = slots.ids(c);
  uint8_t* const first = cache.bytes.data() + (cache.first_k + c.before) * cache.element;
  args.q.out = {first, cache.stride_block, cache.stride_offset, cache.stride_h};
  args.q.in = {first, cache.stride_block, cache.stride_offset, cache.stride_h};
  args.q.heads = c.heads_k;

  Rotation rows(c, random);
  rows.cos = {Memory(c.table_dtype, c.seq * c.pairs, false, random), 0, c.pairs};
  rows.sin = rows.cos;
  cpu::cos_sin({angles_of(same ? inv_freq : changed, distance, 0.875), c.seq,
                rows.cos.memory.data(), rows.sin.memory.data(), c.table_dtype});
  Bytes expected = cache.bytes;
  Memory head(c.dtype, c.dim(), false, random), rotated = head;
  for (int64_t token = 0; token < c.seq; ++token) {
    if (!slots.stores(token)) continue;
    for (int64_t h = 0; h < c.heads_k; ++h) {
      const int64_t at = cache.index(cache.first_k, slots.of(token), h, 0);
      for (int64_t i = 0; i < c.dim(); ++i) {
        float8 ? head.set_value(i, format.value_of(expected[at + i]))
               : head.set(i, scalar::read_bits(c.dtype, expected.data(), at + i));
      }
      rotate_head(c, rows, 0, token, head, 0, rotated, 0);
      for (int64_t i = c.before; i < c.before + 2 * c.pairs; ++i) {
        if (float8) {
          expected[at + i] = format.bits_of(rotated.value(i));
        } else {
          scalar::write_bits(c.dtype, expected.data(), at + i, rotated.bits(i));
        }
      }
    }
  }
  cpu::shift_cached_k(args);
  const char* const formats[] = {"its dtype", "float8_e4m3fn", "float8_e5m2"};
  const std::string what =
      text(c) + text(", a cache of %s%s", formats[static_cast<int>(cache_dtype)],
                     same ? "" : ", other frequencies");
  expect_same(expected, cache.bytes, cache_dtype, c.dtype, what);
}

}  // namespace

void kernel_cases::test_cached_keys(Random& random) {
  for_each_size("shift_cached_k", kSizes, random, test);
}
