"""The operators under torch.func.vmap: one call for all samples, whichever arguments are batched.

A batch is one of the operators' own dimensions: samples are sequences (of x), rows (of tables), or
frequencies (of cos_sin).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import register_vmap

from rope_ext._angle_derivatives import table_dtype
from rope_ext._derivatives import last_stride_one
from rope_ext.options import check_order_stays

rope = torch.ops.rope

Dims = tuple[int | None, ...]


def register_batching() -> None:
    for name, rule in (
        ("apply_rotary", _rotation("apply_rotary", 1)),
        ("apply_rotary_qk", _rotation("apply_rotary_qk", 2)),
        ("apply_rotary_", _rotation("apply_rotary_", 1, in_place=True)),
        ("apply_rotary_qk_", _rotation("apply_rotary_qk_", 2, in_place=True)),
        ("apply_rotary_table_backward", _table_backward),
        ("cos_sin_cache", _cos_sin("cos_sin_cache")),
        ("cos_sin", _cos_sin("cos_sin")),
        ("cos_sin_backward", _cos_sin_backward),
        ("apply_rotary_qk_at", _at("apply_rotary_qk_at")),
        ("apply_rotary_qk_at_", _at("apply_rotary_qk_at_", in_place=True)),
        ("rms_norm_rotary_qk", _rms_norm_rotary_qk),
        ("rms_norm_rotary_qk_backward", _rms_norm_rotary_qk_backward),
    ):
        register_vmap(f"rope::{name}", rule)
    for name in ("apply_rotary_qk_append_kv_", "apply_rotary_mla_append_"):
        _REFUSING.impl(name, _refused(name), "FuncTorchBatched")


def _samples(x: Tensor, dim: int | None, count: int) -> Tensor:
    """x with its samples first [N, ..]; one that is not batched is the same for all."""
    return x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)


def _sequences(x: Tensor) -> Tensor:
    """[N, B, S, H, D] or packed [N, T, H, D] -> [N * B, S, H, D]; a view where strides allow it."""
    return last_stride_one(x if x.dim() == 4 else x.flatten(0, 1))


def _rows(
    count: int, batch: int, seq: int, dims: Dims, cos: Tensor, sin: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos, sin and position_ids for N * B sequences, from those of N samples of B sequences."""
    batched_table = dims[0] is not None or dims[1] is not None
    batched_ids = dims[2] is not None
    if batched_table:
        cos, sin = (_samples(t, dim, count) for t, dim in zip((cos, sin), dims, strict=False))
    if batched_ids:
        ids = ids.movedim(dims[2], 0)

    def each(t: Tensor, batched: bool, rank: int) -> Tensor:
        """t [..] or [1|B, ..], of at most `rank` dimensions, with N before if batched, for all."""
        t = t if batched else t[None]
        t = t.unsqueeze(1) if t.dim() == rank else t
        return t.expand(count, batch, *t.shape[2:]).flatten(0, 1)

    if cos.dim() - batched_table == 3:  # [1|B, S, W]
        if batched_table or cos.shape[0] != 1:
            cos, sin = each(cos, batched_table, 3), each(sin, batched_table, 3)
    elif batched_table and ids is None:  # the rows 0, 1, 2, ... of each
        cos, sin = each(cos[:, :seq], True, 3), each(sin[:, :seq], True, 3)
    elif batched_table:  # one table of all, in which each sample has its part
        length, ids = cos.shape[1], each(ids, batched_ids, 2)
        first = length * torch.arange(count, device=ids.device).repeat_interleave(batch)[:, None]
        outside = (ids < 0) | (ids >= length)  # of the sample's part, if not of the whole
        ids = torch.where(outside, -1, ids + first)
        cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
    elif ids is not None and (batched_ids or ids.dim() == 2):
        ids = each(ids, batched_ids, 2)
    return last_stride_one(cos), last_stride_one(sin), ids


