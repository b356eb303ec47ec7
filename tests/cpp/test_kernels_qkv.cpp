// The CPU kernel that takes q, k and v out of a packed tensor, or puts them into one, part of
// test_kernels.cpp: the exact bits.
#include "kernel_cases.h"
#include "kernels.h"

using namespace kernel_cases;

namespace {

constexpr Sizes kSizes[] = {
    // B, S, heads of q, of k in a group; channels before, pairs, channels after; groups
    {"multi-head", 2, 3, 4, 4, 0, 32, 0, 1},
    {"grouped", 2, 3, 4, 1, 0, 64, 0, 3},
    {"less than a vector", 2, 3, 3, 1, 1, 1, 1, 2},
    {"parts of vectors", 1, 7, 2, 3, 5, 17, 9, 2},
    {"more pairs than rows of the table are held for", 2, 2, 1, 1, 0, kManyPairs, 0, 1},
    {"divided among threads", 2, 60, 2, 1, 0, 33, 4, 4},
    {"no token", 2, 0, 3, 1, 0, 16, 0, 2},
    {"no sequence", 0, 3, 3, 1, 5, 16, 0, 1},
};

// One of q, k and v: of each group some heads of the packed tensor, from `first` on, and a tensor
// [B, S, groups * heads, D] of its own.
struct Part {
  int64_t heads, first;
  Tensor own;
};

void test(Case c, bool to_packed, Random& random) {
  ++cases;
  c.in_place = false;
  const int64_t groups = c.rank, of_group = c.heads_q + 2 * c.heads_k;
  const Rotation rotation(c, random);
  Tensor packed = random_tensor(c, groups * of_group, kGuard, random);
  Part parts[] = {
      {c.heads_q, 0, random_tensor(c, groups * c.heads_q, kGuard, random)},
      {c.heads_k, c.heads_q, random_tensor(c, groups * c.heads_k, kGuard, random)},
      {c.heads_k, c.heads_q + c.heads_k, random_tensor(c, groups * c.heads_k, kGuard, random)},
  };
  const int64_t missing = to_packed ? random.below(6) : -1;  // 0, 1, 2: q, k or v has no gradient
  Memory expected_packed = packed.memory;
  Memory expected[] = {parts[0].own.memory, parts[1].own.memory, parts[2].own.memory};
  for (int64_t which = 0; which < 3; ++which) {
    const Part& part = parts[which];
    for (int64_t i = 0; i < c.batch * c.seq * groups * part.heads; ++i) {
      const int64_t head = i % (groups * part.heads), token = i / (groups * part.heads);
      const int64_t b = token / c.seq, s = token % c.seq;
      const int64_t in_packed = head / part.heads * of_group + part.first + head % part.heads;
      const int64_t own = part.own.index(b, s, head, 0), at = packed.index(b, s, in_packed, 0);
      const Memory& in = to_packed ? part.own.memory : packed.memory;
      Memory& out = to_packed ? expected_packed : expected[which];
      const int64_t from = to_packed ? own : at, to = to_packed ? at : own;
      if (which < 2 && which != missing) {
        rotate_head(c, rotation, b, s, in, from, out, to);
        continue;
      }
      for (int64_t channel = 0; channel < c.dim(); ++channel) {
        out.set(to + channel, which == missing ? 0 : in.bits(from + channel));
      }
    }
  }

  RotaryQkvArgs args{};
  static_cast<RotaryArgs&>(args) = rotation.args(c);
  args.groups = groups;
  RotatedHeads* const given[] = {&args.q, &args.k, &args.v};
  for (int64_t which = 0; which < 3; ++which) {
    Part& part = parts[which];
    RotatedHeads& x = *given[which];
    x.heads = part.heads;
    const auto group_of = [&](auto heads, int64_t count) {
      heads.stride_g = count * heads.stride_h;
      return heads;
    };
    const auto from_packed = [&](auto heads) {
      using Byte =
          std::conditional_t<std::is_same_v<decltype(heads.data), void*>, char, const char>;
      if (heads.data) {
        heads.data =
            static_cast<Byte*>(heads.data) + part.first * heads.stride_h * size_of(c.dtype);
      }
      return group_of(heads, of_group);
    };
    if (to_packed) {
      x.in = group_of(part.own.heads<const void*>(c), part.heads);
      if (which == missing) x.in.data = nullptr;
      x.out = from_packed(packed.heads<void*>(c));
    } else {
      x.in = from_packed(packed.heads<const void*>(c));
      x.out = group_of(part.own.heads<void*>(c), part.heads);
    }
  }
  cpu::apply_rotary_qkv(args);
  const std::string what =
      text(c) + text(", %d groups%s", int(groups), to_packed ? ", into the packed tensor" : "");
  expect_same(expected_packed, packed.memory, what + ", packed");
  const char* const names[] = {", q", ", k", ", v"};
  for (int64_t which = 0; which < 3; ++which) {
    expect_same(expected[which], parts[which].own.memory, what + names[which]);
  }
}

}  // namespace

void kernel_cases::test_qkv(Random& random) {
  for (const bool to_packed : {false, true}) {
    for_each_size("apply_rotary_qkv", kSizes, random,
                  [=](const Case& c, Random& random) { test(c, to_packed, random); });
  }
}
