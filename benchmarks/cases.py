"""The shapes that are timed and reckoned with, and the rotation in eager PyTorch beside them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """q [B, S, Hq, D] and k [B, S, Hk, D] of which rotary_dim channels turn."""

    name: str
    batch: int
    seq: int
    q_heads: int
    k_heads: int
    head_dim: int
    rotary_dim: int
    interleaved: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def heads(self) -> int:
        return self.q_heads + self.k_heads

    def label(self, dtype: torch.dtype) -> str:
        return f"{self.name}, B={self.batch} S={self.seq}, {str(dtype).removeprefix('torch.')}"


CASES = [
    Case("Llama-3-8B prefill", 1, 4096, 32, 8, 128, 128),
    Case("Llama-3-8B decode", 1, 1, 32, 8, 128, 128),
    Case("Llama-3-8B decode", 64, 1, 32, 8, 128, 128),
    Case("SmolLM2 prefill", 1, 2048, 9, 3, 64, 64),
    Case("GPT-NeoX-20B prefill, partial", 1, 2048, 64, 64, 96, 24),
]
GPU_CASES = [
    *CASES,
    Case("Llama-3-8B prefill", 1, 32768, 32, 8, 128, 128),
    Case("Llama-3-8B prefill, interleaved", 1, 4096, 32, 8, 128, 128, interleaved=True),
]


def widened(table: Tensor, interleaved: bool) -> Tensor:
    """A column a channel, [S, R], from a column a pair, [S, P]."""
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def eager(
    x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool = False
) -> Tensor:
    """x [B, S, H, D] rotated as transformers does it: cos, sin [1, S, 1, R]."""
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        half = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), -1).flatten(-2)
    else:
        half = torch.cat((-rotated[..., rotary_dim // 2 :], rotated[..., : rotary_dim // 2]), -1)
    turned = rotated * cos + half * sin
    return torch.cat((turned, rest), -1) if rotary_dim < x.shape[-1] else turned
