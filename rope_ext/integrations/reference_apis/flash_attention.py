"""flash-attention's rotary function.

Source of what is matched: github.com/Dao-AILab/flash-attention, ``flash_attn/layers/rotary.py``
and ``flash_attn/ops/triton/rotary.py``, release 2.8.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from rope_ext.integrations.reference_apis._refusals import refuse
from rope_ext.ops import apply_rotary


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates x by tables, as ``flash_attn.layers.rotary.apply_rotary_emb``.

    Args:
        x: [B, S, H, D], or packed [T, H, D] with cu_seqlens.
        cos: [seqlen_ro, R / 2], a row for each position, R <= D. Of x's dtype or another one.
        sin: as cos.
        interleaved: pairs are neighbouring channels instead of halves.
        inplace: write into x and return it.
        seqlen_offsets: the position of each sequence's first token: an int, or int32 or int64 [B].
        cu_seqlens: int32 or int64 [B + 1], ascending from 0: sequence b of a packed x is
            ``x[cu_seqlens[b] : cu_seqlens[b + 1]]``. Tokens after the last one are padding and
            take the first row, that of seqlen_offsets if it is an int.
        max_seqlen: the length of the longest sequence of a packed x. Not needed: checked against
            the table's rows if given.

    Returns:
        The rotated x, of its shape and dtype.

    Differs from flash-attention: runs on the CPU as well; takes any D and float64; passes gradients
    on to cos and sin, and in place is safe under autograd. A position past the table raises on the
    CPU and makes NaN on CUDA, where flash-attention leaves the token as it is; tokens after the
    last sequence are written, where it leaves them undefined.
    """
    function = "flash_attention.apply_rotary_emb"
    if cos.dim() != 2:
        refuse(function, "cos", "to have shape [seqlen_ro, R / 2]", cos)
    if cu_seqlens is None:
        if x.dim() != 4:
            refuse(function, "x", "to have shape [B, S, H, D]", x)
        batch, longest = x.shape[:2]
    else:
        if x.dim() != 3:
            refuse(function, "x", "to have shape [T, H, D] when cu_seqlens is given", x)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            refuse(function, "cu_seqlens", "to have shape [B + 1]", cu_seqlens)
        batch, longest = cu_seqlens.shape[0] - 1, max_seqlen or 0
    if longest > cos.shape[0]:
        refuse(function, "cos", f"to have rows for {longest} tokens", cos)
    if isinstance(seqlen_offsets, Tensor):
        offsets = seqlen_offsets
        if offsets.shape != (batch,):
            refuse(function, "seqlen_offsets", f"to be an int or of shape [{batch}]", offsets)
    else:
        offsets = None
        most = cos.shape[0] - longest
        if not 0 <= seqlen_offsets <= most:
            refuse(
                function,
                "seqlen_offsets",
                f"to be from 0 to {most}, for {longest} tokens and {cos.shape[0]} rows of cos",
                seqlen_offsets,
            )
        # The rows that are left are those of the positions from here on.
        cos, sin = cos[seqlen_offsets:], sin[seqlen_offsets:]
    return apply_rotary(
        x,
        cos,
        sin,
        _positions(x, offsets, cu_seqlens),
        interleaved=interleaved,
        layout="bshd" if cu_seqlens is None else "thd",
        inplace=inplace,
    )


def _positions(x: Tensor, offsets: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """[B, S] or [T]; None where a token's position is its index in the sequence."""
    if cu_seqlens is None:
        if offsets is None:
            return None
        step = torch.arange(x.shape[1], dtype=offsets.dtype, device=offsets.device)
        return offsets[:, None] + step
    token = torch.arange(x.shape[0], dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1  # B for padding
    position = token - cu_seqlens[sequence]
    if offsets is not None:
        position = position + pad(offsets, (0, 1))[sequence]
    return torch.where(sequence < cu_seqlens.shape[0] - 1, position, 0)
