"""q, k and v out of one packed tensor, the output of a projection, and the gradient to that.

The gradient is an operator of its own, which writes all of it in one pass. Its derivatives are
composed of the rotation and of PyTorch's operators.
"""

from typing import Any

import torch
from torch import Tensor

from rope_ext._engine.autograd import last_stride_one, sum_of, zero_unless_given
from rope_ext._engine.record import Composed, Derivative, Given, Grads, Operator
from rope_ext._engine.sharding import (
    BATCH,
    HEADS,
    SEQUENCE,
    Axes,
    Placed,
    Result,
    Sharding,
    rotation_sharding,
)
from rope_ext._engine.vmap import one_by_one
from rope_ext._operators.rotation import inverted, rotated_alone, table_grad
from rope_ext.reference import split_qkv

rope = torch.ops.rope

GRADS = ("grad_q", "grad_k", "grad_v")


def token_dims(qkv: Tensor, kv_heads: int | None) -> int:
    """2: batch and sequence; 1."""
    return qkv.dim() - (3 if kv_heads is None else 2)


def heads_of(shape: Any, kv_heads: int | None) -> tuple[int, int]:
    """Hq and Hk of a qkv of this shape."""
    if kv_heads is None:
        return shape[-3] * (shape[-2] - 2), shape[-3]
    return shape[-2] - 2 * kv_heads, kv_heads


def packed(q: Tensor, k: Tensor, v: Tensor, by_group: bool) -> Tensor:
    """The way back of split_qkv."""
    if by_group:
        q, k, v = (x.unflatten(-2, (k.shape[-2], -1)) for x in (q, k, v))
    return torch.cat((q, k, v), -2)


def new_tokens(x: Tensor, dims: int, *of_token: int, device: Any = None) -> Tensor:
    """Empty, [B, S, *of_token] or [T, *of_token], with the tokens in memory in the order of x."""
    sizes = [*x.shape[:dims]]
    sequence_first = dims == 2 and min(sizes) > 1 and x.stride(0) < x.stride(1)
    if sequence_first:
        sizes.reverse()
    out = torch.empty(*sizes, *of_token, dtype=x.dtype, device=device or x.device)
    return out.transpose(0, 1) if sequence_first else out


