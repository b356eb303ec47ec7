// apply_rotary_append on the CPU: tokens are spread over threads, each rotated and then stored
// while the first cache still has it.
#include <algorithm>

#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace rope::cpu {

namespace {

// A thread gets at least this many channels: below that, waking it costs more than it saves.
constexpr int64_t kGrainChannels = 16384;

}  // namespace

void apply_rotary_append(const AppendArgs& args) {
  const RotaryArgs& rotary = args.rotary;
  const int64_t rotated = (rotary.q.heads + rotary.k.heads) * rotary.rotary_dim;
  const int64_t stored = args.k.heads * args.k.channels + args.v.heads * args.v.channels;
  const int64_t channels = std::max<int64_t>(rotated + stored, 1);
  const int64_t grain = std::max<int64_t>(1, kGrainChannels / channels);
  const auto& kernel = isa().apply_rotary_append;
  parallel_for(rotary.batch * rotary.seq, grain,
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace rope::cpu
