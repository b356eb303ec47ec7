"""Rotation of q and k by angles that are computed in the same pass, without a table."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from rope_ext._argument_errors import raise_argument_error
from rope_ext._destinations import Rotation, rotate
from rope_ext._engine.direct import direct_call
from rope_ext.options import Layout, as_bshd, from_bshd, rotation_options

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
    in float32 (float64 for float64). sin and cos are just as exact, and computed once for all heads
    of a token. This is for contexts whose table is too large, and for positions or frequencies that
    change with each step. If many layers share the positions of a step, rows made once by
    :func:`cos_sin` are less work.

    Args:
        q, k: as for :func:`apply_rotary_qk`.
        inv_freq: [P], radians per token; the first R = 2P channels from rotary_offset on rotate.
        position_ids: in tokens, [S], [1|B, S], or [T] if packed; int32, int64 or floating, of any
            value. With axes, a leading dimension A: one position for each axis. None: 0, 1, 2, ...
            in each sequence (over all T if packed).
        axes: as for :func:`cos_sin`.
        attention_scaling: factor on cos and sin.
        rotary_offset: the first channel that rotates, 0 <= rotary_offset <= D - R.
        interleaved, interleaved_out, inverse, layout: as for :func:`apply_rotary`.
        inplace: write into q and k and return them. Differentiable for q and k, saves no copy.

    Returns:
        The rotated q and k. NaN for angles out of the range of :func:`cos_sin`.

    Raises:
        RuntimeError: as :func:`apply_rotary`, and for an axis outside of [0, A) as :func:`cos_sin`.
        TypeError, ValueError: as :func:`apply_rotary`.

    Source: RoFormer, arXiv 2104.09864, equation 34.
    """
    if type(inplace) is bool and not is_dynamo_compiling():
        rotated = (_rotate_in_place if inplace else _rotate)(
            layout, None, None, q, k, inv_freq, position_ids, axes, attention_scaling,
            rotary_offset, interleaved, interleaved_out, inverse,
        )  # fmt: skip
        if rotated is not NotImplemented:
            return (q, k) if rotated is None else rotated
    try:
        options = rotation_options(None, rotary_offset, interleaved, interleaved_out, inverse)
        if attention_scaling != 1.0:
            options["attention_scaling"] = attention_scaling
        rows = inv_freq, position_ids, axes
        return rotate(_BY_ANGLES, (q, k), rows, options, layout, inplace)
    except Exception:
        raise_argument_error(apply_rotary_qk_at)
        raise


def _rotate_one(
    x: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None,
    axes: Tensor | None,
    *,
    layout: Layout,
    **options: Any,
) -> Tensor:
    """Rotates x as q, beside a k without heads: no operator rotates one tensor by angles."""
    no_heads = from_bshd(as_bshd(x, layout, "apply_rotary_qk_at")[..., :0, :], layout)
    rows = inv_freq, position_ids
    rotated, _ = apply_rotary_qk_at(x, no_heads, *rows, axes=axes, layout=layout, **options)
    return rotated


def _check_angles_need_no_grad(
    function: str, inv_freq: Tensor, position_ids: Tensor | None, *_: Tensor | None
) -> None:
    if inv_freq.requires_grad or (position_ids is not None and position_ids.requires_grad):
        raise RuntimeError(
            f"rope_ext.{function}: expected inv_freq and position_ids to need no gradient when "
            "inplace=True (it takes q and k as they were before), got one that requires grad: "
            "rotate with inplace=False, or detach() them"
        )


_rotate, _rotate_in_place = direct_call("apply_rotary_qk_at"), direct_call("apply_rotary_qk_at_")

_BY_ANGLES = Rotation(
    function="apply_rotary_qk_at",
    names=("q", "k"),
    new=rope.apply_rotary_qk_at,
    in_place=rope.apply_rotary_qk_at_,
    into=None,
    decomposed=None,
    one=_rotate_one,
    check_rows=_check_angles_need_no_grad,
)
