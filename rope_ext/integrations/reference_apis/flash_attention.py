"""flash-attention's rotary functions.

Source: github.com/Dao-AILab/flash-attention, ``flash_attn/layers/rotary.py``
and ``flash_attn/ops/triton/rotary.py``, release 2.8.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rope_ext._engine.calls import is_differentiated, is_transformed
from rope_ext._in_place import (
    check_differentiable_in_place,
    check_tables_need_no_grad,
    in_place_rotation,
)
from rope_ext.integrations.reference_apis._refusals import names_arguments, refuse
from rope_ext.rotation import apply_rotary, apply_rotary_qk


@names_arguments
def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates x by tables, as ``flash_attn.layers.rotary.apply_rotary_emb``.

    Args:
        x: [B, S, H, D], or packed [T, H, D] with cu_seqlens.
        cos: [seqlen_ro, R / 2], a row for each position, R <= D. Of x's dtype or another one.
        sin: as cos.
        interleaved: pairs are neighbouring channels instead of halves.
        inplace: write into x and return it.
        seqlen_offsets: the position of each sequence's first token: an int, or int32 or int64 [B].
        cu_seqlens: int32 or int64 [B + 1], ascending from 0: sequence b of a packed x is
            ``x[cu_seqlens[b] : cu_seqlens[b + 1]]``. Tokens after the last sequence are padding:
            they take the first row, or that of seqlen_offsets if it is an int.
        max_seqlen: the length of the longest sequence of a packed x. Not needed: checked against
            the table's rows if given.

    Returns:
        The rotated x, of its shape and dtype.

    Differs from flash-attention: runs on the CPU as well; takes any D and float64; has gradients to
    cos and sin; is safe under autograd in place. A position past the table raises on the CPU and
    gives NaN on CUDA, where flash-attention leaves the token as it is. Tokens after the last
    sequence are written, where flash-attention leaves them undefined.
    """
    function = "flash_attention.apply_rotary_emb"
    _check_table(function, "cos", cos)
    if cu_seqlens is None:
        if x.dim() != 4:
            refuse(function, "x", "to have shape [B, S, H, D]", x)
        batch, longest = x.shape[:2]
    else:
        if x.dim() != 3:
            refuse(function, "x", "to have shape [T, H, D] when cu_seqlens is given", x)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            refuse(function, "cu_seqlens", "to have shape [B + 1]", cu_seqlens)
        batch, longest = cu_seqlens.shape[0] - 1, max_seqlen or 0
    (cos, sin), offsets = _rows(function, (cos, sin), batch, longest, seqlen_offsets)
    return apply_rotary(
        x,
        cos,
        sin,
        _positions(x, offsets, cu_seqlens),
        interleaved=interleaved,
        layout="bshd" if cu_seqlens is None else "thd",
        inplace=inplace,
    )


@names_arguments
def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates q and k of a packed qkv in place, as the function of ``flash_attn.layers.rotary``.

    Args:
        qkv: [B, S, 3, H, D]; or, with num_heads_q, [B, S, Hq + 2 Hk, D]: heads of q, of k, of v.
            Any strides with the last one 1.
        cos: [seqlen_ro, R / 2], a row for each position, R <= D. Of qkv's dtype or another one.
        sin: as cos.
        cos_k, sin_k: the same for k (xPos), of cos's shape, dtype and device. None: those of q.
        interleaved: pairs are neighbouring channels instead of halves.
        seqlen_offsets: the position of each sequence's first token: an int, or int32 or int64 [B].
        num_heads_q: Hq, for a qkv of four dimensions.

    Returns:
        qkv itself: the same tensor, v untouched. Differentiable for qkv, also twice. No tensor of
        its size is made, except for the gradient in the backward.

    Raises:
        ValueError, RuntimeError: before anything is written, for wrong shapes, for a position past
            the table on the CPU, for a tensor that autograd does not allow to be modified in place
            (a leaf that requires grad, or a view of one: clone it), and for tables that require
            grad.

    Differs from flash-attention: as :func:`apply_rotary_emb`. q and k take one pass for any strides
    (two with cos_k); flash-attention needs a contiguous qkv for that. It also rotates the incoming
    gradient in place, where another function may still read it; here autograd knows of the write
    and copies the gradient if it is a view of another tensor.
    """
    function = "flash_attention.apply_rotary_emb_qkv_"
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            refuse(function, "qkv", "to have shape [B, S, 3, H, D]", qkv)
    elif qkv.dim() != 4:
        expected = "to have shape [B, S, 3, H, D], or [B, S, Hq + 2 Hk, D] with num_heads_q"
        refuse(function, "qkv", expected, qkv)
    elif num_heads_q is None:
        refuse(function, "num_heads_q", "to be given with qkv [B, S, Hq + 2 Hk, D]", num_heads_q)
    elif not 0 <= num_heads_q <= qkv.shape[2] or (qkv.shape[2] - num_heads_q) % 2 != 0:
        expected = f"to leave as many heads for k as for v, of the {qkv.shape[2]} of qkv"
        refuse(function, "num_heads_q", expected, num_heads_q)
    tables = [cos, sin]
    if cos_k is not None or sin_k is not None:
        tables += [cos if cos_k is None else cos_k, sin if sin_k is None else sin_k]
    for name, table in zip(("cos", "sin", "cos_k", "sin_k"), tables, strict=False):
        _check_table(function, name, table)
        if name.endswith("_k"):
            _check_like_cos(function, name, table, cos)
    tables, offsets = _rows(function, tables, *qkv.shape[:2], seqlen_offsets)
    write = partial(_rotate_qkv_, num_heads_q=num_heads_q if qkv.dim() == 4 else None)
    options = {"interleaved": interleaved}
    positions = _positions(qkv, offsets, None)
    return _written(function, {"qkv": qkv}, write, options, positions, *tables)


@names_arguments
def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotates k of a packed kv in place, as ``flash_attn.layers.rotary.apply_rotary_emb_kv_``.

    Args:
        kv: [B, S, 2, H, D]: k and v. Any strides with the last one 1.
        cos, sin, interleaved, seqlen_offsets: as for :func:`apply_rotary_emb_qkv_`.

    Returns:
        kv itself. Differentiable, with errors and differences, as :func:`apply_rotary_emb_qkv_`.
    """
    function = "flash_attention.apply_rotary_emb_kv_"
    if kv.dim() != 5 or kv.shape[2] != 2:
        refuse(function, "kv", "to have shape [B, S, 2, H, D]", kv)
    for name, table in (("cos", cos), ("sin", sin)):
        _check_table(function, name, table)
    tables, offsets = _rows(function, [cos, sin], *kv.shape[:2], seqlen_offsets)
    options = {"interleaved": interleaved}
    return _written(
        function, {"kv": kv}, _rotate_kv_, options, _positions(kv, offsets, None), *tables
    )


