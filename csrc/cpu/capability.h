// Which instruction set the CPU kernels use: the best one that this processor supports, unless the
// environment variable ROPE_EXT_CPU_CAPABILITY or a test names another.
#pragma once

#include <string>

namespace rope::cpu {

// The name of the one in use. Picked at the first call, which throws std::runtime_error if the
// environment variable names an unknown or unsupported one.
const char* capability();

// Throws std::invalid_argument for an unknown name, std::runtime_error for one that this processor
// does not support; both change nothing.
void set_capability(const std::string& name);

}  // namespace rope::cpu
