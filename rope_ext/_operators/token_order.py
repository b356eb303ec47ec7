"""The tokens of each row of a table: the gradient to a row is the sum over them."""

import sys
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor. Does not import DTensor: without its module there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def tokens_by_row(position_ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The tokens sorted by their row. Each row is summed alone and in this order, so that the bits
    are the same in every run and on every device.

    Returns:
        token_order: int64 [tokens], indices into the flattened position_ids.
        row_offsets: int64 [rows + 1], where the tokens of each row begin in token_order.
    """
    flat = position_ids.reshape(-1)
    in_order, order = torch.sort(flat, stable=True)
    each_row = torch.arange(rows + 1, dtype=flat.dtype, device=flat.device)
    return order, torch.searchsorted(in_order, each_row)


def distributed_tokens_by_row(position_ids: Any, rows: int, *others: Any) -> tuple[Any, Any]:
    """:func:`tokens_by_row` of each rank's tokens, for DTensors: position_ids or the others (x, and
    gradients to x) may be sharded along batch or sequence.

    token_order indexes the tokens of the rank. row_offsets count tokens, so they add up over ranks.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    sharded = []
    for placements in zip(*(tensor.placements for tensor in (position_ids, *others)), strict=True):
        of_tokens = (p for p in placements if type(p) is Shard and p.dim < position_ids.dim())
        sharded.append(next(of_tokens, Replicate()))
    here = position_ids.redistribute(placements=sharded).to_local()
    order, offsets = tokens_by_row(here, rows)
    mesh = position_ids.device_mesh
    one_dimensional = [Shard(0) if p.is_shard() else p for p in sharded]
    counts = [Partial() if p.is_shard() else p for p in sharded]
    return (
        DTensor.from_local(order, mesh, one_dimensional, run_check=False),
        DTensor.from_local(offsets, mesh, counts, run_check=False),
    )
