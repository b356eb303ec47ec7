"""The operators in ONNX: a table for torch.onnx.export.

    torch.onnx.export(model, inputs, opset_version=23, custom_translation_table=TRANSLATIONS)

A rotation becomes the standard operator RotaryEmbedding of opset 23. Rotations that it can't
express become basic ONNX operators with the same results: float64, one angle a channel (W = R), and
every rotation if opset_version is below 23. The tables of cos and sin are computed in float64.

Arithmetic is in float32 (float64 for float64) and rounded once, as in the operators themselves:
float16 and bfloat16 are cast before and after a rotation. The ONNX runtime raises the errors for a
position outside of the table and for a table that is too short.

ONNX has no operators that write. If a model rotates in place and needs no gradient, export it
within ``rope_ext.lowering("decompose")``.

Source: onnx.ai/onnx/operators/onnx__RotaryEmbedding.html.
"""

from collections.abc import Callable
from typing import Any

import torch

try:
    import onnx_ir
    from onnxscript import evaluator, onnx_types
    from onnxscript import opset18 as op
    from onnxscript import opset23 as op23
except ImportError as error:
    raise ImportError(
        f"rope_ext.integrations.onnx needs the package onnxscript, as torch.onnx does ({error})"
    ) from error

Value = onnx_types.TensorType  # of a traced onnx_ir.Value; the exporter reads annotations
INT64, FLOAT, DOUBLE = onnx_ir.DataType.INT64, onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE


def apply_rotary(
    x: Value,  # [B, S, H, D] or [T, H, D]
    cos: Value,  # [L, W], [1|B, S, W] or [1, T, W]
    sin: Value,  # as cos
    position_ids: Value | None = None,  # [S], [1|B, S] or [T]
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
) -> Value:
    """rope::apply_rotary, in ONNX."""
    packed, heads, head_dim, width = len(x.shape) == 3, *x.shape[-2:], cos.shape[-1]
    dim = 2 * width if rotary_dim is None else rotary_dim
    order = interleaved if interleaved_out is None else interleaved_out
    dtype, by_token = x.dtype, len(cos.shape) == 3
    arithmetic = DOUBLE if dtype == DOUBLE else FLOAT
    standard = width < dim and arithmetic == FLOAT and _opset_version() >= 23

    x, cos, sin = (_cast(t, arithmetic) for t in (x, cos, sin))
    if packed:
        x = op.Unsqueeze(x, [0])
    x = op.Transpose(x, perm=[0, 2, 1, 3])  # [B, H, S, D]
    ids = None if by_token else _positions(x, position_ids)
    # onnxruntime refuses a table with fewer rows than tokens, which packed sequences may have.
    if ids is not None and (packed or not standard):
        cos, sin, ids = _rows(cos, ids), _rows(sin, ids), None

    # The standard operator leaves the channels after those that rotate as they are.
    end = head_dim if standard and order == interleaved else rotary_offset + dim
    y = x if (rotary_offset, end) == (0, head_dim) else _channels(x, rotary_offset, end)
    if standard:
        # Older onnxruntime releases need the number of heads if a part of the head rotates.
        part = {"rotary_embedding_dim": dim, "num_heads": heads if isinstance(heads, int) else 0}
        attributes = part if rotary_offset + dim < end else {}
        y = _standard(y, cos, op.Neg(sin) if inverse else sin, ids, interleaved, **attributes)
        if order != interleaved:
            y = _joined(*_pairs(y, dim, interleaved), dim, order)
    else:
        y = _plain(y, cos, sin, dim, width == dim, interleaved, order, inverse)
    if rotary_offset > 0 or end < head_dim:
        parts = [_channels(x, 0, rotary_offset), y, _channels(x, end, head_dim)]
        y = op.Concat(*parts, axis=-1)
    y = op.Transpose(y, perm=[0, 2, 1, 3])
    return _cast(op.Squeeze(y, [0]) if packed else y, dtype)