def _rotation(name: str, rotated: int, in_place: bool = False) -> Callable[..., Any]:
    """The rule of an operator whose first `rotated` arguments rotate."""
    operator = getattr(rope, name.removesuffix("_"))

    def rule(info: Any, in_dims: Dims, *args: Any, **options: Any) -> Any:
        count, xs = info.batch_size, args[:rotated]
        cos, sin, position_ids = (*args[rotated:], None)[:3]  # which may be left out
        if in_place:
            _check_written(name, in_dims[:rotated])
            check_order_stays(name, options)
        samples = [_samples(x, dim, count) for x, dim in zip(xs, in_dims, strict=False)]
        batch = 1 if samples[0].dim() == 4 else samples[0].shape[1]
        dims = (*in_dims[rotated:], None)[:3]
        rows = _rows(count, batch, samples[0].shape[-3], dims, cos, sin, position_ids)
        outs = operator(*(_sequences(x) for x in samples), *rows, **options)
        outs = (outs,) if isinstance(outs, Tensor) else outs
        outs = tuple(out.unflatten(0, x.shape[: x.dim() - 3])
                     for out, x in zip(outs, samples, strict=True))  # fmt: skip
        if in_place:
            for x, out in zip(samples, outs, strict=True):
                x.copy_(out)
            return None, None
        return (outs, (0,) * rotated) if rotated > 1 else (outs[0], 0)

    return rule


def _check_written(name: str, dims: Dims) -> None:
    if None in dims:
        raise RuntimeError(
            f"rope::{name}: expected what is written to be batched by vmap where another argument "
            "is, got a tensor that is the same for all samples"
        )


# register_vmap takes no operator with tensors among its keywords, even to refuse it.
_REFUSING = torch.library.Library("rope", "IMPL")


def _refused(name: str) -> Callable[..., None]:
    """A cache is one for all sequences: they are a batch, with slots of their own."""

    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError(
            f"rope::{name}: expected to be called with a batch of sequences, whose slots are those "
            "of one cache, got tensors batched by vmap"
        )

    return refuse


def _table_backward(
    info: Any,
    in_dims: Dims,
    grad_q: Tensor,
    q: Tensor,
    grad_k: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    token_order: Tensor | None = None,
    row_offsets: Tensor | None = None,
    **options: Any,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    operator, count = rope.apply_rotary_table_backward, info.batch_size
    in_dims = (*in_dims, None, None)[:7]
    samples = [
        None if x is None else _samples(x, dim, count)
        for x, dim in zip((grad_q, q, grad_k, k), in_dims, strict=False)
    ]
    xs = [None if x is None else _sequences(x) for x in samples]
    shape = _samples(cos, in_dims[4], count).shape[1:]
    rows, width = shape[-2:]
    batch, seq = 1 if samples[1].dim() == 4 else samples[1].shape[1], xs[1].shape[1]
    if len(shape) == 3 and shape[0] == batch:  # a row a token: nothing to sum over tokens
        grads = operator(*xs, cos.new_empty(count * batch, rows, width), **options)
        return tuple(g.view(count, *shape) for g in grads), (0, 0)

    # One table of all, in which each sample has its part and a row more: that of the tokens after
    # its last row's and before the first of the next sample's, which have positions outside.
    tokens = batch * seq
    if token_order is None:  # each row has a token of each sequence
        token_order = torch.arange(tokens, device=q.device).view(batch, seq).T.flatten()
        row_offsets = batch * torch.arange(rows + 1, device=q.device).clamp(max=seq)
    first = tokens * torch.arange(count, device=q.device)[:, None]
    order = (_samples(token_order, in_dims[5], count) + first).flatten()
    offsets = (_samples(row_offsets, in_dims[6], count) + first).flatten()
    offsets = torch.cat((offsets, offsets.new_full((1,), count * tokens)))
    grads = operator(*xs, cos.new_empty(count * (rows + 1), width), order, offsets, **options)
    return tuple(g.view(count, rows + 1, width)[:, :rows].reshape(count, *shape)
                 for g in grads), (0, 0)  # fmt: skip


def _one_by_one(
    operator: Any, info: Any, in_dims: Dims, args: tuple[Any, ...], options: dict[str, Any]
) -> list[Any]:
    """Frequencies and positions both batched, or axes: no operator has that."""
    return [
        operator(
            *(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)),
            **options,
        )
        for i in range(info.batch_size)
    ]


def _cos_sin(name: str) -> Callable[..., Any]:
    """The rule of cos_sin and cos_sin_cache, whose second argument is a number."""
    operator = getattr(rope, name)

    def rule(
        info: Any,
        in_dims: Dims,
        inv_freq: Tensor,
        positions: Any,
        *axes: Tensor | None,  # of cos_sin alone, which may be left out
        **options: Any,
    ) -> Any:
        has_axes = axes not in ((), (None,))
        of_each = len(in_dims) > 2 and in_dims[2] is not None
        if in_dims[0] is None and not of_each:
            samples = positions.movedim(in_dims[1], 1 if has_axes else 0)
            return operator(inv_freq, samples, *axes, **options), (0, 0)
        if in_dims[1] is None and not of_each:  # one vector of frequencies for all
            inv_freq = inv_freq.movedim(in_dims[0], 0)
            axes = (axes[0].repeat(info.batch_size),) if has_axes else ()
            tables = operator(inv_freq.flatten(), positions, *axes, **options)
            return tuple(t.unflatten(-1, inv_freq.shape) for t in tables), (-2, -2)
        tables = _one_by_one(operator, info, in_dims, (inv_freq, positions, *axes), options)
        return tuple(torch.stack(t) for t in zip(*tables, strict=True)), (0, 0)

    return rule


