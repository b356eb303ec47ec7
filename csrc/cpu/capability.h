// Which instruction set the CPU kernels use: the best that this processor has, unless told
// otherwise by the environment variable ROPE_EXT_CPU_CAPABILITY=portable|avx2 or by a test.
#pragma once

#include <optional>
#include <string_view>

namespace rope::cpu {

enum class Capability { Portable, Avx2 };  // Avx2: AVX2, FMA and F16C

// The one in use. Cheap; picked at the first call, which throws std::runtime_error if the
// environment variable names an unknown or unsupported one.
Capability capability();

// False, and nothing changes, where the processor does not support it.
bool set_capability(Capability wanted);

Capability best_capability();

const char* name(Capability capability);                           // "portable", "avx2"
std::optional<Capability> find_capability(std::string_view name);  // the other way round

}  // namespace rope::cpu
