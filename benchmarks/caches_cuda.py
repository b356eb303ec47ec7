"""GPU cases of the rotation with an append to a paged cache: of k and v, and of latents."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from common import FIRST_POSITION, Case
from norms_cuda import EPS, LEAVES, MODEL, leaves, torch_norm, without_eps
from operator_case import (
    EAGER,
    POSITION_BYTES,
    TABLE_BYTES,
    Arguments,
    OperatorCase,
    Way,
    in_float64,
    in_sectors,
)
from rotations_cuda import (
    eager_arguments,
    eager_rotation,
    heads_of,
    inv_freq_of,
    llama,
    moved_bytes,
    row_bytes,
    rows_of,
)
from torch import Tensor

import rope_ext
from rope_ext import reference

rope = torch.ops.rope

BLOCK_SIZE = 16  # tokens
SCALE = 0.25  # of a float8 cache
DEEPSEEK_HEADS, DEEPSEEK_HEAD_DIM, ROTATING, RANK = 128, 192, 64, 512  # DeepSeek-V3


@functools.cache
def slots_of(shape: Case) -> Tensor:
    """[B, S]: a slot for each token, in random order, out of twice as many slots."""
    slots = torch.randperm(2 * shape.tokens)[: shape.tokens]
    return slots.view(shape.batch, shape.seq).cuda()


@functools.cache
def scale() -> Tensor:
    return torch.tensor([SCALE]).cuda()


def cache_of(shape: Case, dtype: torch.dtype, *token: int) -> Tensor:
    """[blocks, block_size, *token]."""
    blocks = -(-2 * shape.tokens // BLOCK_SIZE)
    cache = torch.randn(blocks, BLOCK_SIZE, *token, dtype=torch.bfloat16, device="cuda")
    return cache.to(dtype)


def slot_bytes(shape: Case) -> int:
    return in_sectors(shape.tokens * POSITION_BYTES)


def store(cache: Tensor, x: Tensor, slots: Tensor, scale: Tensor | None) -> None:
    """Stores x [tokens, *token] to its slots, rounded to a float8 as PyTorch rounds."""
    pages = cache.view(-1, *cache.shape[2:])
    if scale is not None:
        limit = torch.finfo(cache.dtype).max
        x = (x.float() / scale).clamp(-limit, limit).to(cache.dtype).view(torch.uint8)
        pages = pages.view(torch.uint8)
    pages.index_copy_(0, slots, x)


# ---- keys and values

KV_NAMES = ("v", "k_cache", "v_cache", "slot_mapping", "k_scale", "v_scale")


def flat_slots(arguments: Arguments) -> Arguments:
    return {**arguments, "slot_mapping": arguments["slot_mapping"].flatten()}


def rotate_then_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    **rows: Any,
) -> None:
    rope.apply_rotary_qk_(q, k, **rows)
    store(k_cache, k.flatten(0, 1), slot_mapping, k_scale)
    store(v_cache, v.flatten(0, 1), slot_mapping, v_scale)


def eager_append_arguments(arguments: Arguments) -> Arguments:
    rest = flat_slots(arguments)
    return {**{n: rest.pop(n, None) for n in KV_NAMES}, **eager_arguments(rest)}


def eager_append(
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    **rotated: Any,
) -> tuple[Tensor, ...]:
    q, k = eager_rotation(**rotated)
    store(k_cache, k.flatten(0, 1), slot_mapping, k_scale)
    store(v_cache, v.flatten(0, 1), slot_mapping, v_scale)
    return q, k, k_cache, v_cache


def kv_arguments(shape: Case, dtype: torch.dtype) -> Arguments:
    """q, k and v in bfloat16, and caches of dtype."""
    q, k = heads_of(shape, MODEL)
    k_cache, v_cache = (cache_of(shape, dtype, *k.shape[2:]) for _ in "kv")
    made = {"q": q, "k": k, "v": torch.randn_like(k), "k_cache": k_cache, "v_cache": v_cache}
    made = {**made, "slot_mapping": slots_of(shape), **rows_of(shape)}
    return made if dtype == MODEL else {**made, "k_scale": scale(), "v_scale": scale()}


def kv_bytes(shape: Case, dtype: torch.dtype) -> int:
    channels = shape.tokens * shape.k_heads * shape.head_dim
    stored = channels * MODEL.itemsize + 2 * channels * dtype.itemsize  # v read, k and v written
    rotated = moved_bytes(shape, shape.heads, MODEL.itemsize, in_place=True)
    return rotated + stored + row_bytes(shape) + slot_bytes(shape) + scale_bytes(dtype, 2)


def append_kv(
    form: str, step: str, tokens: int, dtype: torch.dtype, compiled: bool = False
) -> OperatorCase:
    """A case in bfloat16, with a cache of dtype."""
    shape = llama(step, tokens)
    return OperatorCase(
        rope.apply_rotary_qk_append_kv_.default,
        form,
        shape,
        lambda: kv_arguments(shape, dtype),
        lambda a: reference.apply_rotary_qk_append_kv(**in_float64(a)),
        kv_bytes(shape, dtype),
        {
            "apply_rotary_qk_, two index_copy_": Way(rotate_then_store, flat_slots),
            EAGER: Way(eager_append, eager_append_arguments),
        },
        compiled=compiled,
    )


def norm_then_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    norm_v: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    **weights_and_rows: Any,
) -> tuple[Tensor, ...]:
    q, k = rope.rms_norm_rotary_qk(q, k, **weights_and_rows)
    v = torch.nn.functional.rms_norm(v, v.shape[-1:], eps=EPS) if norm_v else v
    store(k_cache, k.flatten(0, 1), slot_mapping, k_scale)
    store(v_cache, v.flatten(0, 1), slot_mapping, v_scale)
    return q, k, v, k_cache, v_cache


def eager_normed_append(
    q_weight: Tensor, k_weight: Tensor, norm_v: bool, xs: list[Tensor], v: Tensor, **rest: Any
) -> tuple[Tensor, ...]:
    xs = [torch_norm(x, w, EPS) for x, w in zip(xs, (q_weight, k_weight), strict=True)]
    v = torch.nn.functional.rms_norm(v, v.shape[-1:], eps=EPS) if norm_v else v
    q, k, *caches = eager_append(v=v, xs=xs, **rest)
    return q, k, v, *caches


def eager_normed_arguments(arguments: Arguments) -> Arguments:
    a = {"norm_v": False, **without_eps(arguments)}
    own = {name: a.pop(name) for name in ("q_weight", "k_weight", "norm_v")}
    return {**own, **eager_append_arguments(a)}


def normed_append(
    form: str, step: str, tokens: int, dtype: torch.dtype, norm_v: bool = False
) -> OperatorCase:
    """A case in bfloat16 with weights [D], with a cache of dtype."""
    shape = llama(step, tokens)

    def arguments() -> Arguments:
        normed = leaves(shape, LEAVES["q"], all_heads=False)
        made = {**kv_arguments(shape, dtype), **normed, "eps": EPS}
        return {**made, "norm_v": True} if norm_v else made

    of_v = shape.tokens * shape.k_heads * shape.head_dim * MODEL.itemsize  # written
    return OperatorCase(
        rope.rms_norm_rotary_qk_append_kv_.default,
        form,
        shape,
        arguments,
        lambda a: reference.rms_norm_rotary_qk_append_kv(**in_float64(a)),
        kv_bytes(shape, dtype) + 2 * shape.head_dim * MODEL.itemsize + norm_v * of_v,
        {
            "rms_norm_rotary_qk, two index_copy_": Way(norm_then_store, flat_slots),
            EAGER: Way(eager_normed_append, eager_normed_arguments),
        },
        roundings=16,
    )


# ---- keys that move


def shift_arguments(arguments: Arguments) -> Arguments:
    a = dict(arguments)
    distance = a.pop("new_position_ids").cpu() - a.pop("old_position_ids").cpu()
    cos, sin = rope_ext.cos_sin(a.pop("inv_freq"), distance.cuda())
    return {**a, "cos": cos, "sin": sin}


def take_and_store(rotate: Callable[..., Tensor]) -> Callable[..., None]:
    def steps(k_cache: Tensor, slot_mapping: Tensor, cos: Tensor, sin: Tensor) -> None:
        keys = k_cache.flatten(0, 1).view(torch.uint8)[slot_mapping].view(k_cache.dtype)
        of_float8 = k_cache.dtype.itemsize == 1
        keys = rotate(keys.float() if of_float8 else keys, cos, sin)
        store(k_cache, keys, slot_mapping, torch.ones_like(cos[0, 0]) if of_float8 else None)

    return steps


def rotate_keys(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rope.apply_rotary_(keys, cos, sin)
    return keys


def shift(form: str, step: str, tokens: int, dtype: torch.dtype) -> OperatorCase:
    """A case of Llama-3-8B's keys in a cache of dtype, each from a position to another one."""
    shape = llama(step, tokens)

    def arguments() -> Arguments:
        old = FIRST_POSITION + torch.arange(shape.tokens)
        return {
            "k_cache": cache_of(shape, dtype, shape.k_heads, shape.head_dim),
            "slot_mapping": slots_of(shape).flatten(),
            "old_position_ids": old.cuda(),
            "new_position_ids": (old // 2).cuda(),
            "inv_freq": inv_freq_of(shape.head_dim, shape.rotary_dim),
        }

    frequencies = shape.rotary_dim // 2 * TABLE_BYTES
    return OperatorCase(
        rope.shift_cached_k_.default,
        form,
        shape,
        arguments,
        lambda a: (reference.shift_cached_k(**in_float64(a)),),
        moved_bytes(shape, shape.k_heads, dtype.itemsize, in_place=True)
        + 3 * slot_bytes(shape)
        + frequencies,
        {
            "index, apply_rotary_, index_copy_": Way(take_and_store(rotate_keys), shift_arguments),
            EAGER: Way(take_and_store(reference.apply_rotary), shift_arguments),
        },
    )


def scale_bytes(dtype: torch.dtype, count: int) -> int:
    """Bytes of the scales. Here both are one tensor; in a model they share a sector."""
    return in_sectors(4 * count) if dtype.itemsize == 1 else 0


# ---- latents


def split_latent(arguments: Arguments) -> Arguments:
    """The rotated channels of q, and k_pe as one head; the model makes these views anyway."""
    a = flat_slots(arguments)
    return {**a, "k_pe": a["k_pe"].unsqueeze(-2), "scale": a.get("scale")}


def latent_steps(rotate: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    def steps(
        q: Tensor,
        k_pe: Tensor,
        kv_c: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        scale: Tensor | None,
        **rows: Any,
    ) -> tuple[Tensor, ...]:
        q, k_pe = rotate(q, k_pe, **rows)
        row = torch.cat((kv_c, k_pe.squeeze(-2)), -1)
        store(kv_cache, row.flatten(0, 1), slot_mapping, scale)
        return q, k_pe.squeeze(-2), kv_cache

    return steps


def rotate_latent(q: Tensor, k_pe: Tensor, **rows: Any) -> tuple[Tensor, Tensor]:
    rope.apply_rotary_(q, rotary_offset=DEEPSEEK_HEAD_DIM - ROTATING, **rows)
    rope.apply_rotary_(k_pe, **rows)
    return q, k_pe


def eager_latent(
    q: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    stays, turns = q.split((DEEPSEEK_HEAD_DIM - ROTATING, ROTATING), -1)
    turned, k_pe = eager_rotation([turns, k_pe], cos, sin, interleaved)
    return torch.cat((stays, turned), -1), k_pe


def eager_latent_arguments(arguments: Arguments) -> Arguments:
    a = split_latent(arguments)
    rows = eager_arguments({n: a.pop(n) for n in ("cos", "sin", "position_ids") if n in a} | {
        "x": a["q"], "interleaved": a.pop("interleaved")})  # fmt: skip
    rows.pop("xs")
    return {**a, **rows}


def mla_append(
    form: str, step: str, tokens: int, dtype: torch.dtype, compiled: bool = False
) -> OperatorCase:
    """A case of DeepSeek-V3 in bfloat16, interleaved, with a cache of dtype."""
    batch, seq = (1, tokens) if step == "prefill" else (tokens, 1)
    shape = Case("DeepSeek-V3", batch, seq, DEEPSEEK_HEADS, 1, DEEPSEEK_HEAD_DIM, ROTATING, True)
    model = torch.bfloat16

    def arguments() -> Arguments:
        q = heads_of(shape, model)[0]
        k_pe, kv_c = (
            torch.randn(batch, seq, channels, dtype=model, device="cuda")
            for channels in (ROTATING, RANK)
        )
        made = {"q": q, "k_pe": k_pe, "kv_c": kv_c}
        made["kv_cache"] = cache_of(shape, dtype, RANK + ROTATING)
        made = {**made, "slot_mapping": slots_of(shape), **rows_of(shape), "interleaved": True}
        return made if dtype == model else {**made, "scale": scale()}

    stored = tokens * (RANK * model.itemsize + (RANK + ROTATING) * dtype.itemsize)
    rotated = moved_bytes(shape, shape.heads, model.itemsize, in_place=True)
    return OperatorCase(
        rope.apply_rotary_mla_append_.default,
        form,
        shape,
        arguments,
        lambda a: reference.apply_rotary_mla_append(**in_float64(a)),
        rotated + stored + row_bytes(shape) + slot_bytes(shape) + scale_bytes(dtype, 1),
        {
            "two apply_rotary_, cat, index_copy_": Way(latent_steps(rotate_latent), split_latent),
            EAGER: Way(latent_steps(eager_latent), eager_latent_arguments),
        },
        compiled=compiled,
    )