def _cos_sin_backward(
    info: Any,
    in_dims: Dims,
    grad_cos: Tensor,
    grad_sin: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None = None,
    axes: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    operator, dims = rope.cos_sin_backward, (*in_dims, None, None)[:5]
    if dims[3] is not None or dims[4] is not None:
        args = grad_cos, grad_sin, inv_freq, position_ids, axes
        return torch.stack(_one_by_one(operator, info, dims, args, options)), 0
    grads = (
        _samples(grad, dim, info.batch_size).movedim(0, -2).flatten(-2)
        for grad, dim in zip((grad_cos, grad_sin), dims, strict=False)
    )
    inv_freq = _samples(inv_freq, dims[2], info.batch_size)
    axes = None if axes is None else axes.repeat(info.batch_size)
    grad = operator(*grads, inv_freq.flatten(), position_ids, axes, **options)
    return grad.view(inv_freq.shape), 0


def _at(name: str, in_place: bool = False) -> Callable[..., Any]:
    """The rule of a rotation by angles: by rows, which every sample may have of its own."""
    rotation = _rotation("apply_rotary_qk_" if in_place else "apply_rotary_qk", 2, in_place)

    def rule(
        info: Any,
        in_dims: Dims,
        q: Tensor,
        k: Tensor,
        inv_freq: Tensor,
        position_ids: Tensor | None = None,
        axes: Tensor | None = None,
        *,
        attention_scaling: float = 1.0,
        **options: Any,
    ) -> Any:
        dims = (*in_dims, None, None)[:5]
        if in_place:
            _check_written(name, dims[:2])
        made = {"attention_scaling": attention_scaling, "dtype": table_dtype(q, None)}
        if position_ids is None:
            made_by = "cos_sin_cache"
            args = inv_freq, _samples(q, dims[0], info.batch_size).shape[-3]
        else:
            made_by, args = "cos_sin", (inv_freq, position_ids, axes)
        of_args = dims[2 : 2 + len(args)]
        if all(dim is None for dim in of_args):
            rows, row_dims = getattr(rope, made_by)(*args, **made), (None, None)
        else:
            rows, row_dims = _cos_sin(made_by)(info, of_args, *args, **made)
        return rotation(info, (*dims[:2], *row_dims, None), q, k, *rows, None, **options)

    return rule


def _rms_norm_rotary_qk(
    info: Any,
    in_dims: Dims,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *rows: Any,
    **options: Any,
) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Samples are sequences; where they have weights of their own, one call each."""
    operator, count, weights = rope.rms_norm_rotary_qk, info.batch_size, (q_weight, k_weight)
    if in_dims[2] is not None or in_dims[3] is not None:
        return _each_sample(operator, info, in_dims, (q, k, *weights, *rows), options), (0, 0)
    samples = [_samples(x, dim, count) for x, dim in zip((q, k), in_dims, strict=False)]
    batch = 1 if samples[0].dim() == 4 else samples[0].shape[1]
    cos, sin, position_ids = (*rows, None)[:3]
    dims = (*in_dims[4:], None)[:3]
    all_rows = _rows(count, batch, samples[0].shape[-3], dims, cos, sin, position_ids)
    outs = operator(*(_sequences(x) for x in samples), *weights, *all_rows, **options)
    return tuple(out.unflatten(0, x.shape[: x.dim() - 3])
                 for out, x in zip(outs, samples, strict=True)), (0, 0)  # fmt: skip


def _rms_norm_rotary_qk_backward(
    info: Any, in_dims: Dims, *args: Any, **options: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call each: every sample has gradients to the weights of its own."""
    operator = rope.rms_norm_rotary_qk_backward
    return _each_sample(operator, info, in_dims, args, options), (0,) * 4


def _each_sample(
    operator: Any, info: Any, in_dims: Dims, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    def sample(x: Any, dim: int | None, i: int) -> Any:
        return x if dim is None else last_stride_one(x.select(dim, i))

    results = [
        operator(*(sample(x, dim, i) for x, dim in zip(args, in_dims, strict=True)), **options)
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(each) for each in zip(*results, strict=True))
