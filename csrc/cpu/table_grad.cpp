// Gradient of apply_rotary to its table on the CPU: rows of the gradient spread over threads. A row
// is summed by one thread in one order, so the result does not depend on the number of threads.
#include <algorithm>

#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace rope::cpu {

void rotary_table_grad(const RotaryTableGradArgs& args) {
  constexpr int64_t kGrainChannels = 16384;
  const int64_t rows = args.grad_batch * args.rows;
  if (rows == 0) return;
  const int64_t tokens = args.batch * args.seq;
  const int64_t channels = tokens * (args.q.heads + args.k.heads) * args.rotary_dim;
  const int64_t grain =
      std::max<int64_t>(1, kGrainChannels / std::max<int64_t>(1, channels / rows));
  const auto& kernel = isa().rotary_table_grad;
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace rope::cpu
