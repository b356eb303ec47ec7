"""Derivatives of the operators, backward and forward, in every transform of torch.func.

An operator gets one kernel for the dispatch key Autograd, as those of PyTorch have it: a node of
the graph where something requires grad, the tangent where something has one, else nothing but the
operator.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn.functional import pad

from rope_ext._copies import register_copies
from rope_ext._token_order import distributed_tokens_by_row, is_dtensor, tokens_by_row

rope = torch.ops.rope

# Of the one level that there is: unpack_dual asks a count that compiled graphs do not keep.
_unpack_dual = torch._VF._unpack_dual

Grads = tuple[Tensor | None, ...]

AUTOGRAD = torch.library.Library("rope", "IMPL")


def register_derivatives() -> None:
    for name, save, backward, tangent in (
        ("apply_rotary", _save_one, _apply_rotary_backward, _apply_rotary_tangent),
        ("apply_rotary_qk", _save_two, _apply_rotary_qk_backward, _apply_rotary_qk_tangent),
        (
            "apply_rotary_table_backward",
            save_all,
            _table_backward_backward,
            _table_backward_tangent,
        ),
    ):
        register_derivative(name, save, backward, tangent)


def register_derivative(
    name: str,
    save: Callable[..., None],
    backward: Callable[..., Grads],
    tangent: Callable[..., Any],
) -> None:
    """Of an operator: what it saves, its backward, its tangent."""
    overload = getattr(rope, name).default
    kernel = _autograd_kernel(overload, save, backward, tangent)
    AUTOGRAD.impl(name, kernel, "Autograd", with_keyset=True)
    register_copies(AUTOGRAD, name, overload)


def is_dual(*tensors: Any) -> bool:
    """Whether one of them carries a tangent, of forward-mode differentiation."""
    return any(isinstance(t, Tensor) and _unpack_dual(t, 0)[1] is not None for t in tensors)


def _autograd_kernel(
    overload: Any,
    save: Callable[..., None],
    backward: Callable[..., Grads],
    tangent: Callable[..., Any],
) -> Callable[..., Any]:
    """The kernel of an operator, of what it saves, its backward and its tangent.

    torch.library.register_autograd would do without the tangent, and ends in an error in the
    transforms of torch.func. Here each level of these comes in by itself, as it does for the
    kernels of PyTorch: so the node is one of a single level.
    """
    positional = [a.default_value for a in overload._schema.arguments if not a.kwarg_only]
    defaults = {a.name: a.default_value for a in overload._schema.arguments if a.kwarg_only}
    after_autograd = torch._C._after_autograd_keyset

    def forward(ctx: Any, *inputs: Any) -> Any:
        *args, call = inputs
        with call.modes(), torch._C._AutoDispatchBelowAutograd():
            output = overload.redispatch(call.keyset & after_autograd, *args, **call.options)
        # Zeros would be work, and for DTensors no DTensors; forward mode can't do without.
        ctx.set_materialize_grads(forward_ad._current_level >= 0)
        ctx.options = {**defaults, **call.options}
        save(ctx, args)
        ctx.call, call.args = call, args
        return output

    def node_backward(ctx: Any, *grads: Tensor) -> Grads:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return *backward(ctx, *grads), None

    def jvp(ctx: Any, *tangents: Any) -> Any:
        # called in apply, when forward has returned
        primals = [_unpack_dual(a, 0)[0] if isinstance(a, Tensor) else a for a in ctx.call.args]
        with ctx.call.modes():
            return tangent(primals, tangents[:-1], ctx.options)

    functions = {"forward": forward, "backward": node_backward, "jvp": jvp}
    node = type(
        overload._schema.name.removeprefix("rope::").title().replace("_", ""),
        (_SingleLevelFunction,),
        {name: staticmethod(function) for name, function in functions.items()},
    )

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active()
        if not (transformed or forward_ad._current_level >= 0) and not (
            torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        ):
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & after_autograd, *args, **options)
        args += tuple(positional[len(args) :])  # the dispatcher leaves out what is the default
        call = _Call(keyset, options)
        if not transformed:
            output = node.apply(*args, call)
        else:
            call.modes = _Modes()
            with enable_single_level_autograd_function():
                output = node.apply(*args, call)
        call.args = ()  # or the graph would keep them
        return output

    return kernel


@dataclass
class _Call:
    """What a call of an operator has beside its arguments."""

    keyset: Any
    options: dict[str, Any]
    modes: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    args: Sequence[Any] = ()


class _Modes:
    """Puts the two modes of differentiation back to what they were when this was made: a node turns
    them off, and the outer levels of torch.func, which come after, would take that for theirs.
    """

    def __init__(self) -> None:
        self.backward = torch.is_grad_enabled()
        self.forward = forward_ad._is_fwd_grad_enabled()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.backward), forward_ad._set_fwd_grad_enabled(self.forward):
            yield


def last_stride_one(grad: Tensor) -> Tensor:
    """Gradients of other strides, such as the expanded ones of sum(), are laid out."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def zero_unless_given(tangent: Tensor | None, of: Tensor) -> Tensor:
    return torch.zeros_like(of) if tangent is None else last_stride_one(tangent)


def sum_of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def save_all(ctx: Any, args: list[Any]) -> None:
    ctx.numbers = [None if isinstance(a, Tensor) else a for a in args]
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in args))


# Of the rotation. It is linear in x, so its gradient is the transposed rotation; and linear in
# (cos, sin), so the gradient to them is bilinear, with rotations as its derivatives. Tangents are
# the operators themselves.


