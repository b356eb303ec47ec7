"""The operators as typed functions: with layouts, and in place with autograd."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rope_ext import decompositions
from rope_ext._calling import call, rotation_options
from rope_ext._explaining import explain
from rope_ext._in_place import (
    check_differentiable_in_place,
    check_order_stays,
    check_tables_need_no_grad,
    in_place_rotation,
    is_differentiated,
    is_transformed,
)
from rope_ext._layouts import Layout, as_bshd, from_bshd

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
    (interleaved), and becomes ``(x1 cos - x2 sin, x2 cos + x1 sin)``. These count from
    rotary_offset; channels before it and past the R that rotate are left as they are. Arithmetic is
    in float32 (float64 for float64), rounded once.

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
            interleaved is True reads neighbours and writes halves, as DeepSeek-V3 does. For W = R
            the columns of cos and sin are in the order of the result, or, if inverse, of x: the
            backward of a rotation is the inverse with the two orders swapped, and the same table.
        inverse: rotate by the negative angles; for W = R, the transpose.
        layout: the order of x's dimensions. cos, sin and position_ids do not depend on it.
        inplace: write into x and return it. Differentiable for x, saves no copy of it. The pairs
            stay where they are: interleaved_out has to be None or interleaved.
        out: a tensor of x's shape and dtype, in the same layout, to write into and return: memory
            that is there already. It shares none with x, cos or sin; nothing may need a gradient.

    Returns:
        The rotated x, of x's shape, dtype and order of dimensions in memory.

    Raises:
        RuntimeError: naming operator, argument, what was expected and what came, before anything is
            written. A position outside of the table raises on the CPU; on CUDA the rotated channels
            of its token become NaN, unless the environment variable ROPE_EXT_CHECK=1 is set. Where
            another thread writes to position_ids during the call, they become NaN on the CPU too.
        TypeError: so too, for an argument of another type: a None or a list for a tensor.
        ValueError: so too, for a layout that is none, or not that of the tensors.

    Source: RoFormer, arXiv 2104.09864, equation 34. In float32 the bits are those of
    ``x * cos + rotate_half(x) * sin`` as transformers computes it.
    """
    try:
        options = rotation_options(rotary_dim, rotary_offset, interleaved, interleaved_out, inverse)
        view = as_bshd(x, layout, "apply_rotary")
        if out is not None:
            _check_not_both("apply_rotary", inplace)
            written = as_bshd(out, layout, "apply_rotary", "out")
            options["out"] = written
            call(rope.apply_rotary.out, view, cos, sin, position_ids, written=(out,), **options)
            return out
        if inplace is False:
            rotate = decompositions if decompositions.in_graph() else rope
            rotated = call(rotate.apply_rotary, view, cos, sin, position_ids, **options)
            return from_bshd(rotated, layout)
        check_order_stays("apply_rotary", interleaved, interleaved_out, inplace)
        if not is_differentiated(x, cos, sin) and not decompositions.in_graph():
            call(rope.apply_rotary_, view, cos, sin, position_ids, written=(x,), **options)
            return x
        check_tables_need_no_grad("apply_rotary", cos, sin)
        check_differentiable_in_place("apply_rotary", {"x": x})
        if is_transformed():
            rotated = apply_rotary(x, cos, sin, position_ids, **options, layout=layout)
            return x.copy_(rotated)
        with torch.no_grad():
            call(rope.apply_rotary_, view, cos, sin, position_ids, written=(x,), **options)
        return in_place_rotation(x, apply_rotary, layout, options, cos, sin, position_ids)
    except Exception:
        if not is_compiling():
            explain(apply_rotary)
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
    try:
        options = rotation_options(rotary_dim, rotary_offset, interleaved, interleaved_out, inverse)
        if layout == "bshd" and q.dim() == k.dim() == 4:  # the most frequent, and the quickest
            view_q, view_k = q, k
        else:
            view_q = as_bshd(q, layout, "apply_rotary_qk", "q")
            view_k = as_bshd(k, layout, "apply_rotary_qk", "k")
        if out is not None:
            _check_not_both("apply_rotary_qk", inplace)
            out_q, out_k = out
            options["out_q"] = as_bshd(out_q, layout, "apply_rotary_qk", "out[0]")
            options["out_k"] = as_bshd(out_k, layout, "apply_rotary_qk", "out[1]")
            rotate = rope.apply_rotary_qk.out
            call(rotate, view_q, view_k, cos, sin, position_ids, written=(out_q, out_k), **options)
            return out_q, out_k
        if inplace is False:
            rotate = decompositions if decompositions.in_graph() else rope
            rotate = rotate.apply_rotary_qk
            rotated = call(rotate, view_q, view_k, cos, sin, position_ids, **options)
            if layout == "bshd":
                return rotated
            return from_bshd(rotated[0], layout), from_bshd(rotated[1], layout)
        check_order_stays("apply_rotary_qk", interleaved, interleaved_out, inplace)
        if not is_differentiated(q, k, cos, sin) and not decompositions.in_graph():
            rotate = rope.apply_rotary_qk_
            call(rotate, view_q, view_k, cos, sin, position_ids, written=(q, k), **options)
            return q, k
        check_tables_need_no_grad("apply_rotary_qk", cos, sin)
        check_differentiable_in_place("apply_rotary_qk", {"q": q, "k": k})
        if is_transformed():
            out_q, out_k = apply_rotary_qk(q, k, cos, sin, position_ids, **options, layout=layout)
            return q.copy_(out_q), k.copy_(out_k)
        with torch.no_grad():
            rotate = rope.apply_rotary_qk_
            call(rotate, view_q, view_k, cos, sin, position_ids, written=(q, k), **options)
        return (
            in_place_rotation(q, apply_rotary, layout, options, cos, sin, position_ids),
            in_place_rotation(k, apply_rotary, layout, options, cos, sin, position_ids),
        )
    except Exception:
        if not is_compiling():
            explain(apply_rotary_qk)
        raise


