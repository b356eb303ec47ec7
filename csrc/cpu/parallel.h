// PyTorch's own thread pool, through its C interface.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <stdexcept>

namespace rope::cpu {

// Calls body(begin, end) on ranges that cover [0, items), each at least `grain` long, on as many
// threads as torch.get_num_threads() allows. The body must not throw.
template <class Body>
void parallel_for(int64_t items, int64_t grain, const Body& body) {
  if (items <= 0) return;
  if (items <= grain) return body(int64_t{0}, items);
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  void* const context = const_cast<void*>(static_cast<const void*>(&body));
  if (torch_parallel_for(0, items, grain, call, context) != 0) {
    throw std::runtime_error("rope: PyTorch's parallel_for failed");
  }
}

}  // namespace rope::cpu
