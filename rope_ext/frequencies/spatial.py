"""Frequencies for images and volumes, and initial values of learned frequencies.

A token at (h, w) has one position on each axis. Its angles are those of one axis after the other.

    inv_freq, _ = frequencies.axial(64, axes=2)   # [16], for each axis
    axes = torch.arange(2).repeat_interleave(16)  # the axis of each pair
    positions = torch.stack((height, width))      # [2, S]
    cos, sin = rope_ext.cos_sin(inv_freq.repeat(2), positions, axes=axes)  # [S, 32]
    x = rope_ext.apply_rotary(x, cos[None], sin[None])
"""

import math

import torch
from torch import Tensor

from rope_ext.frequencies.bounds import (
    Device,
    check_integer,
    check_number,
    check_rotary_dim,
    exponents,
)


def axial(
    head_dim: int,
    *,
    axes: int = 2,
    base: float = 10000.0,
    alternating: bool = False,
    device: Device = None,
) -> tuple[Tensor, float]:
    """Frequencies of each axis of an image (2) or a volume (3). The axes share a head's channels.

    An axis gets ``R = 2 (D // axes // 2)`` channels and ``inv_freq[i] = base ** (-2 i / R)``, the
    same for each; channels past axes * R do not rotate. With alternating, the frequencies of the
    whole head, ``base ** (-2 j / D)``, go to the axes in turn: pair j belongs to axis j % axes.

    Args:
        head_dim: channels of a head, D: even, at least 2 axes; with alternating a multiple of 2
            axes.
        axes: 1 or more.
        base, device: as for :func:`default`.
        alternating: as in Pixtral.

    Returns:
        inv_freq, float32 [R / 2], for every axis; with alternating, [axes, D / 2 / axes]. And
        attention_scaling, 1.0.

    Raises:
        ValueError: for an argument outside of these bounds.

    Source: rope type "axial" of transformers (Qwen2-VL's vision tower and 30 others; three axes:
    MiniMax-M3-VL; alternating: Pixtral).
    """
    check_integer("axial", "axes", axes)
    check_number("axial", "base", base, above=0)
    divisor = 2 * axes if alternating else 2
    check_rotary_dim("axial", head_dim, None, least=2 * axes, divisor=divisor)
    if alternating:
        inv_freq = 1.0 / (base ** exponents(head_dim, device))
        return inv_freq.view(-1, axes).t().contiguous(), 1.0
    return 1.0 / (base ** exponents(2 * (head_dim // axes // 2), device)), 1.0


def pixel(
    rotary_dim: int, *, max_freq: float = 10.0, size: int | None = None, device: Device = None
) -> tuple[Tensor, float]:
    """Frequencies of an axis that runs from -1 to 1: ``pi`` to ``pi max_freq / 2``, evenly spaced.

    With size, for pixels counted in half steps from the middle, ``2 i - (size - 1)`` for pixel i of
    size, so that positions are integers: inv_freq is divided by ``size - 1``.

        inv_freq, _ = frequencies.pixel(32, max_freq=256, size=224)
        cos, sin = rope_ext.cos_sin(inv_freq, 2 * torch.arange(224) - 223)

    Args:
        rotary_dim: channels of this axis, R: even, at least 2.
        max_freq: half turns of the fastest pair from -1 to 1; at least 2. The slowest pair makes 2.
        size: pixels of the axis; at least 2. None: radians per unit, not per token.
        device: where to make inv_freq.

    Returns:
        inv_freq, float32 [R / 2], and attention_scaling, 1.0.

    Raises:
        ValueError: for an argument outside of these bounds.

    Source: freqs_for="pixel" of lucidrains/rotary-embedding-torch.
    """
    check_rotary_dim("pixel", rotary_dim, None)
    check_number("pixel", "max_freq", max_freq, least=2)
    inv_freq = torch.linspace(1.0, max_freq / 2, rotary_dim // 2, dtype=torch.float32) * math.pi
    inv_freq = inv_freq.to(device)
    if size is None:
        return inv_freq, 1.0
    check_integer("pixel", "size", size, least=2)
    return inv_freq / (size - 1), 1.0


def constant(rotary_dim: int, *, value: float = 1.0, device: Device = None) -> tuple[Tensor, float]:
    """The same frequency for every pair: a neutral start for learned frequencies.

    Args:
        rotary_dim: channels that rotate, R: even, at least 2.
        value: the frequency, in radians per token; any finite number.
        device: where to make inv_freq.

    Returns:
        inv_freq, float32 [R / 2], and attention_scaling, 1.0.

    Raises:
        ValueError: for an argument outside of these bounds.

    Source: freqs_for="constant" of lucidrains/rotary-embedding-torch.
    """
    check_rotary_dim("constant", rotary_dim, None)
    check_number("constant", "value", value)
    return torch.full((rotary_dim // 2,), value, dtype=torch.float32, device=device), 1.0
