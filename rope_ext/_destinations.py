"""Where the results of a rotation go: into new tensors, into `out`, or in place.

The flow is the same for every function that rotates; a :class:`Rotation` holds what differs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rope_ext._engine.calls import call, is_differentiated, is_transformed
from rope_ext._in_place import (
    check_differentiable_in_place,
    check_needs_no_grad,
    in_place_rotation,
)
from rope_ext.lowering import decomposes
from rope_ext.options import as_bshd, check_order_stays, from_bshd


class Rotation(NamedTuple):
    """What a function that rotates passes to :func:`rotate`."""

    function: str  # the function's name, for messages
    names: tuple[str, ...]  # the tensors that rotate, for messages
    new: Any  # the operator with new results
    in_place: Any  # the operator that writes into the tensors
    into: Any  # the operator that writes into `out`, or None
    decomposed: Callable[..., Any] | None  # `new` in plain PyTorch, or None
    # (x, *rows, layout=, **options): rotates one of the tensors; None: the function can't be undone
    one: Callable[..., Tensor] | None
    check_rows: Callable[..., None]  # (function, *rows): raises if rows need a gradient


def rotate(
    rotation: Rotation,
    tensors: tuple[Tensor, ...],  # x, or q and k: in the order of layout
    rows: tuple[Tensor | None, ...],  # the operators' other tensors
    options: dict[str, Any],
    layout: str,
    inplace: bool = False,
    out: tuple[Tensor, ...] | None = None,  # one for each of `tensors`
) -> Any:
    """Returns the rotated tensors: one, or a tuple of two."""
    if layout == "bshd" and tensors[0].dim() == tensors[-1].dim() == 4:  # the most frequent case
        views = tensors
    else:
        views = _views(rotation.function, rotation.names, tensors, layout)
    if out is not None:
        return _rotate_into(rotation, views, rows, options, layout, inplace, out)
    operator = rotation.decomposed if decomposes() else None
    if inplace is False:
        rotated = call(operator or rotation.new, views + rows, options)
        if layout == "bshd":
            return rotated
        if len(tensors) == 1:
            return from_bshd(rotated, layout)
        return from_bshd(rotated[0], layout), from_bshd(rotated[1], layout)
    check_order_stays(rotation.function, options, inplace)
    if operator is not None or is_differentiated(*tensors, *rows):
        return _rotate_in_place(rotation, tensors, views, rows, options, layout)
    call(rotation.in_place, views + rows, options, tensors)
    return tensors if len(tensors) > 1 else tensors[0]


def _rotate_into(
    rotation: Rotation,
    views: tuple[Tensor, ...],
    rows: tuple[Tensor | None, ...],
    options: dict[str, Any],
    layout: str,
    inplace: bool,
    out: tuple[Tensor, ...],
) -> Any:
    function = rotation.function
    if inplace:
        raise ValueError(f"rope_ext.{function}: expected inplace=False with out, got inplace=True")
    if len(views) == 1:
        options["out"] = as_bshd(out[0], layout, function, "out")
    else:
        out_q, out_k = out
        options["out_q"], options["out_k"] = _views(
            function, ("out[0]", "out[1]"), (out_q, out_k), layout
        )
    call(rotation.into, views + rows, options, tuple(out))
    return tuple(out) if len(out) > 1 else out[0]


def _rotate_in_place(
    rotation: Rotation,
    tensors: tuple[Tensor, ...],
    views: tuple[Tensor, ...],
    rows: tuple[Tensor | None, ...],
    options: dict[str, Any],
    layout: str,
) -> Any:
    """Rotates in place under autograd, in a transform of torch.func or in a graph."""
    rotation.check_rows(rotation.function, *rows)
    named = dict(zip(rotation.names, tensors, strict=True))
    if rotation.one is None:
        check_needs_no_grad(rotation.function, named)
    check_differentiable_in_place(rotation.function, named)
    if is_transformed():
        new = rotate(rotation, tensors, rows, options, layout)
        new = new if len(tensors) > 1 else (new,)
        written = tuple(x.copy_(y) for x, y in zip(tensors, new, strict=True))
    else:
        with torch.no_grad():
            call(rotation.in_place, views + rows, options, tensors)
        written = tuple(in_place_rotation(x, rotation.one, layout, options, *rows) for x in tensors)
    return written if len(written) > 1 else written[0]


def _views(
    function: str, names: tuple[str, ...], tensors: tuple[Tensor, ...], layout: str
) -> tuple[Tensor, ...]:
    """The tensors as [B, S, H, D] or [T, H, D]."""
    if len(tensors) == 1:
        return (as_bshd(tensors[0], layout, function, names[0]),)
    q, k = tensors
    return as_bshd(q, layout, function, names[0]), as_bshd(k, layout, function, names[1])
