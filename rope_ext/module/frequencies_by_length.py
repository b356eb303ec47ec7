"""The scalings whose frequencies depend on the length of a sequence, and their cos and sin.

Everything is computed with tensors on the device, without waiting for values and without branches
on data. So graphs can be captured and compiled, and one graph serves all lengths.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rope_ext import reference
from rope_ext.frequencies.ntk_aware import stretched_by
from rope_ext.module.tables import tables


class LongRope(NamedTuple):
    """longrope: one set of frequencies for short sequences, another one for long ones."""

    original_max_position_embeddings: int
    short_inv_freq: Tensor  # [P]
    long_inv_freq: Tensor  # [P]
    short_scaling: float
    long_scaling: float

    def tables(self, positions: Tensor | int, length: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin of the positions, with long frequencies for lengths past the original.

        positions: position_ids, or a number n for the positions 0 to n - 1.
        length: [], or one for each sequence.
        """
        is_long = length > self.original_max_position_embeddings
        if length.dim() == 0 and self.short_scaling == self.long_scaling:
            inv_freq = torch.where(is_long, self.long_inv_freq, self.short_inv_freq)
            return tables(inv_freq, positions, self.short_scaling)
        short = tables(self.short_inv_freq, positions, self.short_scaling)
        long = tables(self.long_inv_freq, positions, self.long_scaling)
        is_long = _beside(is_long.unsqueeze(-1), positions)
        return torch.where(is_long, long[0], short[0]), torch.where(is_long, long[1], short[1])


class DynamicNtk(NamedTuple):
    """NTK-aware scaling by length."""

    original_max_position_embeddings: int
    factor: float
    base: float
    exponents: Tensor  # [P]
    inv_freq: Tensor  # [P], up to the original length

    def tables(self, positions: Tensor | int, length: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin of the positions, with the frequencies of length ([] or one a sequence)."""
        inv_freq = self.frequencies(length)
        if length.dim() == 0:
            return tables(inv_freq, positions)
        if not isinstance(positions, Tensor):
            positions = torch.arange(positions, device=length.device)[None]
        # the operators take one inv_freq for all; float64 is as exact for positions below 2^29
        cos, sin = reference.cos_sin(_beside(inv_freq, positions), positions)
        return cos.float(), sin.float()

    def frequencies(self, length: Tensor) -> Tensor:
        """The frequencies [*length.shape, P] of sequences of that length."""
        original = self.original_max_position_embeddings
        stretched = stretched_by(
            length, self.exponents, factor=self.factor, original=original, base=self.base
        )
        return torch.where((length > original).unsqueeze(-1), stretched, self.inv_freq)

    def longest_so_far(self, seen: Tensor, length: Tensor) -> Tensor:
        """The length that decides the frequencies, from the previous one, `seen`, and this call's.

        It only grows, but a sequence shorter than the original length resets it to that. An empty
        sequence does not change it.
        """
        original = self.original_max_position_embeddings
        longer = torch.where(length < original, original, torch.maximum(seen, length))
        return torch.where(length == 0, seen, longer)


def longest(positions: Tensor | int, device: torch.device) -> Tensor:
    """One more than the largest position, int64 []."""
    if not isinstance(positions, Tensor):
        return torch.full((), positions, dtype=torch.int64, device=device)
    if positions.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=device)
    return positions.max().long() + 1


def _beside(x: Tensor, positions: Tensor | int) -> Tensor:
    """Reshapes x [], [B, C] or [T, C] to broadcast with rows [B, S, P] or [T, P]."""
    packed = isinstance(positions, Tensor) and positions.dim() == 1
    return x if x.dim() < 2 or packed else x.unsqueeze(1)


def checked_regime_length(
    regime_length: int | Tensor | None, inv_freq: Tensor
) -> int | Tensor | None:
    """Returns regime_length; raises if it is not a length."""
    if isinstance(regime_length, Tensor):
        if regime_length.dtype not in (torch.int32, torch.int64) or regime_length.dim() > 1:
            raise ValueError(
                "RotaryEmbedding: expected regime_length to be int32 or int64 of shape [], [B] or "
                f"[T], got {regime_length.dtype} {list(regime_length.shape)}"
            )
        if regime_length.device != inv_freq.device:
            raise ValueError(
                "RotaryEmbedding: expected regime_length on the device of inv_freq, "
                f"{inv_freq.device}, got {regime_length.device}"
            )
    elif regime_length is not None and (
        isinstance(regime_length, (bool, float, str)) or regime_length < 1
    ):
        raise ValueError(
            f"RotaryEmbedding: expected regime_length to be an integer of at least 1, got "
            f"{regime_length!r}"
        )
    return regime_length


def check_one_length_each(
    regime_length: Tensor, count: int, symbol: str = "", reason: str = ""
) -> None:
    """Raises if regime_length is not one for each of `count` sequences or tokens."""
    if list(regime_length.shape) != [count]:
        raise ValueError(
            f"RotaryEmbedding: expected regime_length to have shape [] or {symbol}[{count}]"
            f"{reason}, got {list(regime_length.shape)}"
        )
