// RMSNorm and rotation on the CPU, forward and backward: tokens spread over threads. No sum crosses
// threads but that of the partial gradients to the weights, whose order is one of shapes.
#include <algorithm>

#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace rope::cpu {

namespace {

// A thread gets at least this many channels: below that, waking it costs more than it saves.
constexpr int64_t kGrainChannels = 16384;

int64_t grain_of(int64_t channels) {
  return std::max<int64_t>(1, kGrainChannels / std::max<int64_t>(1, channels));
}

int64_t token_channels(const RotaryArgs& args) {
  return (args.q.heads + args.k.heads) * args.head_dim;
}

}  // namespace

void rms_norm_rotary(const RmsNormRotaryArgs& args) {
  const auto& kernel = isa().rms_norm_rotary;
  parallel_for(args.rotary.batch * args.rotary.seq, grain_of(token_channels(args.rotary)),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void rms_norm_rotary_grad(const RmsNormRotaryGradArgs& args) {
  const auto& kernel = isa().rms_norm_rotary_grad;
  parallel_for(args.chunks, grain_of(args.chunk_tokens * token_channels(args.rotary)),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  const auto& sum = isa().rms_norm_rotary_grad_sum;
  parallel_for(args.columns, grain_of(args.chunks),
               [&](int64_t begin, int64_t end) { sum(args, begin, end); });
}

}  // namespace rope::cpu
