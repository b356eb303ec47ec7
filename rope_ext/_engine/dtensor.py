"""The operators on DTensors: each rank calls the operator on its local tensors, without
communication.

What a call's shapes and placements decide is kept, as DTensor does it for PyTorch's operators.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rope_ext._engine.direct import call_directly
from rope_ext._engine.placements import (
    Operand,
    Plan,
    check_operands,
    contiguous_strides,
    plan_for,
    result_placements,
)
from rope_ext._engine.record import Given, Operator
from rope_ext._engine.sharding import BATCH, SEQUENCE, PartOfRange, Placed, rotation_sharding
from rope_ext._torch_private import (
    allows_implicit_replication,
    distributed_as,
    distribution_of,
)


def register_dtensors(operators: Sequence[Operator]) -> None:
    for operator in operators:
        torch.library.register_torch_dispatch(operator.op, DTensor, _dispatch(operator))


def _dispatch(operator: Operator) -> Callable[..., Any]:
    def dispatch(
        cls: type,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Given | None = None,
    ) -> Any:
        with torch.no_grad():  # autograd has recorded the call already
            return _run(operator, operator.given(args, kwargs or {}))

    return dispatch


class _ResultOf(NamedTuple):
    placements: tuple[Any, ...]
    shape: torch.Size
    strides: tuple[int, ...]


@dataclass
class _Decision:
    """What a call's shapes, strides, dtypes and placements decide. Holds none of its tensors."""

    plan: Plan
    placements: dict[str, tuple[Any, ...]]  # of each tensor that a rank needs a part of
    complete: Callable[[Given, PartOfRange], None]
    results: tuple[_ResultOf, ...]
    # The mesh of the last results, and what they are but for their local tensors.
    made: tuple[Any, tuple[Any, ...]] = (None, ())


def _run(operator: Operator, given: Given) -> Any:
    tensors = {name: given[name] for name in operator.tensors if given[name] is not None}
    mesh = next(x.device_mesh for x in tensors.values() if isinstance(x, DTensor))
    placed: Given = {}
    for name, x in tensors.items():
        if not isinstance(x, DTensor):
            x = given[name] = _replicated(operator.op, name, x, mesh)
        placed[name] = Placed(x.shape, x.stride(), x.dtype, x.device_mesh, x.placements)
    decision = _decide(operator, tuple((given | placed).values()))

    arguments = dict(given)
    for name, placements in decision.placements.items():
        x = given[name]
        if x.placements != placements:  # cut without communication
            x = x.detach().redistribute(placements=placements)
        arguments[name] = x.to_local()
    device = arguments[next(iter(decision.placements))].device

    def part_of_range(start: int, length: int, axis: str) -> Tensor | None:
        part = decision.plan.part(mesh, length, axis)
        return part and torch.arange(start + part[0], start + part[1], device=device)

    decision.complete(arguments, part_of_range)
    results = call_directly(operator, arguments)
    if operator.written:
        return None
    return _distributed(results, mesh, decision)


def _replicated(op: str, name: str, x: Tensor, mesh: Any) -> Any:
    """A plain tensor as a DTensor, where PyTorch has been told that ranks have the same values."""
    if not allows_implicit_replication(DTensor):
        raise RuntimeError(
            f"{op}: expected {name} to be a DTensor, as others are, got a plain tensor: "
            f"distribute_tensor({name}, mesh, [Replicate()]) makes it one"
        )
    return DTensor.from_local(x, mesh, run_check=False)


def _decide(operator: Operator, arguments: tuple[Any, ...]) -> _Decision:
    """arguments: with Placed for DTensors."""
    try:
        return _decided(operator, arguments)
    except TypeError:  # sizes of a graph for all sizes are not hashable
        return _decided.__wrapped__(operator, arguments)


@lru_cache(maxsize=4096)
def _decided(operator: Operator, arguments: tuple[Any, ...]) -> _Decision:
    given = dict(zip(operator.defaults, arguments, strict=True))
    op, rule = operator.op, operator.sharding or rotation_sharding
    sharding = rule(operator, given)
    linear, written = sharding.linear | {*operator.outs}, operator.written
    operands = [
        Operand(name, given[name], axes, name in linear, name in written)
        for name, axes in sharding.axes.items()
        if given[name] is not None
    ]
    check_operands(op, operands)
    plan = plan_for(op, operands)
    placements = {o.name: at for o, at in zip(operands, plan.placements, strict=True)}
    results = tuple(
        _ResultOf(
            tuple(result_placements(op, result, operands, plan)),
            torch.Size(result.shape),
            contiguous_strides(result),
        )
        for result in sharding.results
    )
    for name, result in zip(operator.outs, results, strict=False):
        if placements[name] != result.placements:
            raise RuntimeError(
                f"{op}: expected {name} to be placed as the result, {result.placements}, "
                f"got {placements[name]}"
            )
    if sharding.tokens_stay_whole:
        _check_tokens_are_whole(op, operands, plan, sharding.tokens_stay_whole)
    return _Decision(plan, placements, sharding.complete, results)


def _check_tokens_are_whole(op: str, operands: list[Operand], plan: Plan, why: str) -> None:
    for mesh_dim, axes in enumerate(plan.sharded):
        if any(axis in (BATCH, SEQUENCE) for axis in axes):
            raise RuntimeError(
                f"{op}: expected tokens to be replicated on dimension {mesh_dim} of the mesh, as "
                f"{why}, got {operands[0].name} or another one sharded along {axes[0]}"
            )


def _distributed(results: Any, mesh: Any, decision: _Decision) -> Any:
    """The local results as DTensors."""
    locals_ = results if isinstance(results, tuple) else (results,)
    known_mesh, known = decision.made
    if known_mesh is mesh:
        made = tuple(
            distributed_as(x, local, DTensor) for x, local in zip(known, locals_, strict=True)
        )
    else:
        made = tuple(
            DTensor.from_local(
                local, mesh, at.placements, run_check=False, shape=at.shape, stride=at.strides
            )
            for local, at in zip(locals_, decision.results, strict=True)
        )
        decision.made = mesh, tuple(map(distribution_of, made))
    return made if isinstance(results, tuple) else made[0]
