"""The operators on DTensors: each rank calls the operator on its local tensors, without
communication.

Uses only what is public in every supported torch: torch.library.register_torch_dispatch, and
to_local, from_local and redistribute of DTensor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rope_ext._engine.placements import (
    Operand,
    Plan,
    checked,
    distributed,
    parts_of,
    plan_for,
    result_placements,
)
from rope_ext._engine.record import Given, Operator
from rope_ext._engine.sharding import BATCH, SEQUENCE, rotation_sharding


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


def _run(operator: Operator, given: Given) -> Any:
    op, rule = operator.op, operator.sharding or rotation_sharding
    sharding = rule(operator, given)
    linear, written = sharding.linear | {*operator.outs}, operator.written
    operands = checked(
        op,
        *(
            Operand(name, given[name], axes, name in linear, name in written)
            for name, axes in sharding.axes.items()
        ),
    )
    plan = plan_for(op, operands)
    placements = [result_placements(op, result, operands, plan) for result in sharding.results]
    _check_outs(operator, operands, plan, placements)
    if sharding.tokens_stay_whole:
        _check_tokens_are_whole(op, operands, plan, sharding.tokens_stay_whole)
    first = operands[0].tensor

    def part_of_range(start: int, length: int, axis: str) -> Tensor | None:
        if not any(axis in on for on in plan.sharded):
            return None
        whole = torch.arange(start, start + length, device=first.to_local().device)
        everywhere = DTensor.from_local(whole, first.device_mesh, run_check=False)
        return everywhere.redistribute(placements=plan.place((axis,))).to_local()

    arguments = given | parts_of(operands, plan)
    sharding.complete(arguments, part_of_range)
    results = operator.overload(**arguments)
    if operator.written:
        return None
    wrapped = tuple(
        distributed(local, first.device_mesh, at, result.shape, result.like)
        for local, at, result in zip(
            (results,) if operator.result_count == 1 else results,
            placements,
            sharding.results,
            strict=True,
        )
    )
    return wrapped[0] if operator.result_count == 1 else wrapped


def _check_outs(
    operator: Operator, operands: list[Operand], plan: Plan, results: list[list[Any]]
) -> None:
    at = {o.name: placements for o, placements in zip(operands, plan.placements, strict=True)}
    for name, expected in zip(operator.outs, results, strict=False):
        if at[name] != tuple(expected):
            raise RuntimeError(
                f"{operator.op}: expected {name} to be placed as the result, {tuple(expected)}, "
                f"got {at[name]}"
            )


def _check_tokens_are_whole(op: str, operands: list[Operand], plan: Plan, why: str) -> None:
    for mesh_dim, axes in enumerate(plan.sharded):
        if any(axis in (BATCH, SEQUENCE) for axis in axes):
            raise RuntimeError(
                f"{op}: expected tokens to be replicated on dimension {mesh_dim} of the mesh, as "
                f"{why}, got {operands[0].name} or another one sharded along {axes[0]}"
            )
