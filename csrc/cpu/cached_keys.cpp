// shift_cached_k on the CPU: tokens are divided among threads.
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace rope::cpu {

void shift_cached_k(const ShiftArgs& args) {
  const auto& kernel = isa().kernels.shift_cached_k;
  parallel_for(args.seq, grain_of(args.q.heads * args.rotary_dim),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace rope::cpu
