// Cases for the kernels that rotate: combinations of dtypes, layouts and orders, the tensors of a
// case, and its rotation by scalars.
#pragma once

#include "kernel_memory.h"

namespace kernel_cases {

// Below, between and above whole vectors of 4 to 32 pairs; 72 and 100 end in part of one.
constexpr int64_t kPairs[] = {1, 3, 7, 8, 12, 15, 16, 17, 40, 64, 72, 100};
constexpr DType kDTypes[] = {DType::Float64, DType::Float32, DType::Float16, DType::BFloat16};
constexpr int64_t kManyPairs = 1100;      // more than the kernels hold rows of the table for
constexpr int64_t kManyChannels = 40000;  // divided among threads

// Which row of the table a token uses.
enum class Rows { Index, PerToken, Int32, Int64 };

struct Case {
  const char* op;
  DType dtype, table_dtype;
  int64_t batch, seq, heads_q, heads_k, pairs, before, after;  // channels that do not rotate
  Rows rows;
  bool interleaved, interleaved_out, full_width, table_interleaved, inverse;
  bool in_place, head_major;
  bool any_bits;    // NaN, infinities and subnormals too
  bool outside;     // some indices are outside, as if they had changed after the checks
  const char* why;  // if the sizes come from a table: why these
  int64_t rank;     // channels of a latent, or groups of heads

  int64_t dim() const { return before + 2 * pairs + after; }
  int64_t width() const { return full_width ? 2 * pairs : pairs; }
};

inline std::string text(const Case& c) {  // [B, S, q + k, before + R + after]
  const char* const rows[] = {"by index", "per token", "by int32", "by int64"};
  return text("%s%s%s %s, table %s%s%s %s, [%d, %d, %d+%d, %d+%d+%d]%s, %s to %s%s%s%s%s", c.op,
              c.why ? ", " : "", c.why ? c.why : "", name(c.dtype), name(c.table_dtype),
              c.full_width ? " full width" : "", c.table_interleaved ? " interleaved" : "",
              rows[static_cast<int>(c.rows)], int(c.batch), int(c.seq), int(c.heads_q),
              int(c.heads_k), int(c.before), int(2 * c.pairs), int(c.after),
              c.head_major ? " head-major" : "", c.interleaved ? "interleaved" : "half-split",
              c.interleaved_out ? "interleaved" : "half-split", c.inverse ? ", inverse" : "",
              c.in_place ? ", in place" : "", c.any_bits ? ", any bits" : "",
              c.outside ? ", indices outside" : "");
}

// ----------------------------------------------------------------------------------------- tensors

// Sizes that take a path of their own through the code, or that a model has.
struct Sizes {
  const char* why;
  int64_t batch, seq, heads_q, heads_k, before, pairs, after;
  int64_t rank = 0;
};

// [B, S, H, D] with gaps between its tokens and its heads, and guards around it.
struct Tensor {
  Memory memory;
  int64_t guard, stride_b, stride_s, stride_h;

  int64_t index(int64_t b, int64_t s, int64_t h, int64_t channel) const {
    return guard + b * stride_b + s * stride_s + h * stride_h + channel;
  }
  template <class Pointer>
  Heads<Pointer> heads(const Case& c) {  // without elements nullptr, as in torch
    Pointer first = memory.count() > 0 ? memory.data(guard + c.before) : nullptr;
    return {first, stride_b, stride_s, stride_h};
  }
};

// guard: 0 for tensors that are only read.
inline Tensor random_tensor(const Case& c, int64_t heads, int64_t guard, Random& random) {
  const int64_t head = c.dim() + random.below(3);
  const int64_t inner = (c.head_major ? c.seq : heads) * head + random.below(9);
  const int64_t b = (c.head_major ? heads : c.seq) * inner + random.below(9);
  const int64_t s = c.head_major ? head : inner, h = c.head_major ? inner : head;
  const int64_t extent = (c.batch - 1) * b + (c.seq - 1) * s + (heads - 1) * h + c.dim();
  const bool any = c.batch > 0 && c.seq > 0;
  const int64_t count = heads > 0 ? (any ? extent : 0) + 2 * guard : 0;
  return {Memory(c.dtype, count, c.any_bits, random), guard, b, s, h};
}

// The heads of one tensor in memory that it shares with others.
struct View {
  int64_t heads, channels;
  int64_t first = 0, stride_b = 0, stride_s = 0, stride_h = 0;