def _rotate_qkv_(
    qkv: Tensor,
    position_ids: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *of_k: Tensor,
    num_heads_q: int | None,
    **options: Any,
) -> None:
    if num_heads_q is None:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]
    if not of_k:
        apply_rotary_qk(q, k, cos, sin, position_ids, inplace=True, **options)
        return
    apply_rotary(q, cos, sin, position_ids, inplace=True, **options)
    apply_rotary(k, *of_k, position_ids, inplace=True, **options)


def _rotate_kv_(
    kv: Tensor, position_ids: Tensor | None, cos: Tensor, sin: Tensor, **options: Any
) -> None:
    apply_rotary(kv[:, :, 0], cos, sin, position_ids, inplace=True, **options)


def _written(
    function: str,
    named: dict[str, Tensor],
    write: Callable[..., None],
    options: dict[str, Any],
    position_ids: Tensor | None,
    *tables: Tensor,
) -> Tensor:
    """The one tensor of `named`, after `write` has rotated parts of it. Autograd gets one node for
    the whole tensor: nodes for views of its parts would copy a whole gradient each.
    """
    (x,) = named.values()
    if not is_differentiated(x, *tables) or is_transformed():
        write(x, position_ids, *tables, **options)
        return x
    for cos, sin in zip(tables[::2], tables[1::2], strict=True):
        check_tables_need_no_grad(function, cos, sin)
    check_differentiable_in_place(function, named)
    with torch.no_grad():
        write(x, position_ids, *tables, **options)

    def rotated(grad: Tensor, *rows: Tensor, layout: str, **options: Any) -> Tensor:
        return _written(function, {"grad": grad.clone()}, write, options, *rows)

    return in_place_rotation(x, rotated, "bshd", options, position_ids, *tables)


def _check_table(function: str, name: str, table: Tensor) -> None:
    if table.dim() != 2:
        refuse(function, name, "to have shape [seqlen_ro, R / 2]", table)


def _check_like_cos(function: str, name: str, table: Tensor, cos: Tensor) -> None:
    """Raises for a wrong table of k before q is rotated."""
    same = (table.shape, table.dtype, table.device) == (cos.shape, cos.dtype, cos.device)
    if not same or (table.shape[1] > 1 and table.stride(1) != cos.stride(1)):
        got = f"{list(table.shape)}, {table.dtype}, {table.device}, strides {table.stride()}"
        refuse(function, name, "to have the shape, dtype, device and last stride of cos", got)


def _rows(
    function: str,
    tables: Sequence[Tensor],
    batch: int,
    longest: int,
    seqlen_offsets: int | Tensor,
) -> tuple[list[Tensor], Tensor | None]:
    """The tables from the row of the first token on; and the offsets, if they differ between
    sequences.
    """
    rows = tables[0].shape[0]
    if longest > rows:
        refuse(function, "cos", f"to have rows for {longest} tokens", tables[0])
    if isinstance(seqlen_offsets, Tensor):
        if seqlen_offsets.shape != (batch,):
            expected = f"to be an int or of shape [{batch}]"
            refuse(function, "seqlen_offsets", expected, seqlen_offsets)
        return list(tables), seqlen_offsets
    most = rows - longest
    if not 0 <= seqlen_offsets <= most:
        expected = f"to be from 0 to {most}, for {longest} tokens and {rows} rows of cos"
        refuse(function, "seqlen_offsets", expected, seqlen_offsets)
    return [table[seqlen_offsets:] for table in tables], None


def _positions(x: Tensor, offsets: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """position_ids [B, S] or [T]; None if a token's position is its index in the sequence."""
    if cu_seqlens is None:
        if offsets is None:
            return None
        step = torch.arange(x.shape[1], dtype=offsets.dtype, device=offsets.device)
        return offsets[:, None] + step
    token = torch.arange(x.shape[0], dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1  # B for padding
    position = token - cu_seqlens[sequence]
    if offsets is not None:
        position = position + pad(offsets, (0, 1))[sequence]
    return torch.where(sequence < cu_seqlens.shape[0] - 1, position, 0)
