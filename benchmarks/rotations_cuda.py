"""GPU cases of the rotation, by a table and by angles."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from common import DECODE_STRIDE, FIRST_POSITION, Case
from operator_case import (
    EAGER,
    FUNCTION,
    POSITION_BYTES,
    TABLE_BYTES,
    Arguments,
    OperatorCase,
    Way,
    in_float64,
    in_sectors,
)
from other_libraries import eager, widened
from other_libraries_cuda import rotations_of_other_libraries
from torch import Tensor

import rope_ext
from rope_ext import reference

rope = torch.ops.rope

AXES = 3  # time, height and width


def llama(step: str, tokens: int, interleaved: bool = False) -> Case:
    batch, seq = (1, tokens) if step == "prefill" else (tokens, 1)
    return Case("Llama-3-8B", batch, seq, 32, 8, 128, 128, interleaved)


def neox(tokens: int) -> Case:
    return Case("GPT-NeoX-20B", 1, tokens, 64, 64, 96, 24)


@functools.cache
def inv_freq_of(head_dim: int, rotary_dim: int) -> Tensor:
    return rope_ext.frequencies.default(head_dim, rotary_dim=rotary_dim)[0].cuda()


@functools.cache
def rows_of(shape: Case) -> Arguments:
    """A table from FIRST_POSITION on; no positions in prefill, one for each sequence in decode."""
    inv_freq = inv_freq_of(shape.head_dim, shape.rotary_dim).cpu()
    length = shape.seq if shape.step == "prefill" else DECODE_STRIDE * shape.batch
    cos, sin = (t.cuda() for t in rope_ext.cos_sin_cache(inv_freq, length, start=FIRST_POSITION))
    rows: Arguments = {"cos": cos, "sin": sin}
    if shape.step == "decode":
        rows["position_ids"] = (DECODE_STRIDE * torch.arange(shape.batch)[:, None]).cuda()
    return rows


def row_bytes(shape: Case) -> int:
    """Bytes of the table and of the positions."""
    table = 2 * shape.tokens * shape.rotary_dim // 2 * TABLE_BYTES
    return table + (in_sectors(shape.tokens * POSITION_BYTES) if shape.step == "decode" else 0)


def heads_of(shape: Case, dtype: torch.dtype) -> list[Tensor]:
    """q [B, S, Hq, D] and k [B, S, Hk, D]."""
    return [
        torch.randn(shape.batch, shape.seq, heads, shape.head_dim, dtype=dtype, device="cuda")
        for heads in (shape.q_heads, shape.k_heads)
    ]


def moved_bytes(shape: Case, heads: int, itemsize: int, in_place: bool) -> int:
    """Bytes of heads read and written; in place, the sectors of their rotated channels."""
    channels = in_sectors(shape.rotary_dim * itemsize) if in_place else shape.head_dim * itemsize
    return 2 * shape.tokens * heads * channels


@functools.lru_cache(maxsize=8)
def model_rows(
    cos: Tensor, sin: Tensor, position_ids: Tensor | None, dtype: torch.dtype, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The rows that a model computes once a step for all layers: [1|B, S, 1, R]."""
    rows = (t[None] if position_ids is None else t[position_ids] for t in (cos, sin))
    cos, sin = (widened(t, interleaved).unsqueeze(-2).to(dtype) for t in rows)
    return cos, sin


def eager_arguments(arguments: Arguments) -> Arguments:
    """The table's rows in the dtype and width of a model, and the other arguments."""
    rest = dict(arguments)
    xs = [rest.pop(name) for name in ("x", "q", "k") if name in rest]
    rows = rest.pop("cos"), rest.pop("sin"), rest.pop("position_ids", None)
    interleaved = rest.pop("interleaved", False)
    cos, sin = model_rows(*rows, xs[0].dtype, interleaved)
    return {"xs": xs, "cos": cos, "sin": sin, "interleaved": interleaved}


def eager_rotation(
    xs: list[Tensor], cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, ...]:
    return tuple(eager(x, cos, sin, interleaved) for x in xs)


