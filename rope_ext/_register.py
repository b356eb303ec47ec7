"""What PyTorch has to know about the operators beside their kernels: fakes and derivatives.

Fakes give shapes, dtypes and strides and check devices alone: the operators check, when they run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake
from torch.nn.functional import pad

from rope_ext._token_order import distributed_tokens_by_row, is_dtensor, tokens_by_row

rope = torch.ops.rope


def register() -> None:
    """Registers everything. Called once, when the package is imported."""
    register_fake("rope::apply_rotary", _fake_apply_rotary)
    register_fake("rope::apply_rotary_qk", _fake_apply_rotary_qk)
    register_fake("rope::apply_rotary_", _fake_apply_rotary_)
    register_fake("rope::apply_rotary_qk_", _fake_apply_rotary_qk_)
    register_fake("rope::apply_rotary.out", _fake_apply_rotary_out)
    register_fake("rope::apply_rotary_qk.out", _fake_apply_rotary_qk_out)
    register_fake("rope::apply_rotary_table_backward", _fake_table_backward)
    register_fake("rope::cos_sin_cache", _fake_cos_sin_cache)
    register_fake("rope::cos_sin", _fake_cos_sin)
    register_fake("rope::cos_sin_backward", _fake_cos_sin_backward)

    for name, backward, setup in (
        ("apply_rotary", _apply_rotary_backward, _apply_rotary_setup),
        ("apply_rotary_qk", _apply_rotary_qk_backward, _apply_rotary_qk_setup),
        ("apply_rotary_table_backward", _table_backward_backward, _table_backward_setup),
        ("cos_sin_cache", _cos_sin_cache_backward, _cos_sin_cache_setup),
        ("cos_sin", _cos_sin_backward, _cos_sin_setup),
        ("cos_sin_backward", _cos_sin_backward_backward, _cos_sin_backward_setup),
    ):
        register_autograd(f"rope::{name}", backward, setup_context=setup)

    for name, overload, arguments, outs in (
        ("apply_rotary_", rope.apply_rotary_.default, 3, ()),
        ("apply_rotary_qk_", rope.apply_rotary_qk_.default, 4, ()),
        ("apply_rotary.out", rope.apply_rotary.out, 3, ("out",)),
        ("apply_rotary_qk.out", rope.apply_rotary_qk.out, 4, ("out_q", "out_k")),
    ):
        kernel = _writing_kernel(overload, arguments, outs)
        _WRITING.impl(name, kernel, **_BELOW_AUTOGRAD)


# Fakes


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _output_like(x: Tensor) -> Tensor:
    """As output_like in apply_rotary.cpp."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else _empty(x)


