"""Rotations that also write a paged KV cache, one pass and one launch a layer, with RMSNorm before
the rotation too, and rotations of keys in it. All are for inference.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from rope_ext._argument_errors import raise_argument_error
from rope_ext._engine.calls import call
from rope_ext._engine.direct import direct_call
from rope_ext.options import CACHE_ORDERS, Layout, as_bshd, norm_options, rotation_options

rope = torch.ops.rope
_append_kv, _append_normed, _append_latent, _shift = map(
    direct_call,
    (
        "apply_rotary_qk_append_kv_",
        "rms_norm_rotary_qk_append_kv_",
        "apply_rotary_mla_append_",
        "shift_cached_k_",
    ),
)

CacheLayout = Literal["NHD", "HND"]


def apply_rotary_qk_append_kv_(
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
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    inverse: bool = False,
    layout: Layout = "bshd",
    cache_layout: CacheLayout = "NHD",
) -> None:
    """Rotates q and k in place, and writes the rotated k, and v, to a paged KV cache.

    q and k get the bits of :func:`rope_ext.apply_rotary_qk` with ``inplace=True``. This is for
    inference: nothing may need a gradient.

    Args:
        q, cos, sin, position_ids, rotary_dim, rotary_offset, interleaved, inverse, layout: as for
            :func:`rope_ext.apply_rotary_qk`.
        k: of q's shape and dtype, but for its number of heads Hk.
        v: of k's shape and dtype, in the same layout.
        k_cache: [blocks, block_size, Hk, D] (cache_layout "NHD") or [blocks, Hk, block_size, D]
            ("HND"), any strides with the last one 1: k_cache and v_cache may be parts of one
            tensor. Of q's dtype, float8_e4m3fn or float8_e5m2.
        v_cache: as k_cache.
        slot_mapping: where each token is stored, block * block_size + offset: int32 or int64
            [B, S] or [B * S], for every layout, or [T] if packed. A token with a negative slot is
            rotated and not stored. So are the tokens past the end of a one-dimensional slot_mapping
            that is shorter than q (q and k padded for a CUDA graph).
        k_scale: float32 of one element or [Hk], finite and above 0, for a float8 cache. The rotated
            k, rounded to its dtype, is divided by k_scale, rounded to nearest, ties to even, and
            stored. Too large values become the largest finite value of the dtype; NaN stays NaN.
            None: 1.
        v_scale: as k_scale.
        q_out: float8_e4m3fn or float8_e5m2, of q's shape, in the same layout, for attention kernels
            that take float8 queries: all channels of the rotated q, rounded to q's dtype, are
            divided by a scale, rounded as for the cache, and written here. q itself then stays as
            it is.
        q_scale: float32 of one element or [H], finite and above 0, for q_out. None: 1.
        q_scale_out: float32 [B, S, H] for every layout, or [T, H] if packed, instead of q_scale:
            each head of each token is divided by a scale of its own, which is written here: its
            largest magnitude by the largest finite value of q_out's dtype, or 1 if that is 0.

    Raises:
        RuntimeError: for an invalid argument, before any tensor is modified. The message names the
            operator, the argument, the expected and the given value. On the CPU, a slot outside of
            the cache, a slot of two tokens and a scale that is not above 0 raise. On CUDA they
            raise only if ROPE_EXT_CHECK=1 is set. Otherwise nothing is stored for a slot outside of
            the cache, one of two tokens with the same slot is stored, and a wrong scale is used.
            If another thread writes to slot_mapping during the call, nothing is stored for a slot
            outside of the cache on the CPU either.
        TypeError: likewise, for an argument of another type, such as None or a list for a tensor.
        ValueError: likewise, for an unknown layout or cache_layout, or one that contradicts the
            shapes.

    Source: the semantics are those of vLLM's rotary_embedding and reshape_and_cache_flash, and of
    FlashInfer's append_paged_kv_cache.
    """
    if not is_dynamo_compiling():
        done = _append_kv(
            layout, cache_layout, None, q, k, v, k_cache, v_cache, slot_mapping, cos, sin,
            position_ids, k_scale, v_scale, q_out, q_scale, q_scale_out, rotary_dim, rotary_offset,
            interleaved, inverse,
        )  # fmt: skip
        if done is None:
            return
    try:
        name = "apply_rotary_qk_append_kv_"
        options = rotation_options(rotary_dim, rotary_offset, interleaved, None, inverse)
        options |= _given(k_scale=k_scale, v_scale=v_scale, q_scale=q_scale)
        options |= (outs := _given(q_out=q_out, q_scale_out=q_scale_out))
        if q_out is not None:
            options["q_out"] = as_bshd(q_out, layout, name, "q_out")
        views = _views(name, layout, cache_layout, q, k, v, k_cache, v_cache)
        args = (*views, slot_mapping, cos, sin, position_ids)
        written = (q, k, k_cache, v_cache, *outs.values())
        call(rope.apply_rotary_qk_append_kv_, args, options, written)
    except Exception:
        raise_argument_error(apply_rotary_qk_append_kv_)
        raise


def rms_norm_rotary_qk_append_kv_(
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
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    inverse: bool = False,
    layout: Layout = "bshd",
    cache_layout: CacheLayout = "NHD",
) -> None:
    """Normalises q and k by RMSNorm and rotates them in place, and writes k and v to a paged cache.

    q and k get the bits of :func:`rope_ext.rms_norm_rotary_qk`, and the caches those of
    :func:`rope_ext.apply_rotary_qk_append_kv_` for them. This is for inference: nothing may need a
    gradient.

    Args:
        q, k, k_cache, v_cache, slot_mapping: as for :func:`rope_ext.apply_rotary_qk_append_kv_`.
        cos, sin, position_ids, layout, cache_layout: as there.
        k_scale, v_scale, q_out, q_scale, q_scale_out: as there.
        v: of k's shape and dtype, in the same layout; it may share memory with nothing else.
        q_weight, k_weight, eps, unit_offset: as for :func:`rope_ext.rms_norm_rotary_qk`.
        norm_v: v is normalised too, in place, without a weight (Gemma 4): a row is a head, or with
            weights [H, D] all heads of a token.
        rotary_dim, rotary_offset, interleaved, inverse: as for :func:`rope_ext.apply_rotary_qk`.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`rope_ext.apply_rotary_qk_append_kv_`.

    Source: as of those two; Gemma4RMSNorm of transformers (with_scale=False).
    """
    if not is_dynamo_compiling():
        done = _append_normed(
            layout, cache_layout, None, q, k, v, k_cache, v_cache, slot_mapping, q_weight, k_weight,
            cos, sin, position_ids, eps, unit_offset, norm_v, k_scale, v_scale, q_out, q_scale,
            q_scale_out, rotary_dim, rotary_offset, interleaved, inverse,
        )  # fmt: skip
        if done is None:
            return
    try:
        name = "rms_norm_rotary_qk_append_kv_"
        options = rotation_options(rotary_dim, rotary_offset, interleaved, None, inverse)
        options |= norm_options(eps, unit_offset)
        if norm_v:
            options["norm_v"] = norm_v
        options |= _given(k_scale=k_scale, v_scale=v_scale, q_scale=q_scale)
        options |= (outs := _given(q_out=q_out, q_scale_out=q_scale_out))
        if q_out is not None:
            options["q_out"] = as_bshd(q_out, layout, name, "q_out")
        views = _views(name, layout, cache_layout, q, k, v, k_cache, v_cache)
        args = (*views, slot_mapping, q_weight, k_weight, cos, sin, position_ids)
        written = (q, k, v, k_cache, v_cache, *outs.values())
        call(rope.rms_norm_rotary_qk_append_kv_, args, options, written)
    except Exception:
        raise_argument_error(rms_norm_rotary_qk_append_kv_)
        raise


def apply_rotary_mla_append_(
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
) -> None:
    """Rotates q and k_pe of DeepSeek's latent attention in place, and writes the rows of the cache.

    The last R = 2 W channels of each head of q rotate, and all of k_pe, the one key that all heads
    share. The row of a token in the cache is its latent kv_c, then the rotated k_pe. This is for
    inference: nothing may need a gradient.

    Args:
        q: [B, S, H, D] or packed [T, H, D], R <= D, any strides with the last one 1; it may be a
            part of a larger tensor. float64, float32, float16 or bfloat16.
        k_pe: [B, S, R], [B, S, 1, R], [T, R] or [T, 1, R], of q's dtype.
        kv_c: [B, S, rank] or [T, rank], of q's dtype.
        kv_cache: [blocks, block_size, rank + R], any strides with the last one 1. Of q's dtype,
            float8_e4m3fn or float8_e5m2.
        slot_mapping: as for :func:`rope_ext.apply_rotary_qk_append_kv_`.
        cos, sin: a table [L, W], or a row for each token [1|B, S, W], [T, W] or [1, T, W]: one
            angle a pair.
        position_ids: as for :func:`rope_ext.apply_rotary`.
        scale: float32 of one element, for a float8 cache: as k_scale of
            :func:`rope_ext.apply_rotary_qk_append_kv_`, for the whole row.
        q_out, q_scale, q_scale_out: as there: all of q, also the channels that do not rotate.
        interleaved, interleaved_out: as for :func:`rope_ext.apply_rotary`. DeepSeek-V3's pairs are
            neighbours that become halves (True, False), which works in place for R up to 512.

    Raises:
        RuntimeError, TypeError: as :func:`rope_ext.apply_rotary_qk_append_kv_`.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; the row of the cache is that of vLLM's
    concat_and_cache_mla.
    """
    if not is_dynamo_compiling():
        done = _append_latent(
            None, None, None, q, k_pe, kv_c, kv_cache, slot_mapping, cos, sin, position_ids, scale,
            q_out, q_scale, q_scale_out, interleaved, interleaved_out,
        )  # fmt: skip
        if done is None:
            return
    try:
        options = rotation_options(interleaved=interleaved, interleaved_out=interleaved_out)
        options |= _given(scale=scale, q_scale=q_scale)
        options |= (outs := _given(q_out=q_out, q_scale_out=q_scale_out))
        args = (q, k_pe, kv_c, kv_cache, slot_mapping, cos, sin, position_ids)
        call(rope.apply_rotary_mla_append_, args, options, (q, k_pe, kv_cache, *outs.values()))
    except Exception:
        raise_argument_error(apply_rotary_mla_append_)
        raise


def shift_cached_k_(
    k_cache: Tensor,
    slot_mapping: Tensor,
    old_position_ids: Tensor,
    new_position_ids: Tensor,
    inv_freq: Tensor,
    *,
    new_inv_freq: Tensor | None = None,
    attention_scaling: float = 1.0,
    rotary_offset: int = 0,
    interleaved: bool = False,
    cache_layout: CacheLayout = "NHD",
) -> None:
    """Gives keys of a paged KV cache new positions: rotates them, in place, by the difference.

    For tokens that are dropped from the middle of a context (context shift), cached chunks that are
    used at another place (prefix and chunk reuse), and frequencies that change while keys are
    cached (dynamic NTK, LongRoPE). A key rotated at position p and moved to position q is the key
    rotated at q, but for the rounding of the cache's dtype, one more for each move: the angle is
    exact at any distance. This is for inference: nothing may need a gradient.

    Args:
        k_cache: [blocks, block_size, Hk, D] (cache_layout "NHD") or [blocks, Hk, block_size, D]
            ("HND"), or the rows of latent attention [blocks, block_size, rank + R], whose last
            R = 2P channels rotate. Any strides with the last one 1; float64, float32, float16,
            bfloat16, float8_e4m3fn or float8_e5m2. A scale of a float8 cache stays as it is: a
            rotation keeps it.
        slot_mapping: the slots of the keys, block * block_size + offset: int32 or int64 [N], none
            twice. Nothing is done for a negative slot.
        old_position_ids: [N], where the keys are now, in tokens: int32, int64 or floating, of any
            value.
        new_position_ids: [N], where they go.
        inv_freq: [P], radians per token. The first R = 2P channels from rotary_offset on rotate, or
            of a latent cache the last.
        new_inv_freq: [P], of the new angles: they are new_position_ids * new_inv_freq. None:
            inv_freq.
        attention_scaling: factor on the channels that rotate: where the frequencies change, that of
            the new ones divided by that of the old ones.
        rotary_offset: the first channel that rotates, 0 <= rotary_offset <= D - R. 0 for a latent
            cache.
        interleaved: the order of the pairs, as for :func:`rope_ext.apply_rotary`.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`rope_ext.apply_rotary_qk_append_kv_`.

    Source: RoFormer, arXiv 2104.09864, equation 34: rotations of one pair add up. llama.cpp's
    llama_memory_seq_add does the same for a shift of all keys.
    """
    if not is_dynamo_compiling():
        done = _shift(
            None, cache_layout, None, k_cache, slot_mapping, old_position_ids, new_position_ids,
            inv_freq, new_inv_freq, attention_scaling, rotary_offset, interleaved,
        )  # fmt: skip
        if done is None:
            return
    try:
        if k_cache.dim() == 3:
            cache = k_cache.unsqueeze(2)
            rotary_offset += k_cache.shape[2] - 2 * inv_freq.numel()
        else:
            cache = _as_nhd(k_cache, cache_layout, "shift_cached_k_", "k_cache")
        args = (cache, slot_mapping, old_position_ids, new_position_ids, inv_freq)
        options = rotation_options(rotary_offset=rotary_offset, interleaved=interleaved)
        options |= {"new_inv_freq": new_inv_freq, "attention_scaling": attention_scaling}
        call(rope.shift_cached_k_, args, options, (k_cache,))
    except Exception:
        raise_argument_error(shift_cached_k_)
        raise


def _given(**tensors: Tensor | None) -> dict[str, Any]:
    return {name: t for name, t in tensors.items() if t is not None}


def _views(
    function: str, layout: str, cache_layout: str, q: Tensor, k: Tensor, v: Tensor,
    k_cache: Tensor, v_cache: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The tensors as [B, S, H, D] or [T, H, D], and the caches as [blocks, block_size, Hk, D]."""
    xs = (("q", q), ("k", k), ("v", v))
    caches = (("k_cache", k_cache), ("v_cache", v_cache))
    return (
        *(as_bshd(x, layout, function, name) for name, x in xs),
        *(_as_nhd(cache, cache_layout, function, name) for name, cache in caches),
    )


def _as_nhd(cache: Tensor, layout: str, function: str, name: str) -> Tensor:
    """A view [blocks, block_size, Hk, D] of a cache."""
    if layout not in CACHE_ORDERS:
        raise ValueError(
            f"rope_ext.{function}: expected cache_layout to be one of {', '.join(CACHE_ORDERS)}, "
            f"got {layout!r}"
        )
    if cache.dim() != 4:
        heads_first = layout == "HND"
        shape = "[blocks, Hk, block_size, D]" if heads_first else "[blocks, block_size, Hk, D]"
        raise ValueError(
            f"rope_ext.{function}: expected {name} to have shape {shape} (cache_layout "
            f"{layout!r}), got {list(cache.shape)}"
        )
    swap = CACHE_ORDERS[layout][1]
    return cache if swap is None else cache.transpose(swap[0], swap[1])
