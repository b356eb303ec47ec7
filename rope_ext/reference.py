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


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and second channels of the pairs of x [..., R], each [..., P]."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, -1)
    return first, second


def cos_sin(
    inv_freq: Tensor,
    position_ids: Tensor,
    *,
    axes: Tensor | None = None,
    attention_scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As :func:`rope_ext.cos_sin`: in float64, exact to about 1e-16 times the angle."""
    positions = position_ids.double()
    positions = positions.unsqueeze(-1) if axes is None else positions[axes].movedim(0, -1)
    angles = positions * inv_freq.double()
    return angles.cos() * attention_scaling, angles.sin() * attention_scaling


def apply_rotary_qk_at(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None = None,
    *,
    axes: Tensor | None = None,
    attention_scaling: float = 1.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As :func:`rope_ext.apply_rotary_qk_at`, by the rows of its angles in float64."""
    if position_ids is None:
        position_ids = torch.arange(q.shape[-3], device=q.device)
    rows = cos_sin(inv_freq, position_ids, axes=axes, attention_scaling=attention_scaling)
    return apply_rotary(q, *rows, **options), apply_rotary(k, *rows, **options)
