"""The operators in plain PyTorch, for compilers and for devices without kernels.

``rope_ext.lowering("decompose")`` uses the rotations, and ``DECOMPOSITIONS`` is a table of them for
``run_decompositions``. ``PLAIN`` has all operators that autograd does not compose of others
(``rope_ext/_engine/fallback.py``). None waits for values on the device: positions outside of a
table give NaN, and slots outside of a cache are skipped.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from rope_ext import _exact_angles, reference


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
    cos, sin = (_wide(t, like=x) for t in _rows(x, cos, sin, position_ids))
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


def apply_rotary_quantize(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """What torch.ops.rope.apply_rotary_quantize writes to x_out and scale_out."""
    rows = (_wide(t, like=x) for t in _rows(x, cos, sin, position_ids))
    return reference.apply_rotary_quantize(x, *rows, **options)


def rms_norm_rotary(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    **options: Any,
) -> Tensor:
    """torch.ops.rope.rms_norm_rotary in plain PyTorch."""
    if weight.shape not in (x.shape[-1:], x.shape[-2:]):
        shapes = f"{list(x.shape[-1:])} or {list(x.shape[-2:])}"
        _refuse(f"a weight of shape {shapes}", list(weight.shape), "rms_norm_rotary")
    normalised = reference._normalised(_wide(x), _wide(weight, like=x), eps, unit_offset)
    return apply_rotary(normalised, cos, sin, position_ids, **options).to(x.dtype)


def rms_norm_rotary_qk(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *rows: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """torch.ops.rope.rms_norm_rotary_qk in plain PyTorch."""
    one: Any = rms_norm_rotary
    return one(q, q_weight, *rows, **options), one(k, k_weight, *rows, **options)


def rms_norm_rotary_qkv(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *rows: Tensor | None,
    kv_heads: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.rope.rms_norm_rotary_qkv in plain PyTorch."""
    q, k, v = reference.split_qkv(qkv, kv_heads)
    q, k = rms_norm_rotary_qk(q, k, q_weight, k_weight, *rows, **options)
    return q, k, v.clone(memory_format=torch.contiguous_format)


# ---- appends: they write the caches, and return what q, k, ... become, None for each cache


def apply_rotary_qk_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *rows: Tensor | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_out: Tensor | None = None,
    q_scale: Tensor | None = None,
    q_scale_out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """torch.ops.rope.apply_rotary_qk_append_kv_ in plain PyTorch."""
    rotate: Any = apply_rotary_qk
    rotated, k = rotate(q, k, *rows, **options)
    _store(k_cache, k, slot_mapping, k_scale)
    _store(v_cache, v, slot_mapping, v_scale)
    q, *float8 = reference._as_float8(q, rotated, q_out, q_scale, q_scale_out)
    return q, k, None, None, *float8


def rms_norm_rotary_qk_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *rows: Tensor | None,
    eps: float = 1e-6,
    norm_v: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_out: Tensor | None = None,
    q_scale: Tensor | None = None,
    q_scale_out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """torch.ops.rope.rms_norm_rotary_qk_append_kv_ in plain PyTorch."""
    rotated, k = rms_norm_rotary_qk(q, k, q_weight, k_weight, *rows, eps=eps, **options)
    if norm_v:
        ones = torch.ones_like(_wide(k_weight, like=v))
        v = reference._normalised(_wide(v), ones, eps, unit_offset=False).to(v.dtype)
    _store(k_cache, k, slot_mapping, k_scale)
    _store(v_cache, v, slot_mapping, v_scale)
    q, *float8 = reference._as_float8(q, rotated, q_out, q_scale, q_scale_out)
    return q, k, v, None, None, *float8


def apply_rotary_mla_append(
    q: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    q_out: Tensor | None = None,
    q_scale: Tensor | None = None,
    q_scale_out: Tensor | None = None,
    **pair_order: Any,
) -> tuple[Tensor | None, ...]:
    """torch.ops.rope.apply_rotary_mla_append_ in plain PyTorch."""
    rows, last = (cos, sin, position_ids), q.shape[-1] - 2 * cos.shape[-1]
    rotated = apply_rotary(q, *rows, rotary_offset=last, **pair_order)
    k = k_pe.reshape(*q.shape[:-2], 1, k_pe.shape[-1])
    k = apply_rotary(k, *rows, **pair_order)
    latent = torch.cat((kv_c.unsqueeze(-2), k), -1)
    _store(kv_cache.unsqueeze(2), latent, slot_mapping, scale)
    q, *float8 = reference._as_float8(q, rotated, q_out, q_scale, q_scale_out)
    return q, k.reshape(k_pe.shape), None, *float8


