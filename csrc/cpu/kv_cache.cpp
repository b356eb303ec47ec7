// apply_rotary_append on the CPU: tokens are divided among threads. Each token is rotated and then
// stored while the L1 cache still holds it.
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace rope::cpu {

void apply_rotary_append(const AppendArgs& args) {
  const RotaryArgs& rotary = args.rotary;
  const int64_t rotated = (rotary.q.heads + rotary.k.heads) * rotary.rotary_dim;
  const int64_t stored = args.k.heads * args.k.channels + args.v.heads * args.v.channels;
  const auto& kernel = isa().kernels.apply_rotary_append;
  parallel_for(rotary.batch * rotary.seq, grain_of(rotated + stored),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace rope::cpu
