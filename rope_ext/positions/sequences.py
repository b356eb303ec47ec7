"""Positions in sequences: packed into one, after the tokens of a cache, or padded to one length."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from rope_ext.positions.checks import (
    Device,
    check_bounds,
    check_device,
    check_integers,
    check_lengths,
    check_mask,
    check_not_negative,
    check_shape,
    check_size,
    refuse,
    values_known,
)


def from_cu_seqlens(
    cu_seqlens: Tensor,
    total: int | None = None,
    *,
    offsets: Tensor | int | None = None,
    padding: int = -1,
) -> Tensor:
    """Positions of the tokens of packed sequences: 0, 1, 2, ... in each.

    With offsets, positions continue after the tokens that a sequence has in its cache. Prompts,
    parts of prompts and decoding steps may be mixed in a batch: a sequence of one token with an
    offset is a decoding step.

    Args:
        cu_seqlens: int32 or int64 [sequences + 1]: where each sequence starts in the batch, from 0,
            and where the last one ends. Sequences may be empty.
        total: tokens of the batch, T. None: the last value of cu_seqlens, which can be read only on
            the CPU and outside of graphs. Larger for a batch that is padded to a fixed size.
        offsets: tokens before the first: for each sequence, int32 or int64 [sequences], or for all.
        padding: the position of tokens past the last sequence, at least -1. -1 marks them:
            :func:`slot_mapping` gives them no slot, and cos_sin takes it as any position. A table
            has no row -1: the rotation raises on the CPU, and on CUDA q and k of these tokens
            become NaN. With 0 they take the first row; slot_mapping then needs a mask,
            ``sequence_of_tokens(...) >= 0``.

    Returns:
        int64 [T], in tokens.

    Raises:
        ValueError: for an unknown or too small total, for cu_seqlens that decrease, for negative
            offsets, and for wrong shapes, dtypes and devices. Values of tensors are checked only on
            the CPU.
    """
    function = "from_cu_seqlens"
    check_size(function, "padding", padding, least=-1)
    token, sequence, bounds = _tokens(function, cu_seqlens, total)
    positions = token - bounds[sequence]
    if isinstance(offsets, Tensor):
        check_integers(function, "offsets", offsets, "[sequences]")
        check_shape(function, "offsets", offsets, "[sequences]", cu_seqlens.shape[0] - 1)
        check_device(function, "offsets", offsets, "cu_seqlens", cu_seqlens)
        check_not_negative(function, "offsets", offsets)
        positions = positions + pad(offsets.long(), (0, 1))[sequence]
    elif offsets is not None:
        check_size(function, "offsets", offsets)
        positions = positions + offsets
    return torch.where(sequence < cu_seqlens.shape[0] - 1, positions, padding)


def sequence_of_tokens(cu_seqlens: Tensor, total: int | None = None) -> Tensor:
    """The sequence that each token of a packed batch belongs to.

    Args:
        cu_seqlens, total: as for :func:`from_cu_seqlens`.

    Returns:
        int64 [T], in [0, sequences); -1 for tokens past the last sequence.

    Raises:
        ValueError: as :func:`from_cu_seqlens`.
    """
    _, sequence, _ = _tokens("sequence_of_tokens", cu_seqlens, total)
    return torch.where(sequence < cu_seqlens.shape[0] - 1, sequence, -1)


def from_offsets(
    offsets: Tensor | int, seq_len: int, *, padding: int | None = None, device: Device = None
) -> Tensor:
    """Positions of the next tokens of sequences, the same number for each: decoding with a cache.

    Args:
        offsets: tokens before the first: int32 or int64 [B], or an int for all sequences. With
            padding, -n means that the first n of the S tokens are padding, on the left.
        seq_len: next tokens of each sequence, S.
        padding: the position of tokens before the first of their sequence, at least -1, as for
            :func:`from_cu_seqlens`: -1 for tokens without a slot, 0 for a row of a table. None:
            negative offsets raise.
        device: of the result, where offsets is an int.

    Returns:
        int64 [B, S], or [1, S] for an int, which fits every B.

    Raises:
        ValueError: for a negative seq_len, for negative offsets without padding, for a wrong shape
            or dtype. Values of tensors are checked only on the CPU.
    """
    function = "from_offsets"
    check_size(function, "seq_len", seq_len)
    hint = " (give padding= where sequences are padded on the left)"
    if padding is not None:
        check_size(function, "padding", padding, least=-1)
    if isinstance(offsets, Tensor):
        check_integers(function, "offsets", offsets, "[B]")
        if padding is None:
            check_not_negative(function, "offsets", offsets, hint)
        positions = offsets.long().unsqueeze(1) + torch.arange(seq_len, device=offsets.device)
    else:
        check_size(function, "offsets", offsets, 0 if padding is None else None, hint)
        positions = torch.arange(seq_len, device=device).unsqueeze(0) + offsets
    return positions if padding is None else torch.where(positions < 0, padding, positions)


def from_attention_mask(attention_mask: Tensor) -> Tensor:
    """Positions in sequences that are padded on either side.

    Args:
        attention_mask: bool, int32 or int64 [B, S]: 1 for tokens, 0 for padding. With a cache, S
            counts all tokens so far, and ``from_attention_mask(...)[:, -new:]`` are the new ones.

    Returns:
        int64 [B, S]: 0, 1, 2, ... for tokens, from left to right, and 0 for padding.

    Raises:
        ValueError: for a wrong shape or dtype and, on the CPU, for values other than 0 and 1.

    Source: generate of transformers 5, which has 0 for padding; transformers 4 had 1.
    """
    counts = check_mask("from_attention_mask", attention_mask)
    return (counts.cumsum(1) - 1).masked_fill(~counts, 0)


def _tokens(function: str, cu_seqlens: Tensor, total: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """0, 1, ..., T - 1; the sequence of each token (the number of sequences for padding); and
    cu_seqlens as int64.
    """
    check_bounds(function, "cu_seqlens", cu_seqlens, least=0)
    token = torch.arange(_total(function, cu_seqlens, total), device=cu_seqlens.device)
    bounds = cu_seqlens.long()
    # A token's sequence is the number of sequences that end at or before it, empty ones included.
    return token, torch.searchsorted(bounds[1:], token, right=True), bounds


def _total(function: str, cu_seqlens: Tensor, total: int | None) -> int:
    if not values_known(cu_seqlens):
        if total is None:
            where = f"cu_seqlens on {cu_seqlens.device}, or in a graph"
            refuse(function, f"total, the number of tokens, to be given for {where}", None)
        check_size(function, "total", total)
        return total
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        refuse(function, "cu_seqlens to begin with 0", bounds[0])
    check_lengths(function, "cu_seqlens", bounds)
    if total is None:
        return bounds[-1]
    check_size(function, "total", total)
    if total < bounds[-1]:
        refuse(function, f"total to be at least {bounds[-1]}, the last of cu_seqlens", total)
    return total
