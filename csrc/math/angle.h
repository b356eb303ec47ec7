// sin and cos of position * inv_freq, exact enough at any position: the only reduction of angles.
//
// The product is kept exactly, as hi + lo (Dekker's two-product by fused multiply-add), and reduced
// by the nearest multiple n of pi/2 (Cody and Waite, Software Manual for the Elementary Functions,
// 1980):
//   hi - n * kPiOver2Hi       exact: a multiple of 2^-52 below 1
//   lo - n * kPiOver2Lo       one rounding, below 2^-75 for angles below 2^31
// The rest, |r| <= pi/4, goes through Taylor's series. For float32 results the error before the one
// rounding to float32 is below 2^-36 of the result, so the result is within 0.5001 ulp; for float64
// results it is below 1 ulp.
//
// Where the scheme ends, at |position| >= 2^53 or |angle| >= 2^50, the result is NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "math/rotation.h"

namespace rope {

struct SinCos {
  double sin, cos;
};

ROPE_HOST_DEVICE SinCos scaled(const SinCos& value, double scale) {
  return {value.sin * scale, value.cos * scale};
}

// Of angle a less angle b.
ROPE_HOST_DEVICE SinCos difference(const SinCos& a, const SinCos& b) {
  return {a.sin * b.cos - a.cos * b.sin, a.cos * b.cos + a.sin * b.sin};
}

namespace angle {

constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
constexpr double kPiOver2Hi = 0x1.921fb54442d18p+0;  // pi/2, as a sum of three
constexpr double kPiOver2Lo = 0x1.1a62633145c07p-54;
constexpr double kPiOver2Tiny = -0x1.f1976b7ed8fbcp-110;
constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
constexpr double kMaxPosition = 0x1p53;
constexpr double kMaxAngle = 0x1p50;

// The Taylor series of sin(r) / r (kFirst = 2) and cos(r) (kFirst = 1) in z = r^2, kTerms of it:
//   1 - z / (a (a + 1)) (1 - z / ((a + 2) (a + 3)) (1 - ...)),  a = kFirst
template <int kFirst, int kTerms>
ROPE_HOST_DEVICE double series(double z) {
  if constexpr (kTerms == 0) {
    return 1.0;
  } else {
    constexpr double coefficient = -1.0 / (kFirst * (kFirst + 1));
    return fma(z * coefficient, series<kFirst + 2, kTerms - 1>(z), 1.0);
  }
}

// a + b - sum, exactly, where sum is a + b rounded (Knuth, TAOCP volume 2, 4.2.2, theorem B).
ROPE_HOST_DEVICE double two_sum_tail(double a, double b, double sum) {
  const double part = sum - a;
  return (a - (sum - part)) + (b - part);
}

}  // namespace angle

// kDouble: precise enough for float64 results; otherwise for float32 and narrower.
template <bool kDouble>
ROPE_HOST_DEVICE SinCos sin_cos(double position, double inv_freq) {
  using namespace angle;
  const double hi = position * inv_freq;
  const double lo = fma(position, inv_freq, -hi);

  const double rounded = fma(hi, kTwoOverPi, kRound);
  const double n = rounded - kRound;
  int64_t quadrant;
  memcpy(&quadrant, &rounded, sizeof(quadrant));

  const double rest_hi = fma(-n, kPiOver2Hi, hi);
  const double rest_lo = kDouble ? lo - n * kPiOver2Lo : fma(-n, kPiOver2Lo, lo);
  const double r = rest_hi + rest_lo;
  const double z = r * r;

  double sin_r, cos_r;
  if constexpr (kDouble) {
    // sin(r + tail) and cos(r + tail), where tail is what rounding lost in rest_lo and r
    // (two-product, two-sum).
    const double product = n * kPiOver2Lo;
    const double product_tail = fma(n, kPiOver2Lo, -product);
    const double rest_tail =
        two_sum_tail(lo, -product, rest_lo) - fma(n, kPiOver2Tiny, product_tail);
    const double tail = two_sum_tail(rest_hi, rest_lo, r) + rest_tail;
    constexpr double third = 1.0 / 6, half = 0.5;
    const double sin_rest = fma(-third * z, series<4, 7>(z), 0.0);
    sin_r = r + fma(r, sin_rest, tail * (1.0 - half * z));
    const double head = 1.0 - half * z;
    const double cos_rest = z * z * (1.0 / 24) * series<5, 7>(z);
    cos_r = head + (((1.0 - head) - half * z) + (cos_rest - r * tail));
  } else {
    sin_r = r * series<2, 5>(z);
    cos_r = series<1, 6>(z);
  }

  const bool swap = quadrant & 1;
  const double sin_abs = swap ? cos_r : sin_r;
  const double cos_abs = swap ? sin_r : cos_r;
  const double sin_value = quadrant & 2 ? -sin_abs : sin_abs;
  const double cos_value = (quadrant + 1) & 2 ? -cos_abs : cos_abs;
  const bool in_range = fabs(position) < kMaxPosition && fabs(hi) < kMaxAngle;
  return {in_range ? sin_value : NAN, in_range ? cos_value : NAN};
}

}  // namespace rope
