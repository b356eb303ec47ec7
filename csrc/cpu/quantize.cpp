// apply_rotary_quantize on the CPU: heads are divided among threads.
#include <memory>

#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace rope::cpu {

void apply_rotary_quantize(const QuantizeArgs& args) {
  const auto& kernel = isa().kernels.apply_rotary_quantize;
  parallel_for(args.batch * args.seq * args.q.heads, grain_of(args.head_dim),
               [&](int64_t begin, int64_t end) {
                 const auto head = std::make_unique<double[]>(args.head_dim);
                 kernel(args, begin, end, head.get());
               });
}

}  // namespace rope::cpu
