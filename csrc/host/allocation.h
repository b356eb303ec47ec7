// empty_like, new_empty and contiguous of torch::stable, with PyTorch's own exception when memory
// runs out.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace rope {

torch::stable::Tensor allocate_like(const torch::stable::Tensor& x);
torch::stable::Tensor allocate(const torch::stable::Tensor& like,
                               torch::headeronly::IntHeaderOnlyArrayRef sizes,
                               std::optional<torch::headeronly::ScalarType> dtype = std::nullopt);
torch::stable::Tensor allocate_contiguous(const torch::stable::Tensor& x);

}  // namespace rope
