"""Calls of the operators from Python: past autograd, where there is nothing to differentiate."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling


def call(
    operator: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
    written: tuple[Tensor, ...] = (),  # the tensors that it writes
) -> Any:
    """operator(*args, **options), past autograd where nothing is differentiated.

    What autograd has of an operator is written in Python (_derivatives.py, _writes.py), and takes
    longer than all else of a small call. Where nothing requires a gradient it has only the writes
    to take note of, and that is done here. Inference mode goes past it by itself, but for writes
    where some tensor was made outside of it.
    """
    if is_compiling():  # first: a graph is not told the mode
        return operator(*args, **options)
    inference = torch.is_inference_mode_enabled()
    if (
        (inference and not written)
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or (torch.is_grad_enabled() and _any_requires_grad(*args, *written, *options.values()))
    ):
        return operator(*args, **options)
    if not inference and written:
        check_may_be_written(operator, written)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        result = operator(*args, **options)
    if written:
        increment_version([x for x in written if not x.is_inference()])
    return result


def is_differentiated(*tensors: Tensor | None) -> bool:
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return needs_grad or forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether a function is compiled, which makes a functional graph of it anyway, or transformed
    by torch.func or forward-mode differentiation, which know more of copy_ than of our node.
    """
    return (
        is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _any_requires_grad(*args: Any) -> bool:
    for x in args:  # noqa: SIM110 (the generator of any() takes longer than all of this)
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def check_may_be_written(operator: Any, written: tuple[Tensor, ...]) -> None:
    try:
        for x in written:
            if x.is_inference():
                raise RuntimeError(
                    f"{name_of(operator)}: expected no inference tensor to be written outside of "
                    "inference mode, got one"
                )
    except AttributeError:
        return  # a None, which the operator refuses


def name_of(operator: Any) -> str:
    """rope::apply_rotary, rope::apply_rotary.out: of an overload, or of the only one."""
    if isinstance(operator, torch._ops.OpOverloadPacket):
        return operator._qualified_op_name
    overload = operator._overloadname
    return operator._schema.name + ("" if overload == "default" else "." + overload)
