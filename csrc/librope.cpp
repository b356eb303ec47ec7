// librope, the operators without Python, registers them as soon as it is loaded.
#include <cstdio>
#include <exception>

#include "operators.h"

namespace {

[[maybe_unused]] const bool registered = [] {
  try {
    return rope::register_operators();
  } catch (const std::exception& error) {
    // Nobody could catch it here. Where a copy of this library has registered them, all is well.
    std::fprintf(stderr, "librope: the operators rope::* of this copy are not registered: %s\n",
                 error.what());
    return false;
  }
}();

}  // namespace
