"""The rotation in plain PyTorch, for compilers: ``rope_ext.lowering("decompose")`` uses it, and
``DECOMPOSITIONS`` is a table for ``run_decompositions``.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from rope_ext import reference


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    **options: Any,
) -> Tensor:
    """torch.ops.rope.apply_rotary in plain PyTorch."""
    head_dim, dim = x.shape[-1], 2 * cos.shape[-1] if rotary_dim is None else rotary_dim
    if dim < 2 or dim % 2 != 0 or not 0 <= rotary_offset <= head_dim - dim:
        _refuse(
            f"an even rotary_dim of at least 2, and rotary_dim and rotary_offset together at most "
            f"head_dim {head_dim}",
            f"{dim} and {rotary_offset}",
        )
    if cos.shape[-1] not in (dim // 2, dim):
        _refuse(f"cos of width {dim // 2} or, with rotary_dim, {dim}", list(cos.shape))
    cos, sin = _rows(x, cos, sin, position_ids)
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(arithmetic), sin.to(arithmetic)
    return reference.apply_rotary(
        x, cos, sin, rotary_dim=rotary_dim, rotary_offset=rotary_offset, **options
    )


def apply_rotary_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """torch.ops.rope.apply_rotary_qk in plain PyTorch."""
    if q.dtype != k.dtype or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        _refuse(
            f"k of q's dtype and shape, {q.dtype} {list(q.shape)}, but for the number of heads",
            f"{k.dtype} {list(k.shape)}",
        )
    rows = cos, sin, position_ids
    return apply_rotary(q, *rows, **options), apply_rotary(k, *rows, **options)


def apply_rotary_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    kv_heads: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.rope.apply_rotary_qkv in plain PyTorch."""
    heads = qkv.shape[-2]
    groups, of_q = (1, heads - 2) if kv_heads is None else (kv_heads, heads - 2 * kv_heads)
    if groups < 1 or of_q < 1 or of_q % groups != 0:
        _refuse("qkv of Hq + 2 Hk heads, with Hq a multiple of Hk", f"{heads} and Hk = {groups}")
    q, k, v = reference.split_qkv(qkv, kv_heads)
    q, k = apply_rotary_qk(q, k, cos, sin, position_ids, **options)
    return q, k, v.clone(memory_format=torch.contiguous_format)


# For torch.export's run_decompositions, or a backend that has no custom operators.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.rope.apply_rotary.default: apply_rotary,
    torch.ops.rope.apply_rotary_qk.default: apply_rotary_qk,
    torch.ops.rope.apply_rotary_qkv.default: apply_rotary_qkv,
}


def _rows(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """cos and sin with a row for each token, [S, W] or [1|B, S, W], packed [T, W] or [1, T, W].

    Rows outside of the table are NaN.
    """
    packed, seq = x.dim() == 3, x.shape[-3]

    def is_by_token(t: Tensor) -> bool:  # [1|B, S, ..] or [1, T, ..]
        of_batch = t.shape[0] == 1 or (not packed and t.shape[0] == x.shape[0])
        return t.shape[1] == seq and of_batch

    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        _refuse(f"sin like cos, {cos.dtype} {list(cos.shape)}", f"{sin.dtype} {list(sin.shape)}")
    if position_ids is None:
        if not (cos.shape[0] >= seq if cos.dim() == 2 else cos.dim() == 3 and is_by_token(cos)):
            _refuse(f"a row of cos for each of the {seq} positions", list(cos.shape))
        return cos, sin
    ids = position_ids
    of_sequence = ids.dim() == 1 and ids.shape[0] == seq
    of_batch = ids.dim() == 2 and not packed and is_by_token(ids)
    if cos.dim() != 2 or not (of_sequence or of_batch):
        _refuse(
            f"a table cos [L, W] and position_ids for the {seq} positions",
            f"{list(cos.shape)} and {list(ids.shape)}",
        )
    inside = ((ids >= 0) & (ids < cos.shape[0])).unsqueeze(-1)
    row = ids.clamp(0, cos.shape[0] - 1)
    return torch.where(inside, cos[row], torch.nan), torch.where(inside, sin[row], torch.nan)


def _refuse(expected: str, got: object) -> NoReturn:
    raise RuntimeError(f"rope::apply_rotary, decomposed: expected {expected}, got {got}")