def rotation(
    operator: Any, form: str, shape: Case, dtype: torch.dtype, compiled: bool = False
) -> OperatorCase:
    """A case of apply_rotary or apply_rotary_qk: new, in place or out."""
    names = [a.name for a in operator._schema.arguments]
    both, given = "k" in names, [name for name in names if name.startswith("out")]
    in_place = operator._schema.name.endswith("_")
    heads = shape.heads if both else shape.q_heads

    def arguments() -> Arguments:
        xs = heads_of(shape, dtype)[: 1 + both]
        made = dict(zip(("q", "k") if both else ("x",), xs, strict=True))
        made.update(zip(given, map(torch.empty_like, xs), strict=False))
        return {**made, **rows_of(shape), "interleaved": shape.interleaved}

    def exact(arguments: Arguments) -> tuple[Tensor, ...]:
        a = in_float64({n: v for n, v in arguments.items() if n not in given})
        xs = [a.pop(name) for name in ("x", "q", "k") if name in a]
        return tuple(reference.apply_rotary(x, **a) for x in xs)

    ways = {EAGER: Way(eager_rotation, eager_arguments)}
    if both and not given:
        ways[FUNCTION] = Way(functools.partial(rope_ext.apply_rotary_qk, inplace=in_place))
        ways.update(rotations_of_other_libraries(in_place))
    return OperatorCase(
        operator,
        form,
        shape,
        arguments,
        exact,
        moved_bytes(shape, heads, dtype.itemsize, in_place) + row_bytes(shape),
        ways,
        compiled=compiled,
    )


# ---- to float8

GROUP = 128  # channels that share a scale


def attention_output(step: str, tokens: int) -> Case:
    """That of DeepSeek-V4's attention: the last 64 of 512 channels rotate."""
    batch, seq = (1, tokens) if step == "prefill" else (tokens, 1)
    return Case("DeepSeek-V4", batch, seq, 64, 0, 512, 64, True)


def rotate_then_quantize(
    x: Tensor, x_out: Tensor, scale_out: Tensor, group_size: int, **rotation: Any
) -> None:
    groups = rope.apply_rotary(x.float(), **rotation).unflatten(-1, (-1, group_size))
    limit = torch.finfo(x_out.dtype).max
    torch.div(groups.abs().amax(-1).clamp(min=1e-10), limit, out=scale_out)
    x_out.copy_((groups / scale_out[..., None]).clamp(-limit, limit).flatten(-2))


