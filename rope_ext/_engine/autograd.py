"""Derivatives of the operators, backward and forward, in every transform of torch.func.

Each operator gets one kernel at the dispatch key Autograd, like PyTorch's own operators. The kernel
adds a node to the graph if a tensor requires grad, computes the tangent if a tensor has one, and
otherwise only calls the operator.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rope_ext._engine.record import Composed, Derivative, Grads, Operator
from rope_ext._torch_private import (
    SingleLevelFunction,
    any_requires_grad,
    below_autograd,
    in_forward_mode,
    is_forward_mode_enabled,
    keys_below_autograd,
    set_forward_mode_enabled,
    single_level,
    transforms_active,
    unpack_dual,
)

_LIBRARY = torch.library.Library("rope", "IMPL")


def register_autograd(operators: Sequence[Operator]) -> None:
    for operator in operators:
        if isinstance(operator.derivative, Derivative):
            kernel = _autograd_kernel(operator, operator.derivative)
        elif isinstance(operator.derivative, Composed):
            kernel = _composing_kernel(operator, operator.derivative)
        else:
            continue
        _LIBRARY.impl(operator.name, kernel, "Autograd", with_keyset=True)


def _composing_kernel(operator: Operator, composed: Composed) -> Callable[..., Any]:
    """Calls the operator. If the call is differentiated, the operator only checks the arguments,
    and the result is that of the composed function, which PyTorch can differentiate.
    """

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        if transforms_active():
            return composed.function(**operator.given(args, options))
        with below_autograd():
            results = operator.overload.redispatch(keyset & keys_below_autograd, *args, **options)
        if in_forward_mode() or (torch.is_grad_enabled() and any_requires_grad(*args)):
            return composed.function(**operator.given(args, options))
        return results

    return kernel


def _autograd_kernel(operator: Operator, derivative: Derivative) -> Callable[..., Any]:
    """Replaces torch.library.register_autograd, which has no tangents and raises in the transforms
    of torch.func. PyTorch calls the kernel once for each level of a transform, so a node belongs to
    a single level.
    """
    save, backward, tangent = derivative
    redispatch, is_grad_enabled = operator.overload.redispatch, torch.is_grad_enabled
    positional = [operator.defaults[name] for name in operator.positional]
    defaults = {n: x for n, x in operator.defaults.items() if n not in operator.positional}

    def forward(ctx: Any, *inputs: Any) -> Any:
        *args, call = inputs
        with call.modes(), below_autograd():
            output = redispatch(call.keyset & keys_below_autograd, *args, **call.options)
        # Forward mode needs zeros for missing gradients. Elsewhere they cost time, and for DTensors
        # they are plain tensors.
        ctx.set_materialize_grads(in_forward_mode())
        ctx.options = {**defaults, **call.options}
        save(ctx, args)
        ctx.call, call.args = call, args
        return output

    def node_backward(ctx: Any, *grads: Tensor) -> Grads:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return *backward(ctx, *grads), None

    def jvp(ctx: Any, *tangents: Any) -> Any:
        # PyTorch calls this within apply, after forward.
        primals = [unpack_dual(a, 0)[0] if isinstance(a, Tensor) else a for a in ctx.call.args]
        with ctx.call.modes():
            return tangent(primals, tangents[:-1], ctx.options)

    functions = {"forward": forward, "backward": node_backward, "jvp": jvp}
    node = type(
        operator.name.title().replace("_", ""),
        (SingleLevelFunction,),
        {name: staticmethod(function) for name, function in functions.items()},
    )

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        transformed = transforms_active()
        if not (transformed or in_forward_mode()) and not (
            is_grad_enabled() and any_requires_grad(*args)
        ):
            with below_autograd():
                return redispatch(keyset & keys_below_autograd, *args, **options)
        args += tuple(positional[len(args) :])  # the dispatcher omits defaults
        call = _Call(keyset, options)
        if not transformed:
            output = node.apply(*args, call)
        else:
            call.modes = _Modes()
            with single_level():
                output = node.apply(*args, call)
        call.args = ()  # otherwise the graph keeps them alive
        return output

    return kernel


@dataclass
class _Call:
    """What a node needs from a call besides the positional arguments."""

    keyset: Any
    options: dict[str, Any]
    modes: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    args: Sequence[Any] = ()


class _Modes:
    """Restores the grad mode and the forward mode of the moment when this object was made. A node
    turns both off; without this class the outer levels of torch.func, which run inside the node,
    would not differentiate.
    """

    def __init__(self) -> None:
        self.backward = torch.is_grad_enabled()
        self.forward = is_forward_mode_enabled()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.backward), set_forward_mode_enabled(self.forward):
            yield


# Helpers of the operators' derivatives


def last_stride_one(grad: Tensor) -> Tensor:
    """A gradient whose last stride is 1: a copy if it is not, as for the expanded one of sum()."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def zero_unless_given(tangent: Tensor | None, of: Tensor) -> Tensor:
    return torch.zeros_like(of) if tangent is None else last_stride_one(tangent)


def sum_of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def save_all(ctx: Any, args: list[Any]) -> None:
    ctx.numbers = [None if isinstance(a, Tensor) else a for a in args]
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in args))


def both(first: Tensor | None, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients to cos and sin, with zeros for a missing one."""
    first = torch.zeros_like(second) if first is None else first
    return first, torch.zeros_like(first) if second is None else second