def split_like(given: Given, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors like the results of a call with a packed qkv."""
    qkv, kv_heads = given["qkv"], given["kv_heads"]
    q, k = heads_of(qkv.shape, kv_heads)
    dims, dim = token_dims(qkv, kv_heads), qkv.shape[-1]
    of_q, of_k, of_v = (new_tokens(qkv, dims, h, dim, device=device) for h in (q, k, k))
    return of_q, of_k, of_v


def rotated_shapes(given: Given) -> list[tuple[int, ...]]:
    """Those of q and of k, or of those that have a gradient, from the shapes of a call."""
    shape, kv_heads = given["qkv"], given["kv_heads"]
    tokens = shape[: -3 if kv_heads is None else -2]
    heads = zip(("grad_q", "grad_k"), heads_of(shape, kv_heads), strict=True)
    return [(*tokens, count, shape[-1]) for name, count in heads if given.get(name, shape)]


def _save(ctx: Any, args: list[Any]) -> None:
    qkv, *rows = args
    ctx.table_needs_grad = any(ctx.needs_input_grad[1:3])
    ctx.heads = heads_of(qkv.shape, ctx.options["kv_heads"])
    ctx.save_for_backward(*rows, qkv if ctx.table_needs_grad else None)


def _backward(ctx: Any, *grads: Tensor | None) -> Grads:
    *rows, qkv = ctx.saved_tensors
    grads = tuple(None if grad is None else last_stride_one(grad) for grad in grads)
    options = dict(ctx.options)
    kv_heads = options.pop("kv_heads")
    to_qkv = to_cos = to_sin = None
    if ctx.needs_input_grad[0]:
        packing = dict(zip(("q_heads", "kv_heads"), ctx.heads, strict=True))
        packing["by_group"] = kv_heads is None
        to_qkv = rope.apply_rotary_qkv_backward(*grads, *rows, **packing, **options)
    if ctx.table_needs_grad:
        of_qk: Any = zip(grads, split_qkv(qkv, kv_heads)[:2], strict=False)
        terms = [pair for pair in of_qk if pair[0] is not None]
        if terms:
            (grad_q, q), (grad_k, k) = (*terms, (None, None))[:2]
            to_cos, to_sin = table_grad(grad_q, q, grad_k, k, rows[0], rows[2], options)
    return to_qkv, to_cos, to_sin, None


def _tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    qkv, *rows = inputs
    of_qkv: Grads = (None, None, None)
    of_table: Grads = (None, None)
    if tangents[0] is not None:
        of_qkv = rope.apply_rotary_qkv(last_stride_one(tangents[0]), *rows, **options)
    if tangents[1] is not None or tangents[2] is not None:
        of_cos, of_sin = (
            zero_unless_given(t, x) for t, x in zip(tangents[1:3], rows, strict=False)
        )
        rotary = dict(options)
        parts = split_qkv(qkv, rotary.pop("kv_heads"))
        of_table = tuple(rotated_alone(x, of_cos, of_sin, rows[2], rotary) for x in parts[:2])
    return *map(sum_of, of_qkv, of_table), of_qkv[2]


def _composed_backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    q_heads: int,
    kv_heads: int,
    by_group: bool,
    **options: Any,
) -> Tensor:
    grads, heads = (grad_q, grad_k, grad_v), (q_heads, kv_heads, kv_heads)
    like = next(grad for grad in grads if grad is not None)
    q, k, v = (
        like.new_zeros((*like.shape[:-2], count, like.shape[-1])) if grad is None else grad
        for grad, count in zip(grads, heads, strict=True)
    )
    q, k = (
        x if grad is None  # the zeros stay +0, as in the operator
        else rope.apply_rotary(last_stride_one(x), cos, sin, position_ids, **inverted(options))
        for x, grad in zip((q, k), grads, strict=False)
    )  # fmt: skip
    return packed(q, k, v, by_group)


def _packed_like(given: Given, device: Any = None) -> tuple[Tensor]:
    like = next(given[name] for name in GRADS if given[name] is not None)
    q, k, dim = given["q_heads"], given["kv_heads"], like.shape[-1]
    of_token = (k, q // k + 2, dim) if given["by_group"] else (q + 2 * k, dim)
    return (new_tokens(like, like.dim() - 2, *of_token, device=device),)


# DTensors: batch and sequence may be sharded, and by group the groups


def axes_of_part(dims: int, by_group: bool) -> Axes:
    """The axes of q, k or v."""
    return (*(BATCH, SEQUENCE)[-dims:], HEADS if by_group else None, None)


def axes_of_qkv(dims: int, by_group: bool) -> Axes:
    return (*(BATCH, SEQUENCE)[-dims:], *((HEADS,) if by_group else ()), None, None)


def result_like(axes: Axes, x: Tensor, terms: tuple[frozenset[str], ...]) -> Result:
    """x: without memory."""
    like = Placed(tuple(x.shape), x.stride(), x.dtype, None, ())
    return Result(axes, like.shape, like, terms=terms)


def sharding_of_rows(operator: Operator, given: Given, like: Placed, dims: int) -> Sharding:
    """That of everything but the tensors with heads, for tokens like those of `like`."""
    tokens = torch.empty((*like.shape[:dims], 1, 1), device="meta")
    stand_in = dict.fromkeys(operator.rotates, tokens)
    return rotation_sharding(operator, {**given, **stand_in}, (None, None))


def split_sharding(operator: Operator, given: Given, is_linear: bool = True) -> Sharding:
    qkv, by_group = given["qkv"], given["kv_heads"] is None
    dims = token_dims(qkv, given["kv_heads"])
    sharding = sharding_of_rows(operator, given, qkv, dims)
    sharding.axes["qkv"] = axes_of_qkv(dims, by_group)
    terms = (frozenset(("qkv",)),) if is_linear else ()
    sharding.results = tuple(
        result_like(axes_of_part(dims, by_group), x, terms) for x in split_like(given, "meta")
    )
    return sharding


def _backward_sharding(operator: Operator, given: Given) -> Sharding:
    (out,), by_group = _packed_like(given, "meta"), given["by_group"]
    names = [name for name in GRADS if given[name] is not None]
    dims = given[names[0]].dim() - 2
    sharding = sharding_of_rows(operator, given, given[names[0]], dims)
    axes = dict.fromkeys(names, axes_of_part(dims, by_group))
    others = {name: x for name, x in sharding.axes.items() if name not in GRADS}
    terms = tuple(frozenset((name,)) for name in names)
    result = result_like(axes_of_qkv(dims, by_group), out, terms)

    def complete(arguments: Given, part_of_range: Any) -> None:
        rows_of_tokens(arguments, part_of_range)
        if by_group:  # heads of the rank
            count = arguments[names[0]].shape[-2]
            of_first = given["q_heads" if names[0] == "grad_q" else "kv_heads"]
            for name in ("q_heads", "kv_heads"):
                arguments[name] = given[name] * count // of_first

    rows_of_tokens = sharding.complete
    return Sharding({**axes, **others}, (result,), complete)


QKV = (
    Operator(
        "apply_rotary_qkv",
        ("qkv",),
        results=split_like,
        derivative=Derivative(_save, _backward, _tangent),
        rotated_shapes=rotated_shapes,
        vmap=one_by_one,
        sharding=split_sharding,
    ),
    Operator(
        "apply_rotary_qkv_backward",
        ("grad_q", "grad_k"),
        results=_packed_like,
        derivative=Composed(_composed_backward),
        vmap=one_by_one,
        sharding=_backward_sharding,
    ),
)
