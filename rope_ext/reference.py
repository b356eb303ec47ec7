"""The same mathematics in a few lines of plain PyTorch. The tests compare with it, and
decompositions.py gives it to compilers, for graphs without operators.

It computes in the dtype of its arguments, or in that of a wider cos and sin, and rounds to the
dtype of x at the end. Pass float64 for the exact result.
"""

from typing import Any

import torch
from torch import Tensor


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
) -> Tensor:
    """As :func:`rope_ext.apply_rotary` on x [B, S, H, D] or [T, H, D]."""
    seq = x.shape[-3]
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    elif cos.dim() == 2:
        cos, sin = cos[:seq], sin[:seq]
    elif x.dim() == 3:  # rows [1, T, W] of packed tokens
        cos, sin = cos[0], sin[0]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    dim = 2 * cos.shape[-1] if rotary_dim is None else rotary_dim
    out = interleaved if interleaved_out is None else interleaved_out
    if cos.shape[-1] == dim:  # one angle a channel, in the order of the result (inverse: of x)
        order = interleaved if inverse else out
        (c1, c2), (s1, s2) = _pairs(cos, order), _pairs(sin, order)
    else:
        (c1, c2), (s1, s2) = (cos, cos), (sin, sin)
    if inverse:  # the transpose
        s1, s2 = -s2, -s1
    end = rotary_offset + dim
    before, rotating, after = x[..., :rotary_offset], x[..., rotary_offset:end], x[..., end:]
    x1, x2 = _pairs(rotating, interleaved)
    y1, y2 = (x1 * c1 - x2 * s1).to(x.dtype), (x2 * c2 + x1 * s2).to(x.dtype)
    y = torch.stack((y1, y2), -1).flatten(-2) if out else torch.cat((y1, y2), -1)
    return torch.cat((before, y, after), -1)