def apply_rotary_qk(
    q: Value,
    k: Value,
    cos: Value,
    sin: Value,
    position_ids: Value | None = None,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
) -> tuple[Value, Value]:
    """rope::apply_rotary_qk, in ONNX."""
    rest = rotary_dim, rotary_offset, interleaved, interleaved_out, inverse
    q = apply_rotary(q, cos, sin, position_ids, *rest)
    return q, apply_rotary(k, cos, sin, position_ids, *rest)


def cos_sin_cache(
    inv_freq: Value,  # [P]
    length: int | Value,
    start: int | Value = 0,
    attention_scaling: float = 1.0,
    dtype: int = -1,
) -> tuple[Value, Value]:
    """rope::cos_sin_cache, in ONNX."""
    start, length = _int64(start), _int64(length)
    position_ids = op.Range(start, op.Add(start, length), _int64(1))
    return cos_sin(inv_freq, position_ids, None, attention_scaling, dtype)


def cos_sin(
    inv_freq: Value,  # [P]
    position_ids: Value,  # [*], with axes [A, *]
    axes: Value | None = None,  # [P]
    attention_scaling: float = 1.0,
    dtype: int = -1,
) -> tuple[Value, Value]:
    """rope::cos_sin, in ONNX: exact but for 2^-53 of the angle and one rounding."""
    if dtype == -1:  # None
        dtype = DOUBLE if inv_freq.dtype == DOUBLE else FLOAT
    position = _cast(position_ids, DOUBLE)
    if axes is None:
        position = op.Unsqueeze(position, [-1])
    else:
        dims = range(1, len(position_ids.shape))
        position = op.Transpose(op.Gather(position, axes, axis=0), perm=[*dims, 0])
    angle = op.Mul(position, _cast(inv_freq, DOUBLE))
    scaling = op.Constant(value=onnx_ir.tensor(attention_scaling, dtype=DOUBLE))
    cos, sin = (op.Mul(f(angle), scaling) for f in (op.Cos, op.Sin))
    return op.Cast(cos, to=dtype), op.Cast(sin, to=dtype)


def apply_rotary_qk_at(
    q: Value,
    k: Value,
    inv_freq: Value,  # [P]
    position_ids: Value | None = None,  # [S], [1|B, S] or [T], with axes [A, ...]
    axes: Value | None = None,
    attention_scaling: float = 1.0,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
) -> tuple[Value, Value]:
    """rope::apply_rotary_qk_at, in ONNX: by rows of cos and sin."""
    tokens = 1
    if position_ids is not None:
        tokens = len(position_ids.shape) - (axes is not None)
    else:
        first = len(q.shape) - 3
        length = op.Squeeze(op.Shape(q, start=first, end=first + 1), [0])
        position_ids = op.Range(_int64(0), length, _int64(1))
    dtype = DOUBLE if q.dtype == DOUBLE else FLOAT
    rows = cos_sin(inv_freq, position_ids, axes, attention_scaling, dtype)
    for row in rows:  # apply_rotary reads these; the exporter sets them only for results
        row.shape = onnx_ir.Shape([*([None] * tokens), inv_freq.shape[0]])
        row.dtype = onnx_ir.DataType(dtype)
    rest = rotary_offset, interleaved, interleaved_out, inverse
    return apply_rotary_qk(q, k, *rows, None, None, *rest)


# For custom_translation_table of torch.onnx.export(..., dynamo=True).
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.rope.apply_rotary.default: apply_rotary,
    torch.ops.rope.apply_rotary_qk.default: apply_rotary_qk,
    torch.ops.rope.cos_sin_cache.default: cos_sin_cache,
    torch.ops.rope.cos_sin.default: cos_sin,
    torch.ops.rope.apply_rotary_qk_at.default: apply_rotary_qk_at,
}


