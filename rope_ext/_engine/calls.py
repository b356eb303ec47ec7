"""How the functions of rope_ext call operators: without autograd if nothing is differentiated."""

from typing import Any

from torch import Tensor, is_grad_enabled, is_inference_mode_enabled
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from rope_ext._engine.fallback import in_graph
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
    """operator(*args, **options), without the Autograd kernels if nothing is differentiated.

    These kernels (autograd.py, writes.py) are written in Python and take most of the time of a
    small call. If no tensor requires a gradient, only the version counters have to be increased,
    which is done here. Inference mode skips the kernels by itself, except if a tensor is written
    that was made outside of inference mode.
    """
    if is_compiling():  # first: a graph must not depend on the modes below
        return in_graph(operator, args[0].device.type)(*args, **options)
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
    """Whether autograd or forward mode is at work. Python only, as torch.compile traces it."""
    if is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return in_forward_mode()


def is_transformed() -> bool:
    """Whether the call is compiled, or transformed by torch.func or forward-mode differentiation.
    These support copy_, but not the node of an in-place rotation.
    """
    return is_compiling() or transforms_active() or in_forward_mode()
