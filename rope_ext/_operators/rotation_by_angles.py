"""The rotation by angles that the kernel computes, without a table.

Its gradients to q and k are the inverse rotation; those to frequencies and positions are computed
from the gradients to rows of cos and sin.
"""

from typing import Any

import torch
from torch import Tensor

from rope_ext._engine.autograd import last_stride_one, sum_of
from rope_ext._engine.record import Derivative, Given, Grads, Operator
from rope_ext._engine.vmap import by_sequences, samples_of
from rope_ext._operators.angles import (
    COS_SIN,
    COS_SIN_CACHE,
    angle_grads,
    consecutive,
    cos_sin_of_samples,
    cos_sin_tangent,
    table_dtype,
)
from rope_ext._operators.rotation import (
    ROTATE_QK,
    ROTATE_QK_IN_PLACE,
    TWO,
    check_order_stays,
    inverted,
    rotated_alone,
)

rope = torch.ops.rope


def _save_at(ctx: Any, args: list[Any]) -> None:
    q, k, *angles = args
    ctx.angles_need_grad = any(ctx.needs_input_grad[2:4])
    xs = (q, k) if ctx.angles_need_grad else ()
    ctx.save_for_backward(*angles, *xs)


def _without_heads(x: Tensor) -> Tensor:
    """A tensor without heads, which stands for a missing q or k."""
    return x[..., :0, :]


def _rotate_given(rotate: Any, q: Tensor | None, k: Tensor | None) -> Grads:
    """rotate(q, k), where either may be None."""
    if q is None and k is None:
        return None, None
    if q is None:
        return None, rotate(_without_heads(k), k)[1]
    if k is None:
        return rotate(q, _without_heads(q))[0], None
    return rotate(q, k)


def _at_backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> Grads:
    *angles, xs = (*ctx.saved_tensors[:3], ctx.saved_tensors[3:])
    grads = [None if grad is None else last_stride_one(grad) for grad in (grad_q, grad_k)]
    needed = ctx.needs_input_grad[:4]
    back = inverted(ctx.options)
    to_q, to_k = _rotate_given(
        lambda q, k: rope.apply_rotary_qk_at(q, k, *angles, **back),
        *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=False)),
    )
    if not ctx.angles_need_grad:
        return to_q, to_k, None, None, None
    terms = [pair for pair in zip(grads, xs, strict=True) if pair[0] is not None]
    first, second = (*terms, (None, None))[:2]
    with torch.no_grad():  # only their shape matters to the gradient to rows
        cos, _ = _rows_of(first[1], *angles, ctx.options["attention_scaling"])
    to_rows = rope.apply_rotary_table_backward(
        *first, *second, cos, None, None, **_rotation_options(ctx.options)
    )
    to_angles = angle_grads(needed[2:], *to_rows, *angles, ctx.options)
    return to_q, to_k, *to_angles, None


def _rotation_options(options: dict[str, Any]) -> dict[str, Any]:
    rotation = {name: x for name, x in options.items() if name != "attention_scaling"}
    return {"rotary_dim": None, **rotation}


def _rows_of(
    x: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None,
    axes: Tensor | None,
    attention_scaling: float,
) -> tuple[Tensor, Tensor]:
    """The rows of cos and sin of x [.., H, D]; without position_ids as a table."""
    options = {"attention_scaling": attention_scaling, "dtype": table_dtype(x, None)}
    if position_ids is None:
        return rope.cos_sin_cache(inv_freq, x.shape[-3], **options)
    return rope.cos_sin(inv_freq, position_ids, axes, **options)


def _at_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    *xs, inv_freq, position_ids, axes = inputs
    of_x: Grads = _rotate_given(
        lambda q, k: rope.apply_rotary_qk_at(q, k, *inputs[2:], **options),
        *(None if t is None else last_stride_one(t) for t in tangents[:2]),
    )
    if tangents[2] is None and tangents[3] is None:
        return of_x
    if position_ids is None:
        position_ids = consecutive(0, xs[0].shape[-3], inv_freq)
    made = {"attention_scaling": options["attention_scaling"], "dtype": table_dtype(xs[0], None)}
    rows = cos_sin_tangent([inv_freq, position_ids, axes], tangents[2:4], made)
    of_angles = (rotated_alone(x, *rows, None, _rotation_options(options)) for x in xs)
    return tuple(sum_of(a, b) for a, b in zip(of_x, of_angles, strict=True))


def _at_of_samples(
    operator: Operator, count: int, dims: dict[str, int | None], given: Given
) -> Any:
    """Rotates by rows of cos and sin, which may differ between samples."""
    arguments = dict(given)
    inv_freq, position_ids, axes = (arguments.pop(x) for x in ("inv_freq", "position_ids", "axes"))
    made: Given = {
        "inv_freq": inv_freq,
        "attention_scaling": arguments.pop("attention_scaling"),
        "dtype": table_dtype(given["q"], None),
    }
    if position_ids is None:
        maker = COS_SIN_CACHE
        made["length"] = samples_of(given["q"], dims["q"], count).shape[-3]
    else:
        maker = COS_SIN
        made |= {"position_ids": position_ids, "axes": axes}
    of_made = {name: dims.get(name) for name in maker.defaults}
    if all(dim is None for dim in of_made.values()):
        rows, of_rows = maker.overload(**made), (None, None)
    else:
        rows, of_rows = cos_sin_of_samples(maker, count, of_made, maker.defaults | made)
    if operator.written:
        check_order_stays(operator, given)
    by_rows = ROTATE_QK_IN_PLACE if operator.written else ROTATE_QK
    names = ("cos", "sin")
    arguments |= {**dict(zip(names, rows, strict=True)), "position_ids": None, "rotary_dim": None}
    of_arguments = {**dims, **dict(zip(names, of_rows, strict=True)), "position_ids": None}
    return by_sequences(by_rows, count, of_arguments, arguments)


ROTATION_BY_ANGLES = (
    Operator(
        "apply_rotary_qk_at",
        TWO,
        "inv_freq",
        derivative=Derivative(_save_at, _at_backward, _at_tangent),
        vmap=_at_of_samples,
    ),
    Operator("apply_rotary_qk_at_", TWO, "inv_freq", vmap=_at_of_samples),
)