def shift_cached_k(
    k_cache: Tensor,
    slot_mapping: Tensor,
    old_position_ids: Tensor,
    new_position_ids: Tensor,
    inv_freq: Tensor,
    *,
    new_inv_freq: Tensor | None = None,
    attention_scaling: float = 1.0,
    **options: Any,
) -> tuple[None]:
    """torch.ops.rope.shift_cached_k_ in plain PyTorch."""
    old, new = _in_float64(old_position_ids), _in_float64(new_position_ids)
    if new_inv_freq is None:
        cos, sin = _angles(inv_freq, new - old, None, attention_scaling)
    else:
        old_cos, old_sin = _angles(inv_freq, old, None, 1.0)
        new_cos, new_sin = _angles(new_inv_freq, new, None, attention_scaling)
        cos = new_cos * old_cos + new_sin * old_sin
        sin = new_sin * old_cos - new_cos * old_sin
    block, offset, _ = _places(slot_mapping, k_cache)
    keys = _wide(k_cache[block, offset])
    cos, sin = (t.to(keys.device, keys.dtype) for t in (cos, sin))
    _store(k_cache, apply_rotary(keys, cos, sin, **options), slot_mapping, None)
    return (None,)


def _places(slots: Tensor, cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Block and offset of each token, and whether it has a slot; without one they are 0."""
    size = cache.shape[1]
    inside = (slots >= 0) & (slots < cache.shape[0] * size)
    slots = torch.where(inside, slots, 0).long()
    return slots // size, slots % size, inside


def _store(cache: Tensor, x: Tensor, slots: Tensor, scale: Tensor | None) -> None:
    """Writes the heads [.., Hk, D] of each token to its slot.

    Which tokens have one is known on the device alone, and the others must write nothing. So they
    write what the first token with a slot writes, to the same slot; where there is none, all write
    what the cache holds.
    """
    slots, rows = slots.flatten(), x.flatten(0, -3)
    if len(slots) > len(rows) or cache.shape[2:] != rows.shape[1:]:
        expected = f"at most {len(rows)} slots, and a cache of {list(rows.shape[1:])} for each"
        _refuse(expected, f"{len(slots)} and {list(cache.shape[2:])}", "append")
    rows = rows[: len(slots)]  # tokens past the end of slots are not stored
    if rows.numel() == 0 or cache.numel() == 0:
        return
    block, offset, inside = _places(slots, cache)
    token = torch.arange(len(slots), device=slots.device)
    token = torch.where(inside, token, inside.int().argmax())
    at = block[token], offset[token]
    rows = reference._rounded(rows, cache.dtype, scale)[token]
    if cache.dtype.itemsize == 1:  # float8 has no index_put
        cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
    cache.index_put_(at, torch.where(inside.any(), rows, cache[at]))


# ---- angles: in float64, on the CPU where the device has none


def cos_sin_cache(
    inv_freq: Tensor, length: int, *, start: int = 0, **options: Any
) -> tuple[Tensor, Tensor]:
    """torch.ops.rope.cos_sin_cache in plain PyTorch."""
    positions = torch.arange(start, start + length, device=inv_freq.device)
    return cos_sin(inv_freq, positions, **options)


def cos_sin(
    inv_freq: Tensor,
    position_ids: Tensor,
    axes: Tensor | None = None,
    *,
    attention_scaling: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """torch.ops.rope.cos_sin in plain PyTorch."""
    dtype = dtype or (torch.float64 if inv_freq.dtype == torch.float64 else torch.float32)
    cos, sin = _angles(inv_freq, position_ids, axes, attention_scaling)
    cos, sin = (reference.narrowed(t, dtype).to(inv_freq.device) for t in (cos, sin))
    return cos, sin


def cos_sin_backward(
    grad_cos: Tensor,
    grad_sin: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    start: int = 0,
    attention_scaling: float = 1.0,
) -> Tensor:
    """torch.ops.rope.cos_sin_backward in plain PyTorch."""
    if position_ids is None:
        position_ids = torch.arange(start, start + grad_cos.shape[0], device=inv_freq.device)
    cos, sin = _angles(inv_freq, position_ids, axes, attention_scaling)
    slope = cos * _in_float64(grad_sin) - sin * _in_float64(grad_cos)
    terms = _of_pairs(_in_float64(position_ids), axes) * slope
    grad = terms.reshape(-1, terms.shape[-1]).sum(0)
    return reference.narrowed(grad, inv_freq.dtype).to(inv_freq.device)


def apply_rotary_qk_at(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    attention_scaling: float = 1.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """torch.ops.rope.apply_rotary_qk_at in plain PyTorch."""
    if position_ids is None:
        position_ids = torch.arange(q.shape[-3], device=q.device)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    made: dict[str, Any] = {"attention_scaling": attention_scaling, "dtype": dtype}
    return apply_rotary_qk(q, k, *cos_sin(inv_freq, position_ids, axes, **made), **options)


def _angles(
    inv_freq: Tensor, position_ids: Tensor, axes: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """cos and sin in float64, [.., P]."""
    positions = _of_pairs(_in_float64(position_ids), axes)
    cos, sin = _exact_angles.cos_sin(positions, _in_float64(inv_freq))
    return cos * scaling, sin * scaling


def _of_pairs(positions: Tensor, axes: Tensor | None) -> Tensor:
    """positions [..] -> [.., 1], or with axes [A, ..] -> [.., P]: NaN where axes is not in
    [0, A).
    """
    if axes is None:
        return positions.unsqueeze(-1)
    axes = axes.to(positions.device)
    inside = (axes >= 0) & (axes < positions.shape[0])
    of_pairs = positions[torch.where(inside, axes, 0).long()].movedim(0, -1)
    return torch.where(inside, of_pairs, torch.nan)


def _in_float64(x: Tensor) -> Tensor:
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


# ---- the gradient to a table


def apply_rotary_table_backward(
    grad_q: Tensor,
    q: Tensor,
    grad_k: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    token_order: Tensor | None = None,
    row_offsets: Tensor | None = None,
    *,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """torch.ops.rope.apply_rotary_table_backward in plain PyTorch."""
    width = cos.shape[-1]
    dim = 2 * width if rotary_dim is None else rotary_dim
    rotating = slice(rotary_offset, rotary_offset + dim)
    order_out = interleaved if interleaved_out is None else interleaved_out
    grads: list[Any] = [0, 0, 0, 0]  # to c1, s1, c2, s2: [.., P] of each token
    for grad, x in ((grad_q, q), (grad_k, k)):
        if grad is None or x is None:
            continue
        g1, g2 = reference._pairs(_wide(grad[..., rotating]), order_out)
        x1, x2 = reference._pairs(_wide(x[..., rotating]), interleaved)
        products = g1 * x1, -g1 * x2, g2 * x2, g2 * x1
        grads = [total + each.sum(-2) for total, each in zip(grads, products, strict=True)]
    to_c1, to_s1, to_c2, to_s2 = grads
    if inverse:  # the transpose has -s2 for s1, and -s1 for s2
        to_s1, to_s2 = -to_s2, -to_s1
    both: list[Tensor] = []
    order = -1 if (interleaved if inverse else order_out) else -2
    for first, second in ((to_c1, to_c2), (to_s1, to_s2)):
        if width == dim:  # one angle a channel, in the order of the result (inverse: of x)
            both.append(torch.stack((first, second), order).flatten(-2))
        else:
            both.append(first + second)
    to_cos, to_sin = (_over_tokens(x, cos, token_order, row_offsets).to(cos.dtype) for x in both)
    return to_cos, to_sin


def _over_tokens(
    grad: Tensor, cos: Tensor, token_order: Tensor | None, row_offsets: Tensor | None
) -> Tensor:
    """Of each token [B, S, W] or [T, W] -> of each row, of cos's shape."""
    grad = grad.reshape(-1, *grad.shape[-2:])  # [1|B, S, W]
    if cos.dim() == 3:
        return grad if cos.shape[0] == grad.shape[0] else grad.sum(0, keepdim=True)
    rows, width = cos.shape
    to_rows = grad.new_zeros(rows + 1, width)  # the last: of tokens outside of the table
    if token_order is None or row_offsets is None:
        to_rows[: grad.shape[1]] = grad.sum(0)
    else:
        place = torch.arange(token_order.numel(), device=token_order.device)
        row = torch.searchsorted(row_offsets[1:].contiguous(), place, right=True)
        row = torch.where(place < row_offsets[0], rows, row)
        to_rows.index_put_((row,), grad.flatten(0, 1)[token_order], accumulate=True)
    return to_rows[:rows]


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


def _refuse(expected: str, got: object, what: str = "apply_rotary") -> NoReturn:
    raise RuntimeError(f"rope::{what}, decomposed: expected {expected}, got {got}")


def _wide(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x in the dtype of the arithmetic for `like`, or for x."""
    of = x if like is None else like
    return x.to(torch.float64 if of.dtype == torch.float64 else torch.float32)


# By the name of the operator, without _ and .out. An operator that writes returns what its written
# tensors become, in the order of the schema.
PLAIN: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        apply_rotary,
        apply_rotary_qk,
        apply_rotary_qkv,
        apply_rotary_quantize,
        rms_norm_rotary,
        rms_norm_rotary_qk,
        rms_norm_rotary_qkv,
        apply_rotary_qk_append_kv,
        rms_norm_rotary_qk_append_kv,
        apply_rotary_mla_append,
        shift_cached_k,
        cos_sin_cache,
        cos_sin,
        cos_sin_backward,
        apply_rotary_qk_at,
        apply_rotary_table_backward,
    )
}

# For torch.export's run_decompositions, or a backend that has no custom operators.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.rope.apply_rotary.default: apply_rotary,
    torch.ops.rope.apply_rotary_qk.default: apply_rotary_qk,
    torch.ops.rope.apply_rotary_qkv.default: apply_rotary_qkv,
}
