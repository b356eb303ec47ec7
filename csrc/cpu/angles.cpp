// cos_sin on the CPU, and its gradient to inv_freq: tokens are divided among threads.
#include <algorithm>

#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace rope::cpu {

void cos_sin(const CosSinArgs& args) {
  constexpr int64_t kGrainAngles = 2048;  // some 20 microseconds
  if (args.angles.pairs == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrainAngles / args.angles.pairs);
  const auto& kernel = isa().kernels.cos_sin;
  parallel_for(args.tokens, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void cos_sin_grad(const CosSinGradArgs& args) {
  const auto& kernel = isa().kernels.cos_sin_grad;
  parallel_for(args.chunks, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  isa().kernels.cos_sin_grad_sum(args);
}

}  // namespace rope::cpu
