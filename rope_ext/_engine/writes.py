"""Operators that write, in place, into out or to a cache: version counters, and errors.

Autograd compares version counters to detect that a saved tensor was written later. A C++ kernel
does not increase them, so this file does. Inference mode counts no versions and skips this file.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from rope_ext._engine.record import Operator
from rope_ext._torch_private import (
    any_requires_grad,
    below_versions,
    in_forward_mode,
    is_dual,
    keys_below_versions,
    name_of,
    transforms_active,
)

_LIBRARY = torch.library.Library("rope", "IMPL")


def register_writes(operators: Sequence[Operator]) -> None:
    for operator in operators:
        if operator.written:
            kernel = _writing_kernel(operator)
            _LIBRARY.impl(operator.name, kernel, "ADInplaceOrView", with_keyset=True)


def check_may_be_written(operator: Any, written: tuple[Tensor, ...]) -> None:
    """Raises for inference tensors, which are only written in inference mode."""
    try:
        for x in written:
            if x.is_inference():
                raise RuntimeError(
                    f"{name_of(operator)}: expected no inference tensor to be written outside of "
                    "inference mode, got one"
                )
    except AttributeError:
        return  # for None the operator raises the error


def _writing_kernel(operator: Operator) -> Callable[..., None]:
    """Raises for tensors that require grad, runs the operator, and increases version counters."""
    overload, written_tensors = operator.overload, operator.written_tensors
    redispatch = overload.redispatch
    is_inference_mode, is_grad_enabled = torch.is_inference_mode_enabled, torch.is_grad_enabled

    def kernel(keyset: Any, *args: Any, **options: Any) -> None:
        written = written_tensors(args, options)
        if not is_inference_mode():
            check_may_be_written(overload, written)
        if is_grad_enabled() and any_requires_grad(*args, *options.values()):
            _refuse_gradients(operator, operator.named(args, options))
        if (transforms_active() or in_forward_mode()) and is_dual(*args, *options.values()):
            raise RuntimeError(
                f"{operator.op}: expected tensors without tangents ({_instead(operator)}), got one "
                "that forward-mode differentiation has given one"
            )
        with below_versions():
            redispatch(keyset & keys_below_versions, *args, **options)
        increment_version(written)

    return kernel


def _refuse_gradients(operator: Operator, given: dict[str, Any]) -> None:
    tensors = ((name, x) for name, x in given.items() if isinstance(x, Tensor))
    name = next(name for name, x in tensors if x.requires_grad)
    raise RuntimeError(
        f"{operator.op}: expected {name} to need no gradient ({_instead(operator)}), got a tensor "
        "that requires grad"
    )


def _instead(operator: Operator) -> str:
    """What the caller can do to get a gradient."""
    if operator.outs:
        return "rotate without out"
    if {*operator.written} <= {*operator.rotates}:
        return f"{name_of(operator.functional)} is differentiable"
    return "what a cache keeps has none"
