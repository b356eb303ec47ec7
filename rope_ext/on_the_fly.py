"""Rotation by angles that are computed as it goes, without a table."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rope_ext._calling import rotation_options
from rope_ext._engine.calls import call, is_differentiated, is_transformed
from rope_ext._explaining import explain
from rope_ext._in_place import (
    check_differentiable_in_place,
    check_order_stays,
    in_place_rotation,
)
from rope_ext._layouts import Layout, as_bshd, from_bshd

rope = torch.ops.rope


def apply_rotary_qk_at(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None = None,
    *,
    axes: Tensor | None = None,
    attention_scaling: float = 1.0,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
    layout: Layout = "bshd",
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotates q and k by ``position * inv_freq``, with no table in memory.

    The bits are those of ``apply_rotary_qk(q, k, *cos_sin(inv_freq, position_ids, ...))`` with rows
    in float32 (float64 for float64): sin and cos are as exact, and computed once for all heads of a
    token. For contexts whose table is too large, and positions or frequencies that change with each
    step. Where many layers share the positions of a step, rows made once by :func:`cos_sin` are
    less work.

    Args:
        q, k: as for :func:`apply_rotary_qk`.
        inv_freq: [P], radians per token; the first R = 2P channels from rotary_offset on rotate.
        position_ids: in tokens, [S], [1|B, S], or [T] if packed; int32, int64 or floating, of any
            value. With axes a leading dimension A, a position an axis. None: 0, 1, 2, ... in each
            sequence (over all T if packed).
        axes: as for :func:`cos_sin`.
        attention_scaling: factor on cos and sin.
        rotary_offset: the first channel that rotates, 0 <= rotary_offset <= D - R.
        interleaved, interleaved_out, inverse, layout: as for :func:`apply_rotary`.
        inplace: write into q and k and return them. Differentiable for these, saves no copy.

    Returns:
        The rotated q and k. NaN where an angle is out of reach (see :func:`cos_sin`).

    Raises:
        RuntimeError: naming operator, argument, what was expected and what came, before anything is
            written. An axis outside of [0, A): as for :func:`cos_sin`.
        TypeError, ValueError: as :func:`apply_rotary`.

    Source: RoFormer, arXiv 2104.09864, equation 34.
    """
    try:
        function = "apply_rotary_qk_at"
        options = rotation_options(None, rotary_offset, interleaved, interleaved_out, inverse)
        angles: dict[str, Any] = {}
        if attention_scaling != 1.0:
            angles["attention_scaling"] = attention_scaling
        view_q, view_k = as_bshd(q, layout, function, "q"), as_bshd(k, layout, function, "k")
        arguments = (view_q, view_k, inv_freq, position_ids, axes)
        if inplace is False:
            out_q, out_k = call(rope.apply_rotary_qk_at, *arguments, **options, **angles)
            return from_bshd(out_q, layout), from_bshd(out_k, layout)
        check_order_stays(function, interleaved, interleaved_out, inplace)
        positions_need_grad = position_ids is not None and position_ids.requires_grad
        of_angles = (inv_freq,) if position_ids is None else (inv_freq, position_ids)
        if not is_differentiated(q, k, *of_angles):
            call(rope.apply_rotary_qk_at_, *arguments, written=(q, k), **options, **angles)
            return q, k
        if inv_freq.requires_grad or positions_need_grad:
            raise RuntimeError(
                f"rope_ext.{function}: expected inv_freq and position_ids to need no gradient when "
                "inplace=True (it takes q and k as they were before), got one that requires grad: "
                "rotate with inplace=False, or detach() them"
            )
        check_differentiable_in_place(function, {"q": q, "k": k})
        if is_transformed():
            out_q, out_k = apply_rotary_qk_at(
                q, k, inv_freq, position_ids, axes=axes, **options, **angles, layout=layout
            )
            return q.copy_(out_q), k.copy_(out_k)
        with torch.no_grad():
            call(rope.apply_rotary_qk_at_, *arguments, written=(q, k), **options, **angles)

        def rotate_back(grad: Tensor, inv_freq: Tensor, *rest: Any, **back: Any) -> Tensor:
            """Of q or of k, beside a tensor without heads."""
            position_ids, axes = rest
            no_heads = from_bshd(as_bshd(grad, layout, function)[..., :0, :], layout)
            rotated, _ = apply_rotary_qk_at(
                grad, no_heads, inv_freq, position_ids, axes=axes,
                attention_scaling=attention_scaling, **back,
            )  # fmt: skip
            return rotated

        rows = inv_freq, position_ids, axes
        return (
            in_place_rotation(q, rotate_back, layout, options, *rows),
            in_place_rotation(k, rotate_back, layout, options, *rows),
        )
    except Exception:
        if not is_compiling():
            explain(apply_rotary_qk_at)
        raise
