// Memory that the kernels read and write, and reports of wrong results.
#pragma once

#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <new>
#include <string>
#include <vector>

#include "scalar.h"

namespace kernel_cases {

using namespace rope;
using scalar::Random;

constexpr int64_t kGuard = 64;  // elements before and after what is written

inline std::atomic<int> failures = 0;
inline std::atomic<int64_t> cases = 0;

inline void expect(bool condition, const std::string& what) {
  if (!condition && ++failures <= 20) std::printf("FAIL %s\n", what.c_str());
}

template <class... Args>
std::string text(const char* format, Args... args) {
  char line[512];
  std::snprintf(line, sizeof(line), format, args...);
  return line;
}

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::Float64: return "float64";
    case DType::Float32: return "float32";
    case DType::Float16: return "float16";
    default: return "bfloat16";
  }
}

// Memory aligned to whole vectors, of exactly the size asked for: sanitizers see a read or write
// outside it.
template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};

  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlignment)); }
  void deallocate(T* data, size_t) { ::operator delete(data, kAlignment); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};

// Elements of a dtype, random at first.
class Memory {
 public:
  Memory(DType dtype, int64_t count, bool any_bits, Random& random)
      : dtype_(dtype), count_(count), bytes_(count * size_of(dtype)) {
    for (int64_t i = 0; i < count; ++i) {
      set(i, any_bits ? random.any_bits() : random.ordinary(dtype));
    }
  }

  void* data(int64_t at = 0) { return bytes_.data() + at * size_of(dtype_); }
  const void* data() const { return bytes_.data(); }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  uint64_t bits(int64_t at) const { return scalar::read_bits(dtype_, data(), at); }
  double value(int64_t at) const { return scalar::value_of(dtype_, bits(at)); }
  void set(int64_t at, uint64_t bits) { scalar::write_bits(dtype_, data(), at, bits); }
  void set_value(int64_t at, double value) { set(at, scalar::bits_of(dtype_, value)); }

 private:
  DType dtype_;
  int64_t count_;
  std::vector<char, Aligned<char>> bytes_;
};

// The same bits everywhere, guards included; any NaN equals any other.
inline void expect_same(const Memory& expected, const Memory& got, const std::string& what) {
  const DType dtype = got.dtype();
  for (int64_t i = 0; i < got.count(); ++i) {
    const uint64_t want = expected.bits(i), have = got.bits(i);
    if (want == have || (scalar::is_nan(dtype, want) && scalar::is_nan(dtype, have))) continue;
    expect(false,
           what + text(": element %" PRId64 ": expected %#" PRIx64 " (%g), got %#" PRIx64 " (%g)",
                       i, want, expected.value(i), have, got.value(i)));
    return;
  }
}

}  // namespace kernel_cases
