// New tensors for results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace rope {

// Dense, of x's shape and order of dimensions, as torch.empty_like; last stride 1.
inline torch::stable::Tensor dense_like(const torch::stable::Tensor& x) {
  torch::stable::Tensor out = torch::stable::empty_like(x);
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && out.stride(last) != 1) return torch::stable::new_empty(x, x.sizes());
  return out;
}

}  // namespace rope
