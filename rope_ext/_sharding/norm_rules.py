"""The rules of rms_norm_rotary_qk and its backward: batch and sequence shard freely, and heads
where each is normalised by itself.
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from rope_ext._sharding.plan import (
    HEADS_OF,
    Operand,
    Plan,
    checked,
    distributed,
    parts_of,
    plan_for,
)
from rope_ext._sharding.rules import (
    _as_dispatch,
    _axes_of_positions,
    _axes_of_rows,
    _axes_of_x,
    _name,
    _positions_in_table,
)


def register() -> None:
    for op, rule in (
        ("rms_norm_rotary_qk", _rms_norm_rotary_qk),
        ("rms_norm_rotary_qk_backward", _rms_norm_rotary_qk_backward),
    ):
        torch.library.register_torch_dispatch(f"rope::{op}", DTensor, _as_dispatch(rule))


def _normed_operands(
    op: str, q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, position_ids: Any,
    grad_q: Any = None, grad_k: Any = None,
) -> list[Operand]:  # fmt: skip
    """Rows of [H, D], which are all heads of a token, are needed whole."""
    heads = HEADS_OF if q_weight.dim() == 1 else (None, None)
    axes_q, axes_k = _axes_of_x(q, heads[0]), _axes_of_x(k, heads[1])
    rows = _axes_of_rows(cos, q, position_ids)
    return checked(
        op,
        Operand("q", q, axes_q),
        Operand("k", k, axes_k),
        Operand("grad_q", grad_q, axes_q),
        Operand("grad_k", grad_k, axes_k),
        Operand("q_weight", q_weight, (None,) * q_weight.dim()),
        Operand("k_weight", k_weight, (None,) * k_weight.dim()),
        Operand("cos", cos, rows),
        Operand("sin", sin, rows),
        Operand("position_ids", position_ids, _axes_of_positions(position_ids)),
    )


def _normed_parts(op: str, operands: list[Operand], plan: Plan) -> dict[str, Any]:
    parts = parts_of(operands, plan)
    if "position_ids" not in parts:
        cos = next(o.tensor for o in operands if o.name == "cos")
        parts["position_ids"] = _positions_in_table(op, operands[0].tensor, cos, plan)
    return parts


def _rms_norm_rotary_qk(func: Any, **given: Any) -> Any:
    """Results are placed as q and k."""
    names = {argument.name for argument in func._schema.arguments if not argument.kwarg_only}
    tensors = {name: given.pop(name) for name in names}
    operands = _normed_operands(_name(func), **tensors)
    plan = plan_for(_name(func), operands)
    results = func(**_normed_parts(_name(func), operands, plan), **given)
    return tuple(
        distributed(result, x.tensor.device_mesh, placements, x.tensor.shape, x.tensor)
        for result, x, placements in zip(results, operands, plan.placements, strict=False)
    )


def _rms_norm_rotary_qk_backward(func: Any, **given: Any) -> Any:
    """Gradients to q and k are placed as these; those to the weights are sums over the tokens and
    heads that a rank has, to be added over ranks.
    """
    names = {argument.name for argument in func._schema.arguments if not argument.kwarg_only}
    tensors = {name: given.pop(name) for name in names}
    operands = _normed_operands(_name(func), **tensors)
    plan = plan_for(_name(func), operands)
    parts = {"grad_q": None, "grad_k": None, **_normed_parts(_name(func), operands, plan)}
    grads = func(**parts, **given)
    mesh, xs = operands[0].tensor.device_mesh, operands[:2]
    to_xs = [
        distributed(grad, mesh, placements, x.tensor.shape, x.tensor)
        for grad, x, placements in zip(grads, xs, plan.placements, strict=False)
    ]
    to_weights = [
        distributed(
            grad,
            mesh,
            [Partial() if set(on) & set(x.axes) else Replicate() for on in plan.sharded],
            grad.shape,
        )
        for grad, x in zip(grads[2:], xs, strict=True)
    ]
    return *to_xs, *to_weights
