"""Calls of the operators by the functions of rope_ext: past autograd, if it has nothing to do."""

from typing import Any

from torch import Tensor, is_grad_enabled, is_inference_mode_enabled
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from rope_ext._engine.writes import check_may_be_written
from rope_ext._torch_private import (
    any_requires_grad,
    below_versions,
    in_forward_mode,
    transforms_active,
)


def call(
    operator: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
    written: tuple[Tensor, ...] = (),  # the tensors that it writes
) -> Any:
    """operator(*args, **options), past autograd where nothing is differentiated.

    The kernels of autograd.py and writes.py are Python, and take longer than all else of a small
    call. Where nothing requires a gradient only versions have to be counted, which is done here.
    Inference mode skips these kernels by itself, except for writes where a tensor was made outside
    of it.
    """
    if is_compiling():  # first: a graph must not depend on the modes below
        return operator(*args, **options)
    inference = is_inference_mode_enabled()
    if (
        (inference and not written)
        or in_forward_mode()
        or transforms_active()
        or (is_grad_enabled() and any_requires_grad(*args, *written, *options.values()))
    ):
        return operator(*args, **options)
    if not inference and written:
        check_may_be_written(operator, written)
    with below_versions():
        result = operator(*args, **options)
    if written:
        counted = [x for x in written if not x.is_inference()] if inference else written
        increment_version(counted)
    return result


def is_differentiated(*tensors: Tensor | None) -> bool:
    """In Python alone, as torch.compile has to trace it."""
    if is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return in_forward_mode()


def is_transformed() -> bool:
    """Whether this is compiled, which makes a functional graph of it, or transformed by torch.func
    or forward-mode differentiation, which support copy_ and not our node.
    """
    return is_compiling() or transforms_active() or in_forward_mode()