def _check_device(op: str, of: str, x: Tensor, **others: Tensor | None) -> None:
    """A tensor without data beside real ones comes here, not to the operator: as check_device."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise RuntimeError(
                f"rope::{op}: expected {name} on the device of {of}, {x.device}, got {other.device}"
            )


def _fake_apply_rotary_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    op: str = "apply_rotary_",
    **options: Any,
) -> None:
    _check_device(op, "x", x, cos=cos, sin=sin, position_ids=position_ids)


def _fake_apply_rotary(x: Tensor, *args: Any, **options: Any) -> Tensor:
    _fake_apply_rotary_(x, *args, op="apply_rotary", **options)
    return _output_like(x)


def _fake_apply_rotary_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    op: str = "apply_rotary_qk_",
    **options: Any,
) -> None:
    _check_device(op, "q", q, k=k, cos=cos, sin=sin, position_ids=position_ids)


def _fake_apply_rotary_qk(
    q: Tensor, k: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    _fake_apply_rotary_qk_(q, k, *args, op="apply_rotary_qk", **options)
    return _output_like(q), _output_like(k)


def _fake_apply_rotary_out(x: Tensor, *args: Any, out: Tensor, **options: Any) -> None:
    _fake_apply_rotary_(x, *args, op="apply_rotary.out", **options)
    _check_device("apply_rotary.out", "x", x, out=out)


def _fake_apply_rotary_qk_out(
    q: Tensor, k: Tensor, *args: Any, out_q: Tensor, out_k: Tensor, **options: Any
) -> None:
    _fake_apply_rotary_qk_(q, k, *args, op="apply_rotary_qk.out", **options)
    _check_device("apply_rotary_qk.out", "q", q, out_q=out_q, out_k=out_k)


def _fake_table_backward(
    grad_q: Tensor,
    q: Tensor,
    grad_k: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return _empty(cos), _empty(cos)


def _fake_cos_sin_backward(
    grad_cos: Tensor, grad_sin: Tensor, inv_freq: Tensor, *args: Any, **options: Any
) -> Tensor:
    return _empty(inv_freq)


def _table_dtype(inv_freq: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """As check_table_dtype in checks_cos_sin.cpp."""
    if dtype is not None:
        return dtype
    return torch.float64 if inv_freq.dtype == torch.float64 else torch.float32


def _fake_cos_sin_cache(
    inv_freq: Tensor,
    length: int,
    *,
    start: int = 0,
    attention_scaling: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = _table_dtype(inv_freq, dtype)
    shape = (length, inv_freq.shape[0])
    return inv_freq.new_empty(shape, dtype=dtype), inv_freq.new_empty(shape, dtype=dtype)


def _fake_cos_sin(
    inv_freq: Tensor,
    position_ids: Tensor,
    *,
    attention_scaling: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    _check_device("cos_sin", "inv_freq", inv_freq, position_ids=position_ids)
    dtype = _table_dtype(inv_freq, dtype)
    shape = (*position_ids.shape, inv_freq.shape[0])
    return inv_freq.new_empty(shape, dtype=dtype), inv_freq.new_empty(shape, dtype=dtype)


# In place, or into out. A kernel of C++ alone would leave autograd in the dark: no version counter
# would tell it that a tensor it saved has been written. Not used in inference mode, which counts no
# versions.

_WRITING = torch.library.Library("rope", "IMPL")
_BELOW_AUTOGRAD = {"dispatch_key": "ADInplaceOrView", "with_keyset": True}


def _writing_kernel(overload: Any, arguments: int, outs: tuple[str, ...]) -> Callable[..., None]:
    """Refuses tensors that require grad, runs the operator, and counts up the written versions.

    The first `arguments` are the differentiable ones; outs, or without any those that come before
    cos and sin, are written.
    """
    op = overload._schema.name + ("." + overload._overloadname if outs else "")
    names = (*(argument.name for argument in overload._schema.arguments[:arguments]), *outs)
    instead = "rotate without out" if outs else "the functions of rope_ext differentiate in place"

    def kernel(keyset: Any, *args: Any, **options: Any) -> None:
        written = tuple(options[name] for name in outs) or args[: arguments - 2]
        if not torch.is_inference_mode_enabled() and any(x.is_inference() for x in written):
            raise RuntimeError(
                f"{op}: expected no inference tensor to be written outside of inference mode, got "
                "one"
            )
        if torch.is_grad_enabled():
            tensors = (*args[:arguments], *written) if outs else args[:arguments]
            for name, tensor in zip(names, tensors, strict=True):
                if tensor.requires_grad:
                    raise RuntimeError(
                        f"{op}: expected {name} to need no gradient ({instead}), got a tensor that "
                        "requires grad"
                    )
        with torch._C._AutoDispatchBelowADInplaceOrView():
            overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **options)
        torch.autograd.graph.increment_version(written)

    return kernel


# Derivatives of the rotation. It is linear in x, so its gradient is the transposed rotation; and
# linear in (cos, sin), so the gradient to them is bilinear, with rotations as its derivatives.


def last_stride_one(grad: Tensor) -> Tensor:
    """Gradients of other strides, such as the expanded ones of sum(), are laid out."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], options: dict[str, Any], rotated: int) -> None:
    """Keeps what backward needs; the rotated tensors only for gradients to the table."""
    ctx.set_materialize_grads(False)  # zeros would be work, and for DTensors no DTensors
    cos, sin, position_ids = inputs[rotated : rotated + 3]
    ctx.table_needs_grad = any(ctx.needs_input_grad[rotated : rotated + 2])
    xs = inputs[:rotated] if ctx.table_needs_grad else ()
    ctx.save_for_backward(cos, sin, position_ids, *xs)
    ctx.options = options


