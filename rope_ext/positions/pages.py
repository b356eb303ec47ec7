"""Slots of a paged KV cache: where the key and value of each token are kept."""

import torch
from torch import Tensor

from rope_ext.positions.checks import (
    check_device,
    check_integers,
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
    mask: Tensor | None = None,
) -> Tensor:
    """The slot of each token: ``block * block_size + position % block_size``.

    Block ``position // block_size`` of a sequence is the entry of that number in its row of
    block_table.

    Args:
        block_table: int32 or int64 [B, blocks of a sequence]: the blocks of each sequence, in
            order; below 0 where it has none.
        positions: int32 or int64 [1|B, S], or [T] with sequence: in tokens. Below 0: no slot.
        block_size: tokens of a block, at least 1.
        sequence: int32 or int64 [T], in [0, B): the sequence of each token of a packed batch
            (:func:`sequence_of_tokens`).
        mask: bool, of positions' shape: False for tokens that get no slot, such as padding.

    Returns:
        int64 [B, S] or [T]; -1 for tokens that get no slot, which nothing is stored of.

    Raises:
        ValueError: for a position whose sequence has no block for it, and for a sequence that
            block_table does not have; where values can't be looked at, on other devices and in
            graphs, such slots are -1. For wrong shapes, dtypes and devices.
        TypeError: for what is no tensor.

    Source: PagedAttention, arXiv 2309.06180, section 4.2; slot_mapping is vLLM's term.
    """
    _check(block_table, positions, block_size, sequence, mask)
    rows, most = block_table.shape
    if sequence is None:
        positions = positions.expand(rows, -1)
        mask = None if mask is None else mask.expand(rows, -1)
    wanted = positions >= 0 if mask is None else (positions >= 0) & mask
    if rows == 0 or most == 0:  # there is no entry to read
        slots = torch.full_like(positions, -1, dtype=torch.int64)
        found = torch.zeros_like(wanted)
    else:
        index = torch.div(positions.long(), block_size, rounding_mode="floor")
        at = index.clamp(0, most - 1)
        if sequence is None:
            block, known = block_table.gather(1, at), True
        else:
            known = (sequence >= 0) & (sequence < rows)
            block = block_table[sequence.long().clamp(0, rows - 1), at]
        slots = block.long() * block_size + positions.long() % block_size
        found = (block >= 0) & (index < most) & known
    if values_known(block_table, positions, sequence, mask):
        _check_found(found | ~wanted, block_table, positions, block_size, sequence)
    return torch.where(wanted & found, slots, -1)


def _check(
    block_table: Tensor,
    positions: Tensor,
    block_size: int,
    sequence: Tensor | None,
    mask: Tensor | None,
) -> None:
    function = "slot_mapping"
    check_size(function, "block_size", block_size, least=1)
    check_integers(function, "block_table", block_table, "[B, blocks of a sequence]")
    check_device(function, "positions", positions, "block_table", block_table)
    if sequence is None:
        check_integers(function, "positions", positions, "[1|B, S]")
        rows, seq = block_table.shape[0], positions.shape[1]
        if positions.shape[0] not in (1, rows):
            check_shape(function, "positions", positions, "[1|B, S]", rows, seq)
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


def _check_found(
    found: Tensor,
    block_table: Tensor,
    positions: Tensor,
    block_size: int,
    sequence: Tensor | None,
) -> None:
    if found.all():
        return
    at = tuple((~found).nonzero()[0].tolist())
    row = at[0] if sequence is None else int(sequence[at])
    if not 0 <= row < block_table.shape[0]:
        expected = f"sequence in [0, {block_table.shape[0]}), the rows of block_table"
        refuse("slot_mapping", expected, f"{row} at index {list(at)}")
    position = int(positions[at])
    number = position // block_size
    refuse(
        "slot_mapping",
        f"block_table to have block {number} of sequence {row}, for position {position}",
        block_table[row].tolist()[: number + 1],
    )
