"""Transformer Engine's rotary function.

Source: transformer-engine 2.20.2, ``transformer_engine/pytorch/attention/rope.py``.
"""

from typing import Literal

import torch
from torch import Tensor

from rope_ext import positions
from rope_ext.integrations.reference_apis._refusals import names_arguments, refuse
from rope_ext.positions.checks import values_known
from rope_ext.rotation import apply_rotary

_FUNCTION = "transformer_engine.apply_rotary_pos_emb"


@names_arguments
def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: Literal["sbhd", "bshd", "thd"] = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Rotates t by angles, as ``transformer_engine.pytorch.attention.apply_rotary_pos_emb``.

    Args:
        t: [S, B, H, D], [B, S, H, D] or packed [T, H, D], as tensor_format says; the rank's tokens.
            Any strides with the last one 1.
        freqs: angles in radians, [s2, 1, 1, R], a row for each position and a column for each
            channel, R <= D. The two channels of a pair usually have equal angles, as from
            RotaryPositionEmbedding, but they may differ.
        tensor_format: "sbhd", "bshd" or "thd".
        start_positions: int32 or int64 [B]: the position of each sequence's first token. None: 0.
        interleaved: pairs are neighbouring channels instead of halves.
        fused: accepted and ignored: there is one kernel.
        cu_seqlens: for "thd", int32 or int64 [B + 1], ascending from 0: where each sequence starts
            in the batch of all ranks together (cu_seqlens_padded). A rank's tokens after the last
            sequence take the first row.
        cp_size: ranks that share each sequence (context parallelism). A sequence has 2 cp_size
            chunks, and rank r has chunk r and chunk 2 cp_size - 1 - r, so the rank has an even
            number of tokens of each sequence.
        cp_rank: this rank, 0 <= cp_rank < cp_size.

    Returns:
        The rotated t, of its shape, dtype and order of dimensions in memory. Differentiable for t
        and freqs, twice.

    Raises:
        ValueError: for wrong shapes, formats and ranks, for a sequence that is not a multiple of
            the chunks (packed: on the CPU), and on the CPU for a position past freqs.

    Differs from Transformer Engine: runs on the CPU as well, takes float64, never copies t, and
    never waits for a device, while ``fused=False`` there reads cu_seqlens and start_positions. For
    float32 the bits are those of ``fused=False``. For float16 and bfloat16, cos, sin and the
    products are float32 and the result is rounded once, as with ``fused=True``. A position past
    freqs gives NaN on CUDA.
    """
    angles = angles_of_tokens(
        t, freqs, tensor_format, start_positions, cu_seqlens, cp_size, cp_rank
    )
    options = {"rotary_dim": freqs.shape[-1], "interleaved": interleaved}
    return apply_rotary(t, angles.cos(), angles.sin(), layout=tensor_format, **options)


def angles_of_tokens(
    t: Tensor,
    freqs: Tensor,
    tensor_format: Literal["sbhd", "bshd", "thd"] = "sbhd",
    start_positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """The angles of the rank's tokens, [S, R], [B, S, R] or [T, R].

    Arguments and errors are those of :func:`apply_rotary_pos_emb`.
    """
    tokens = _check(t, freqs, tensor_format, start_positions, cu_seqlens, cp_size, cp_rank)
    angles = freqs[:, 0, 0]  # [s2, R]
    if cu_seqlens is not None and tensor_format == "thd":
        at = packed_positions(tokens, start_positions, cu_seqlens, cp_size, cp_rank)
        return _rows(angles, at)
    if start_positions is not None or cp_size > 1:
        return _rows(angles, _positions(tokens, start_positions, cp_size, cp_rank, t.device))
    return angles[:tokens]


def _check(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str,
    start_positions: Tensor | None,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> int:
    """Checks the arguments. Returns the rank's tokens of a sequence, or of all packed sequences."""
    if tensor_format not in ("sbhd", "bshd", "thd"):
        refuse(_FUNCTION, "tensor_format", "to be sbhd, bshd or thd", repr(tensor_format))
    packed = tensor_format == "thd"
    if t.dim() != (3 if packed else 4):
        refuse(_FUNCTION, "t", f"to have shape [{', '.join(tensor_format.upper())}]", t)
    if freqs.dim() != 4 or freqs.shape[1:3] != (1, 1):
        refuse(_FUNCTION, "freqs", "to have shape [s2, 1, 1, R]", freqs)
    if not 0 <= cp_rank < cp_size:
        refuse(_FUNCTION, "cp_rank", f"to be in [0, {cp_size}), of cp_size ranks", cp_rank)
    tokens = t.shape[1 if tensor_format == "bshd" else 0]
    if packed:
        if cu_seqlens is None or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            refuse(_FUNCTION, "cu_seqlens", "to have shape [B + 1] for thd", cu_seqlens)
        batch, least = cu_seqlens.shape[0] - 1, min(tokens, 1)
    else:
        batch, least = t.shape[0 if tensor_format == "bshd" else 1], tokens * cp_size
        if cp_size > 1 and tokens % 2 != 0:
            refuse(_FUNCTION, "t", "to have an even number of tokens for cp_size > 1", t)
    if freqs.shape[0] < least:
        refuse(_FUNCTION, "freqs", f"to have rows for {least} tokens", freqs)
    if start_positions is not None:
        if start_positions.shape != (batch,):
            refuse(_FUNCTION, "start_positions", f"to have shape [{batch}]", start_positions)
        if start_positions.dtype not in (torch.int32, torch.int64):
            refuse(_FUNCTION, "start_positions", "to be int32 or int64", start_positions.dtype)
    named = {"freqs": freqs, "start_positions": start_positions, "cu_seqlens": cu_seqlens}
    for name, x in named.items():
        if x is not None and x.device != t.device:
            refuse(_FUNCTION, name, f"to be on the device of t, {t.device}", x.device)
    return tokens


def _positions(
    tokens: int, start: Tensor | None, cp_size: int, cp_rank: int, device: torch.device
) -> Tensor:
    """Positions in sequences of one length, [S] or [B, S]."""
    if cp_size == 1:
        at = torch.arange(tokens, device=device)
    else:
        at = positions.context_parallel(tokens * cp_size, cp_size, cp_rank, device=device)
    return at if start is None else start.long().unsqueeze(1) + at


def packed_positions(
    tokens: int, start: Tensor | None, cu_seqlens: Tensor, cp_size: int, cp_rank: int
) -> Tensor:
    """Positions of a rank's tokens in a packed batch, [T], from `start` in each sequence."""
    if cp_size == 1:
        return positions.from_cu_seqlens(cu_seqlens, tokens, offsets=start, padding=0)
    whole = tokens * cp_size
    at = positions.context_parallel(whole, cp_size, cp_rank, cu_seqlens=cu_seqlens)
    if start is None:
        return at
    return at + start[positions.sequence_of_tokens(cu_seqlens // cp_size, tokens)]


def _rows(angles: Tensor, at: Tensor) -> Tensor:
    """[..., R], the rows of angles [s2, R] at the positions [...]; NaN past the last row."""
    length = angles.shape[0]
    outside = (at < 0) | (at >= length)
    if values_known(at) and outside.any():
        expected = f"to have a row for position {at[outside][0].item()}"
        refuse(_FUNCTION, "freqs", expected, f"{length} rows")
    return angles[at.clamp(0, length - 1)].masked_fill(outside.unsqueeze(-1), torch.nan)
