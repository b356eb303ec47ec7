// Results of the operators that rotate, out of place.
#pragma once

#include "checks.h"
#include "outputs.h"

namespace rope {

// A new tensor like x as the result for `heads`.
inline torch::stable::Tensor new_output(RotaryArgs& args, RotatedHeads& heads,
                                        const torch::stable::Tensor& x) {
  torch::stable::Tensor out = dense_like(x);
  set_output(args, heads, out);
  args.new_outputs = true;
  return out;
}

}  // namespace rope
