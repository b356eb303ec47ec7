// Cases for the kernels that rotate: every combination of dtypes, layouts and orders, their tensors
// in memory, and how one that is wrong is reported.
#pragma once

#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <new>
#include <string>
#include <vector>

#include "scalar.h"

namespace kernel_cases {

using namespace rope;
using scalar::Random;

// Below, between and above whole vectors of 4, 8 and 16 pairs; 72 and 100 end in part of one.
constexpr int64_t kPairs[] = {1, 3, 7, 8, 12, 15, 16, 17, 40, 64, 72, 100};
constexpr DType kDTypes[] = {DType::Float64, DType::Float32, DType::Float16, DType::BFloat16};
constexpr int64_t kManyPairs = 1100;      // rows of the table in more than one piece
constexpr int64_t kManyChannels = 40000;  // so many are spread over threads
constexpr int64_t kGuard = 64;            // elements before and after what is written

inline std::atomic<int> failures = 0;
inline std::atomic<int64_t> cases = 0;

inline void expect(bool condition, const std::string& what) {
  if (!condition && ++failures <= 20) std::printf("FAIL %s\n", what.c_str());
}

template <class... Args>
std::string text(const char* format, Args... args) {
  char line[512];
  std::snprintf(line, sizeof(line), format, args...);
  return line;
}

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::Float64: return "float64";
    case DType::Float32: return "float32";
    case DType::Float16: return "float16";
    default: return "bfloat16";
  }
}

// Which row of the table a token uses.
enum class Rows { Index, PerToken, Int32, Int64 };

struct Case {
  const char* op;
  DType dtype, table_dtype;
  int64_t batch, seq, heads_q, heads_k, pairs, before, after;  // channels that do not rotate
  Rows rows;
  bool interleaved, interleaved_out, full_width, table_interleaved, inverse;
  bool in_place, head_major;
  bool any_bits;  // NaN, infinities, subnormals and all else

  int64_t dim() const { return before + 2 * pairs + after; }
  int64_t width() const { return full_width ? 2 * pairs : pairs; }
};

inline std::string text(const Case& c) {  // [B, S, q + k, before + R + after]
  const char* const rows[] = {"by index", "per token", "by int32", "by int64"};
  return text("%s %s, table %s%s%s %s, [%d, %d, %d+%d, %d+%d+%d]%s, %s to %s%s%s%s", c.op,
              name(c.dtype), name(c.table_dtype), c.full_width ? " full width" : "",
              c.table_interleaved ? " interleaved" : "", rows[static_cast<int>(c.rows)],
              int(c.batch), int(c.seq), int(c.heads_q), int(c.heads_k), int(c.before),
              int(2 * c.pairs), int(c.after), c.head_major ? " head-major" : "",
              c.interleaved ? "interleaved" : "half-split",
              c.interleaved_out ? "interleaved" : "half-split", c.inverse ? ", inverse" : "",
              c.in_place ? ", in place" : "", c.any_bits ? ", any bits" : "");
}

// ------------------------------------------------------------------------------------------ memory

// Memory aligned to whole vectors, and not a byte more than is asked for: sanitizers see what is
// read or written beside it.
template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};

  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlignment)); }
  void deallocate(T* data, size_t) { ::operator delete(data, kAlignment); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};

// Elements of a dtype, at first all random.
class Memory {
 public:
  Memory(DType dtype, int64_t count, bool any_bits, Random& random)
      : dtype_(dtype), count_(count), bytes_(count * size_of(dtype)) {
    for (int64_t i = 0; i < count; ++i) {
      set(i, any_bits ? random.any_bits() : random.ordinary(dtype));
    }
  }

  void* data(int64_t at = 0) { return bytes_.data() + at * size_of(dtype_); }
  const void* data() const { return bytes_.data(); }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  uint64_t bits(int64_t at) const { return scalar::read_bits(dtype_, data(), at); }
  double value(int64_t at) const { return scalar::value_of(dtype_, bits(at)); }
  void set(int64_t at, uint64_t bits) { scalar::write_bits(dtype_, data(), at, bits); }
  void set_value(int64_t at, double value) { set(at, scalar::bits_of(dtype_, value)); }

 private:
  DType dtype_;
  int64_t count_;
  std::vector<char, Aligned<char>> bytes_;
};

// The same bits everywhere, also in guards; a NaN may be any.
inline void expect_same(const Memory& expected, const Memory& got, const std::string& what) {
  const DType dtype = got.dtype();
  for (int64_t i = 0; i < got.count(); ++i) {
    const uint64_t want = expected.bits(i), have = got.bits(i);
    if (want == have || (scalar::is_nan(dtype, want) && scalar::is_nan(dtype, have))) continue;
    expect(false,
           what + text(": element %" PRId64 ": expected %#" PRIx64 " (%g), got %#" PRIx64 " (%g)",
                       i, want, expected.value(i), have, got.value(i)));
    return;
  }
}

