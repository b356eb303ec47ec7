// apply_rotary and apply_rotary_at inside one thread. Included by isa_body.h, in the namespace of
// an instruction set.
#include "cpu/isa/row_scratch.h"

// Copies count < kBelow elements (kBelow a power of two) by moves of a fixed size each, which take
// a fraction of the time of a memcpy whose size is not known.
template <int64_t kBelow, class T>
ROPE_HOST_DEVICE void copy_few(T* to, const T* from, int64_t count) {
  if constexpr (kBelow > 1) {
    constexpr int64_t kHalf = kBelow / 2;
    if (count & kHalf) {
      memcpy(to, from, kHalf * sizeof(T));
      to += kHalf;
      from += kHalf;
    }
    copy_few<kHalf>(to, from, count);
  }
}

// Rotates `pairs` pairs of one head: in, out point at the first of them.
template <class P, bool kFullWidth, bool kStream, class T, class A>
ROPE_HOST_DEVICE void rotate_head(const T* in, T* out, int64_t half, int64_t pairs,
                                  const Row<const A>& row) {
  using V = typename P::Vector;
  constexpr int64_t kLanes = P::kLanes;
  const auto turn_at = [&](int64_t i) ROPE_ALWAYS_INLINE {
    const V c1 = read<V>(row.c1 + i), s1 = read<V>(row.s1 + i);
    if constexpr (!kFullWidth) return Turn<V>{c1, s1, c1, s1};
    return Turn<V>{c1, s1, read<V>(row.c2 + i), read<V>(row.s2 + i)};
  };
  // The last vector, which begins among the pairs of the one before it: read before they change.
  const int64_t last = pairs - kLanes;
  const bool ragged = pairs % kLanes != 0;
  V end1, end2;
  if (ragged) P::load(in + P::kStepIn * last, half, end1, end2);
  int64_t i = 0;
  for (; i <= last; i += kLanes) {
    V x1, x2;
    P::load(in + P::kStepIn * i, half, x1, x2);
    rotate(turn_at(i), x1, x2);
    P::template store<kStream>(out + P::kStepOut * i, half, x1, x2);
  }
  if (ragged) {
    rotate(turn_at(i), end1, end2);
    P::store(out + P::kStepOut * last, half, end1, end2);
  }
}

// The same for less than kLanes pairs.
template <class P, bool kFullWidth, class T, class A>
ROPE_HOST_DEVICE void rotate_few(const T* in, T* out, int64_t half, int64_t pairs,
                                 const Row<const A>& row) {
  constexpr int64_t kLanes = P::kLanes;
  T ends[2 * kLanes] = {};
  copy_few<P::kStepIn * kLanes>(ends, in, P::kStepIn * pairs);
  if constexpr (P::kStepIn == 1) copy_few<kLanes>(ends + kLanes, in + half, pairs);
  rotate_head<P, kFullWidth, false, T, A>(ends, ends, kLanes, kLanes, row);
  copy_few<P::kStepOut * kLanes>(out, ends, P::kStepOut * pairs);
  if constexpr (P::kStepOut == 1) copy_few<kLanes>(out + half, ends + kLanes, pairs);
}

// Heads that a thread goes through one after the other: those of a token, or the tokens of a head.
// in, out point at their first channel that rotates.
template <class T>
struct Run {
  const T* in;
  T* out;
  int64_t count;
  int64_t step_in, step_out;  // channels from one to the next
  int64_t step_row;           // entries of the table from one to the next
  bool apart;                 // lines lie between those that rotate: the processor sees no stream
};

constexpr int64_t kLine = 64;  // bytes of the caches

// Heads that are asked of memory ahead of their turn, where they lie apart.
constexpr int64_t kHeadsAhead = 32;

// Rotates `pairs` pairs of each head, from `row` on; kFew: less than P::kLanes.
template <class P, bool kFullWidth, bool kStream, bool kFew, class T, class A>
ROPE_HOST_DEVICE void rotate_run(const Run<T>& run, int64_t half, int64_t pairs, Row<const A> row) {
  const T* in = run.in;
  T* out = run.out;
  for (int64_t i = 0; i < run.count; ++i) {
    if (run.apart) {
      const int64_t ahead = kHeadsAhead * run.step_in * static_cast<int64_t>(sizeof(T));
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(in) + ahead), 1);
    }
    if constexpr (kFew) {
      rotate_few<P, kFullWidth>(in, out, half, pairs, row);
    } else {
      rotate_head<P, kFullWidth, kStream>(in, out, half, pairs, row);
    }
    in += run.step_in;
    out += run.step_out;
    row = row.plus(run.step_row);
  }
}

// Copies the channels of each head before and after those that rotate.
template <class T>
__attribute__((noinline)) void copy_others(const RotaryArgs& args, const Run<T>& run) {
  const int64_t before = args.rotary_offset, past = args.rotary_dim;
  const int64_t after = args.head_dim - before - past;
  const T* in = run.in;
  T* out = run.out;
  for (int64_t i = 0; i < run.count; ++i) {
    if (before > 0) memcpy(out - before, in - before, before * sizeof(T));
    if (after > 0) memcpy(out + past, in + past, after * sizeof(T));
    in += run.step_in;
    out += run.step_out;
  }
}

