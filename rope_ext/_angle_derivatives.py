"""Derivatives of the operators that make angles: of cos and sin, and of the rotation by them.

An angle is position * inv_freq, and cos' = -inv_freq sin, sin' = inv_freq cos by the position, or
with the position in the place of inv_freq. By positions, which seldom have gradients, they are
composed of the operators in float64 and of PyTorch's own.
"""

from typing import Any

import torch
from torch import Tensor

from rope_ext._derivatives import (
    Grads,
    both,
    inverted,
    last_stride_one,
    register_derivative,
    rotated_alone,
    save_all,
    sum_of,
    zero_unless_given,
)

rope = torch.ops.rope


def register_angle_derivatives() -> None:
    for name, save, backward, tangent in (
        ("cos_sin_cache", save_all, _cos_sin_cache_backward, _cos_sin_cache_tangent),
        ("cos_sin", save_all, _cos_sin_backward, _cos_sin_tangent),
        ("cos_sin_backward", save_all, _cos_sin_backward_backward, _cos_sin_backward_tangent),
        ("apply_rotary_qk_at", _save_at, _at_backward, _at_tangent),
    ):
        register_derivative(name, save, backward, tangent)


def table_dtype(inv_freq: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """As check_table_dtype in csrc/angles.cpp."""
    if dtype is not None:
        return dtype
    return torch.float64 if inv_freq.dtype == torch.float64 else torch.float32


# Positions and pairs: an axis is the position of all pairs, or with axes of those that name it.
# Axis by axis, as sums in the order of an index are not the same every time on CUDA.


def _of_pairs(positions: Tensor, axes: Tensor | None) -> Tensor:
    """positions [..] -> [.., 1], or [A, ..] -> [.., P], float64; NaN for an axis that is none."""
    positions = positions.double().unsqueeze(-1)
    if axes is None:
        return positions
    of_pairs: Any = torch.nan
    for axis in range(positions.shape[0]):
        of_pairs = torch.where(axes == axis, positions[axis], of_pairs)
    return of_pairs


def _over_pairs(terms: Tensor, positions: Tensor, axes: Tensor | None) -> Tensor:
    """The transpose: terms [.., P] -> as positions, the sums over the pairs of each."""
    if axes is None:
        return terms.sum(-1).to(positions.dtype)
    sums = [torch.where(axes == i, terms, 0.0).sum(-1) for i in range(positions.shape[0])]
    return torch.stack(sums).to(positions.dtype)


def _exact(
    inv_freq: Tensor, position_ids: Tensor, axes: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """cos and sin in float64."""
    options = {"attention_scaling": scaling, "dtype": torch.float64}
    return rope.cos_sin(inv_freq, position_ids, axes, **options)


# Of cos and sin


def _cos_sin_cache_backward(ctx: Any, grad_cos: Tensor | None, grad_sin: Tensor | None) -> Grads:
    grad_cos, grad_sin = both(grad_cos, grad_sin)
    inv_freq, _ = ctx.saved_tensors
    options = {name: ctx.options[name] for name in ("start", "attention_scaling")}
    return rope.cos_sin_backward(grad_cos, grad_sin, inv_freq, **options), None


def _cos_sin_backward(ctx: Any, grad_cos: Tensor | None, grad_sin: Tensor | None) -> Grads:
    grads = both(grad_cos, grad_sin)
    needed = ctx.needs_input_grad[:2]
    return *_angle_grads(needed, *grads, *ctx.saved_tensors, ctx.options), None


def _angle_grads(
    needed: tuple[bool, ...],
    grad_cos: Tensor,
    grad_sin: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None,
    axes: Tensor | None,
    options: dict[str, Any],
) -> Grads:
    """The gradients to inv_freq and to position_ids, of those to cos and sin."""
    to_inv_freq = to_positions = None
    scaling = options["attention_scaling"]
    if needed[0]:
        to_inv_freq = rope.cos_sin_backward(
            grad_cos, grad_sin, inv_freq, position_ids, axes, attention_scaling=scaling
        )
    if needed[1]:
        cos, sin = _exact(inv_freq, position_ids, axes, scaling)
        turned = (cos * grad_sin - sin * grad_cos) * inv_freq
        to_positions = _over_pairs(turned, position_ids, axes)
    return to_inv_freq, to_positions


def _cos_sin_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    inv_freq, position_ids, axes = inputs
    dtype = table_dtype(inv_freq, options["dtype"])
    turned = None
    if tangents[0] is not None:
        turned = _of_pairs(position_ids, axes) * tangents[0]
    if tangents[1] is not None:
        turned = sum_of(turned, _of_pairs(tangents[1], axes) * inv_freq)
    if turned is None:
        return None, None
    cos, sin = _exact(inv_freq, position_ids, axes, options["attention_scaling"])
    return (-(sin * turned)).to(dtype), (cos * turned).to(dtype)


def _cos_sin_cache_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    inv_freq, length = inputs
    position_ids = _consecutive(options["start"], length, inv_freq)
    return _cos_sin_tangent([inv_freq, position_ids, None], (tangents[0], None), options)


def _consecutive(start: int, length: int, like: Tensor) -> Tensor:
    return torch.arange(start, start + length, device=like.device)


# Of F = sum over positions p of p (cos grad_sin - sin grad_cos), which is cos_sin_backward


def _by_inv_freq(
    grad_cos: Tensor,
    grad_sin: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor,
    axes: Tensor | None,
    scaling: float,
) -> Tensor:
    """dF / d inv_freq [P]."""
    position = _of_pairs(position_ids, axes)
    return rope.cos_sin_backward(
        position * grad_sin, -position * grad_cos, inv_freq, position_ids, axes,
        attention_scaling=scaling,
    )  # fmt: skip


def _by_position(
    grad_cos: Tensor,
    grad_sin: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor,
    axes: Tensor | None,
    scaling: float,
) -> Tensor:
    """dF / dp of each pair [.., P]."""
    cos, sin = _exact(inv_freq, position_ids, axes, scaling)
    angle = _of_pairs(position_ids, axes) * inv_freq
    return cos * grad_sin - sin * grad_cos - angle * (sin * grad_sin + cos * grad_cos)


def _with_positions(inputs: Any, options: dict[str, Any]) -> list[Any]:
    """grad_cos, grad_sin, inv_freq, position_ids (given, or start, start + 1, ...), axes."""
    grad_cos, grad_sin, inv_freq, position_ids, axes = inputs
    if position_ids is None:
        position_ids = _consecutive(options["start"], grad_cos.shape[0], inv_freq)
    return [grad_cos, grad_sin, inv_freq, position_ids, axes]


def _cos_sin_backward_backward(ctx: Any, grad: Tensor) -> Grads:
    """grad [P] coming in."""
    inputs = _with_positions(ctx.saved_tensors, ctx.options)
    grad_cos, grad_sin, inv_freq, position_ids, axes = inputs
    scaling = ctx.options["attention_scaling"]
    cos, sin = _exact(inv_freq, position_ids, axes, scaling)
    weight = _of_pairs(position_ids, axes) * grad
    to_grad_cos, to_grad_sin = -(weight * sin), weight * cos
    to_inv_freq = grad * _by_inv_freq(*inputs, scaling)
    to_positions = None
    if ctx.needs_input_grad[3]:
        to_positions = _over_pairs(grad * _by_position(*inputs, scaling), position_ids, axes)
    return (
        to_grad_cos.to(grad_cos.dtype),
        to_grad_sin.to(grad_sin.dtype),
        to_inv_freq,
        to_positions,
        None,
    )


def _cos_sin_backward_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    grad_cos, grad_sin, *rest = inputs
    inv_freq, _, axes = rest
    scaling = options["attention_scaling"]
    of_grads = of_inv_freq = of_positions = None
    if tangents[0] is not None or tangents[1] is not None:
        to_cos = zero_unless_given(tangents[0], grad_cos)
        to_sin = zero_unless_given(tangents[1], grad_sin)
        of_grads = rope.cos_sin_backward(to_cos, to_sin, *rest, **options)
    if tangents[2] is not None:
        of_inv_freq = tangents[2] * _by_inv_freq(*_with_positions(inputs, options), scaling)
    if tangents[3] is not None:
        terms = _of_pairs(tangents[3], axes) * _by_position(*inputs, scaling)
        terms = terms.flatten(0, -2).sum(0) if terms.dim() > 1 else terms
        of_positions = terms.to(inv_freq.dtype)
    return sum_of(sum_of(of_grads, of_inv_freq), of_positions)


# Of the rotation by angles: to q and k the inverse, to angles by way of the rows.


def _save_at(ctx: Any, args: list[Any]) -> None:
    q, k, *angles = args
    ctx.angles_need_grad = any(ctx.needs_input_grad[2:4])
    xs = (q, k) if ctx.angles_need_grad else ()
    ctx.save_for_backward(*angles, *xs)


def _none_beside(x: Tensor) -> Tensor:
    """A tensor without heads, for the operator on two where there is one."""
    return x[..., :0, :]


def _both_or_one(rotate: Any, q: Tensor | None, k: Tensor | None) -> Grads:
    """rotate(q, k), of which one may be None."""
    if q is None and k is None:
        return None, None
    to_q, to_k = rotate(_none_beside(k) if q is None else q, _none_beside(q) if k is None else k)
    return None if q is None else to_q, None if k is None else to_k


def _at_backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> Grads:
    *angles, xs = (*ctx.saved_tensors[:3], ctx.saved_tensors[3:])
    grads = [None if grad is None else last_stride_one(grad) for grad in (grad_q, grad_k)]
    needed = ctx.needs_input_grad[:4]
    back = inverted(ctx.options)
    to_q, to_k = _both_or_one(
        lambda q, k: rope.apply_rotary_qk_at(q, k, *angles, **back),
        *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=False)),
    )
    if not ctx.angles_need_grad:
        return to_q, to_k, None, None, None
    terms = [pair for pair in zip(grads, xs, strict=True) if pair[0] is not None]
    first, second = (*terms, (None, None))[:2]
    with torch.no_grad():  # it is their shape alone that the gradient to rows depends on
        cos, _ = _rows_of(first[1], *angles, ctx.options["attention_scaling"])
    to_rows = rope.apply_rotary_table_backward(
        *first, *second, cos, None, None, **_rotation_options(ctx.options)
    )
    to_angles = _angle_grads(needed[2:], *to_rows, *angles, ctx.options)
    return to_q, to_k, *to_angles, None