def cos_sin_cache(
    inv_freq: Tensor,
    length: int,
    *,
    start: int = 0,
    attention_scaling: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Tables of cos and sin for the positions start, start + 1, ..., start + length - 1.

    Args:
        inv_freq: [P], radians per token; any floating dtype of the operators. The angle is exactly
            position * inv_freq, for the inv_freq given.
        length: rows of the table.
        start: position of the first row, in tokens; may be negative.
        attention_scaling: factor on cos and sin.
        dtype: of the tables. None: float32, or float64 for a float64 inv_freq.

    Returns:
        cos, sin: [length, P]. In float32 within 1 ulp (measured: 0.5001) of the true value for
        angles up to 2^31 radians. NaN for angles of 2^50 radians and more, and positions of 2^53
        and more. Differentiable, twice, for inv_freq.

    Raises:
        RuntimeError: for a negative length, an inv_freq that is not [P] or not floating, and
            another dtype.
        TypeError: for an argument of another type.

    Source: RoFormer, arXiv 2104.09864, section 3.2.2; the angle is reduced in csrc/angle.h.
    """
    try:
        _check_dtype(dtype)
        return call(
            rope.cos_sin_cache,
            inv_freq,
            length,
            start=start,
            attention_scaling=attention_scaling,
            dtype=dtype,
        )
    except Exception:
        if not is_compiling():
            explain(cos_sin_cache)
        raise


def cos_sin(
    inv_freq: Tensor,
    position_ids: Tensor,
    *,
    axes: Tensor | None = None,
    attention_scaling: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of cos and sin for given positions, as :func:`cos_sin_cache` has them.

    Args:
        inv_freq, attention_scaling, dtype: as for :func:`cos_sin_cache`.
        position_ids: of any shape, in tokens; may be negative. int32 or int64; or, for pixel
            coordinates, interpolation and the like, float64, float32, float16 or bfloat16, of which
            the angle is just as exact. With axes [A, ...]: a position an axis, such as time, height
            and width.
        axes: int32 or int64 [P], each in [0, A): pair i turns by position_ids[axes[i]]. None: all
            pairs turn by the one position that a token has.

    Returns:
        cos, sin: ``[*position_ids.shape, P]``, with axes ``[*position_ids.shape[1:], P]``, for
        :func:`apply_rotary` when a token's positions are [B, S] or [T]. Differentiable, twice, for
        inv_freq and floating position_ids.

    Raises:
        RuntimeError: for position_ids or axes of another dtype, shape or device. An axis outside of
            [0, A) raises on the CPU; on CUDA its pairs become NaN, unless the environment variable
            ROPE_EXT_CHECK=1 is set. Where another thread writes to axes during the call, they
            become NaN on the CPU too.
        TypeError: for an argument of another type.

    Source of axes: Qwen2-VL (arXiv 2409.12191, section 2.1), whose sections of pairs are one map,
    as are interleaved sections (Qwen3-VL) and axial ones (images and volumes).
    """
    try:
        _check_dtype(dtype)
        options = {"attention_scaling": attention_scaling, "dtype": dtype}
        return call(rope.cos_sin, inv_freq, position_ids, axes, **options)
    except Exception:
        if not is_compiling():
            explain(cos_sin)
        raise


def _check_dtype(dtype: object) -> None:
    """Before PyTorch sees it, which takes integers for dtypes and crashes on some."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError("of another type: explain() says it by name")


def _check_not_both(function: str, inplace: bool) -> None:
    if inplace:
        raise ValueError(f"rope_ext.{function}: expected inplace=False with out, got inplace=True")