  int64_t index(int64_t b, int64_t s, int64_t h, int64_t channel) const {
    return first + b * stride_b + s * stride_s + h * stride_h + channel;
  }
  template <class Pointer>
  Heads<Pointer> in(Memory& memory, int64_t channel) const {
    return {memory.data(first + channel), stride_b, stride_s, stride_h};
  }
};

// Views of one projection, one after the other in each token or, head-major, in each sequence: with
// gaps. Any of them may be the last, before the guard or the end.
struct Packed {
  std::vector<View> views;
  Memory memory;
};
inline Packed random_packed(const Case& c, std::vector<View> views, int64_t guard, Random& random) {
  const int64_t count = static_cast<int64_t>(views.size()), start = random.below(count);
  int64_t width = 0, past = 0;  // of a token, or of a sequence
  for (int64_t i = 0; i < count; ++i) {
    View& view = views[(start + i) % count];
    const int64_t head = view.channels + random.below(3);
    view.first = guard + width;
    view.stride_h = c.head_major ? c.seq * head : head;
    view.stride_s = head;
    width += view.heads * (c.head_major ? c.seq : 1) * head;
  }
  width += random.below(9);
  for (View& view : views) {
    if (!c.head_major) view.stride_s = width;
    view.stride_b = c.head_major ? width : c.seq * width;
    if (c.batch * c.seq * view.heads == 0) continue;
    past = std::max(past, view.index(c.batch - 1, c.seq - 1, view.heads - 1, view.channels));
  }
  return {views, Memory(c.dtype, std::max(past, guard) + guard, c.any_bits, random)};
}

// ---------------------------------------------------------------------------------------- rotation

// cos or sin: rows for all sequences, or for each.
struct TableSide {
  Memory memory;
  int64_t stride_b, stride_row;
};

inline TableSide random_table(const Case& c, int64_t rows, Random& random) {
  const int64_t row = c.width() + random.below(3);
  const bool per_token = c.rows == Rows::PerToken;
  const int64_t count = (per_token ? c.batch : 1) * rows * row - (row - c.width());
  return {Memory(c.table_dtype, std::max<int64_t>(count, 0), c.any_bits, random),
          per_token ? rows * row : 0, row};
}

// Not in [0, count): next to it, or at the limits of the type.
inline int64_t index_outside(int64_t count, bool int64, Random& random) {
  const int64_t outside[] = {-1, count, int64 ? INT64_MIN : INT32_MIN,
                             int64 ? INT64_MAX : INT32_MAX};
  return outside[random.below(4)];
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
      if (given && c.outside && random.below(5) == 0) {
        wide.back() = index_outside(rows, c.rows == Rows::Int64, random);
      }
      narrow.push_back(static_cast<int32_t>(wide.back()));
    }
  }
  PositionIds ids(const Case& c) const {
    if (c.rows == Rows::Int32) return {narrow.data(), false, c.seq, 1};
    if (c.rows == Rows::Int64) return {wide.data(), true, c.seq, 1};
    return {};
  }
};

// The two channels of pair i, counted from the first that rotates, or its two columns in a table.
struct Pair {
  int64_t first, second;
};
inline Pair channels(bool interleaved, int64_t pairs, int64_t i) {
  return interleaved ? Pair{2 * i, 2 * i + 1} : Pair{i, i + pairs};
}
inline Pair columns(const Case& c, int64_t i) {
  return c.full_width ? channels(c.table_interleaved, c.pairs, i) : Pair{i, i};
}

// cos and sin of the two channels of a pair.
struct Turn {
  double c1, s1, c2, s2;
};

// What the tokens of a case are rotated by.
struct Rotation {
  int64_t rows;
  TableSide cos, sin;
  Positions positions;

  Rotation(const Case& c, Random& random)
      : rows(c.rows == Rows::Index || c.rows == Rows::PerToken ? c.seq : 50),
        cos(random_table(c, rows, random)),
        sin(random_table(c, rows, random)),
        positions(c, rows, random) {}

