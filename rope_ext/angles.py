"""cos and sin of angles: tables of consecutive positions, rows of given ones."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from rope_ext._argument_errors import raise_argument_error
from rope_ext._engine.calls import call
from rope_ext._engine.direct import direct_call

rope = torch.ops.rope
_table, _rows = direct_call("cos_sin_cache"), direct_call("cos_sin")


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

    Source: RoFormer, arXiv 2104.09864, section 3.2.2; the angle is reduced in csrc/math/angle.h.
    """
    if not is_dynamo_compiling():
        made = _table(None, None, None, inv_freq, length, start, attention_scaling, dtype)
        if made is not NotImplemented:
            return made
    try:
        _check_dtype(dtype)
        options = {"start": start, "attention_scaling": attention_scaling, "dtype": dtype}
        return call(rope.cos_sin_cache, (inv_freq, length), options)
    except Exception:
        raise_argument_error(cos_sin_cache)
        raise


def cos_sin(
    inv_freq: Tensor,
    position_ids: Tensor,
    *,
    axes: Tensor | None = None,
    attention_scaling: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of cos and sin for given positions, as exact as those of :func:`cos_sin_cache`.

    Args:
        inv_freq, attention_scaling, dtype: as for :func:`cos_sin_cache`.
        position_ids: of any shape, in tokens; may be negative. int32 or int64, or, for pixel
            coordinates or interpolation, float64, float32, float16 or bfloat16: the angle is just
            as exact. With axes, [A, ...]: one position for each axis, such as time, height and
            width.
        axes: int32 or int64 [P], each in [0, A): the angle of pair i is that of
            position_ids[axes[i]]. None: each token has one position, for all pairs.

    Returns:
        cos, sin: ``[*position_ids.shape, P]``, with axes ``[*position_ids.shape[1:], P]``, for
        :func:`apply_rotary` when a token's positions are [B, S] or [T]. Differentiable, twice, for
        inv_freq and floating position_ids.

    Raises:
        RuntimeError: for position_ids or axes of another dtype, shape or device. An axis outside of
            [0, A) raises on the CPU; on CUDA its pairs become NaN, unless the environment variable
            ROPE_EXT_CHECK=1 is set. If another thread writes to axes during the call, they become
            NaN on the CPU too.
        TypeError: for an argument of another type.

    Source of axes: Qwen2-VL (arXiv 2409.12191, section 2.1). Its sections of pairs are such a map,
    and so are interleaved sections (Qwen3-VL) and axial ones (images and volumes).
    """
    if not is_dynamo_compiling():
        made = _rows(None, None, None, inv_freq, position_ids, axes, attention_scaling, dtype)
        if made is not NotImplemented:
            return made
    try:
        _check_dtype(dtype)
        options = {"attention_scaling": attention_scaling, "dtype": dtype}
        return call(rope.cos_sin, (inv_freq, position_ids, axes), options)
    except Exception:
        raise_argument_error(cos_sin)
        raise


def _check_dtype(dtype: object) -> None:
    """Raises before PyTorch gets it: PyTorch takes integers for dtypes and crashes on some."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError("of another type: raise_argument_error names it")
