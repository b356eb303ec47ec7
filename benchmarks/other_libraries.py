"""The parts that the CPU and GPU benchmarks of other libraries share."""

import torch
from torch import Tensor
from verify import WrongResult


class Skip(Exception):
    """The library has no such rotation."""


def reason(error: Exception) -> str:
    """Why a way that raised this error is left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    if isinstance(error, ImportError):
        return f"not importable ({first})"
    return first if isinstance(error, Skip | WrongResult) else f"{type(error).__name__}: {first}"


def widened(table: Tensor, interleaved: bool) -> Tensor:
    """A table [..., R] with a column a channel from one with a column a pair, [..., P]."""
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def eager(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, S, H, D] rotated as in transformers: cos, sin [1|B, S, 1, R]."""
    rotary_dim = cos.shape[-1]
    rotated = x[..., :rotary_dim]
    if interleaved:
        half = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), -1).flatten(-2)
    else:
        half = torch.cat((-rotated[..., rotary_dim // 2 :], rotated[..., : rotary_dim // 2]), -1)
    turned = rotated * cos + half * sin
    if rotary_dim == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., rotary_dim:]), -1)