def _save(ctx: Any, args: list[Any], rotated: int) -> None:
    """Keeps what backward needs; the rotated tensors only for gradients to the table."""
    cos, sin, position_ids = args[rotated : rotated + 3]
    ctx.table_needs_grad = any(ctx.needs_input_grad[rotated : rotated + 2])
    xs = args[:rotated] if ctx.table_needs_grad else ()
    ctx.save_for_backward(cos, sin, position_ids, *xs)


def _save_one(ctx: Any, args: list[Any]) -> None:
    _save(ctx, args, rotated=1)


def _save_two(ctx: Any, args: list[Any]) -> None:
    _save(ctx, args, rotated=2)


def _apply_rotary_backward(ctx: Any, grad: Tensor) -> Grads:
    cos, sin, position_ids, *xs = ctx.saved_tensors
    grad = last_stride_one(grad)
    grad_x = grad_cos = grad_sin = None
    if ctx.needs_input_grad[0]:
        grad_x = rope.apply_rotary(grad, cos, sin, position_ids, **inverted(ctx.options))
    if ctx.table_needs_grad:
        grad_cos, grad_sin = table_grad(grad, xs[0], None, None, cos, position_ids, ctx.options)
    return grad_x, grad_cos, grad_sin, None


def _apply_rotary_qk_backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> Grads:
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
        grad_cos, grad_sin = table_grad(*first, *second, cos, position_ids, ctx.options)
    return to_q, to_k, grad_cos, grad_sin, None


def inverted(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the inverse rotation, which is the backward: it reads the result's order."""
    inverse = {**options, "inverse": not options.get("inverse", False)}
    if options.get("interleaved_out") is not None:
        inverse["interleaved"] = options["interleaved_out"]
        inverse["interleaved_out"] = options.get("interleaved", False)
    return inverse


def table_grad(
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


def rotated_alone(
    x: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    options: dict[str, Any],
) -> Tensor | None:
    """The derivative of the rotation by the table in the direction (cos, sin): the rotation, and
    zero where channels do not rotate.
    """
    if x is None:
        return None
    dim, offset = options["rotary_dim"], options["rotary_offset"]
    dim = 2 * cos.shape[-1] if dim is None else dim
    rotating = last_stride_one(x)[..., offset : offset + dim]
    out = rope.apply_rotary(rotating, cos, sin, position_ids, **{**options, "rotary_offset": 0})
    return pad(out, (offset, x.shape[-1] - offset - dim))


def rotary_tangent(
    x: Tensor,
    x_tangent: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor | None],
    row_tangents: tuple[Tensor | None, Tensor | None],
    options: dict[str, Any],
) -> Tensor | None:
    cos, _, position_ids = rows
    of_x = of_table = None
    if x_tangent is not None:
        of_x = rope.apply_rotary(last_stride_one(x_tangent), *rows, **options)
    if any(t is not None for t in row_tangents):
        table = (zero_unless_given(t, cos) for t in row_tangents)
        of_table = rotated_alone(x, *table, position_ids, options)
    return sum_of(of_x, of_table)


def _apply_rotary_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    x, *rows = inputs
    return rotary_tangent(x, tangents[0], tuple(rows), tangents[1:3], options)


def _apply_rotary_qk_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    *xs, cos, sin, position_ids = inputs
    rows = cos, sin, position_ids
    return tuple(
        rotary_tangent(x, tangent, rows, tangents[2:4], options)
        for x, tangent in zip(xs, tangents[:2], strict=True)
    )


def _table_backward_backward(ctx: Any, table_cos: Tensor | None, table_sin: Tensor | None) -> Grads:
    """grad_cos and grad_sin are linear in grad_q, and in q: the gradient to either is the other one
    rotated by the table (table_cos, table_sin), and zero where channels do not rotate.
    """
    table_cos, table_sin = both(table_cos, table_sin)
    grad_q, q, grad_k, k, _, order, offsets = ctx.saved_tensors
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
    rows = last_stride_one(table_cos), last_stride_one(table_sin), position_ids
    forward, inverse = ctx.options, inverted(ctx.options)
    return (
        rotated_alone(q, *rows, forward),
        rotated_alone(grad_q, *rows, inverse),
        rotated_alone(k, *rows, forward),
        rotated_alone(grad_k, *rows, inverse),
        None,
        None,
        None,
    )


def _table_backward_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    """Bilinear: in the gradients of the rotated tensors, and in the tensors."""
    grad_q, q, grad_k, k, *rest = inputs
    first, second = None, None
    if tangents[0] is not None or tangents[2] is not None:
        to_q = zero_unless_given(tangents[0], grad_q)
        to_k = None if k is None else zero_unless_given(tangents[2], grad_k)
        first = rope.apply_rotary_table_backward(to_q, q, to_k, k, *rest, **options)
    if tangents[1] is not None or tangents[3] is not None:
        to_q = zero_unless_given(tangents[1], q)
        to_k = None if k is None else zero_unless_given(tangents[3], k)
        second = rope.apply_rotary_table_backward(grad_q, to_q, grad_k, to_k, *rest, **options)
    if first is None or second is None:
        return first or second or (None, None)
    return tuple(a + b for a, b in zip(first, second, strict=True))


def both(first: Tensor | None, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients to cos and sin, with zeros for one that nothing depends on."""
    first = torch.zeros_like(second) if first is None else first
    return first, torch.zeros_like(first) if second is None else second