// A block of tokens of one batch row, and the heads of q and k, counted together, that a thread
// has.
struct Block {
  int64_t b, s, tokens;
  int64_t head_begin, head_end;
};

// Rotates pairs [first, first + pairs) of the heads of a block.
template <class T, class P, bool kFullWidth, bool kStream, bool kFew = false, class Args>
void rotate_block(const Args& args, const Block& block, int64_t first, int64_t pairs) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  RowScratch<A, P::kLanes, P::kOrder, P::kBFloat16, kFullWidth> rows;
  rows.fill(args, block.b, block.s, block.tokens, first, pairs);
  const int64_t half = args.rotary_dim / 2;
  int64_t heads_before = 0;
  for (const RotatedHeads* x : {&args.q, &args.k}) {
    const int64_t begin = std::max<int64_t>(block.head_begin - heads_before, 0);
    const int64_t end = std::min(block.head_end - heads_before, x->heads);
    heads_before += x->heads;
    if (begin >= end) continue;
    Run<T> run;
    run.in = static_cast<const T*>(x->in.data) + block.b * x->in.stride_b +
             block.s * x->in.stride_s + begin * x->in.stride_h;
    run.out = static_cast<T*>(x->out.data) + block.b * x->out.stride_b + block.s * x->out.stride_s +
              begin * x->out.stride_h;
    const bool copies = first == 0 && args.head_dim > args.rotary_dim && run.in != run.out;
    const bool along_heads = block.tokens == 1;
    run.count = along_heads ? end - begin : block.tokens;
    run.step_in = along_heads ? x->in.stride_h : x->in.stride_s;
    run.step_out = along_heads ? x->out.stride_h : x->out.stride_s;
    run.step_row = along_heads ? 0 : rows.stride();
    run.apart = (args.head_dim - args.rotary_dim) * static_cast<int64_t>(sizeof(T)) >= 2 * kLine;
    const int64_t runs = along_heads ? 1 : end - begin;
    for (int64_t i = 0; i < runs; ++i) {
      if (copies) copy_others(args, run);
      Run<T> from_first = run;
      from_first.in += P::kStepIn * first;
      from_first.out += P::kStepOut * first;
      rotate_run<P, kFullWidth, kStream, kFew>(from_first, half, pairs, rows.row());
      run.in += x->in.stride_h;
      run.out += x->out.stride_h;
    }
  }
}

template <class T, bool kInterleaved, bool kInterleavedOut, bool kFullWidth, bool kStream,
          class Args>
void apply_rotary_range(const Args& args, const RotaryPlan& plan, int64_t begin, int64_t end) {
  using Wide = RotationPairs<T, kInterleaved, kInterleavedOut, true>;
  using Narrow = RotationPairs<T, kInterleaved, kInterleavedOut, false>;
  const int64_t heads = args.q.heads + args.k.heads;
  const int64_t half = args.rotary_dim / 2;
  static_assert(kScratchPairs >= 2 * kMaxBlockTokens * Wide::kLanes, "rows are whole vectors");
  const int64_t chunk = kScratchPairs / plan.block_tokens / Wide::kLanes * Wide::kLanes;

  for (int64_t item = begin; item < end;) {
    const int64_t index = item / heads;
    Block block;
    block.b = index / plan.blocks_a_batch_row;
    block.s = (index - block.b * plan.blocks_a_batch_row) * plan.block_tokens;
    block.tokens = std::min(args.seq - block.s, plan.block_tokens);
    block.head_begin = item - index * heads;
    block.head_end = std::min(block.head_begin + (end - item), heads);
    item += block.head_end - block.head_begin;

    for (int64_t first = 0; first < half; first += chunk) {
      const int64_t pairs = std::min(half - first, chunk);
      if (pairs >= Wide::kLanes) {
        rotate_block<T, Wide, kFullWidth, kStream>(args, block, first, pairs);
      } else if (pairs >= Narrow::kLanes) {
        rotate_block<T, Narrow, kFullWidth, false>(args, block, first, pairs);
      } else {
        rotate_block<T, Narrow, kFullWidth, false, true>(args, block, first, pairs);
      }
    }
  }
  if constexpr (kStream) finish_streaming();
}

void apply_rotary(const RotaryArgs& args, const RotaryPlan& plan, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto storage) {
    using T = decltype(storage);
    dispatch_orders(args, [&](auto in, auto out) {
      const auto run = [&](auto full_width, auto stream) {
        apply_rotary_range<T, in, out, full_width, stream>(args, plan, begin, end);
      };
      if (args.table.full_width) {
        run(std::true_type(), std::false_type());
      } else if (plan.stream) {
        run(std::false_type(), std::true_type());
      } else {
        run(std::false_type(), std::false_type());
      }
    });
  });
}

// Its results are new or in place: nothing is written past the caches.
void apply_rotary_at(const RotaryAtArgs& args, const RotaryPlan& plan, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto storage) {
    dispatch_orders(args, [&](auto in, auto out) {
      apply_rotary_range<decltype(storage), in, out, false, false>(args, plan, begin, end);
    });
  });
}
