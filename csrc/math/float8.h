// Converts float32 to the eight-bit floats of KV caches: rounded once, to nearest, ties to even,
// and saturating: values too large, infinity included, become the largest finite value. NaN stays
// NaN.
//
// Source: OCP 8-bit Floating Point Specification (OFP8), revision 1.0, of which PyTorch's
// float8_e4m3fn and float8_e5m2 are the two formats.
#pragma once

#include <cstdint>
#include <cstring>

#include "host/compiler.h"

namespace rope {

// 4 bits of exponent, 3 of mantissa, no infinity: up to 448.
struct Float8E4M3 {
  static constexpr int kMantissaBits = 3;
  static constexpr uint32_t kBias = 7, kLargest = 0x7e, kNan = 0x7f;
};

// 5 bits of exponent, 2 of mantissa, laid out as in IEEE 754: up to 57344.
struct Float8E5M2 {
  static constexpr int kMantissaBits = 2;
  static constexpr uint32_t kBias = 15, kLargest = 0x7b, kNan = 0x7f;
};

namespace float8_detail {

ROPE_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

ROPE_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace float8_detail

// Without branches, so that a loop of it is compiled to vectors.
template <class Format>
ROPE_HOST_DEVICE uint8_t float8_of(float value) {
  using namespace float8_detail;
  constexpr int kDropped = 23 - Format::kMantissaBits;  // of the mantissa of a float32
  constexpr uint32_t kRebias = (127 - Format::kBias) << 23;
  constexpr uint32_t kLargest = (Format::kLargest << kDropped) + kRebias;
  constexpr uint32_t kSmallestNormal = kRebias + (1u << 23);
  // The float32 whose unit is that of subnormals, 2^(1 - bias - mantissa bits).
  constexpr uint32_t kSameUnit = (127 + 1 - Format::kBias + kDropped) << 23;
  const uint32_t bits = bits_of(value);
  const uint32_t given = bits & 0x7fffffffu;
  const uint32_t magnitude = given < kLargest ? given : kLargest;
  const uint32_t half_and_odd = (1u << (kDropped - 1)) - 1 + ((magnitude >> kDropped) & 1u);
  const uint32_t normal = (magnitude - kRebias + half_and_odd) >> kDropped;
  const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(kSameUnit)) - kSameUnit;
  const uint32_t rounded = magnitude < kSmallestNormal ? subnormal : normal;
  const uint32_t finite_or_nan = given > 0x7f800000u ? Format::kNan : rounded;
  return static_cast<uint8_t>(finite_or_nan | ((bits >> 24) & 0x80u));
}

}  // namespace rope
