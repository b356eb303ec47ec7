// apply_rotary_append and rms_norm_rotary_append on the CPU: tokens are divided among threads. Each
// token is rotated and then stored while the L1 cache still holds it.
#include <memory>

#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace rope::cpu {

namespace {

// Memory of a thread for heads of q on their way to float8; nullptr where q stays.
std::unique_ptr<char[]> scratch_for(const AppendArgs& args) {
  if (args.float8_q.out.data == nullptr) return nullptr;
  const int64_t channels = heads_in_scratch(args.rotary) * args.rotary.head_dim;
  return std::make_unique<char[]>(channels * size_of(args.rotary.dtype));
}

}  // namespace

void apply_rotary_append(const AppendArgs& args) {
  const RotaryArgs& rotary = args.rotary;
  const int64_t rotated = (rotary.q.heads + rotary.k.heads) * rotary.rotary_dim;
  const int64_t stored = args.k.heads * args.k.channels + args.v.heads * args.v.channels;
  const auto& kernel = isa().kernels.apply_rotary_append;
  parallel_for(
      rotary.batch * rotary.seq, grain_of(rotated + stored),
      [&](int64_t begin, int64_t end) { kernel(args, begin, end, scratch_for(args).get()); });
}

void rms_norm_rotary_append(const RmsNormAppendArgs& args) {
  const RotaryArgs& rotary = args.append.rotary;
  const int64_t channels = (rotary.q.heads + 2 * rotary.k.heads) * rotary.head_dim;
  const auto& kernel = isa().kernels.rms_norm_rotary_append;
  parallel_for(rotary.batch * rotary.seq, grain_of(channels), [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, scratch_for(args.append).get());
  });
}

}  // namespace rope::cpu
