"""What a record says of DTensors: axes by name, along which tensors are sharded together.

A rule gets an operator and its arguments, and describes; placements.py and dtensor.py do the rest.
The import of torch.distributed.tensor is not needed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from rope_ext._engine.record import Operator

BATCH, SEQUENCE, HEADS, PAIRS = "batch", "sequence", "heads", "pairs"
# q and k have heads of their own: one may be sharded along them and the other not.
HEADS_OF = ("heads of q", "heads of k")

Axes = tuple[str | None, ...]  # of each dimension; None: it stays whole
# (start, length, axis) -> the rank's part of start, start + 1, ..., None where axis is not sharded
PartOfRange = Callable[[int, int, str], Tensor | None]


class Result(NamedTuple):
    """Where a result is sharded, and where each rank has a term of a sum that is pending."""

    axes: Axes
    shape: tuple[int, ...]
    like: Any = None  # the DTensor whose order of dimensions in memory it has
    summed: tuple[str | None, ...] = ()  # axes that it is a sum over
    terms: tuple[frozenset[str], ...] = ()  # it is a sum of these, each linear in all of its names


@dataclass
class Sharding:
    """The axes of the tensors of one call, and its results."""

    axes: dict[str, Axes]
    results: tuple[Result, ...] = ()
    # Changes the rank's arguments, where these depend on its place in the mesh.
    complete: Callable[[dict[str, Any], PartOfRange], None] = lambda arguments, part_of_range: None
    tokens_stay_whole: str = ""  # why tokens may not be sharded, for the refusal

    @property
    def linear(self) -> set[str]:
        return {name for result in self.results for term in result.terms for name in term}


ShardingRule = Callable[["Operator", dict[str, Any]], Sharding]


def axes_of_x(x: Tensor, heads: str | None) -> Axes:
    """Of [B, S, H, D] or [T, H, D]."""
    known: dict[int, Axes] = {4: (BATCH, SEQUENCE, heads, None), 3: (SEQUENCE, heads, None)}
    return known.get(x.dim(), (None,) * x.dim())


def axes_of_rows(cos: Tensor, x: Tensor, position_ids: Tensor | None) -> Axes:
    """Of rows [1|B, S, W] or [T, W]; a table [L, W] stays whole, for any position may be asked."""
    if cos.dim() == 3:
        return (None if cos.shape[0] == 1 else BATCH, SEQUENCE, None)
    if cos.dim() == 2 and position_ids is None and cos.shape[0] == x.shape[-3]:
        return (SEQUENCE, None)
    return (None,) * cos.dim()


def axes_of_positions(position_ids: Tensor | None, of_pairs: Tensor | None = None) -> Axes:
    """Of position_ids [S], [1|B, S] or [T]; of_pairs, the argument axes: with a leading A."""
    lead = () if of_pairs is None else (None,)
    shape = () if position_ids is None else position_ids.shape[len(lead) :]
    if len(shape) not in (1, 2):
        return ()
    batch = () if len(shape) == 1 else (None if shape[0] == 1 else BATCH,)
    return (*lead, *batch, SEQUENCE)


def positions_in_table(
    op: str, x: Tensor, cos: Tensor, part_of_range: PartOfRange
) -> Tensor | None:
    """A table without positions has a row for each index in the whole sequence, which is not the
    index in a rank's part of it.
    """
    length = x.shape[-3]
    if cos.dim() != 2 or cos.shape[0] == length:  # rows of tokens are sharded as the tokens
        return None
    if cos.shape[0] < length:
        raise RuntimeError(
            f"{op}: expected cos to have at least {length} rows, the length of the whole sequence, "
            f"got {cos.shape[0]}"
        )
    return part_of_range(0, length, SEQUENCE)


def rotation_sharding(
    operator: Operator,
    given: dict[str, Any],
    heads: tuple[str | None, ...] = HEADS_OF,
    is_linear: bool = True,
) -> Sharding:
    """Of an operator that rotates: batch, sequence and heads shard freely, and a pending sum passes
    through what rotates. Results, and what is written instead of them, are placed as what rotates;
    frequencies and weights stay whole.
    """
    xs = [given[name] for name in operator.rotates]
    rows = given.get("cos")
    position_ids = given["position_ids"]
    axes = {}
    for names in (operator.rotates, operator.outs):
        for name, of_heads in zip(names, heads, strict=False):
            axes[name] = axes_of_x(given[name], of_heads)
    for name in operator.tensors:
        if name in ("cos", "sin"):
            axes[name] = axes_of_rows(rows, xs[0], position_ids)
        elif name == "position_ids":
            axes[name] = axes_of_positions(position_ids, given.get("axes"))
        elif name not in axes and given[name] is not None:
            axes[name] = (None,) * given[name].dim()

    def complete(arguments: dict[str, Any], part_of_range: PartOfRange) -> None:
        if position_ids is None and rows is not None:
            positions = positions_in_table(operator.op, xs[0], rows, part_of_range)
            arguments["position_ids"] = positions
        elif position_ids is None:
            arguments["position_ids"] = part_of_range(0, xs[0].shape[-3], SEQUENCE)

    results = tuple(
        Result(axes[name], x.shape, x, terms=(frozenset((name,)),) if is_linear else ())
        for name, x in zip(operator.rotates, xs, strict=True)
    )
    return Sharding(axes, results, complete)
