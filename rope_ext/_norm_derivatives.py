"""Derivatives of rms_norm_rotary_qk. The plain backward, to q, k and the weights, is an operator
with kernels. All else is composed of differentiable PyTorch and the rotation: gradients to cos and
sin, tangents, and that backward itself where it is to be differentiated in turn.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rope_ext._copies import register_copies
from rope_ext._derivatives import (
    AUTOGRAD,
    Grads,
    inverted,
    last_stride_one,
    register_derivative,
    rotary_tangent,
    save_all,
    table_grad,
)

rope = torch.ops.rope


def register_norm_derivatives() -> None:
    register_derivative("rms_norm_rotary_qk", save_all, _backward, _tangent)
    name, overload = "rms_norm_rotary_qk_backward", rope.rms_norm_rotary_qk_backward.default
    AUTOGRAD.impl(name, _backward_kernel, "Autograd", with_keyset=True)
    register_copies(AUTOGRAD, name, overload)


def _split(options: dict[str, Any]) -> tuple[float, bool, dict[str, Any]]:
    """eps, unit_offset, and the options of the rotation."""
    rotary = {"eps": 1e-6, "unit_offset": False, "rotary_dim": None, "rotary_offset": 0, **options}
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
        """Of n times the factor, for tangents of x and of the weight."""
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


def _backward_kernel(keyset: Any, *args: Any, **options: Any) -> Any:
    """The kernels; where more is differentiated they check, and PyTorch computes what it can
    differentiate.
    """
    if torch._C._are_functorch_transforms_active():
        return _composed_backward(*args, **options)
    with torch._C._AutoDispatchBelowAutograd():
        overload = rope.rms_norm_rotary_qk_backward.default
        grads = overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)
    needs_grad = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
    if needs_grad or forward_ad._current_level >= 0:
        return _composed_backward(*args, **options)
    return grads


def _composed_backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
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