def _rotation_options(options: dict[str, Any]) -> dict[str, Any]:
    names = ("rotary_offset", "interleaved", "interleaved_out", "inverse")
    return {"rotary_dim": None, **{name: options[name] for name in names}}


def _rows_of(
    x: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None,
    axes: Tensor | None,
    attention_scaling: float,
) -> tuple[Tensor, Tensor]:
    """The rows that x [.., H, D] turns by, without position_ids a table of them."""
    options = {"attention_scaling": attention_scaling, "dtype": table_dtype(x, None)}
    if position_ids is None:
        return rope.cos_sin_cache(inv_freq, x.shape[-3], **options)
    return rope.cos_sin(inv_freq, position_ids, axes, **options)


def _at_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    *xs, inv_freq, position_ids, axes = inputs
    of_x: Grads = _both_or_one(
        lambda q, k: rope.apply_rotary_qk_at(q, k, *inputs[2:], **options),
        *(None if t is None else last_stride_one(t) for t in tangents[:2]),
    )
    if tangents[2] is None and tangents[3] is None:
        return of_x
    if position_ids is None:
        position_ids = _consecutive(0, xs[0].shape[-3], inv_freq)
    made = {"attention_scaling": options["attention_scaling"], "dtype": table_dtype(xs[0], None)}
    rows = _cos_sin_tangent([inv_freq, position_ids, axes], tangents[2:4], made)
    turned = (rotated_alone(x, *rows, None, _rotation_options(options)) for x in xs)
    return tuple(sum_of(a, b) for a, b in zip(of_x, turned, strict=True))
