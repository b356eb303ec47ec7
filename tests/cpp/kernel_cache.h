// A paged cache, the slots of tokens in it, and heads as float8 beside it.
#pragma once

#include <numeric>

#include "kernel_cases.h"

namespace kernel_cases {

using Bytes = std::vector<uint8_t, Aligned<uint8_t>>;

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
  Bytes bytes;

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

// The same elements of a cache, or of heads as float8. Any NaN equals any other.
inline void expect_same(const Bytes& expected, const Bytes& got, CacheDType cache_dtype,
                        DType dtype, const std::string& what) {
  const bool float8 = cache_dtype != CacheDType::OfModel;
  const scalar::Float8Format format(cache_dtype == CacheDType::Float8E5M2);
  const auto is_nan = [&](uint64_t bits) {
    return float8 ? std::isnan(format.value_of(static_cast<uint8_t>(bits)))
                  : scalar::is_nan(dtype, bits);
  };
  const int64_t size = float8 ? 1 : size_of(dtype);
  for (int64_t i = 0; i < static_cast<int64_t>(got.size()) / size; ++i) {
    uint64_t want = 0, have = 0;
    std::memcpy(&want, expected.data() + i * size, size);
    std::memcpy(&have, got.data() + i * size, size);
    if (want == have || (is_nan(want) && is_nan(have))) continue;
    expect(false, what + text(": element %" PRId64 ": expected %#" PRIx64 ", got %#" PRIx64, i,
                              want, have));
    return;
  }
}

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

// Heads [B, S, H, D] as float8, with gaps and guards, beside what a kernel is to write there.
class HeadsAsFloat8 {
 public:
  const bool e5m2;

  HeadsAsFloat8(const Case& c, int64_t heads, Random& random)
      : e5m2(random.coin()),
        format_(e5m2),
        places_(random_tensor(c, heads, kGuard, random)),
        bytes_(places_.memory.count()) {
    for (uint8_t& byte : bytes_) byte = static_cast<uint8_t>(random.any_bits());
    expected_ = bytes_;
  }
  CacheDType dtype() const { return e5m2 ? CacheDType::Float8E5M2 : CacheDType::Float8E4M3; }
  const scalar::Float8Format& format() const { return format_; }
  Heads<void*> heads() {
    void* const first = bytes_.empty() ? nullptr : bytes_.data() + places_.guard;
    return {first, places_.stride_b, places_.stride_s, places_.stride_h};
  }
  void expect(DType arithmetic, int64_t b, int64_t s, int64_t h, int64_t channel, double value,
              float scale) {
    expected_[places_.index(b, s, h, channel)] =
        format_.bits_of(scalar::computed(arithmetic, value / scale));
  }
  void check(const std::string& what) const {
    expect_same(expected_, bytes_, dtype(), DType::Float32, what);
  }

 private:
  const scalar::Float8Format format_;
  const Tensor places_;
  Bytes bytes_, expected_;
};

// Scales that a kernel writes, [.., count], contiguous and with guards, beside the right ones.
struct WrittenScales {
  Memory got, expected;

  WrittenScales(int64_t count, Random& random)
      : got(DType::Float32, count + 2 * kGuard, false, random), expected(got) {}
  float* data() { return static_cast<float*>(got.data(kGuard)); }
  void set(int64_t at, float scale) { expected.set_value(kGuard + at, scale); }
  void check(const std::string& what) const { expect_same(expected, got, what + ", scales"); }
};

// The larger magnitude, rounded to float; NaN if one is NaN.
inline float larger_magnitude(float largest, double value) {
  const float magnitude = static_cast<float>(std::fabs(value));
  return std::isnan(largest) || magnitude <= largest ? largest : magnitude;
}

}  // namespace kernel_cases