def quantize(form: str, step: str, tokens: int) -> OperatorCase:
    shape = attention_output(step, tokens)

    def arguments() -> Arguments:
        (x, _) = heads_of(shape, torch.bfloat16)
        return {
            "x": x,
            **rows_of(shape),
            "rotary_offset": shape.head_dim - shape.rotary_dim,
            "interleaved": True,
            "inverse": True,
            "group_size": GROUP,
            "x_out": torch.empty_like(x, dtype=torch.float8_e4m3fn),
            "scale_out": x.new_empty(*x.shape[:-1], shape.head_dim // GROUP, dtype=torch.float32),
        }

    channels = shape.tokens * shape.q_heads * shape.head_dim
    return OperatorCase(
        rope.apply_rotary_quantize.default,
        form,
        shape,
        arguments,
        lambda a: reference.apply_rotary_quantize(**in_float64(a)),
        channels * (2 + 1) + channels // GROUP * 4 + row_bytes(shape),
        {
            "apply_rotary of float32, then groups": Way(rotate_then_quantize),
            EAGER: Way(reference.apply_rotary_quantize),
        },
    )


# ---- packed


def qkv_of(shape: Case, dtype: torch.dtype, by_group: bool) -> Arguments:
    """[B, S, Hq + 2 Hk, D], or by group."""
    q, k = shape.q_heads, shape.k_heads
    heads = (k, q // k + 2) if by_group else (q + 2 * k,)
    sizes = shape.batch, shape.seq, *heads, shape.head_dim
    qkv = torch.randn(*sizes, dtype=dtype, device="cuda")
    return {"qkv": qkv} if by_group else {"qkv": qkv, "kv_heads": k}


def grads_of(shape: Case, dtype: torch.dtype) -> Arguments:
    q, k = heads_of(shape, dtype)
    return {"grad_q": q, "grad_k": k, "grad_v": torch.randn_like(k)}


def packed_bytes(shape: Case, dtype: torch.dtype) -> int:
    heads = shape.q_heads + 2 * shape.k_heads
    return moved_bytes(shape, heads, dtype.itemsize, in_place=False) + row_bytes(shape)


def split_then(
    rotate: Callable[..., Any], qkv: Tensor, kv_heads: int | None = None, **rows: Tensor
) -> tuple[Tensor, ...]:
    q, k, v = reference.split_qkv(qkv, kv_heads)
    return rotate(q, **rows), rotate(k, **rows), v


def split_and_rotate(form: str, shape: Case, dtype: torch.dtype, by_group: bool) -> OperatorCase:
    """A case of apply_rotary_qkv."""
    return OperatorCase(
        rope.apply_rotary_qkv.default,
        form,
        shape,
        lambda: {**qkv_of(shape, dtype, by_group), **rows_of(shape)},
        lambda a: reference.apply_rotary_qkv(**in_float64(a)),
        packed_bytes(shape, dtype),
        {
            EAGER: Way(functools.partial(split_then, reference.apply_rotary)),
            "split, apply_rotary of each": Way(functools.partial(split_then, rope.apply_rotary)),
        },
    )


def rotate_then_pack(
    rotate: Callable[..., Tensor],
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    q_heads: int,
    kv_heads: int,
    by_group: bool,
    **rows: Tensor,
) -> Tensor:
    parts = [rotate(grad, inverse=True, **rows) for grad in (grad_q, grad_k)] + [grad_v]
    if by_group:
        parts = [part.unflatten(-2, (kv_heads, -1)) for part in parts]
    return torch.cat(parts, -2)


def packed_backward(form: str, shape: Case, dtype: torch.dtype, by_group: bool) -> OperatorCase:
    """A case of the backward of apply_rotary_qkv."""
    heads = {"q_heads": shape.q_heads, "kv_heads": shape.k_heads, "by_group": by_group}
    eager, ours = (
        functools.partial(rotate_then_pack, rotate)
        for rotate in (reference.apply_rotary, rope.apply_rotary)
    )
    return OperatorCase(
        rope.apply_rotary_qkv_backward.default,
        form,
        shape,
        lambda: {**grads_of(shape, dtype), **rows_of(shape), **heads},
        lambda a: (eager(**in_float64(a)),),
        packed_bytes(shape, dtype),
        {EAGER: Way(eager), "apply_rotary of each, cat": Way(ours)},
    )


# ---- by angles


@functools.cache
def positions_of(shape: Case, axes: bool) -> Tensor | None:
    """None: 0, 1, 2, ..., the positions of a prefill; with axes [A, B, S]."""
    if axes:
        shifts = torch.arange(AXES)[:, None, None]
        return (FIRST_POSITION + torch.arange(shape.seq) // (1 + shifts)).expand(
            AXES, shape.batch, shape.seq
        ).contiguous().cuda()  # fmt: skip
    if shape.step == "prefill":
        return None
    return (FIRST_POSITION + DECODE_STRIDE * torch.arange(shape.batch)[:, None]).cuda()


@functools.cache
def axes_of(pairs: int) -> Tensor:
    """The axis of each pair, [P]."""
    return (torch.arange(pairs) * AXES // pairs).cuda()


def float32_angles(inv_freq: Tensor, positions: Tensor, axes: Tensor | None = None) -> Tensor:
    """Angles [..., P] as in model libraries: rounded to float32."""
    if axes is None:
        return positions[..., None].float() * inv_freq
    return positions[axes].movedim(0, -1).float() * inv_freq


def eager_at(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None = None,
    axes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Rotates by tables of q's dtype from angles in float32."""
    if position_ids is None:
        position_ids = torch.arange(q.shape[1], device=q.device)[None]
    angles = float32_angles(inv_freq, position_ids, axes)
    cos, sin = (widened(t, False).unsqueeze(-2).to(q.dtype) for t in (angles.cos(), angles.sin()))
    return eager_rotation([q, k], cos, sin, False)


def rows_then(rotate: Any) -> Callable[..., Any]:
    """rope_ext's rows of the step, then its rotation by them."""

    def steps(
        q: Tensor,
        k: Tensor,
        inv_freq: Tensor,
        position_ids: Tensor | None = None,
        axes: Tensor | None = None,
    ) -> Any:
        if position_ids is None:
            return rotate(q, k, *rope.cos_sin_cache(inv_freq, q.shape[1]))
        return rotate(q, k, *rope.cos_sin(inv_freq, position_ids, axes))

    return steps


def rotation_at(
    operator: Any,
    form: str,
    shape: Case,
    dtype: torch.dtype,
    axes: bool = False,
    compiled: bool = False,
) -> OperatorCase:
    in_place = operator._schema.name.endswith("_")
    pairs = shape.rotary_dim // 2

    def arguments() -> Arguments:
        q, k = heads_of(shape, dtype)
        made = {"q": q, "k": k, "inv_freq": inv_freq_of(shape.head_dim, shape.rotary_dim)}
        if (positions := positions_of(shape, axes)) is not None:
            made["position_ids"] = positions
        return {**made, "axes": axes_of(pairs)} if axes else made

    angle_bytes = in_sectors(pairs * TABLE_BYTES)
    if axes:
        angle_bytes += pairs * POSITION_BYTES
    if axes or shape.step == "decode":
        angle_bytes += in_sectors((AXES if axes else 1) * shape.tokens * POSITION_BYTES)
    rotate = rope.apply_rotary_qk_.default if in_place else rope.apply_rotary_qk.default
    return OperatorCase(
        operator,
        form,
        shape,
        arguments,
        lambda a: reference.apply_rotary_qk_at(**in_float64(a)),
        moved_bytes(shape, shape.heads, dtype.itemsize, in_place) + angle_bytes,
        {
            "rows, then apply_rotary_qk" + "_" * in_place: Way(rows_then(rotate)),
            EAGER: Way(eager_at, angle_roundings=2),
        },
        compiled=compiled,
    )
