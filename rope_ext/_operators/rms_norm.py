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
from rope_ext._operators.qkv import (
    GRADS,
    packed,
    rotated_shapes,
    split_like,
    split_sharding,
)
from rope_ext._operators.rotation import (
    ONE,
    TWO,
    in_place_by_sequences,
    inverted,
    rotary_tangent,
    table_grad,
)
from rope_ext.reference import split_qkv

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


def _parts(args: Sequence[Any]) -> tuple[Any, Any, Any]:
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
        to_table = _to_table(grads, xs, weights, rows, ctx.options)
    return *to_xs_and_weights, *to_table, None


def _to_table(
    grads: Grads,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    rows: Sequence[Any],
    options: dict[str, Any],
) -> Grads:
    """The gradients to cos and sin, from those that are given."""
    cos, _, position_ids = rows
    eps, unit_offset, rotary = _split(options)
    terms: list[Any] = []
    for grad, x, weight in zip(grads, xs, weights, strict=True):
        if grad is not None:
            norm = _Norm(x, weight, eps, unit_offset)
            terms += [_wide(grad), last_stride_one(norm.n * norm.factor)]
    if not terms:
        return None, None
    grad_q, q, grad_k, k = (*terms, None, None)[:4]
    return table_grad(grad_q, q, grad_k, k, cos, position_ids, rotary)


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


# Packed qkv


def _backward_of_qkv(ctx: Any, *grads: Tensor | None) -> Grads:
    qkv, q_weight, k_weight, *rows = ctx.saved_tensors
    grads = tuple(None if grad is None else last_stride_one(grad) for grad in grads)
    to_qkv_and_weights: Grads = None, None, None
    to_table: Grads = None, None
    if any(ctx.needs_input_grad[:3]):
        to_qkv_and_weights = rope.rms_norm_rotary_qkv_backward(
            *grads, qkv, q_weight, k_weight, *rows, **ctx.options
        )
    if any(ctx.needs_input_grad[3:5]):
        options = dict(ctx.options)
        xs = split_qkv(qkv, options.pop("kv_heads"))[:2]
        to_table = _to_table(grads[:2], xs, (q_weight, k_weight), rows, options)
    return *to_qkv_and_weights, *to_table, None


def _tangent_of_qkv(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    qkv, *others = inputs
    of_qkv, *of_others = tangents
    rotary = dict(options)
    kv_heads = rotary.pop("kv_heads")
    q, k, _ = split_qkv(qkv, kv_heads)
    of_q, of_k, of_v = (None,) * 3 if of_qkv is None else split_qkv(of_qkv, kv_heads)
    results = _tangent([q, k, *others], (of_q, of_k, *of_others), rotary)
    return *results, None if of_v is None else of_v.clone()


def _composed_backward_of_qkv(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    kv_heads: int | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = cos, sin, position_ids
    q, k, v = split_qkv(qkv, kv_heads)
    to_q, to_q_weight = _composed_backward(grad_q, q, q_weight, rows, options)
    to_k, to_k_weight = _composed_backward(grad_k, k, k_weight, rows, options)
    to_v = torch.zeros_like(v) if grad_v is None else grad_v
    return packed(to_q, to_k, to_v, kv_heads is None), to_q_weight, to_k_weight


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


def _split_sharding(operator: Operator, given: Given) -> Sharding:
    """By group, the groups may be sharded too."""
    return split_sharding(operator, given, is_linear=False)


def _split_backward_sharding(operator: Operator, given: Given) -> Sharding:
    sharding, qkv = _split_sharding(operator, given), given["qkv"]
    part, axes = sharding.results[0].axes, sharding.axes["qkv"]
    sharding.axes |= {name: part for name in GRADS if given[name] is not None}
    sharding.results = (
        Result(axes, qkv.shape, qkv),
        *(Result((), given[name].shape, summed=axes) for name in WEIGHTS[TWO]),
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
    Operator(
        "rms_norm_rotary_qkv",
        ("qkv",),
        results=split_like,
        derivative=Derivative(save_all, _backward_of_qkv, _tangent_of_qkv),
        flops_channel=4,
        rotated_shapes=rotated_shapes,
        vmap=one_by_one,
        sharding=_split_sharding,
    ),
    Operator(
        "rms_norm_rotary_qkv_backward",
        ("qkv",),
        results=("qkv", *WEIGHTS[TWO]),
        derivative=Composed(_composed_backward_of_qkv),
        flops_channel=12,
        rotated_shapes=rotated_shapes,
        vmap=one_by_one,
        sharding=_split_backward_sharding,
    ),
)
