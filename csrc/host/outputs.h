// New tensors for results.
#pragma once

#include "checks.h"
#include "host/allocation.h"

namespace rope {

// Dense, of x's shape and order of dimensions, as torch.empty_like; last stride 1.
inline torch::stable::Tensor dense_like(const torch::stable::Tensor& x) {
  torch::stable::Tensor out = allocate_like(x);
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && out.stride(last) != 1) return allocate(x, x.sizes());
  return out;
}

// A new tensor like x as the result for `heads`.
inline torch::stable::Tensor new_output(RotaryArgs& args, RotatedHeads& heads,
                                        const torch::stable::Tensor& x) {
  torch::stable::Tensor out = dense_like(x);
  set_output(args, heads, out);
  args.new_outputs = true;
  return out;
}

}  // namespace rope
