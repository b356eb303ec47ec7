"""Tables of cos and sin, of given positions or of 0, 1, 2, ...; the latter are kept for reuse."""

from typing import NamedTuple

import torch
from torch import Tensor

from rope_ext._torch_private import is_of_a_transform
from rope_ext.angles import cos_sin, cos_sin_cache


def tables(
    inv_freq: Tensor, positions: Tensor | int, attention_scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos, sin [*positions.shape, P] of position_ids, or [positions, P] of 0 to positions - 1."""
    if isinstance(positions, Tensor):
        return cos_sin(inv_freq, positions, attention_scaling=attention_scaling)
    return cos_sin_cache(inv_freq, positions, attention_scaling=attention_scaling)


def _is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: tensors have no values before its replay."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class _Table(NamedTuple):
    """cos, sin [L, P], with the inv_freq and its version that they were computed from."""

    inv_freq: Tensor
    version: int
    cos: Tensor
    sin: Tensor
    is_cuda: bool


class TableCache:
    """One table for each name. A table is made again if its frequencies change. If it is too short,
    the missing rows are computed, at least as many as it has.
    """

    def __init__(self) -> None:
        self.made: dict[str, _Table] = {}

    def kept(self, name: str, inv_freq: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """cos, sin of any length, if :meth:`get` would use what has been made."""
        made = self.made.get(name)
        if made is None:
            return None
        of, version, cos, sin, is_cuda = made  # faster than names
        if (
            of is not inv_freq
            or of._version != version
            or of.requires_grad
            or (is_cuda and _is_captured(of))
        ):
            return None
        return cos, sin

    def get(
        self, name: str, inv_freq: Tensor, attention_scaling: float, length: int, first_rows: int
    ) -> tuple[Tensor, Tensor]:
        """cos, sin [L, P] with L >= length, and for a new table L >= first_rows."""
        if inv_freq.is_inference() or _is_captured(inv_freq):  # no version, or no values
            return tables(inv_freq, length, attention_scaling)
        version = inv_freq._version
        made = self.made.get(name)
        if made is not None and (made.inv_freq is not inv_freq or made.version != version):
            made = None
        there = 0 if made is None else made.cos.size(0)
        if made is None or there < length:
            rows = max(length, 2 * there or first_rows)
            # Not an inference tensor, even if made in inference mode: training may come later.
            with torch.inference_mode(False), torch.no_grad():
                cos, sin = cos_sin_cache(
                    inv_freq, rows - there, start=there, attention_scaling=attention_scaling
                )
                if made is not None:
                    cos, sin = torch.cat((made.cos, cos)), torch.cat((made.sin, sin))
            if type(cos) is not Tensor or is_of_a_transform(cos):  # without values, or only in it
                return cos, sin
            made = self.made[name] = _Table(inv_freq, version, cos, sin, inv_freq.is_cuda)
        return made.cos, made.sin
