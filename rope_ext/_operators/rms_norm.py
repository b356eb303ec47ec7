"""RMSNorm of q and k and their rotation, and its backward.

The gradients to q, k and the weights are an operator with kernels. All else is composed of the
rotation and PyTorch's operators: gradients to cos and sin, tangents, and the second derivative.
"""

from typing import Any

import torch
from torch import Tensor

from rope_ext._engine.autograd import last_stride_one, save_all
from rope_ext._engine.record import Composed, Derivative, Given, Grads, Operator
from rope_ext._engine.sharding import HEADS_OF, Result, Sharding, rotation_sharding
from rope_ext._engine.vmap import one_by_one
from rope_ext._operators.rotation import TWO, inverted, rotary_tangent, table_grad

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


def _backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> Grads:
    q, k, q_weight, k_weight, cos, sin, position_ids = ctx.saved_tensors
    grads = [None if grad is None else last_stride_one(grad) for grad in (grad_q, grad_k)]
    eps, unit_offset, rotary = _split(ctx.options)
    result: list[Tensor | None] = [None] * 7
    if any(ctx.needs_input_grad[:4]):
        rows = cos, sin, position_ids
        result[:4] = rope.rms_norm_rotary_qk_backward(
            *grads, q, k, q_weight, k_weight, *rows, **ctx.options
        )
    if any(ctx.needs_input_grad[4:6]):
        terms: list[Tensor | None] = []
        for grad, x, weight in zip(grads, (q, k), (q_weight, k_weight), strict=True):
            if grad is not None:
                norm = _Norm(x, weight, eps, unit_offset)
                terms += [_wide(grad), last_stride_one(norm.n * norm.factor)]
        result[4:6] = table_grad(*(*terms, None, None)[:4], cos, position_ids, rotary)
    return tuple(result)


def _tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    *tensors, cos, sin, position_ids = inputs
    eps, unit_offset, rotary = _split(options)
    results = []
    for x, weight, i in zip(tensors[:2], tensors[2:], (0, 1), strict=True):
        norm = _Norm(x, weight, eps, unit_offset)
        tangent = rotary_tangent(
            norm.n * norm.factor,
            norm.tangent(tangents[i], tangents[2 + i]),
            (cos, sin, position_ids),
            tangents[4:6],
            rotary,
        )
        results.append(None if tangent is None else tangent.to(x.dtype))
    return tuple(results)


def _composed_backward(
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
    eps, unit_offset, rotary = _split(options)
    to_xs, to_weights = [], []
    for grad, x, weight in ((grad_q, q, q_weight), (grad_k, k, k_weight)):
        if grad is None:
            to_xs.append(torch.zeros_like(x))
            to_weights.append(torch.zeros_like(weight))
            continue
        norm = _Norm(x, weight, eps, unit_offset)
        grad = last_stride_one(_wide(grad))
        back = rope.apply_rotary(grad, cos, sin, position_ids, **inverted(rotary))
        weighted = back * norm.factor
        along = (weighted * norm.n).mean(norm.row, keepdim=True)
        to_xs.append(((weighted - norm.n * along) * norm.inverse_rms).to(x.dtype))
        others = tuple(range(x.dim() - weight.dim()))
        to_weights.append((back * norm.n).sum(others).to(weight.dtype))
    return *to_xs, *to_weights


# DTensors: batch and sequence may be sharded, and heads where each is normalised by itself


def _sharding(operator: Operator, given: Given) -> Sharding:
    """With a weight [H, D] a row is all heads of a token, so the heads must not be sharded."""
    heads = HEADS_OF if given["q_weight"].dim() == 1 else (None, None)
    return rotation_sharding(operator, given, heads, is_linear=False)


def _backward_sharding(operator: Operator, given: Given) -> Sharding:
    """Gradients to q and k are placed as q and k. Those to the weights are sums over tokens and
    heads: Partial where these are sharded.
    """
    sharding = _sharding(operator, given)
    sharding.axes |= {f"grad_{name}": sharding.axes[name] for name in TWO}
    sharding.results += tuple(
        Result((), given[f"{name}_weight"].shape, summed=sharding.axes[name]) for name in TWO
    )
    return sharding


# RMSNorm takes 4 operations a channel (a square, its sum, two products), its backward 12: the sums
# of x x and of g w x (5), n (1), the gradient to x (4) and that to the weight (2).
RMS_NORM = (
    Operator(
        "rms_norm_rotary_qk",
        TWO,
        derivative=Derivative(save_all, _backward, _tangent),
        flops_channel=4,
        sharding=_sharding,
    ),
    Operator(
        "rms_norm_rotary_qk_backward",
        TWO,
        results=("q", "k", "q_weight", "k_weight"),
        derivative=Composed(_composed_backward),
        flops_channel=12,
        vmap=one_by_one,
        sharding=_backward_sharding,
    ),
)