def _apply_rotary_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    _save(ctx, inputs, keyword_only_inputs, rotated=1)


def _apply_rotary_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    cos, sin, position_ids, *xs = ctx.saved_tensors
    grad = last_stride_one(grad)
    grad_x = grad_cos = grad_sin = None
    if ctx.needs_input_grad[0]:
        grad_x = rope.apply_rotary(grad, cos, sin, position_ids, **inverted(ctx.options))
    if ctx.table_needs_grad:
        grad_cos, grad_sin = _table_grad(grad, xs[0], None, None, cos, position_ids, ctx.options)
    return grad_x, grad_cos, grad_sin, None


def _apply_rotary_qk_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    _save(ctx, inputs, keyword_only_inputs, rotated=2)


def _apply_rotary_qk_backward(
    ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None
) -> tuple[Tensor | None, ...]:
    cos, sin, position_ids, *xs = ctx.saved_tensors
    grads = [None if grad is None else last_stride_one(grad) for grad in (grad_q, grad_k)]
    grad_q, grad_k = (
        g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)
    )
    rows, inverse = (cos, sin, position_ids), inverted(ctx.options)
    to_q = to_k = grad_cos = grad_sin = None
    if grad_q is not None and grad_k is not None:
        to_q, to_k = rope.apply_rotary_qk(grad_q, grad_k, *rows, **inverse)
    elif grad_q is not None:
        to_q = rope.apply_rotary(grad_q, *rows, **inverse)
    elif grad_k is not None:
        to_k = rope.apply_rotary(grad_k, *rows, **inverse)
    terms = [pair for pair in zip(grads, xs, strict=False) if pair[0] is not None]
    if ctx.table_needs_grad and terms:
        first, second = (*terms, (None, None))[:2]
        grad_cos, grad_sin = _table_grad(*first, *second, cos, position_ids, ctx.options)
    return to_q, to_k, grad_cos, grad_sin, None


