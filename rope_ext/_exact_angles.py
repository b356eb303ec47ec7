"""sin and cos of position * inv_freq in plain PyTorch, as csrc/math/angle.h has them.

The product and the multiple of pi/2 are kept exactly, each as a sum of two float64 numbers. There
is no fused multiply-add, so products are split (Veltkamp and Dekker, "A floating-point technique
for extending the available precision", 1971).
"""

import math

import torch
from torch import Tensor

_PI_OVER_2 = tuple(
    map(float.fromhex, ("0x1.921fb54442d18p+0", "0x1.1a62633145c07p-54", "-0x1.f1976b7ed8fbcp-110"))
)
_MAX_POSITION, _MAX_ANGLE = 2.0**53, 2.0**50  # from there on the result is NaN


def cos_sin(position: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * inv_freq, float64 tensors that broadcast, within 1 ulp."""
    angle, angle_tail = _product(position, inv_freq)
    inside = (position.abs() < _MAX_POSITION) & (angle.abs() < _MAX_ANGLE)
    n = (angle * (2 / math.pi)).round()
    first, middle, last = (torch.full_like(n, part) for part in _PI_OVER_2)
    turned, turned_tail = _product(n, first)
    second, second_tail = _product(n, middle)
    rest, lost = _sum(angle_tail, -turned_tail)
    rest, lost_next = _sum(rest, -second)
    r, lost_last = _sum(angle - turned, rest)  # the difference is exact: both are close
    tail = lost + lost_next + lost_last - second_tail - n * last
    cos_r, sin_r = r.cos(), r.sin()
    cos_r, sin_r = cos_r - sin_r * tail, sin_r + cos_r * tail
    quadrant = torch.where(inside, n, 0.0).long() & 3
    cos = torch.where(quadrant % 2 == 0, cos_r, sin_r)
    sin = torch.where(quadrant % 2 == 0, sin_r, cos_r)
    cos = torch.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = torch.where(quadrant >= 2, -sin, sin)
    return torch.where(inside, cos, torch.nan), torch.where(inside, sin, torch.nan)


def _product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a * b exactly, as a rounded product and the rest."""
    product = a * b
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as a sum of two numbers of 26 bits."""
    scaled = x * (2.0**27 + 1)
    high = scaled - (scaled - x)
    return high, x - high


def _sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b exactly, as a rounded sum and the rest (Knuth, TAOCP volume 2, 4.2.2, theorem B)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)
