// The storage types one number at a time, by their definitions: the kernels' vectors are tested
// against these.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "args.h"

namespace scalar {

using rope::DType;

// IEEE 754 binary interchange formats, and bfloat16: a sign, exponent bits, mantissa bits.
struct Format {
  int exponent_bits, mantissa_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint64_t sign() const { return uint64_t{1} << (exponent_bits + mantissa_bits); }
  uint64_t infinity() const { return ((uint64_t{1} << exponent_bits) - 1) << mantissa_bits; }
  // The exponent of the last place of a value.
  int unit(double value) const { return std::max(std::ilogb(value), 1 - bias()) - mantissa_bits; }
};

inline Format format_of(DType dtype) {
  switch (dtype) {
    case DType::Float64: return {11, 52};
    case DType::Float32: return {8, 23};
    case DType::Float16: return {5, 10};
    default: return {8, 7};  // BFloat16
  }
}

inline bool is_nan(DType dtype, uint64_t bits) {
  const Format format = format_of(dtype);
  return (bits & (format.sign() - 1)) > format.infinity();
}

template <class To, class From>
To same_bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from), "same size");
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline double value_of(DType dtype, uint64_t bits) {
  if (dtype == DType::Float64) return same_bits<double>(bits);
  if (dtype == DType::Float32) return same_bits<float>(static_cast<uint32_t>(bits));
  const Format format = format_of(dtype);
  const uint64_t magnitude = bits & (format.sign() - 1);
  const int exponent = static_cast<int>(magnitude >> format.mantissa_bits);
  const uint64_t leading = exponent > 0 ? uint64_t{1} << format.mantissa_bits : 0;
  const uint64_t mantissa = magnitude & ((uint64_t{1} << format.mantissa_bits) - 1);
  const double value = std::ldexp(static_cast<double>(leading | mantissa),
                                  std::max(exponent, 1) - format.bias() - format.mantissa_bits);
  const double special = magnitude == format.infinity() ? INFINITY : NAN;
  return std::copysign(magnitude < format.infinity() ? value : special,
                       bits & format.sign() ? -1.0 : 1.0);
}

// Rounded to nearest, ties to even.
inline uint64_t bits_of(DType dtype, double value) {
  if (dtype == DType::Float64) return same_bits<uint64_t>(value);
  if (dtype == DType::Float32) return same_bits<uint32_t>(static_cast<float>(value));
  const Format format = format_of(dtype);
  const uint64_t sign = std::signbit(value) ? format.sign() : 0;
  if (std::isnan(value)) return format.infinity() + 1;
  if (std::isinf(value)) return sign | format.infinity();
  const int unit = format.unit(value);
  const auto units = static_cast<uint64_t>(std::nearbyint(std::ldexp(std::fabs(value), -unit)));
  // The leading bit of a normal number is the exponent's last; rounding up may carry into it.
  const auto exponent = static_cast<uint64_t>(unit + format.mantissa_bits + format.bias() - 1);
  const uint64_t magnitude = (exponent << format.mantissa_bits) + units;
  return sign | std::min(magnitude, format.infinity());
}

inline uint64_t read_bits(DType dtype, const void* data, int64_t at) {
  const int64_t size = rope::size_of(dtype);
  uint64_t bits = 0;
  std::memcpy(&bits, static_cast<const char*>(data) + at * size, size);  // little-endian
  return bits;
}

inline void write_bits(DType dtype, void* data, int64_t at, uint64_t bits) {
  const int64_t size = rope::size_of(dtype);
  std::memcpy(static_cast<char*>(data) + at * size, &bits, size);
}

// Rounds to the type that the kernels compute in: float64 for float64, otherwise float32. An
// operation in double, rounded again, is that operation in float32: 53 bits are more than 2 * 24
// + 1.
inline double computed(DType dtype, double value) {
  return dtype == DType::Float64 ? value : static_cast<double>(static_cast<float>(value));
}

// One of the eight-bit formats of caches, csrc/math/float8.h.
class Float8Format {
 public:
  explicit Float8Format(bool e5m2) : infinity_(e5m2 ? 0x7c : -1) {
    const int mantissa_bits = e5m2 ? 2 : 3, largest = e5m2 ? 0x7b : 0x7e;
    const Format format{7 - mantissa_bits, mantissa_bits};
    for (int bits = 0; bits <= largest; ++bits) {
      const int exponent = bits >> mantissa_bits, mantissa = bits % (1 << mantissa_bits);
      const int leading = exponent > 0 ? 1 << mantissa_bits : 0;
      const int unit = std::max(exponent, 1) - format.bias() - mantissa_bits;
      values_.push_back(std::ldexp(leading + mantissa, unit));
    }
  }
  // The values halfway between two neighbours.
  int64_t ties() const { return static_cast<int64_t>(values_.size()) - 1; }
  double tie(int64_t at) const { return (values_[at] + values_[at + 1]) / 2; }
  float largest() const { return static_cast<float>(values_.back()); }
  double value_of(uint8_t bits) const {
    const size_t magnitude = bits & 0x7f;
    const double above = static_cast<int>(magnitude) == infinity_ ? INFINITY : NAN;
    return std::copysign(magnitude < values_.size() ? values_[magnitude] : above,
                         bits & 0x80 ? -1.0 : 1.0);
  }
  // The nearest, ties to even bits; saturating.
  uint8_t bits_of(double value) const {
    const double magnitude = std::fabs(value);
    const auto above = std::lower_bound(values_.begin(), values_.end() - 1, magnitude);
    auto bits = static_cast<size_t>(above - values_.begin());
    if (std::isnan(value)) return 0x7f;
    if (bits > 0 && magnitude < values_[bits]) {
      const double to_lower = magnitude - values_[bits - 1], to_upper = values_[bits] - magnitude;
      if (to_lower < to_upper || (to_lower == to_upper && bits % 2 == 1)) --bits;
    }
    return static_cast<uint8_t>(bits | (std::signbit(value) ? 0x80 : 0));
  }

 private:
  int infinity_;                // its bits, if there are any
  std::vector<double> values_;  // of the bits 0, 1, 2, ...
};

// Random numbers, the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  bool coin() { return engine_() >> 63; }
  uint64_t any_bits() { return engine_(); }
  // 1/8 <= |value| < 2, with every bit of the mantissa at random.
  uint64_t ordinary(DType dtype) {
    const Format format = format_of(dtype);
    const uint64_t exponent = static_cast<uint64_t>(format.bias() - below(4));
    return (engine_() & ~format.infinity()) | exponent << format.mantissa_bits;
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace scalar
