// Work divided among the threads of PyTorch's own pool, through its C interface.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

namespace rope::cpu {

// A thread gets at least this many channels: below that, waking it costs more than it saves.
constexpr int64_t kGrainChannels = 16384;

// That in items of `channels` channels each.
inline int64_t grain_of(int64_t channels) {
  return std::max<int64_t>(1, kGrainChannels / std::max<int64_t>(1, channels));
}

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
