// apply_rotary, apply_rotary_at, apply_rotary_qkv and the gradient to the table on the CPU: how the
// work is divided among threads.
#include <algorithm>

#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace rope::cpu {

namespace {

// Results from this size on are stored past the caches, which could not hold them for the next
// reader anyway. New memory is not: its lines are in the caches, as they have just been cleared.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// If heads lie further apart than tokens ([B, H, S, D] in memory), a block has several tokens, and
// each head is rotated for all of them, so that memory is read in sequence.
int64_t block_tokens(const RotaryArgs& args) {
  const RotatedHeads& x = args.q.heads > 0 ? args.q : args.k;
  const bool head_major = x.heads > 1 && x.in.stride_h > x.in.stride_s;
  return head_major ? std::min(kMaxBlockTokens, args.seq) : 1;
}

// Whether every head of the result begins at a multiple of a vector.
bool aligned(const RotaryArgs& args, const RotatedHeads& x, int64_t vector_bytes) {
  if (x.heads == 0) return true;
  const int64_t size = size_of(args.dtype);
  int64_t bits = reinterpret_cast<int64_t>(x.out.data);
  for (const int64_t elements : {x.out.stride_b, x.out.stride_s, x.out.stride_h}) {
    bits |= elements * size;
  }
  return bits % vector_bytes == 0;
}

// A store past the caches does not read the line first, but the next reader does not find it in a
// cache: it is faster for results that are too large for the caches. Only for whole heads of whole
// vectors, so that whole lines are written.
bool streams(const RotaryArgs& args, int64_t vector_bytes) {
  const int64_t heads = args.q.heads + args.k.heads;
  const int64_t bytes = args.batch * args.seq * heads * args.head_dim * size_of(args.dtype);
  const auto out_of_place = [](const RotatedHeads& x) {
    return x.heads == 0 || x.in.data != x.out.data;
  };
  return bytes >= kStreamBytes && !args.new_outputs && args.rotary_dim == args.head_dim &&
         args.rotary_dim / 2 * size_of(args.dtype) % vector_bytes == 0 && out_of_place(args.q) &&
         out_of_place(args.k) && aligned(args, args.q, vector_bytes) &&
         aligned(args, args.k, vector_bytes);
}

template <class Args>
void rotate(const Args& args, const Isa& isa,
            void (*kernel)(const Args&, const RotaryBlocks&, int64_t, int64_t)) {
  const int64_t heads = args.q.heads + args.k.heads;
  if (args.batch == 0 || args.seq == 0 || heads == 0) return;
  RotaryBlocks blocks;
  blocks.tokens = block_tokens(args);
  blocks.per_sequence = (args.seq + blocks.tokens - 1) / blocks.tokens;
  blocks.stream = streams(args, isa.vector_bytes);
  parallel_for(args.batch * blocks.per_sequence * heads, grain_of(blocks.tokens * args.head_dim),
               [&](int64_t begin, int64_t end) { kernel(args, blocks, begin, end); });
}

}  // namespace

void apply_rotary(const RotaryArgs& args) {
  const Isa& in_use = isa();
  rotate(args, in_use, in_use.kernels.apply_rotary);
}

void apply_rotary_at(const RotaryAtArgs& args) {
  const Isa& in_use = isa();
  rotate(args, in_use, in_use.kernels.apply_rotary_at);
}

void apply_rotary_qkv(const RotaryQkvArgs& args) {
  const int64_t heads = args.groups * (args.q.heads + args.k.heads + args.v.heads);
  const auto& kernel = isa().kernels.apply_rotary_qkv;
  parallel_for(args.batch * args.seq, grain_of(heads * args.head_dim),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// One thread sums a row, in one order, so that the result does not depend on the number of threads.
void rotary_table_grad(const RotaryTableGradArgs& args) {
  const int64_t rows = args.grad_batch * args.rows;
  if (rows == 0) return;
  const int64_t channels = args.batch * args.seq * (args.q.heads + args.k.heads) * args.rotary_dim;
  const auto& kernel = isa().kernels.rotary_table_grad;
  parallel_for(rows, grain_of(channels / rows),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace rope::cpu
