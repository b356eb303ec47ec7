"""The same mathematics in a few lines of plain PyTorch: the truth of the tests, and what a compiler
gets that is to see through the operators (decompositions.py).

Works in the dtype that it is given, or in that of a wider cos and sin, rounded to x's at the end;
give it float64 to judge others.
"""

from typing import Any

import torch
from torch import Tensor


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
) -> Tensor:
    """As :func:`rope_ext.apply_rotary` on x [B, S, H, D] or [T, H, D]."""
    seq = x.shape[-3]
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    elif cos.dim() == 2:
        cos, sin = cos[:seq], sin[:seq]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    dim = 2 * cos.shape[-1] if rotary_dim is None else rotary_dim
    out = interleaved if interleaved_out is None else interleaved_out
    if cos.shape[-1] == dim:  # one angle a channel of the result, or of what inverse gives back
        order = interleaved if inverse else out
        (c1, c2), (s1, s2) = _pairs(cos, order), _pairs(sin, order)
    else:
        (c1, c2), (s1, s2) = (cos, cos), (sin, sin)
    if inverse:  # the transpose
        s1, s2 = -s2, -s1
    end = rotary_offset + dim
    before, rotating, after = x[..., :rotary_offset], x[..., rotary_offset:end], x[..., end:]
    x1, x2 = _pairs(rotating, interleaved)
    y1, y2 = (x1 * c1 - x2 * s1).to(x.dtype), (x2 * c2 + x1 * s2).to(x.dtype)
    y = torch.stack((y1, y2), -1).flatten(-2) if out else torch.cat((y1, y2), -1)
    return torch.cat((before, y, after), -1)


def rms_norm_rotary_qk(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As :func:`rope_ext.rms_norm_rotary_qk` on q [B, S, H, D], k [B, S, Hk, D], or packed."""

    def normalised(x: Tensor, weight: Tensor) -> Tensor:
        row = (-1,) if weight.dim() == 1 else (-2, -1)
        mean = x.square().mean(row, keepdim=True)
        return x / (mean + eps).sqrt() * (1 + weight if unit_offset else weight)

    rows = cos, sin, position_ids
    return (
        apply_rotary(normalised(q, q_weight), *rows, **options),
        apply_rotary(normalised(k, k_weight), *rows, **options),
    )


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and second channels of the pairs of x [..., R], each [..., P]."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, -1)
    return first, second


def cos_sin(
    inv_freq: Tensor, position_ids: Tensor, *, attention_scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As :func:`rope_ext.cos_sin`: in float64, exact to about 1e-16 times the angle."""
    angles = position_ids.double().unsqueeze(-1) * inv_freq.double()
    return angles.cos() * attention_scaling, angles.sin() * attention_scaling