def _standard(
    x: Value, cos: Value, sin: Value, ids: Value | None, interleaved: bool, **attributes: int
) -> Value:
    """x [B, H, S, D] rotated by rows [1|B, S, P], or by rows ids of a table [L, P]."""
    if ids is None:
        cos, sin = _for_each_sequence(cos, x, 3), _for_each_sequence(sin, x, 3)
    else:
        ids = _for_each_sequence(ids, x, 2)
    return op23.RotaryEmbedding(x, cos, sin, ids, interleaved=int(interleaved), **attributes)


def _plain(
    x: Value,
    cos: Value,
    sin: Value,
    dim: int,
    by_channel: bool,
    interleaved: bool,
    order: bool,
    inverse: bool,
) -> Value:
    """x [B, H, S, R] rotated by rows [1|B, S, W], like reference.apply_rotary."""
    cos, sin = op.Unsqueeze(cos, [1]), op.Unsqueeze(sin, [1])  # the same for all heads
    c1, c2, s1, s2 = cos, cos, sin, sin
    if by_channel:  # one angle a channel, in the order of the result (inverse: of x)
        columns = interleaved if inverse else order
        (c1, c2), (s1, s2) = _pairs(cos, dim, columns), _pairs(sin, dim, columns)
    if inverse:  # the transpose
        s1, s2 = op.Neg(s2), op.Neg(s1)
    x1, x2 = _pairs(x, dim, interleaved)
    y1 = op.Sub(op.Mul(x1, c1), op.Mul(x2, s1))
    y2 = op.Add(op.Mul(x2, c2), op.Mul(x1, s2))
    return _joined(y1, y2, dim, order)


def _opset_version() -> int:
    return evaluator.default().opset.version  # type: ignore[attr-defined]


def _cast(t: Value, dtype: int) -> Value:
    return t if t.dtype == dtype else op.Cast(t, to=dtype)


def _int64(n: int | list[int] | Value) -> Value:
    return n if isinstance(n, onnx_ir.Value) else op.Constant(value=onnx_ir.tensor(n, dtype=INT64))


def _positions(x: Value, position_ids: Value | None) -> Value:
    """The table rows of the tokens of x [B, H, S, D]: int64 [1|B, S]."""
    if position_ids is None:
        length = op.Squeeze(op.Shape(x, start=2, end=3), [0])
        return op.Unsqueeze(op.Range(_int64(0), length, _int64(1)), [0])
    ids = _cast(position_ids, INT64)
    return op.Unsqueeze(ids, [0]) if len(position_ids.shape) == 1 else ids


def _rows(table: Value, ids: Value) -> Value:
    """The rows [1|B, S, W] of the table [L, W]."""
    # Gather counts negative indices from the end, so they must not reach it.
    refused = _int64(torch.iinfo(torch.int64).max)
    return op.Gather(table, op.Where(op.Less(ids, _int64(0)), refused, ids), axis=0)


def _for_each_sequence(t: Value, x: Value, rank: int) -> Value:
    """Expands t [1|B, S, ..] to [B, S, ..] for x [B, H, S, D]."""
    batch = op.Shape(x, start=0, end=1)
    return op.Expand(t, op.Concat(batch, _int64([1] * (rank - 1)), axis=0))


def _channels(x: Value, start: int, end: int) -> Value:
    return op.Slice(x, [start], [end], [-1])


def _pairs(x: Value, dim: int, interleaved: bool) -> tuple[Value, Value]:
    """The first and second channels of the pairs of x [.., R], each [.., P]."""
    if interleaved:
        return op.Slice(x, [0], [dim], [-1], [2]), op.Slice(x, [1], [dim], [-1], [2])
    return _channels(x, 0, dim // 2), _channels(x, dim // 2, dim)


def _joined(x1: Value, x2: Value, dim: int, interleaved: bool) -> Value:
    """The inverse of _pairs, for [B, H, S, P] each."""
    if not interleaved:
        return op.Concat(x1, x2, axis=-1)
    both = op.Concat(op.Unsqueeze(x1, [-1]), op.Unsqueeze(x2, [-1]), axis=-1)
    return op.Reshape(both, [0, 0, 0, dim])
