// RMSNorm and rotation on the CPU, forward and backward: tokens are divided among threads. Sums
// over tokens are made of partial sums, whose order depends on shapes alone.
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace rope::cpu {

namespace {

template <class Args>
int64_t token_channels(const Args& args) {
  const RotaryArgs& rotary = args.rotary;
  return args.groups * (rotary.q.heads + rotary.k.heads + args.v.heads) * rotary.head_dim;
}

}  // namespace

void rms_norm_rotary(const RmsNormRotaryArgs& args) {
  const auto& kernel = isa().kernels.rms_norm_rotary;
  parallel_for(args.rotary.batch * args.rotary.seq, grain_of(token_channels(args)),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void rms_norm_rotary_grad(const RmsNormRotaryGradArgs& args) {
  const auto& kernel = isa().kernels.rms_norm_rotary_grad;
  parallel_for(args.chunks, grain_of(args.chunk_tokens * token_channels(args)),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  const auto& sum = isa().kernels.rms_norm_rotary_grad_sum;
  parallel_for(args.columns, grain_of(args.chunks),
               [&](int64_t begin, int64_t end) { sum(args, begin, end); });
}

}  // namespace rope::cpu
