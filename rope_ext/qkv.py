"""q, k and v out of the packed output of a projection, rotated in one pass."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from rope_ext import decompositions
from rope_ext._argument_errors import raise_argument_error
from rope_ext._engine.calls import call
from rope_ext._engine.direct import direct_call
from rope_ext.lowering import decomposes
from rope_ext.options import PackedLayout, from_bshd, packed_as_bshd, rotation_options

_split_and_rotate = direct_call("apply_rotary_qkv")


def apply_rotary_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    kv_heads: int | None = None,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
    layout: PackedLayout = "bshd",
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the output of a projection into q, k and v, and rotates q and k: for training.

    The results are tensors of their own, v too: they do not keep qkv alive. The backward takes the
    gradients of q, k and v and writes that of qkv in one pass: no concatenation, and zeros only
    for what has no gradient. The bits are those of splitting and :func:`rope_ext.apply_rotary_qk`.

    Args:
        qkv: with kv_heads, [B, S, Hq + 2 Hk, D]: the heads of q, then of k, then of v. Without it,
            by group as in Megatron, [B, S, Hk, Hq / Hk + 2, D]: in each group the heads of q, then
            one of k and one of v. Dtypes and strides as for x of :func:`rope_ext.apply_rotary`.
        kv_heads: Hk, the heads of k and of v; Hq is a multiple of it.
        cos, sin, position_ids: as for :func:`rope_ext.apply_rotary`.
        rotary_dim, rotary_offset, interleaved, interleaved_out, inverse: as there.
        layout: the order of qkv's dimensions and of those of the results: "bshd", [S, B, ..]
            ("sbhd") or packed tokens [T, ..] ("thd").

    Returns:
        q [B, S, Hq, D], k and v [B, S, Hk, D], dense.

    Differentiable for qkv, cos and sin, any number of times.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`rope_ext.apply_rotary`.
    """
    if kv_heads is not None and layout != "bhsd" and not is_dynamo_compiling():
        split = _split_and_rotate(
            layout, None, None, qkv, cos, sin, position_ids, kv_heads,
            rotary_dim, rotary_offset, interleaved, interleaved_out, inverse,
        )  # fmt: skip
        if split is not NotImplemented:
            return split
    try:
        options = rotation_options(rotary_dim, rotary_offset, interleaved, interleaved_out, inverse)
        operator = (
            decompositions.apply_rotary_qkv if decomposes() else torch.ops.rope.apply_rotary_qkv
        )
        rows = cos, sin, position_ids
        return split_by(operator, "apply_rotary_qkv", qkv, rows, kv_heads, options, layout)
    except Exception:
        raise_argument_error(apply_rotary_qkv)
        raise


def split_by(
    operator: Any,
    function: str,
    qkv: Tensor,
    others: tuple[Tensor | None, ...],
    kv_heads: int | None,
    options: dict[str, Any],
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls an operator with a packed qkv, in the order of layout."""
    if kv_heads is not None:
        options["kv_heads"] = kv_heads
    view = packed_as_bshd(qkv, layout, kv_heads is None, function)
    q, k, v = call(operator, (view, *others), options)
    return from_bshd(q, layout), from_bshd(k, layout), from_bshd(v, layout)
