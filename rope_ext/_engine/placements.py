"""Placements of the DTensors of a call, and the local tensors that follow from them.

Axes have names, and operands with a common axis are sharded along it together. If an operand is
sharded along an axis and another one is replicated, each rank takes its part of the replicated one.
A call that needs a collective raises an error: only the caller knows where it is cheapest.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from rope_ext._engine.sharding import BATCH, HEADS_OF, SEQUENCE, Axes, Result
from rope_ext._torch_private import allows_implicit_replication


class Operand(NamedTuple):
    name: str
    tensor: Any  # a DTensor
    axes: Axes
    linear: bool = False  # the result is linear in it, so it may be a pending sum
    written: bool = False


class Plan(NamedTuple):
    """The placements of each operand; and the axes that each dimension of the mesh shards."""

    placements: list[tuple[Any, ...]]
    sharded: list[list[str]]

    def place(self, axes: Axes, summed: Sequence[str | None] = ()) -> list[Any]:
        """Placements of a tensor that has these axes and is a sum over the summed ones."""
        return [_placement(axes, summed, on) for on in self.sharded]


def _placement(axes: Axes, summed: Sequence[str | None], sharded: list[str]) -> Any:
    own = next((axis for axis in sharded if axis in axes), None)
    if own is not None:
        return Shard(axes.index(own))
    return Partial() if any(axis in summed for axis in sharded) else Replicate()


def checked(op: str, *operands: Operand) -> list[Operand]:
    """The operands that are not None, as DTensors of one mesh. Plain tensors raise an error, as in
    PyTorch's own operators, unless torch.distributed.tensor.experimental.implicit_replication()
    allows them.
    """
    operands = tuple(operand for operand in operands if operand.tensor is not None)
    mesh = next(o.tensor.device_mesh for o in operands if isinstance(o.tensor, DTensor))
    result, sizes = [], {}
    for operand in operands:
        name, tensor = operand.name, operand.tensor
        if not isinstance(tensor, DTensor):
            if not allows_implicit_replication(DTensor):
                raise RuntimeError(
                    f"{op}: expected {name} to be a DTensor, as others are, got a plain tensor: "
                    f"distribute_tensor({name}, mesh, [Replicate()]) makes it one"
                )
            tensor = DTensor.from_local(tensor, mesh, run_check=False)
        if tensor.device_mesh != mesh:
            raise RuntimeError(
                f"{op}: expected {name} on the mesh of the others, {mesh}, got {tensor.device_mesh}"
            )
        for axis, size in zip(operand.axes, tensor.shape, strict=False):
            if axis in (BATCH, SEQUENCE) and size != sizes.setdefault(axis, size):
                raise RuntimeError(
                    f"{op}: expected {name} to have {axis} {sizes[axis]}, as "
                    f"{operands[0].name} has, got {size}"
                )
        result.append(operand._replace(tensor=tensor))
    return result


def plan_for(op: str, operands: list[Operand]) -> Plan:
    mesh = operands[0].tensor.device_mesh
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


# From DTensors to local tensors, and back


def parts_of(operands: list[Operand], plan: Plan) -> dict[str, Tensor]:
    """The local tensor of each operand. A replicated one is cut without communication."""
    parts = {}
    for operand, placements in zip(operands, plan.placements, strict=True):
        tensor = operand.tensor
        if tensor.placements != placements:
            tensor = tensor.detach().redistribute(placements=placements)
        parts[operand.name] = tensor.to_local()
    return parts


def distributed(
    local: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int], like: Any = None
) -> Any:
    """A DTensor of this shape; its dimensions are in memory in the order of `like`, if given."""
    order = list(range(len(shape)))
    if like is not None and like.stride(-1) == 1:
        order.sort(key=like.stride, reverse=True)
    strides, step = [1] * len(shape), 1
    for dim in reversed(order):
        strides[dim], step = step, step * max(shape[dim], 1)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )
