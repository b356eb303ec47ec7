#include "cpu/capability.h"

#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>

#include "cpu/isa/isa.h"

namespace rope::cpu {
namespace {

constexpr const Isa* kIsas[] = {&kPortable, &kAvx2, &kAvx512, &kArmBf16};  // the best one last

std::atomic<const Isa*> in_use{nullptr};

// False for those of another architecture.
bool is_built(const Isa& isa) { return isa.vector_bytes > 0; }

const Isa* find(const std::string& name) {
  for (const Isa* each : kIsas) {
    if (name == each->name && is_built(*each)) return each;
  }
  return nullptr;
}

const Isa* best() {
  const Isa* found = nullptr;
  for (const Isa* each : kIsas) {
    if (each->supported()) found = each;
  }
  return found;
}

std::string names() {  // 'portable' or 'avx2' or 'avx512'
  std::string all;
  for (const Isa* each : kIsas) {
    if (!is_built(*each)) continue;
    all += (all.empty() ? "'" : " or '") + std::string(each->name) + "'";
  }
  return all;
}

const Isa* isa_at_start() {
  const char* const name = std::getenv("ROPE_EXT_CPU_CAPABILITY");
  if (name == nullptr || *name == '\0') return best();
  const Isa* const wanted = find(name);
  if (wanted != nullptr && wanted->supported()) return wanted;
  throw std::runtime_error("rope_ext: expected ROPE_EXT_CPU_CAPABILITY to be " + names() +
                           " and supported by this processor (best: '" + best()->name +
                           "'), got '" + name + "'");
}

}  // namespace

const Isa& isa() {
  const Isa* current = in_use.load(std::memory_order_relaxed);
  if (current == nullptr) {
    // Two threads may both get here: they pick the same, and neither overwrites set_capability.
    const Isa* const picked = isa_at_start();
    if (in_use.compare_exchange_strong(current, picked, std::memory_order_relaxed)) return *picked;
  }
  return *current;
}

const char* capability() { return isa().name; }

void set_capability(const std::string& name) {
  const Isa* const wanted = find(name);
  if (wanted == nullptr) {
    throw std::invalid_argument("set_cpu_capability: expected " + names() + ", got '" + name + "'");
  }
  if (!wanted->supported()) {
    throw std::runtime_error("set_cpu_capability: this processor does not support '" + name + "'");
  }
  in_use.store(wanted, std::memory_order_relaxed);
}

}  // namespace rope::cpu
