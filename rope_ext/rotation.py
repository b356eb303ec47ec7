"""Rotation of x, or of q and k, by tables of cos and sin."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from rope_ext import decompositions
from rope_ext._argument_errors import raise_argument_error
from rope_ext._destinations import Rotation, rotate
from rope_ext._engine.direct import direct_call
from rope_ext._in_place import check_tables_need_no_grad
from rope_ext.options import Layout, rotation_options

rope = torch.ops.rope


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
    layout: Layout = "bshd",
    inplace: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Rotates the pairs of channels of x by the angles of each token.

    Pair i of a head is ``(x1, x2)``, channels (i, i + P) (half-split) or (2i, 2i + 1)
    (interleaved), and becomes ``(x1 cos - x2 sin, x2 cos + x1 sin)``. Channels count from
    rotary_offset; those before it and past the R that rotate are left as they are. Arithmetic is in
    float32 (float64 for float64), rounded once.

    Args:
        x: [B, S, H, D] (layout "bshd"), [B, H, S, D] ("bhsd"), [S, B, H, D] ("sbhd") or packed
            [T, H, D] ("thd"); float64, float32, float16 or bfloat16; any strides with the last one
            1. Never copied to another layout.
        cos: a table [L, W] with a row for each position, or a row for each token [1|B, S, W], if
            packed [T, W] or [1, T, W]. W = P = R / 2, one angle a pair; or, with rotary_dim given,
            also W = R, one angle a channel. Any of the four dtypes, last stride 1.
        sin: as cos.
        position_ids: the rows of the table to use: int32 or int64 [S], [1|B, S], or [T] if packed,
            each in [0, L). None: 0, 1, 2, ... in each sequence (over all T if packed).
        rotary_dim: channels that rotate, R: even, 2 <= R <= D. None: 2 W.
        rotary_offset: the first of them, 0 <= rotary_offset <= D - R: D - R where the last channels
            rotate (queries of DeepSeek's latent attention).
        interleaved: pairs are neighbouring channels (RoFormer, GPT-J) instead of halves (GPT-NeoX,
            Llama in Hugging Face).
        interleaved_out: the order of the pairs in the result. None: that of x. False where
            interleaved is True reads neighbours and writes halves, as DeepSeek-V3 does. If W = R,
            the columns of cos and sin are in the order of the result, or of x if inverse. So the
            backward is the inverse with the two orders swapped and the same table.
        inverse: rotate by the negative angles; for W = R, the transpose.
        layout: the order of x's dimensions. cos, sin and position_ids do not depend on it.
        inplace: write into x and return it. Differentiable for x, saves no copy of it. The pairs
            stay where they are: interleaved_out has to be None or interleaved.
        out: a tensor of x's shape and dtype, in the same layout, to write into and return. It
            shares no memory with x, cos or sin; nothing may need a gradient.

    Returns:
        The rotated x, of x's shape, dtype and order of dimensions in memory.

    Raises:
        RuntimeError: for an invalid argument, before any tensor is modified. The message names the
            operator, the argument, the expected and the given value. A position outside of the
            table raises on the CPU; on CUDA the rotated channels of its token become NaN, unless
            the environment variable ROPE_EXT_CHECK=1 is set. If another thread writes to
            position_ids during the call, they become NaN on the CPU too.
        TypeError: likewise, for an argument of another type, such as None or a list for a tensor.
        ValueError: likewise, for an unknown layout, or one that contradicts the shapes.

    Source: RoFormer, arXiv 2104.09864, equation 34. In float32 the bits are those of
    ``x * cos + rotate_half(x) * sin`` as transformers computes it.
    """
    if out is None and type(inplace) is bool and not is_dynamo_compiling():
        rotated = (_rotate_in_place if inplace else _rotate)(
            layout, None, None, x, cos, sin, position_ids,
            rotary_dim, rotary_offset, interleaved, interleaved_out, inverse,
        )  # fmt: skip
        if rotated is not NotImplemented:
            return x if rotated is None else rotated
    elif out is not None and inplace is False and not is_dynamo_compiling():
        rotated = _rotate_into(
            layout, None, None, x, cos, sin, position_ids,
            rotary_dim, rotary_offset, interleaved, interleaved_out, inverse, out,
        )  # fmt: skip
        if rotated is None:
            return out
    try:
        options = rotation_options(rotary_dim, rotary_offset, interleaved, interleaved_out, inverse)
        outs = None if out is None else (out,)
        rows = cos, sin, position_ids
        return rotate(_ONE, (x,), rows, options, layout, inplace, outs)
    except Exception:
        raise_argument_error(apply_rotary)
        raise


def apply_rotary_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
    layout: Layout = "bshd",
    inplace: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates q and k by the same angles, in one pass (one launch on CUDA).

    Args:
        q: as x of :func:`apply_rotary`.
        k: of q's shape and dtype, but for its number of heads (grouped-query attention). In place,
            q and k may be views of one packed tensor, but may share no element.
        cos, sin, position_ids, layout, inplace: as for :func:`apply_rotary`.
        rotary_dim, rotary_offset, interleaved, interleaved_out, inverse: as there.
        out: as for :func:`apply_rotary`, one for q and one for k.

    Returns:
        The rotated q and k.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`apply_rotary`.
    """
    if out is None and type(inplace) is bool and not is_dynamo_compiling():
        rotated = (_rotate_in_place_qk if inplace else _rotate_qk)(
            layout, None, None, q, k, cos, sin, position_ids,
            rotary_dim, rotary_offset, interleaved, interleaved_out, inverse,
        )  # fmt: skip
        if rotated is not NotImplemented:
            return (q, k) if rotated is None else rotated
    elif type(out) is tuple and len(out) == 2 and inplace is False and not is_dynamo_compiling():
        rotated = _rotate_into_qk(
            layout, None, None, q, k, cos, sin, position_ids,
            rotary_dim, rotary_offset, interleaved, interleaved_out, inverse, *out,
        )  # fmt: skip
        if rotated is None:
            return out
    try:
        options = rotation_options(rotary_dim, rotary_offset, interleaved, interleaved_out, inverse)
        rows = cos, sin, position_ids
        return rotate(_BOTH, (q, k), rows, options, layout, inplace, out)
    except Exception:
        raise_argument_error(apply_rotary_qk)
        raise


_rotate, _rotate_in_place = direct_call("apply_rotary"), direct_call("apply_rotary_")
_rotate_into, _rotate_into_qk = map(direct_call, ("apply_rotary.out", "apply_rotary_qk.out"))
_rotate_qk, _rotate_in_place_qk = direct_call("apply_rotary_qk"), direct_call("apply_rotary_qk_")

_ONE = Rotation(
    function="apply_rotary",
    names=("x",),
    new=rope.apply_rotary,
    in_place=rope.apply_rotary_,
    into=rope.apply_rotary.out,
    decomposed=decompositions.apply_rotary,
    one=apply_rotary,
    check_rows=check_tables_need_no_grad,
)
_BOTH = Rotation(
    function="apply_rotary_qk",
    names=("q", "k"),
    new=rope.apply_rotary_qk,
    in_place=rope.apply_rotary_qk_,
    into=rope.apply_rotary_qk.out,
    decomposed=decompositions.apply_rotary_qk,
    one=apply_rotary,
    check_rows=check_tables_need_no_grad,
)
