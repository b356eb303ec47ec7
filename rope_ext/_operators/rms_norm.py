"""RMSNorm and rotation of x, or of q and k (new results, in place, into out), and their backward.

The gradients to these and to the weights are operators with kernels. All else is composed of the
rotation and PyTorch's operators: gradients to cos and sin, tangents, and the second derivative.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rope_ext._engine.autograd import last_stride_one, save_all
from rope_ext._engine.record import Composed, Derivative, Given, Grads, Operator
from rope_ext._engine.sharding import HEADS_OF, Result, Sharding, rotation_sharding
from rope_ext._engine.vmap import one_by_one
from rope_ext._operators.rotation import (
    ONE,
    TWO,
    in_place_by_sequences,
    inverted,
    rotary_tangent,
    table_grad,
)

rope = torch.ops.rope


def _split(options: dict[str, Any]) -> tuple[float, bool, dict[str, Any]]:
    """eps, unit_offset, and the options of the rotation."""
    rotary = dict(options)
    return rotary.pop("eps"), rotary.pop("unit_offset"), rotary


def _row(weight: Tensor) -> tuple[int, ...]:
    """The dimensions of a row of x [.., H, D]: those of the weight."""
    return tuple(range(-weight.dim(), 0))


class _Norm:
    """n = x / rms(x), 1 / rms(x) and the factor on n, in the dtype of the arithmetic."""

    def __init__(self, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> None:
        self.row = _row(weight)
        x = _wide(x)
        weight = weight.to(x.dtype)
        self.factor = 1 + weight if unit_offset else weight
        self.inverse_rms = 1 / (x.square().mean(self.row, keepdim=True) + eps).sqrt()
        self.n = x * self.inverse_rms

    def tangent(self, x: Tensor | None, weight: Tensor | None) -> Tensor | None:
        """The tangent of n times the factor, given those of x and of the weight."""
        if x is None and weight is None:
            return None
        tangent = torch.zeros_like(self.n)
        if x is not None:
            x = x.to(self.n.dtype)
            along = (self.n * x).mean(self.row, keepdim=True)
            tangent = tangent + (x - self.n * along) * self.inverse_rms * self.factor
        if weight is not None:
            tangent = tangent + self.n * weight.to(self.n.dtype)
        return tangent


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _parts(args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """x and weight, or q, k and their weights; then cos, sin and position_ids."""
    count = len(args) // 2 - 1
    return args[:count], args[count : 2 * count], args[2 * count :]


def _backward(ctx: Any, *grads: Tensor | None) -> Grads:
    xs, weights, rows = _parts(ctx.saved_tensors)
    grads = tuple(None if grad is None else last_stride_one(grad) for grad in grads)
    to_xs_and_weights: Grads = (None,) * len((*xs, *weights))
    to_table: Grads = None, None
    *needed, cos_needed, sin_needed, _ = ctx.needs_input_grad[: len(to_xs_and_weights) + 3]
    if any(needed):
        to_xs_and_weights = (
            rope.rms_norm_rotary_backward if len(xs) == 1 else rope.rms_norm_rotary_qk_backward
        )(*grads, *xs, *weights, *rows, **ctx.options)
    if cos_needed or sin_needed:
        cos, _, position_ids = rows
        eps, unit_offset, rotary = _split(ctx.options)
        terms: list[Tensor | None] = []
        for grad, x, weight in zip(grads, xs, weights, strict=True):
            if grad is not None:
                norm = _Norm(x, weight, eps, unit_offset)
                terms += [_wide(grad), last_stride_one(norm.n * norm.factor)]
        to_table = table_grad(*(*terms, None, None)[:4], cos, position_ids, rotary)
    return *to_xs_and_weights, *to_table, None


def _tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    xs, weights, rows = _parts(inputs)
    of_xs, of_weights, of_rows = _parts(tangents)
    eps, unit_offset, rotary = _split(options)
    results = []
    for x, weight, of_x, of_weight in zip(xs, weights, of_xs, of_weights, strict=True):
        norm = _Norm(x, weight, eps, unit_offset)
        tangent = rotary_tangent(
            norm.n * norm.factor,
            norm.tangent(of_x, of_weight),
            tuple(rows),
            of_rows[:2],
            rotary,
        )
        results.append(None if tangent is None else tangent.to(x.dtype))
    return tuple(results) if len(results) > 1 else results[0]


def _composed_backward(
    grad: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rows: tuple[Tensor, Tensor, Tensor | None],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The gradients to x and to its weight."""
    if grad is None:
        return torch.zeros_like(x), torch.zeros_like(weight)
    eps, unit_offset, rotary = _split(options)
    norm = _Norm(x, weight, eps, unit_offset)
    back = rope.apply_rotary(last_stride_one(_wide(grad)), *rows, **inverted(rotary))
    weighted = back * norm.factor
    along = (weighted * norm.n).mean(norm.row, keepdim=True)
    to_x = ((weighted - norm.n * along) * norm.inverse_rms).to(x.dtype)
    others = tuple(range(x.dim() - weight.dim()))
    return to_x, (back * norm.n).sum(others).to(weight.dtype)