def split_qkv(qkv: Tensor, kv_heads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [.., H, D] of [.., Hq + 2 Hk, D] with kv_heads, Hk, or of [.., Hk, Hq / Hk + 2, D]
    by group: views, but for q by group, whose heads do not lie at equal distances.
    """
    if kv_heads is not None:
        q, k, v = qkv.split((qkv.shape[-2] - 2 * kv_heads, kv_heads, kv_heads), -2)
        return q, k, v
    *tokens, groups, heads, dim = qkv.shape
    q, k, v = qkv.split((heads - 2, 1, 1), -2)
    return q.reshape(*tokens, groups * (heads - 2), dim), k.squeeze(-2), v.squeeze(-2)


def apply_rotary_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    kv_heads: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`rope_ext.apply_rotary_qkv`, with v as a view."""
    q, k, v = split_qkv(qkv, kv_heads)
    rows = cos, sin, position_ids
    return apply_rotary(q, *rows, **options), apply_rotary(k, *rows, **options), v


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
    """As :func:`rope_ext.rms_norm_rotary` on x [B, S, H, D] or [T, H, D]."""
    normalised = _normalised(x, weight, eps, unit_offset)
    return apply_rotary(normalised, cos, sin, position_ids, **options)


def rms_norm_rotary_qk(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As :func:`rope_ext.rms_norm_rotary_qk` on q [B, S, H, D], k [B, S, Hk, D], or packed."""
    rows = cos, sin, position_ids
    return (
        rms_norm_rotary(q, q_weight, *rows, **options),
        rms_norm_rotary(k, k_weight, *rows, **options),
    )


def rms_norm_rotary_qkv(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    kv_heads: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`rope_ext.rms_norm_rotary_qkv`, with v as a view."""
    q, k, v = split_qkv(qkv, kv_heads)
    rows = cos, sin, position_ids
    return *rms_norm_rotary_qk(q, k, q_weight, k_weight, *rows, **options), v


def _normalised(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    row = (-1,) if weight.dim() == 1 else (-2, -1)
    mean = x.square().mean(row, keepdim=True)
    return x / (mean + eps).sqrt() * (1 + weight if unit_offset else weight)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and second channels of the pairs of x [..., R], each [..., P]."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, -1)
    return first, second


def cos_sin(
    inv_freq: Tensor,
    position_ids: Tensor,
    *,
    axes: Tensor | None = None,
    attention_scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As :func:`rope_ext.cos_sin`: in float64, exact to about 1e-16 times the angle."""
    positions = position_ids.double()
    positions = positions.unsqueeze(-1) if axes is None else positions[axes].movedim(0, -1)
    angles = positions * inv_freq.double()
    return angles.cos() * attention_scaling, angles.sin() * attention_scaling


def apply_rotary_qk_at(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None = None,
    *,
    axes: Tensor | None = None,
    attention_scaling: float = 1.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As :func:`rope_ext.apply_rotary_qk_at`, by the rows of its angles in float64."""
    if position_ids is None:
        position_ids = torch.arange(q.shape[-3], device=q.device)
    rows = cos_sin(inv_freq, position_ids, axes=axes, attention_scaling=attention_scaling)
    return apply_rotary(q, *rows, **options), apply_rotary(k, *rows, **options)


def apply_rotary_qk_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_out: Tensor | None = None,
    q_scale: Tensor | None = None,
    q_scale_out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """As :func:`rope_ext.apply_rotary_qk_append_kv_` on [B, S, H, D] or [T, H, D] and caches
    [blocks, block_size, Hk, D], but nothing is written.

    Returns:
        What q, k, k_cache and v_cache become; then q_out and q_scale_out, where given.
    """
    rotated, k = (apply_rotary(x, cos, sin, position_ids, **options) for x in (q, k))
    q, *float8 = _as_float8(q, rotated, q_out, q_scale, q_scale_out)
    k_cache = _stored(k_cache, k, slot_mapping, k_scale)
    return q, k, k_cache, _stored(v_cache, v, slot_mapping, v_scale), *float8


def rms_norm_rotary_qk_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    norm_v: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_out: Tensor | None = None,
    q_scale: Tensor | None = None,
    q_scale_out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """As :func:`rope_ext.rms_norm_rotary_qk_append_kv_`, but nothing is written.

    Returns:
        What q, k, v, k_cache and v_cache become; then q_out and q_scale_out, where given.
    """
    rows = q_weight, k_weight, cos, sin, position_ids
    rotated, k = rms_norm_rotary_qk(q, k, *rows, eps=eps, unit_offset=unit_offset, **options)
    q, *float8 = _as_float8(q, rotated, q_out, q_scale, q_scale_out)
    if norm_v:
        v = _normalised(v, torch.ones_like(k_weight), eps, unit_offset=False)
    k_cache = _stored(k_cache, k, slot_mapping, k_scale)
    return q, k, v, k_cache, _stored(v_cache, v, slot_mapping, v_scale), *float8


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
    interleaved: bool = False,
    interleaved_out: bool | None = None,
) -> tuple[Tensor, ...]:
    """As :func:`rope_ext.apply_rotary_mla_append_`, but nothing is written.

    Returns:
        What q, k_pe and kv_cache become; then q_out and q_scale_out, where given.
    """
    options: dict[str, Any] = {"interleaved": interleaved, "interleaved_out": interleaved_out}
    rows, last = (cos, sin, position_ids), q.shape[-1] - 2 * cos.shape[-1]
    rotated = apply_rotary(q, *rows, rotary_offset=last, **options)
    q, *float8 = _as_float8(q, rotated, q_out, q_scale, q_scale_out)
    one_head = k_pe.unsqueeze(-2) if k_pe.dim() < q.dim() else k_pe
    one_head = apply_rotary(one_head, *rows, **options)
    row = torch.cat((kv_c.unsqueeze(-2), one_head), -1)
    kv_cache = _stored(kv_cache.unsqueeze(2), row, slot_mapping, scale).squeeze(2)
    return q, one_head.reshape(k_pe.shape), kv_cache, *float8


def apply_rotary_quantize(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    x_out: Tensor,
    scale_out: Tensor,
    group_size: int = 128,
    eps: float = 1e-10,
    power_of_two_scales: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As :func:`rope_ext.apply_rotary_quantize` on x [B, S, H, D] or [T, H, D], but nothing is
    written.

    Returns:
        What x_out and scale_out become.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rotated = apply_rotary(wide, cos, sin, position_ids, **options)
    groups = rotated.unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1).float().clamp(min=eps) / torch.finfo(x_out.dtype).max
    if power_of_two_scales:
        mantissa, exponent = torch.frexp(scale)  # of [0.5, 1)
        rounded = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        scale = torch.where(scale.isfinite(), rounded, scale)
    return _rounded(groups, x_out.dtype, scale).flatten(-2), scale


def _as_float8(
    q: Tensor, rotated: Tensor, out: Tensor | None, scale: Tensor | None, scale_out: Tensor | None
) -> tuple[Tensor, ...]:
    """What q becomes, and out and scale_out if they are given."""
    if out is None:
        return (rotated,)
    if scale_out is None:
        return q, _rounded(rotated, out.dtype, scale)
    scale = rotated.abs().amax(-1).float() / torch.finfo(out.dtype).max
    scale = torch.where(scale == 0, 1.0, scale)
    return q, _rounded(rotated, out.dtype, scale), scale


def _rounded(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """x [.., H, D], divided by the scale, one or [.., H], as dtype."""
    if scale is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide) / scale.to(wide).unsqueeze(-1)
    if dtype.itemsize == 1:  # as PyTorch rounds to a float8, but saturating
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return narrowed(x, dtype)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as dtype, rounded once: PyTorch rounds float64 to 8 and 16 bits by way of float32. There it
    is rounded to odd, so that the second rounding sees on which side of the float32 it was.
    """
    if x.dtype != torch.float64 or dtype.itemsize > 2:
        return x.to(dtype)
    near = x.float()
    bits, back = near.view(torch.int32), near.double()
    odd = (bits - (back.abs() > x.abs()).int()) | 1
    return torch.where((back == x) | x.isnan(), bits, odd).view(torch.float32).to(dtype)


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
) -> Tensor:
    """As :func:`rope_ext.shift_cached_k_` on a cache [blocks, block_size, Hk, D], by angles in
    float64, but nothing is written.

    Returns:
        What k_cache becomes.
    """
    by_frequencies = new_inv_freq is not None
    to = new_position_ids if by_frequencies else new_position_ids - old_position_ids
    turns = cos_sin(new_inv_freq if by_frequencies else inv_freq, to)
    if by_frequencies:
        (c, s), (old_c, old_s) = turns, cos_sin(inv_freq, old_position_ids)
        turns = c * old_c + s * old_s, s * old_c - c * old_s
    keys = k_cache.flatten(0, 1)[slot_mapping.clamp(min=0)]
    rotated = apply_rotary(keys.double(), *(t * attention_scaling for t in turns), **options)
    stored = _stored(k_cache, rotated, slot_mapping, None)
    return _rotated_channels(stored, k_cache, turns[0], options.get("rotary_offset", 0))


def _rotated_channels(x: Tensor, others: Tensor, cos: Tensor, rotary_offset: int) -> Tensor:
    """x where a row of cos [.., P] rotates, and `others` in the channels before and after."""
    end = rotary_offset + 2 * cos.shape[-1]
    parts = others[..., :rotary_offset], x[..., rotary_offset:end], others[..., end:]
    return torch.cat(parts, -1)


def _stored(cache: Tensor, x: Tensor, slots: Tensor, scale: Tensor | None) -> Tensor:
    """A copy of the cache with the heads [.., Hk, D] of each token in its slot."""
    slots = slots.flatten()
    rows = x.flatten(0, -3)[: len(slots)]  # tokens past the end of slots are not stored
    rows = _rounded(rows, cache.dtype, scale)
    pages = cache.flatten(0, 1).clone()
    as_bytes = pages.view(torch.uint8)
    as_bytes[slots[slots >= 0]] = rows[slots >= 0].view(torch.uint8)
    return pages.view(cache.shape)
