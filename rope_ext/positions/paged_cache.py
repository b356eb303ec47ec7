"""Slots of a paged KV cache: the place of each token's key and value."""

import torch
from torch import Tensor

from rope_ext.positions.checks import (
    check_bounds,
    check_device,
    check_integers,
    check_lengths,
    check_not_negative,
    check_shape,
    check_size,
    check_tensor,
    refuse,
    values_known,
)


def slot_mapping(
    block_table: Tensor,
    positions: Tensor,
    block_size: int,
    sequence: Tensor | None = None,
    *,
    kv_indptr: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The slot of each token: ``block * block_size + position % block_size``.

    Block ``position // block_size`` of a sequence is the entry with this index in its row of
    block_table or, with kv_indptr, in its part of kv_indices.

    Args:
        block_table: int32 or int64 [B, blocks of a sequence]: the blocks of each sequence, in
            order; negative for no block. With kv_indptr, the kv_indices of FlashInfer: int32 or
            int64 [pages], the pages of one sequence after those of another, at least as many as the
            last value of kv_indptr.
        positions: int32 or int64 [1|B, S], or [T] with sequence: in tokens. Negative: no slot.
        block_size: tokens of a block, at least 1 (the page_size of FlashInfer).
        sequence: int32 or int64 [T], in [0, B): the sequence of each token of a packed batch
            (:func:`sequence_of_tokens`).
        kv_indptr: int32 or int64 [B + 1]: where the pages of each sequence start in kv_indices,
            from 0, and where those of the last sequence end.
        mask: bool, of positions' shape: False for tokens that get no slot, such as padding.

    Returns:
        int64 [B, S] or [T]; -1 for tokens without a slot: nothing is stored for them.

    Raises:
        ValueError: for wrong shapes, dtypes and devices. On the CPU also for a position whose
            sequence has no block for it, and for a sequence that block_table does not have: on
            other devices and in graphs such slots are -1. On the CPU also for a kv_indptr that
            decreases or ends past kv_indices.
        TypeError: for a wrong type in place of a tensor.

    Source: PagedAttention, arXiv 2309.06180, section 4.2; slot_mapping is vLLM's term, kv_indptr
    and kv_indices those of FlashInfer (``append_paged_kv_cache``).
    """
    rows = _check(block_table, positions, block_size, sequence, kv_indptr, mask)
    if sequence is None:
        positions = positions.expand(rows, -1)
        mask = None if mask is None else mask.expand(rows, -1)
    wanted = positions >= 0 if mask is None else (positions >= 0) & mask
    if rows == 0 or block_table.shape[-1] == 0:  # no entry to read
        slots = torch.full_like(positions, -1, dtype=torch.int64)
        found = torch.zeros_like(wanted)
    else:
        index = torch.div(positions.long(), block_size, rounding_mode="floor")
        last = block_table.shape[-1] - 1
        row, known = None, True  # each row of positions belongs to its sequence
        if sequence is not None:
            row, known = sequence.long().clamp(0, rows - 1), (sequence >= 0) & (sequence < rows)
        if kv_indptr is None:
            at = index.clamp(0, last)
            block = block_table.gather(1, at) if row is None else block_table[row, at]
            within = index <= last
        else:
            bounds = (kv_indptr[:-1], kv_indptr[1:])
            begin, end = (t.unsqueeze(1) if row is None else t[row] for t in bounds)
            index = index + begin
            block = block_table[index.clamp(0, last)]
            within = index < end.clamp(max=last + 1)
        slots = block.long() * block_size + positions.long() % block_size
        found = (block >= 0) & within & known
    if values_known(block_table, positions, sequence, kv_indptr, mask):
        _check_found(found | ~wanted, block_table, positions, block_size, sequence, kv_indptr)
    return torch.where(wanted & found, slots, -1)


def seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """How many tokens each sequence of a paged cache has.

    If the pages already include a step's new tokens, as in FlashInfer, these are the last ones:
    ``from_cu_seqlens(qo_indptr, T, offsets=seq_lens(...) - qo_indptr.diff())`` gives their
    positions.

    Args:
        kv_indptr: int32 or int64 [B + 1]: where the pages of each sequence begin.
        kv_last_page_len: int32 or int64 [B]: tokens in the last page of each, from 1 to page_size;
            0 for a sequence without pages.
        page_size: tokens of a page, at least 1.

    Returns:
        int64 [B], in tokens.

    Raises:
        ValueError: for wrong shapes, dtypes and devices; on the CPU, for a kv_indptr that decreases
            and for an impossible kv_last_page_len.

    Source: FlashInfer, ``get_seq_lens``.
    """
    function = "seq_lens"
    check_size(function, "page_size", page_size, least=1)
    _check_indptr(function, kv_indptr)
    check_integers(function, "kv_last_page_len", kv_last_page_len, "[B]")
    check_shape(function, "kv_last_page_len", kv_last_page_len, "[B]", kv_indptr.shape[0] - 1)
    check_device(function, "kv_last_page_len", kv_last_page_len, "kv_indptr", kv_indptr)
    check_not_negative(function, "kv_last_page_len", kv_last_page_len)
    if values_known(kv_last_page_len) and (kv_last_page_len > page_size).any():
        expected = f"kv_last_page_len of at most page_size, {page_size}"
        refuse(function, expected, kv_last_page_len.tolist())
    return (kv_indptr.long().diff() - 1).clamp(min=0) * page_size + kv_last_page_len


def _check_indptr(function: str, kv_indptr: Tensor) -> None:
    check_bounds(function, "kv_indptr", kv_indptr, least=0)
    if values_known(kv_indptr):
        bounds = kv_indptr.tolist()
        if bounds[0] != 0:
            refuse(function, "kv_indptr to begin with 0", bounds[0])
        check_lengths(function, "kv_indptr", bounds)


def _check(
    block_table: Tensor,
    positions: Tensor,
    block_size: int,
    sequence: Tensor | None,
    kv_indptr: Tensor | None,
    mask: Tensor | None,
) -> int:
    """Checks the arguments and returns the number of sequences."""
    function = "slot_mapping"
    check_size(function, "block_size", block_size, least=1)
    if kv_indptr is None:
        check_integers(function, "block_table", block_table, "[B, blocks of a sequence]")
        rows = block_table.shape[0]
    else:
        check_integers(function, "block_table", block_table, "[pages] with kv_indptr")
        check_device(function, "kv_indptr", kv_indptr, "block_table", block_table)
        _check_indptr(function, kv_indptr)
        rows = kv_indptr.shape[0] - 1
        if values_known(kv_indptr) and block_table.shape[0] < kv_indptr[-1]:
            expected = f"block_table to have the {kv_indptr[-1]} pages of kv_indptr"
            refuse(function, expected, block_table.shape[0])
    check_device(function, "positions", positions, "block_table", block_table)
    if sequence is None:
        check_integers(function, "positions", positions, "[1|B, S]")
        if positions.shape[0] not in (1, rows):
            check_shape(function, "positions", positions, "[1|B, S]", rows, positions.shape[1])
    else:
        check_integers(function, "positions", positions, "[T]")
        check_integers(function, "sequence", sequence, "[T]")
        check_shape(function, "sequence", sequence, "[T]", positions.shape[0])
        check_device(function, "sequence", sequence, "block_table", block_table)
    if mask is not None:
        check_tensor(function, "mask", mask)
        if mask.dtype is not torch.bool:
            refuse(function, "mask of dtype bool", mask.dtype)
        check_shape(function, "mask", mask, "of positions", *positions.shape)
        check_device(function, "mask", mask, "block_table", block_table)
    return rows


def _check_found(
    found: Tensor,
    block_table: Tensor,
    positions: Tensor,
    block_size: int,
    sequence: Tensor | None,
    kv_indptr: Tensor | None,
) -> None:
    if found.all():
        return
    at = tuple((~found).nonzero()[0].tolist())
    row = at[0] if sequence is None else int(sequence[at])
    rows, of = len(block_table), "the rows of block_table"
    if kv_indptr is not None:
        rows, of = len(kv_indptr) - 1, "the sequences of kv_indptr"
    if not 0 <= row < rows:
        got = f"{row} at index {list(at)} (tokens of no sequence take a mask)"
        refuse("slot_mapping", f"sequence in [0, {rows}), {of}", got)
    position = int(positions[at])
    number = position // block_size
    of_row = row if kv_indptr is None else slice(*kv_indptr[row : row + 2].tolist())
    refuse(
        "slot_mapping",
        f"block_table to have block {number} of sequence {row}, for position {position}",
        block_table[of_row].tolist()[: number + 1],
    )
