// Work divided among the threads of PyTorch's own pool, through its C interface.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <stdexcept>

namespace rope::cpu {

// A thread gets at least this many channels: below that, waking it costs more than it saves.
constexpr int64_t kGrainChannels = 16384;

// That in items of `channels` channels each.
inline int64_t grain_of(int64_t channels) {
  return std::max<int64_t>(1, kGrainChannels / std::max<int64_t>(1, channels));
}

// Calls body(begin, end) on ranges that cover [0, items), each at least `grain` long, on as many
// threads as torch.get_num_threads() allows. Throws the first exception of the body, which must not
// reach the C interface.
template <class Body>
void parallel_for(int64_t items, int64_t grain, const Body& body) {
  if (items <= 0) return;
  if (items <= grain) return body(int64_t{0}, items);
  struct Context {
    const Body& body;
    std::atomic<bool> failed{false};
    std::exception_ptr error = nullptr;
  } context{body};
  const auto call = [](int64_t begin, int64_t end, void* of_call) {
    Context& context = *static_cast<Context*>(of_call);
    try {
      context.body(begin, end);
    } catch (...) {
      if (!context.failed.exchange(true)) context.error = std::current_exception();
    }
  };
  const bool done = torch_parallel_for(0, items, grain, call, &context) == 0;
  if (context.error) std::rethrow_exception(context.error);
  if (!done) throw std::runtime_error("rope: PyTorch's parallel_for failed");
}

}  // namespace rope::cpu
