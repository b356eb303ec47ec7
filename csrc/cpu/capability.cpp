#include "cpu/capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "host/compiler.h"

#if ROPE_X86
#include <cpuid.h>
#endif

namespace rope::cpu {
namespace {

#if ROPE_X86
// __builtin_cpu_supports("f16c") is unknown to older compilers (Clang 14, GCC 10).
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

constexpr int kNotPicked = -1;
std::atomic<int> in_use{kNotPicked};

bool supported(Capability wanted) {
  return static_cast<int>(wanted) <= static_cast<int>(best_capability());
}

Capability capability_at_start() {
  const char* wanted_name = std::getenv("ROPE_EXT_CPU_CAPABILITY");
  if (wanted_name == nullptr || *wanted_name == '\0') return best_capability();
  const std::optional<Capability> wanted = find_capability(wanted_name);
  if (wanted && supported(*wanted)) return *wanted;
  throw std::runtime_error(
      "rope_ext: expected ROPE_EXT_CPU_CAPABILITY to be 'portable' or 'avx2' and supported by this "
      "processor (best: '" +
      std::string(name(best_capability())) + "'), got '" + wanted_name + "'");
}

}  // namespace

Capability best_capability() {
#if ROPE_X86
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  return avx2 ? Capability::Avx2 : Capability::Portable;
#else
  return Capability::Portable;
#endif
}

Capability capability() {
  int current = in_use.load(std::memory_order_relaxed);
  if (current == kNotPicked) {
    // Two threads may both come here; they pick the same, and neither overwrites set_capability.
    const int picked = static_cast<int>(capability_at_start());
    if (in_use.compare_exchange_strong(current, picked, std::memory_order_relaxed))
      return static_cast<Capability>(picked);
  }
  return static_cast<Capability>(current);
}

bool set_capability(Capability wanted) {
  if (!supported(wanted)) return false;
  in_use.store(static_cast<int>(wanted), std::memory_order_relaxed);
  return true;
}

const char* name(Capability capability) {
  return capability == Capability::Avx2 ? "avx2" : "portable";
}

std::optional<Capability> find_capability(std::string_view name_wanted) {
  for (const Capability each : {Capability::Portable, Capability::Avx2}) {
    if (name_wanted == name(each)) return each;
  }
  return std::nullopt;
}

}  // namespace rope::cpu
