// empty_like, new_empty and contiguous of torch::stable, with PyTorch's own exception when memory
// runs out.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>

namespace rope {

// Another owner of the same tensor.
AtenTensorHandle new_handle(AtenTensorHandle x);

AtenTensorHandle allocate_like(AtenTensorHandle x);
AtenTensorHandle allocate(AtenTensorHandle like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                          std::optional<torch::headeronly::ScalarType> dtype = std::nullopt);
AtenTensorHandle allocate_contiguous(AtenTensorHandle x);

}  // namespace rope
