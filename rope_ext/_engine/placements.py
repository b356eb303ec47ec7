"""Placements of the DTensors of a call, and what each rank has of a range.

Axes have names, and operands with a common axis are sharded along it together. If an operand is
sharded along an axis and another one is replicated, each rank takes its part of the replicated one.
A call that needs a collective raises an error: only the caller knows where it is cheapest.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from torch.distributed.tensor import Partial, Replicate, Shard

from rope_ext._engine.sharding import BATCH, HEADS_OF, SEQUENCE, Axes, Placed, Result


class Operand(NamedTuple):
    name: str
    tensor: Placed
    axes: Axes
    linear: bool = False  # the result is linear in it, so it may be a pending sum
    written: bool = False


class Plan(NamedTuple):
    """The placements of each operand; and the axes that each dimension of the mesh shards."""

    placements: list[tuple[Any, ...]]
    sharded: list[list[str]]

    def part(self, mesh: Any, length: int, axis: str) -> tuple[int, int] | None:
        """What this rank has of `length` along an axis, begin and end; None: it is not sharded."""
        begin, end = 0, length
        for mesh_dim, on in enumerate(self.sharded):
            if axis in on:
                each = -(-(end - begin) // mesh.size(mesh_dim))
                begin = min(begin + each * mesh.get_local_rank(mesh_dim), end)
                end = min(begin + each, end)
        return (begin, end) if any(axis in on for on in self.sharded) else None

    def place(self, axes: Axes, summed: Sequence[str | None] = ()) -> list[Any]:
        """Placements of a tensor that has these axes and is a sum over the summed ones."""
        return [_placement(axes, summed, on) for on in self.sharded]


def _placement(axes: Axes, summed: Sequence[str | None], sharded: list[str]) -> Any:
    own = next((axis for axis in sharded if axis in axes), None)
    if own is not None:
        return Shard(axes.index(own))
    return Partial() if any(axis in summed for axis in sharded) else Replicate()


def check_operands(op: str, operands: list[Operand]) -> None:
    """Raises unless they are on one mesh and have the same number of sequences and tokens."""
    mesh, sizes = operands[0].tensor.mesh, {}
    for name, tensor, axes, *_ in operands:
        if tensor.mesh != mesh:
            raise RuntimeError(
                f"{op}: expected {name} on the mesh of the others, {mesh}, got {tensor.mesh}"
            )
        for axis, size in zip(axes, tensor.shape, strict=False):
            if axis in (BATCH, SEQUENCE) and size != sizes.setdefault(axis, size):
                raise RuntimeError(
                    f"{op}: expected {name} to have {axis} {sizes[axis]}, as "
                    f"{operands[0].name} has, got {size}"
                )


def plan_for(op: str, operands: list[Operand]) -> Plan:
    mesh = operands[0].tensor.mesh
    columns = [_plan_on(op, operands, mesh_dim) for mesh_dim in range(mesh.ndim)]
    placements = [tuple(column[0][i] for column in columns) for i in range(len(operands))]
    return Plan(placements, [column[1] for column in columns])


def _plan_on(op: str, operands: list[Operand], mesh_dim: int) -> tuple[list[Any], list[str]]:
    def refuse(operand: Operand, expected: str) -> NoReturn:
        raise RuntimeError(
            f"{op}: expected {operand.name} to be {expected} on dimension {mesh_dim} of the mesh, "
            f"got {operand.tensor.placements[mesh_dim]}: redistribute it before, as no collective "
            "is inserted"
        )

    def beside(axis: str) -> str:
        return f"beside {by[axis].name} as {by[axis].tensor.placements[mesh_dim]}"

    by: dict[str, Operand] = {}  # the sharded axes, and the first operand that is sharded there
    for operand in operands:
        given = operand.tensor.placements[mesh_dim]
        if type(given) is Shard and given.dim < len(operand.axes) and operand.axes[given.dim]:
            by.setdefault(operand.axes[given.dim], operand)
        elif type(given) is not Replicate:
            is_sum = type(given) is Partial and given.reduce_op in ("sum", "avg")
            if not (operand.linear and is_sum):
                refuse(operand, "Replicate(), as it is needed whole,")
    if len(by) > 1 and not all(axis in HEADS_OF for axis in by):
        first, second = list(by)[:2]
        refuse(by[second], f"Replicate() or sharded along {first}, {beside(first)},")

    placements = []
    for operand in operands:
        given = operand.tensor.placements[mesh_dim]
        own = next((axis for axis in operand.axes if axis in by), None)
        wanted = given if own is None else Shard(operand.axes.index(own))
        if wanted != given and (type(given) is not Replicate or operand.written):
            refuse(operand, f"{wanted}, {beside(own)},")
        placements.append(wanted)
    return placements, list(by)


def result_placements(op: str, result: Result, operands: list[Operand], plan: Plan) -> list[Any]:
    """The result is a pending sum if an operand is one and the result is linear in it."""
    placements = plan.place(result.axes, result.summed)
    in_terms = frozenset().union(*result.terms)
    for mesh_dim in range(len(placements)):
        pending = {o.name: o.tensor.placements[mesh_dim] for o in operands if o.name in in_terms}
        pending = {name: p for name, p in pending.items() if type(p) is Partial}
        if not pending:
            continue
        once_each = all(len(term & pending.keys()) == 1 for term in result.terms)
        if not once_each or len({*pending.values()}) > 1:
            raise RuntimeError(
                f"{op}: expected on dimension {mesh_dim} of the mesh the same pending sum in each "
                f"term of the result, once, got {pending}: redistribute before, as no collective "
                "is inserted"
            )
        placements[mesh_dim] = next(iter(pending.values()))
    return placements


def contiguous_strides(result: Result) -> tuple[int, ...]:
    """Those of the whole result, with its dimensions in the order of `like` in memory."""
    shape, like = result.shape, result.like
    order = list(range(len(shape)))
    if like is not None and like.strides[-1] == 1:
        order.sort(key=like.strides.__getitem__, reverse=True)
    strides, step = [1] * len(shape), 1
    for dim in reversed(order):
        strides[dim], step = step, step * max(shape[dim], 1)
    return tuple(strides)