// [B, S, H, D] with gaps between its tokens and its heads, and guards around it.
struct Tensor {
  Memory memory;
  int64_t guard, stride_b, stride_s, stride_h;

  int64_t index(int64_t b, int64_t s, int64_t h, int64_t channel) const {
    return guard + b * stride_b + s * stride_s + h * stride_h + channel;
  }
  template <class Pointer>
  Heads<Pointer> heads(const Case& c) {  // as of a tensor of torch: nullptr where there are none
    Pointer first = memory.count() > 0 ? memory.data(guard + c.before) : nullptr;
    return {first, stride_b, stride_s, stride_h};
  }
};

// guard: of what is written. What is only read has none.
inline Tensor random_tensor(const Case& c, int64_t heads, int64_t guard, Random& random) {
  const int64_t head = c.dim() + random.below(3);
  const int64_t inner = (c.head_major ? c.seq : heads) * head + random.below(9);
  const int64_t b = (c.head_major ? heads : c.seq) * inner + random.below(9);
  const int64_t s = c.head_major ? head : inner, h = c.head_major ? inner : head;
  const int64_t extent = (c.batch - 1) * b + (c.seq - 1) * s + (heads - 1) * h + c.dim();
  const int64_t count = heads > 0 ? extent + 2 * guard : 0;
  return {Memory(c.dtype, count, c.any_bits, random), guard, b, s, h};
}

// cos or sin: rows for all, or for each batch row.
struct TableSide {
  Memory memory;
  int64_t stride_b, stride_row;
};

inline TableSide random_table(const Case& c, int64_t rows, Random& random) {
  const int64_t row = c.width() + random.below(3);
  const bool per_token = c.rows == Rows::PerToken;
  const int64_t count = (per_token ? c.batch : 1) * rows * row - (row - c.width());
  return {Memory(c.table_dtype, count, c.any_bits, random), per_token ? rows * row : 0, row};
}

// Positions of the tokens, [B, S].
struct Positions {
  std::vector<int32_t> narrow;
  std::vector<int64_t> wide;

  Positions(const Case& c, int64_t rows, Random& random) {
    narrow.reserve(c.batch * c.seq), wide.reserve(c.batch * c.seq);
    for (int64_t token = 0; token < c.batch * c.seq; ++token) {
      const bool given = c.rows == Rows::Int32 || c.rows == Rows::Int64;
      wide.push_back(given ? random.below(rows) : token % c.seq);
      narrow.push_back(static_cast<int32_t>(wide.back()));
    }
  }
  PositionIds ids(const Case& c) const {
    if (c.rows == Rows::Int32) return {narrow.data(), false, c.seq, 1};
    if (c.rows == Rows::Int64) return {wide.data(), true, c.seq, 1};
    return {};
  }
};

// Where the two channels of pair i lie among those that rotate, or its two columns in a table.
struct Places {
  int64_t first, second;
};
inline Places places(bool interleaved, int64_t pairs, int64_t i) {
  return interleaved ? Places{2 * i, 2 * i + 1} : Places{i, i + pairs};
}
inline Places columns(const Case& c, int64_t i) {
  return c.full_width ? places(c.table_interleaved, c.pairs, i) : Places{i, i};
}

// Everything that can be combined is drawn at random, but for what picks another piece of code.
template <class Test>
void for_each_case(const char* op, Random& random, const Test& test) {
  for (const DType dtype : kDTypes) {
    for (const int64_t pairs : kPairs) {
      for (int which = 0; which < 8; ++which) {
        Case c{};
        c.op = op;
        c.dtype = dtype;
        c.pairs = random.below(100) == 0 ? kManyPairs : pairs;
        c.interleaved = which & 1, c.interleaved_out = which & 2, c.full_width = which & 4;
        c.in_place = c.interleaved == c.interleaved_out && random.coin();
        c.table_dtype = kDTypes[random.below(4)];
        c.table_interleaved = c.full_width && random.coin();
        c.inverse = random.coin();
        c.head_major = random.coin();
        c.any_bits = random.below(3) == 0;
        c.rows = static_cast<Rows>(random.below(4));
        c.before = random.coin() ? 0 : random.below(20);
        c.after = random.coin() ? 0 : random.below(20);
        c.batch = 1 + random.below(2);
        c.heads_q = random.coin() ? 1 : 2 + random.below(8);
        c.heads_k = random.below(4);
        c.seq = 1 + random.below(20);
        if (random.below(4) == 0) {
          c.seq += kManyChannels / (c.batch * c.dim() * (c.heads_q + c.heads_k));
        }
        test(c, random);
      }
    }
  }
}

}  // namespace kernel_cases