  RotaryArgs args(const Case& c) const {  // without q and k
    RotaryArgs args{};
    args.op = c.op;
    args.dtype = c.dtype;
    args.batch = c.batch, args.seq = c.seq;
    args.head_dim = c.dim(), args.rotary_dim = 2 * c.pairs, args.rotary_offset = c.before;
    args.table = {cos.memory.data(), sin.memory.data(),  c.table_dtype, rows,
                  cos.stride_b,      cos.stride_row,     sin.stride_b,  sin.stride_row,
                  c.full_width,      c.table_interleaved};
    args.position_ids = positions.ids(c);
    args.interleaved = c.interleaved, args.interleaved_out = c.interleaved_out;
    args.inverse = c.inverse;
    return args;
  }
  // In the type that the kernels compute in; NaN for a position outside the table.
  Turn turn(const Case& c, int64_t b, int64_t s, int64_t pair) const {
    const int64_t row = positions.wide[b * c.seq + s];
    if (row < 0 || row >= rows) return {NAN, NAN, NAN, NAN};
    const Pair column = columns(c, pair);
    const auto entry = [&](const TableSide& side, int64_t at) {
      return scalar::computed(c.dtype,
                              side.memory.value(b * side.stride_b + row * side.stride_row + at));
    };
    const Turn turn{entry(cos, column.first), entry(sin, column.first), entry(cos, column.second),
                    entry(sin, column.second)};
    return c.inverse ? Turn{turn.c1, -turn.s2, turn.c2, -turn.s1} : turn;
  }
};

// Rotates one head of token (b, s), from in[from] to out[to]: the exact bits.
inline void rotate_head(const Case& c, const Rotation& rotation, int64_t b, int64_t s,
                        const Memory& in, int64_t from, Memory& out, int64_t to) {
  const auto rounded = [&](double value) { return scalar::computed(c.dtype, value); };
  for (int64_t i = 0; i < c.dim(); ++i) {
    const bool rotates = i >= c.before && i < c.before + 2 * c.pairs;
    if (!rotates) out.set(to + i, in.bits(from + i));
  }
  for (int64_t i = 0; i < c.pairs; ++i) {
    const Pair x = channels(c.interleaved, c.pairs, i);
    const Pair y = channels(c.interleaved_out, c.pairs, i);
    const double x1 = in.value(from + c.before + x.first);
    const double x2 = in.value(from + c.before + x.second);
    const Turn turn = rotation.turn(c, b, s, i);
    out.set_value(to + c.before + y.first, rounded(rounded(x1 * turn.c1) - rounded(x2 * turn.s1)));
    out.set_value(to + c.before + y.second, rounded(rounded(x2 * turn.c2) + rounded(x1 * turn.s2)));
  }
}

// ------------------------------------------------------------------------------------------- cases

// What can be combined is drawn at random, except what selects other code: the dtype and, by the
// bits of `which`, the orders of the pairs and the width of the table.
inline Case random_case(const char* op, DType dtype, int which, Random& random) {
  Case c{};
  c.op = op;
  c.dtype = dtype;
  c.interleaved = which & 1, c.interleaved_out = which & 2, c.full_width = which & 4;
  c.in_place = c.interleaved == c.interleaved_out && random.coin();
  c.table_dtype = kDTypes[random.below(4)];
  c.table_interleaved = c.full_width && random.coin();
  c.inverse = random.coin();
  c.head_major = random.coin();
  c.any_bits = random.below(3) == 0;
  c.outside = random.below(4) == 0;
  c.rows = static_cast<Rows>(random.below(4));
  return c;
}

// Each dtype meets each number of pairs and each value of `which`, and so do these two.
template <class Test>
void for_each_case(const char* op, Random& random, const Test& test) {
  int index = 0;
  for (const int64_t pairs : kPairs) {
    ++index;
    for (const DType dtype : kDTypes) {
      for (int which = (index + static_cast<int>(dtype)) % 2; which < 8; which += 2) {
        Case c = random_case(op, dtype, which, random);
        c.pairs = random.below(100) == 0 ? kManyPairs : pairs;
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

// The same with the sizes of a table.
template <size_t kCount, class Test>
void for_each_size(const char* op, const Sizes (&table)[kCount], Random& random, const Test& test) {
  int index = 0;
  for (const Sizes& sizes : table) {
    ++index;
    for (const DType dtype : kDTypes) {
      for (int orders = (index + static_cast<int>(dtype)) % 2; orders < 4; orders += 2) {
        Case c = random_case(op, dtype, orders + 4 * random.coin(), random);
        c.why = sizes.why;
        c.batch = sizes.batch, c.seq = sizes.seq;
        c.heads_q = sizes.heads_q, c.heads_k = sizes.heads_k;
        c.before = sizes.before, c.pairs = sizes.pairs, c.after = sizes.after;
        c.rank = sizes.rank;
        test(c, random);
      }
    }
  }
}

// The cases of the files test_kernels_*.cpp.
void test_angles(Random& random);
void test_append(Random& random);
void test_cached_keys(Random& random);
void test_qkv(Random& random);
void test_quantize(Random& random);
void test_rms_norm(Random& random);

}  // namespace kernel_cases
