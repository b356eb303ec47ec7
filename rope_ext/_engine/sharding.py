"""How an operator may be sharded: the axes of its tensors, by name.

Tensors with a common axis are sharded along it together. A rule takes an operator and its
arguments, with a Placed for each tensor, and returns a Sharding, which placements.py and dtensor.py
apply. Nothing here imports torch.distributed.tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from rope_ext._engine.record import Operator

BATCH, SEQUENCE, HEADS, PAIRS = "batch", "sequence", "heads", "pairs"
# The heads of q may be sharded and those of k replicated, or the reverse.
HEADS_OF = ("heads of q", "heads of k")

Axes = tuple[str | None, ...]  # the axis of each dimension; None: it is not sharded


class Placed(NamedTuple):
    """A DTensor without its elements: what a rule may read, so that its Sharding can be kept."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    mesh: Any
    placements: tuple[Any, ...]

    def dim(self) -> int:
        return len(self.shape)

    def stride(self, dim: int) -> int:
        return self.strides[dim]


# (start, length, axis) -> the rank's part of start, start + 1, ...; None if axis is not sharded
PartOfRange = Callable[[int, int, str], Tensor | None]


class Result(NamedTuple):
    """A result: how it is sharded, and what it is a sum of."""

    axes: Axes
    shape: tuple[int, ...]
    like: Placed | None = None  # its dimensions have the same order in memory
    summed: tuple[str | None, ...] = ()  # axes that it is a sum over
    terms: tuple[frozenset[str], ...] = ()  # its terms: each is linear in the tensors named


@dataclass
class Sharding:
    """The description of a call: the axes of its tensors, and its results."""

    axes: dict[str, Axes]
    results: tuple[Result, ...] = ()
    # Changes the local arguments that depend on the rank's coordinates in the mesh.
    complete: Callable[[dict[str, Any], PartOfRange], None] = lambda arguments, part_of_range: None
    tokens_stay_whole: str = ""  # why tokens must not be sharded, for the message

    @property
    def linear(self) -> set[str]:
        return {name for result in self.results for term in result.terms for name in term}


ShardingRule = Callable[["Operator", dict[str, Any]], Sharding]


def axes_of_x(x: Placed, heads: str | None) -> Axes:
    """The axes of x [B, S, H, D] or [T, H, D]."""
    known: dict[int, Axes] = {4: (BATCH, SEQUENCE, heads, None), 3: (SEQUENCE, heads, None)}
    return known.get(x.dim(), (None,) * x.dim())


def axes_of_rows(cos: Placed, x: Placed, position_ids: Placed | None) -> Axes:
    """The axes of rows [1|B, S, W] or [T, W]. A table [L, W] is not sharded: a rank may need every
    row.
    """
    if cos.dim() == 3:
        return (None if cos.shape[0] == 1 else BATCH, SEQUENCE, None)
    if cos.dim() == 2 and position_ids is None and cos.shape[0] == x.shape[-3]:
        return (SEQUENCE, None)
    return (None,) * cos.dim()


def axes_of_positions(position_ids: Placed | None, of_pairs: Placed | None = None) -> Axes:
    """The axes of position_ids [S], [1|B, S] or [T]; with of_pairs, the argument axes, [A, ..]."""
    lead = () if of_pairs is None else (None,)
    shape = () if position_ids is None else position_ids.shape[len(lead) :]
    if len(shape) not in (1, 2):
        return ()
    batch = () if len(shape) == 1 else (None if shape[0] == 1 else BATCH,)
    return (*lead, *batch, SEQUENCE)


def positions_in_table(
    op: str, x: Placed, cos: Placed, part_of_range: PartOfRange
) -> Tensor | None:
    """The positions of a rank's tokens, for a call without position_ids and with a table that has a
    row for each token of the whole sequence. None if each rank has the rows of its own tokens.
    """
    length = x.shape[-3]
    if cos.dim() != 2 or cos.shape[0] == length:  # rows are sharded with their tokens
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
    """The rule of operators that rotate. Batch, sequence and heads may be sharded. A pending sum of
    a tensor that rotates gives a pending sum as its result. Results and `out` have the placements
    of the tensors that rotate. Frequencies and weights are not sharded.
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
