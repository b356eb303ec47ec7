// librope, the operators without Python, registers them as soon as it is loaded.
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <exception>

#include "registration.h"

namespace {

using torch::stable::detail::StableLibrary;
using torch::stable::detail::StableTorchLibraryInit;

// The operators that write refuse every tensor that negates its elements; in Python,
// rope_ext/_engine/negative_and_zero_tensors.py refuses only those that are written.
void refuse_negated(StableLibrary& m) {
  for (const rope::Operator& op : rope::operators()) {
    if (op.refuse_negated != nullptr) m.impl(op.name, op.refuse_negated);
  }
}

[[maybe_unused]] const bool registered = [] {
  try {
    rope::register_operators("rope", true);
    static const StableTorchLibraryInit negative(StableLibrary::Kind::IMPL, &refuse_negated, "rope",
                                                 "Negative", __FILE__, __LINE__);
    return true;
  } catch (const std::exception& error) {
    // Nobody could catch it here. If a copy of this library has registered them, they work.
    std::fprintf(stderr, "librope: the operators rope::* of this copy are not registered: %s\n",
                 error.what());
    return false;
  }
}();

}  // namespace
