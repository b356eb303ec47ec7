"""RotaryEmbedding: frequencies, tables and rotation in one module."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rope_ext import frequencies
from rope_ext.ops import Layout, apply_rotary_qk, as_bshd, cos_sin, cos_sin_cache


class _Table(NamedTuple):
    """cos, sin [L, P], and the inv_freq, in its version, that they were made of."""

    inv_freq: Tensor
    version: int
    cos: Tensor
    sin: Tensor


class RotaryEmbedding(nn.Module):
    """Rotates q and k by their positions.

    With position_ids the angles are computed for just these positions, once a call; without, they
    come from a table of the positions 0, 1, 2, ... which grows by doubling when a longer sequence
    comes. inv_freq and the table are float32 and stay so through ``.half()`` and ``.bfloat16()``.
    Neither is part of the state dict: they follow from the arguments. An ``inv_freq`` in a state
    dict, as older checkpoints have it, is accepted and not used.

    Args:
        head_dim: channels of a head, D.
        base: see :func:`rope_ext.frequencies.default`.
        rotary_dim: channels that rotate, R: even, 2 <= R <= D. None: D.
        max_position_embeddings: positions that the model is meant for, in tokens. The table starts
            with at most so many rows; longer sequences are rotated just as exactly.
        interleaved: pairs are neighbouring channels instead of halves.
        device: where inv_freq lies; the module's ``.to(...)`` moves it.

    Raises:
        ValueError: for a rotary_dim, base or max_position_embeddings out of bounds.
    """

    inv_freq: Tensor  # float32 [P], radians per token

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        max_position_embeddings: int,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if max_position_embeddings < 1:
            raise ValueError(
                "RotaryEmbedding: expected max_position_embeddings to be at least 1, got "
                f"{max_position_embeddings}"
            )
        self.head_dim = head_dim
        self.base = base
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        self.max_position_embeddings = max_position_embeddings
        self.interleaved = interleaved
        inv_freq, self.attention_scaling = self._frequencies(device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        # The table [L, P] lies beside the buffers: it is derived, and made where it is needed.
        self._table: _Table | None = None

    def _frequencies(self, device: torch.device | str | None) -> tuple[Tensor, float]:
        return frequencies.default(
            self.head_dim, base=self.base, rotary_dim=self.rotary_dim, device=device
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        position_ids: Tensor | None = None,
        layout: Layout = "bshd",
        *,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Returns q and k, rotated.

        Args:
            q: [B, S, H, D], or as layout says, "bhsd", "sbhd" or "thd" ([T, H, D]).
            k: of q's shape and dtype, but for its number of heads.
            position_ids: int32 or int64 [S], [1|B, S], or [T] for "thd", in tokens, of any size.
                None: 0, 1, 2, ... in each sequence.
            layout: the order of the dimensions of q and k.
            inplace: write into q and k.
        """
        seq, head_dim = as_bshd(q, layout, "RotaryEmbedding", "q").shape[-3::2]
        if head_dim != self.head_dim:
            raise ValueError(
                f"RotaryEmbedding: expected q to have head_dim {self.head_dim}, got {head_dim}"
            )
        if position_ids is None:
            cos, sin = self.table(seq)
        else:
            if position_ids.dim() > (1 if layout == "thd" else 2):
                raise ValueError(
                    "RotaryEmbedding: expected position_ids to have shape "
                    f"{'[T]' if layout == 'thd' else '[S] or [1|B, S]'}, "
                    f"got {list(position_ids.shape)}"
                )
            cos, sin = cos_sin(
                self.inv_freq, position_ids, attention_scaling=self.attention_scaling
            )
            if layout != "thd" and position_ids.dim() == 1:
                cos, sin = cos[None], sin[None]
        return apply_rotary_qk(
            q,
            k,
            cos,
            sin,
            rotary_dim=self.rotary_dim,
            interleaved=self.interleaved,
            layout=layout,
            inplace=inplace,
        )

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [L, P], of the positions 0 to L - 1, where L >= length."""
        learned = self.inv_freq.requires_grad and torch.is_grad_enabled()
        if learned or torch.compiler.is_compiling():  # a graph would be bound to a table's length
            return cos_sin_cache(self.inv_freq, length, attention_scaling=self.attention_scaling)
        version = 0 if self.inv_freq.is_inference() else self.inv_freq._version
        made = self._table
        if made is None or made.inv_freq is not self.inv_freq or made.version != version:
            rows = 0
        else:
            rows = made.cos.shape[0]
        if made is None or rows < max(length, 1):
            rows = max(length, 2 * rows or min(2048, self.max_position_embeddings))
            # Not an inference tensor, even if made in inference mode: training may come later.
            with torch.inference_mode(False), torch.no_grad():
                cos, sin = cos_sin_cache(
                    self.inv_freq, rows, attention_scaling=self.attention_scaling
                )
            made = self._table = _Table(self.inv_freq, version, cos, sin)
        return made.cos, made.sin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Follows moves to another device, but takes no dtype and no value: to_empty() has none."""
        before = self.inv_freq
        super()._apply(fn, recurse)
        device = self.inv_freq.device
        if before.is_meta and device.type != "meta":
            self.inv_freq, _ = self._frequencies(device)
        else:
            self.inv_freq = before.to(device)
        self._table = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "inv_freq", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_table": None}

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, base={self.base}, rotary_dim={self.rotary_dim}, "
            f"max_position_embeddings={self.max_position_embeddings}, "
            f"interleaved={self.interleaved}"
        )
