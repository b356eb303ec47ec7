"""Rotations in place under autograd: the errors for what is not possible, and the node."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rope_ext._engine.autograd import last_stride_one
from rope_ext._operators.rotation import inverted
from rope_ext._torch_private import base_of, is_unmodifiable_view, transforms_active


def check_tables_need_no_grad(function: str, cos: Tensor, sin: Tensor, *_: Tensor | None) -> None:
    if cos.requires_grad or sin.requires_grad:
        raise RuntimeError(
            f"rope_ext.{function}: expected cos and sin to need no gradient when inplace=True (it "
            "takes x as it was before), got tables that require grad: rotate with inplace=False, "
            "or detach() them"
        )


def check_needs_no_grad(function: str, tensors: Mapping[str, Tensor | None]) -> None:
    """For functions that can't be undone."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"rope_ext.{function}: expected {name} to need no gradient when inplace=True (it "
                "takes the tensors as they were before), got one that requires grad: call it with "
                "inplace=False"
            )


def check_differentiable_in_place(function: str, written: dict[str, Tensor]) -> None:
    """Raises the errors that autograd would raise only after the data were written. Graphs and
    transforms of torch.func are not checked: their tensors are placeholders.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms_active():
        return
    for name, x in written.items():
        # A view may be a leaf itself, of a base that needs no gradient.
        if any(leaf.is_leaf and leaf.requires_grad for leaf in (x, base_of(x))):
            raise RuntimeError(
                f"rope_ext.{function}: expected {name} to be no leaf that requires grad, nor a "
                "view of one, when inplace=True, got one: rotate with inplace=False, or a clone() "
                "of it"
            )
        if is_unmodifiable_view(x):
            raise RuntimeError(
                f"rope_ext.{function}: expected {name} to be a view that can be modified in place, "
                "got one of several views of one function (as split, chunk and unbind make) or one "
                "made without gradients: rotate with inplace=False, or a clone() of it"
            )


class _InPlaceRotation(torch.autograd.Function):
    """Records in the graph that x has been rotated, after the rotation. Saves no copy of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rotate: Callable[..., Tensor],
        layout: str,
        options: dict[str, Any],
        *rows: Tensor | None,
    ) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(*rows)
        ctx.rotate = rotate
        ctx.layout = layout
        ctx.options = options
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows = ctx.saved_tensors
        options = inverted(ctx.options)
        rotated = ctx.rotate(last_stride_one(grad), *rows, layout=ctx.layout, **options)
        return rotated, *(None,) * (3 + len(rows))


# (x, the function that rotates a gradient out of place, layout, options, *rows)
in_place_rotation = _InPlaceRotation.apply