def _composed_backward_of_one(
    grad_x: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return _composed_backward(grad_x, x, weight, (cos, sin, position_ids), options)


def _composed_backward_of_two(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = cos, sin, position_ids
    to_q, to_q_weight = _composed_backward(grad_q, q, q_weight, rows, options)
    to_k, to_k_weight = _composed_backward(grad_k, k, k_weight, rows, options)
    return to_q, to_k, to_q_weight, to_k_weight


# DTensors: batch and sequence may be sharded, and heads where each is normalised by itself


def _sharding(operator: Operator, given: Given) -> Sharding:
    """With a weight [H, D] a row is all heads of a token, so the heads must not be sharded."""
    of_each_head = given[WEIGHTS[operator.rotates][0]].dim() == 1
    heads = HEADS_OF if of_each_head else (None, None)
    return rotation_sharding(operator, given, heads, is_linear=False)


def _backward_sharding(operator: Operator, given: Given) -> Sharding:
    """Gradients to x, or to q and k, are placed as these. Those to the weights are sums over tokens
    and heads: Partial where these are sharded.
    """
    sharding, names = _sharding(operator, given), operator.rotates
    sharding.axes |= {f"grad_{name}": sharding.axes[name] for name in names}
    sharding.results += tuple(
        Result((), given[weight].shape, summed=sharding.axes[name])
        for name, weight in zip(names, WEIGHTS[names], strict=True)
    )
    return sharding


# RMSNorm takes 4 operations a channel (a square, its sum, two products), its backward 12: the sums
# of x x and of g w x (5), n (1), the gradient to x (4) and that to the weight (2).
NORM: dict[str, Any] = {"flops_channel": 4, "sharding": _sharding}
BACKWARD: dict[str, Any] = {"flops_channel": 12, "vmap": one_by_one, "sharding": _backward_sharding}
WEIGHTS = {ONE: ("weight",), TWO: ("q_weight", "k_weight")}
DERIVATIVE = Derivative(save_all, _backward, _tangent)

RMS_NORM = (
    Operator("rms_norm_rotary", ONE, derivative=DERIVATIVE, **NORM),
    Operator("rms_norm_rotary_qk", TWO, derivative=DERIVATIVE, **NORM),
    Operator("rms_norm_rotary_", ONE, vmap=in_place_by_sequences, **NORM),
    Operator("rms_norm_rotary_qk_", TWO, vmap=in_place_by_sequences, **NORM),
    Operator("rms_norm_rotary.out", ONE, **NORM),
    Operator("rms_norm_rotary_qk.out", TWO, **NORM),
    Operator(
        "rms_norm_rotary_backward",
        ONE,
        results=(*ONE, *WEIGHTS[ONE]),
        derivative=Composed(_composed_backward_of_one),
        **BACKWARD,
    ),
    Operator(
        "rms_norm_rotary_qk_backward",
        TWO,
        results=(*TWO, *WEIGHTS[TWO]),
        derivative=Composed(_composed_backward_of_two),
        **BACKWARD,
    ),
)
