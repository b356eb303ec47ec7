// apply_rotary and apply_rotary_at on the CPU: how the work is cut and spread over threads.
#include <algorithm>

#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace rope::cpu {

namespace {

// A thread gets at least this many channels: below that, waking it costs more than it saves.
constexpr int64_t kGrainChannels = 16384;

// Results from this size on are written past the caches: what reads them next would not find them
// there anyway. Not where their memory is new: its lines are in the caches, just cleared.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// Where heads lie further apart than tokens ([B, H, S, D] in memory), a block of several tokens is
// walked head by head, so that memory is read in long runs; otherwise token by token.
int64_t block_tokens(const RotaryArgs& args) {
  const RotatedHeads& x = args.q.heads > 0 ? args.q : args.k;
  const bool head_major = x.heads > 1 && x.in.stride_h > x.in.stride_s;
  return head_major ? std::min(kMaxBlockTokens, args.seq) : 1;
}

bool aligned(const RotaryArgs& args, const RotatedHeads& x) {
  if (x.heads == 0) return true;
  const int64_t size = size_of(args.dtype);
  int64_t bits = reinterpret_cast<int64_t>(x.out.data);
  for (const int64_t elements : {x.out.stride_b, x.out.stride_s, x.out.stride_h}) {
    bits |= elements * size;
  }
  return bits % kStreamAlignment == 0;
}

// Writing past the caches saves reading each line before it is overwritten, and costs whoever reads
// the result from the caches: it wins where that is too large for them. Whole heads of whole
// vectors only, so that lines are written whole.
bool streams(const RotaryArgs& args) {
  const int64_t heads = args.q.heads + args.k.heads;
  const int64_t bytes = args.batch * args.seq * heads * args.head_dim * size_of(args.dtype);
  const auto elsewhere = [](const RotatedHeads& x) {
    return x.heads == 0 || x.in.data != x.out.data;
  };
  return bytes >= kStreamBytes && !args.new_outputs && args.rotary_dim == args.head_dim &&
         args.rotary_dim / 2 * size_of(args.dtype) % kStreamAlignment == 0 && elsewhere(args.q) &&
         elsewhere(args.k) && aligned(args, args.q) && aligned(args, args.k);
}

template <class Args>
void run(const Args& args, void (*kernel)(const Args&, const RotaryPlan&, int64_t, int64_t)) {
  const int64_t heads = args.q.heads + args.k.heads;
  if (args.batch == 0 || args.seq == 0 || heads == 0) return;
  RotaryPlan plan;
  plan.block_tokens = block_tokens(args);
  plan.blocks_a_batch_row = (args.seq + plan.block_tokens - 1) / plan.block_tokens;
  plan.stream = streams(args);
  const int64_t items = args.batch * plan.blocks_a_batch_row * heads;
  const int64_t grain = std::max<int64_t>(1, kGrainChannels / (plan.block_tokens * args.head_dim));
  parallel_for(items, grain, [&](int64_t begin, int64_t end) { kernel(args, plan, begin, end); });
}

}  // namespace

void apply_rotary(const RotaryArgs& args) { run(args, isa().apply_rotary); }

void apply_rotary_at(const RotaryAtArgs& args) { run(args, isa().apply_rotary_at); }

}  // namespace rope::cpu
