"""csrc/math: the formulas that the CPU and CUDA share."""
# fmt: off

from rooms.mutant import mutants

MUTANTS = [
    # Signs of sines; the transpose differs where the halves of a table do.
    *mutants(
        "csrc/math/rotation.h", "test_apply_rotary test_gradients attack/test_memory",
        ("second-channel-turns-the-other-way", "x2 * turn.c2 + x1 * turn.s2;",
         "x2 * turn.c2 - x1 * turn.s2;"),
        ("inverse-is-no-transpose", "{turn.c1, -turn.s2, turn.c2, -turn.s1}",
         "{turn.c1, -turn.s1, turn.c2, -turn.s2}"),
        ("gradient-to-sine-without-its-sign", "-sum.g1x2, sum.g2x2", "sum.g1x2, sum.g2x2"),
    ),
    # Angles are inexact far from 0, have the wrong sign in some quadrants, and are never NaN.
    *mutants(
        "csrc/math/angle.h", "test_cos_sin",
        ("reduction-without-its-low-part", "fma(-n, kPiOver2Lo, lo);", "lo;"),
        ("cosine-in-the-wrong-quadrant", "(quadrant + 1) & 2 ?", "quadrant & 1 ?"),
        ("series-of-sine-too-short", "series<2, 5>(z)", "series<2, 3>(z)"),
        ("angles-out-of-reach-are-numbers", "kMaxAngle = 0x1p50", "kMaxAngle = 0x1p60"),
    ),
    # Rounding to float8: no saturation, another largest value, ties to the lower one.
    *mutants(
        "csrc/math/float8.h", "test_append_kv test_append_float8_q",
        ("scale-of-a-head-of-zeros", "scale == 0 ? 1.0f : scale", "scale"),
        ("float8-does-not-saturate", "given < format.largest ? given : format.largest;", "given;"),
        ("largest-float8-is-416", "of(3, 7, 0x7e, 0x7f)", "of(3, 7, 0x7d, 0x7f)"),
        ("ties-of-float8-down", "below_half + ((magnitude >> format.dropped_bits) & 1u);",
         "below_half;"),
    ),
    # Scales of groups: rounded down, without a least one, infinity as a power of two.
    *mutants(
        "csrc/math/float8.h", "test_quantize",
        ("scale-of-a-group-rounded-down", "(bits + 0x7fffffu) & 0xff800000u", "bits & 0xff800000u"),
        ("eps-of-a-group-without-effect", "float_of(largest_bits) < eps ? eps", "false ? eps"),
        ("scale-of-nan-as-a-power-of-two", "power_of_two && bits < 0x7f800000u", "power_of_two"),
    ),
]
