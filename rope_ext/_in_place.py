"""Rotations in place under autograd: what they refuse, and the node that tells autograd of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rope_ext._engine.autograd import last_stride_one
from rope_ext._explaining import describe
from rope_ext._operators.rotation import inverted


def check_order_stays(
    function: str, interleaved: bool, interleaved_out: bool | None, inplace: object = True
) -> None:
    """As check_order_stays in csrc, for graphs as well, which rotate out of place."""
    if inplace is not True:
        raise TypeError(
            f"rope_ext.{function}: expected inplace to be a bool, got {describe(inplace)}"
        )
    if interleaved_out is not None and interleaved_out != interleaved:
        raise RuntimeError(
            f"rope_ext.{function}: expected interleaved_out to be None or interleaved, "
            f"{interleaved}, when inplace=True, as a rotation in place leaves the pairs where they "
            f"are, got {interleaved_out}"
        )


def check_tables_need_no_grad(function: str, cos: Tensor, sin: Tensor) -> None:
    if cos.requires_grad or sin.requires_grad:
        raise RuntimeError(
            f"rope_ext.{function}: expected cos and sin to need no gradient when inplace=True (it "
            "takes x as it was before), got tables that require grad: rotate with inplace=False, "
            "or detach() them"
        )


def check_differentiable_in_place(function: str, written: dict[str, Tensor]) -> None:
    """Refuses what autograd would refuse later, when the data had been written already. Not in
    graphs and transforms of torch.func, which have tensors of their own.
    """
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    ):
        return
    default = torch._C._autograd.CreationMeta.DEFAULT
    for name, x in written.items():
        base = x._base if x._is_view() else x
        # A view may be a leaf itself, of a base that needs no gradient.
        if any(leaf.is_leaf and leaf.requires_grad for leaf in (x, base)):
            raise RuntimeError(
                f"rope_ext.{function}: expected {name} to be no leaf that requires grad, nor a "
                "view of one, when inplace=True, got one: rotate with inplace=False, or a clone() "
                "of it"
            )
        if x._is_view() and torch._C._autograd._get_creation_meta(x) != default:
            raise RuntimeError(
                f"rope_ext.{function}: expected {name} to be a view that can be modified in place, "
                "got one of several views of one function (as split, chunk and unbind make) or one "
                "made without gradients: rotate with inplace=False, or a clone() of it"
            )


class _InPlaceRotation(torch.autograd.Function):
    """Tells autograd that x has been rotated; the data already are. Saves no x."""

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


# x, the function that rotates it out of place, layout, options, and what it takes after x
in_place_rotation = _InPlaceRotation.apply