def inverted(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the inverse rotation, which is the backward: it reads the result's order."""
    inverse = {**options, "inverse": not options["inverse"]}
    if options.get("interleaved_out") is not None:
        inverse["interleaved"] = options["interleaved_out"]
        inverse["interleaved_out"] = options["interleaved"]
    return inverse


def _table_grad(
    grad_q: Tensor,
    q: Tensor,
    grad_k: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    position_ids: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The gradient to cos and sin."""
    order = offsets = None
    if position_ids is not None:
        position_ids = position_ids.expand(q.shape[:-2])
        if is_dtensor(position_ids):
            others = (x for x in (grad_q, q, grad_k, k) if x is not None)
            order, offsets = distributed_tokens_by_row(position_ids, cos.shape[0], *others)
        else:
            order, offsets = tokens_by_row(position_ids, cos.shape[0])
    return rope.apply_rotary_table_backward(grad_q, q, grad_k, k, cos, order, offsets, **options)


def _table_backward_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _table_backward_backward(
    ctx: Any, table_cos: Tensor | None, table_sin: Tensor | None
) -> tuple[Tensor | None, ...]:
    """grad_cos and grad_sin are linear in grad_q, and in q: the gradient to either is the other one
    rotated by the table (table_cos, table_sin), and zero where channels do not rotate.
    """
    table_cos, table_sin = _both(table_cos, table_sin)
    if table_cos is None:
        return (None,) * 7
    grad_q, q, grad_k, k, cos, order, offsets = ctx.saved_tensors
    position_ids = None
    if is_dtensor(order):
        raise NotImplementedError(
            "rope::apply_rotary: expected no second derivative to cos and sin of DTensors with "
            "position_ids, got one: rows of cos_sin(inv_freq, position_ids) have it"
        )
    if order is not None:
        place = torch.arange(order.numel(), device=order.device)
        row = torch.searchsorted(offsets[1:].contiguous(), place, right=True)
        position_ids = torch.empty_like(order).scatter_(0, order, row).view(q.shape[:-2])
    table = last_stride_one(table_cos), last_stride_one(table_sin)
    dim, offset = ctx.options["rotary_dim"], ctx.options["rotary_offset"]
    dim = 2 * cos.shape[-1] if dim is None else dim

    def rotated(x: Tensor | None, options: dict[str, Any]) -> Tensor | None:
        if x is None:
            return None
        x = last_stride_one(x)[..., offset : offset + dim]
        out = rope.apply_rotary(x, *table, position_ids, **{**options, "rotary_offset": 0})
        return pad(out, (offset, q.shape[-1] - offset - dim))

    forward, inverse = ctx.options, inverted(ctx.options)
    return (
        rotated(q, forward),
        rotated(grad_q, inverse),
        rotated(k, forward),
        rotated(grad_k, inverse),
        None,
        None,
        None,
    )


def _both(first: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to cos and sin, with zeros for one that nothing depends on."""
    if first is None and second is not None:
        first = torch.zeros_like(second)
    elif second is None and first is not None:
        second = torch.zeros_like(first)
    return first, second


# Derivatives of cos and sin: cos' = -position sin, sin' = position cos.


def _cos_sin_cache_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0])
    ctx.start = keyword_only_inputs["start"]
    ctx.attention_scaling = keyword_only_inputs["attention_scaling"]


def _cos_sin_cache_backward(
    ctx: Any, grad_cos: Tensor | None, grad_sin: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_cos, grad_sin = _both(grad_cos, grad_sin)
    if grad_cos is None:
        return None, None
    (inv_freq,) = ctx.saved_tensors
    grad = rope.cos_sin_backward(
        grad_cos, grad_sin, inv_freq, start=ctx.start, attention_scaling=ctx.attention_scaling
    )
    return grad, None


def _cos_sin_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)
    ctx.attention_scaling = keyword_only_inputs["attention_scaling"]


def _cos_sin_backward(
    ctx: Any, grad_cos: Tensor | None, grad_sin: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_cos, grad_sin = _both(grad_cos, grad_sin)
    if grad_cos is None:
        return None, None
    inv_freq, position_ids = ctx.saved_tensors
    grad = rope.cos_sin_backward(
        grad_cos, grad_sin, inv_freq, position_ids, attention_scaling=ctx.attention_scaling
    )
    return grad, None


def _cos_sin_backward_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _cos_sin_backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of sum over positions p of p (cos grad_sin - sin grad_cos), grad [P] coming in."""
    grad_cos, grad_sin, inv_freq, position_ids = ctx.saved_tensors
    start, attention_scaling = ctx.options["start"], ctx.options["attention_scaling"]
    if position_ids is None:
        length = grad_cos.shape[0]
        position_ids = torch.arange(start, start + length, device=inv_freq.device)
    cos, sin = rope.cos_sin(
        inv_freq, position_ids, attention_scaling=attention_scaling, dtype=torch.float64
    )
    position = position_ids.unsqueeze(-1).double()
    weight = position * grad
    again = rope.cos_sin_backward(
        position * grad_sin, -position * grad_cos, inv_freq, position_ids,
        attention_scaling=attention_scaling,
    )  # fmt: skip
    to_grad_cos, to_grad_sin = -(weight * sin), weight * cos
    return to_grad_cos.to(grad_cos.dtype), to_grad_sin.to(grad_sin.dtype), grad * again, None
