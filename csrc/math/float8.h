// Converts float32 to the eight-bit floats of KV caches and back: rounded once, to nearest, ties to
// even, and saturating: values too large, infinity included, become the largest finite value. NaN
// stays NaN.
//
// Source: OCP 8-bit Floating Point Specification (OFP8), revision 1.0, of which PyTorch's
// float8_e4m3fn and float8_e5m2 are the two formats.
#pragma once

#include <cstdint>
#include <cstring>

#include "host/compiler.h"

namespace rope {

// What conversions need, as bits of float32.
struct Float8Format {
  int dropped_bits;          // of the mantissa
  uint32_t rebias, largest;  // added to the exponent; the largest finite value
  uint32_t subnormal_unit;   // the float32 whose unit is that of subnormals
  uint32_t nan;

  // largest_code, nan_code: as the eight bits have them.
  static constexpr Float8Format of(int mantissa_bits, uint32_t bias, uint32_t largest_code,
                                   uint32_t nan_code) {
    const int dropped = 23 - mantissa_bits;
    const uint32_t rebias = (127 - bias) << 23;
    // 2^(1 - bias - mantissa bits) is the unit of subnormals.
    return {dropped, rebias, (largest_code << dropped) + rebias,
            static_cast<uint32_t>(127 + 1 - bias + dropped) << 23, nan_code};
  }
};

// 4 bits of exponent, 3 of mantissa, no infinity: up to 448.
struct Float8E4M3 {
  static constexpr Float8Format kFormat = Float8Format::of(3, 7, 0x7e, 0x7f);
  static constexpr uint32_t kInfinity = 0x80;  // none
};

// 5 bits of exponent, 2 of mantissa, laid out as in IEEE 754: up to 57344.
struct Float8E5M2 {
  static constexpr Float8Format kFormat = Float8Format::of(2, 15, 0x7b, 0x7f);
  static constexpr uint32_t kInfinity = 0x7c;
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
ROPE_HOST_DEVICE uint8_t float8_of(const Float8Format& format, float value) {
  using namespace float8_detail;
  const uint32_t bits = bits_of(value);
  const uint32_t given = bits & 0x7fffffffu;
  const uint32_t magnitude = given < format.largest ? given : format.largest;
  const uint32_t below_half = (1u << (format.dropped_bits - 1)) - 1;
  const uint32_t half_and_odd = below_half + ((magnitude >> format.dropped_bits) & 1u);
  const uint32_t normal = (magnitude - format.rebias + half_and_odd) >> format.dropped_bits;
  const uint32_t subnormal =
      bits_of(float_of(magnitude) + float_of(format.subnormal_unit)) - format.subnormal_unit;
  const uint32_t rounded = magnitude < format.rebias + (1u << 23) ? subnormal : normal;
  const uint32_t finite_or_nan = given > 0x7f800000u ? format.nan : rounded;
  return static_cast<uint8_t>(finite_or_nan | ((bits >> 24) & 0x80u));
}

template <class Format>
ROPE_HOST_DEVICE uint8_t float8_of(float value) {
  constexpr Float8Format format = Format::kFormat;
  return float8_of(format, value);
}

// The scale of a head whose largest element has this magnitude.
ROPE_HOST_DEVICE float own_scale(float largest_magnitude, bool e4m3) {
  const float scale = largest_magnitude / (e4m3 ? 448.0f : 57344.0f);
  return scale == 0 ? 1.0f : scale;
}

// Exact, and without subnormals of float32, which a processor may be told to take as zero.
template <class Format>
ROPE_HOST_DEVICE float float8_value(uint8_t code) {
  using namespace float8_detail;
  constexpr Float8Format format = Format::kFormat;
  const uint32_t given = code & 0x7fu, shifted = given << format.dropped_bits;
  const uint32_t normal = shifted + format.rebias;
  const uint32_t subnormal =
      bits_of(float_of(format.subnormal_unit + given) - float_of(format.subnormal_unit));
  const uint32_t finite = shifted < (1u << 23) ? subnormal : normal;
  // The codes above the largest: infinity, where the format has it, then NaN.
  const uint32_t above = given == Format::kInfinity ? 0x7f800000u : 0x7fc00000u;
  const uint32_t magnitude = normal > format.largest ? above : finite;
  return float_of(magnitude | (code & 0x80u) << 24);
}

}  // namespace rope
