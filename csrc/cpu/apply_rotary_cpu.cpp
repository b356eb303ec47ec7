// apply_rotary on the CPU: how the work is cut and spread over threads.
#include <algorithm>

#include "../kernels.h"
#include "isa.h"
#include "parallel.h"

namespace rope::cpu {

namespace {

// A thread gets at least this many channels: below that, waking it costs more than it saves.
constexpr int64_t kGrainChannels = 16384;

// Where heads lie further apart than tokens ([B, H, S, D] in memory), a block of several tokens is
// walked head by head, so that memory is read in long runs; otherwise token by token.
int64_t block_tokens(const RotaryArgs& args) {
  const RotatedHeads& x = args.q.heads > 0 ? args.q : args.k;
  const bool head_major = x.heads > 1 && x.in.stride_h > x.in.stride_s;
  return head_major ? std::min(kMaxBlockTokens, args.seq) : 1;
}

}  // namespace

void apply_rotary(const RotaryArgs& args) {
  const int64_t heads = args.q.heads + args.k.heads;
  if (args.batch == 0 || args.seq == 0 || heads == 0) return;
  TokenBlocks blocks;
  blocks.tokens = block_tokens(args);
  blocks.per_batch = (args.seq + blocks.tokens - 1) / blocks.tokens;
  const int64_t items = args.batch * blocks.per_batch * heads;
  const int64_t grain = std::max<int64_t>(1, kGrainChannels / (blocks.tokens * args.head_dim));
  const auto& kernel = isa().apply_rotary;
  parallel_for(items, grain, [&](int64_t begin, int64_t end) { kernel(args, blocks, begin, end); });
}

}  // namespace rope::cpu
