"""Devices without kernels: there the operators are plain PyTorch (rope_ext/decompositions.py).

The operator's C++ function checks the arguments and makes the results, as on every device; only in
place of its kernel PyTorch computes. In a graph of a compiler the functions of rope_ext are traced
as plain PyTorch.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rope_ext import _C
from rope_ext._engine.record import Composed, Operator
from rope_ext._torch_private import below_versions, has_kernel, keyset_of, privateuse1_name
from rope_ext.decompositions import PLAIN

ENVIRONMENT_VARIABLE = "ROPE_EXT_FALLBACK"  # "error": raise an error instead

# The dispatch keys of devices whose tensors have memory.
KEYS = ("CUDA", "HPU", "MPS", "MTIA", "PrivateUse1", "XPU")
# Here the C++ functions are registered without kernels: for checks and results on every device.
_WITHOUT_KERNEL = keyset_of("QuantizedXPU")
_LIBRARY = torch.library.Library("rope", "IMPL")

with_kernels = {"cpu", "cuda", "meta"}
_plain: dict[Any, Callable[..., Any]] = {}  # by operator, as functions call it
announced: set[str] = set()


def register_fallback(operators: Sequence[Operator]) -> None:
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if wanted not in ("", "error"):
        raise ImportError(
            f"rope_ext: expected {ENVIRONMENT_VARIABLE} to be 'error' or not set, got {wanted!r}"
        )
    for operator in operators:
        packet = getattr(torch.ops.rope, operator.name.partition(".")[0])
        plain = in_plain_pytorch(operator)
        _plain[operator.overload] = plain
        if operator.overload is packet.default:
            _plain[packet] = plain
    for key in KEYS:
        if not has_kernel(operators[0].op, key):
            register_at(key, operators, _LIBRARY)


def register_at(key: str, operators: Sequence[Operator], library: torch.library.Library) -> None:
    with_kernels.discard(device_of(key))
    for operator in operators:
        library.impl(operator.name, _kernel(operator, key), key)


def in_graph(operator: Any, device: str) -> Any:
    """What a graph gets for an operator: the operator, or the same in plain PyTorch."""
    if device in with_kernels or os.environ.get(ENVIRONMENT_VARIABLE) == "error":
        return operator
    return _plain.get(operator, operator)


def in_plain_pytorch(operator: Operator) -> Callable[..., Any]:
    """The overload in plain PyTorch, without checks."""
    if isinstance(operator.derivative, Composed):
        composed = operator.derivative.function
        return lambda *args, **options: composed(**operator.given(args, options))
    function = PLAIN[operator.name.partition(".")[0].removesuffix("_")]
    written_tensors = operator.written_tensors
    outs = operator.outs if "." in operator.name else ()

    def plain(*args: Any, **options: Any) -> Any:
        if not operator.written:
            return function(*args, **options)
        given = {name: x for name, x in options.items() if name not in outs}
        values = function(*args, **given)
        for written, value in zip(written_tensors(args, options), _listed(values), strict=True):
            if value is not None:
                written.copy_(value)

    return plain


def _kernel(operator: Operator, key: str) -> Callable[..., Any]:
    plain, redispatch = in_plain_pytorch(operator), operator.overload.redispatch

    def kernel(*args: Any, **options: Any) -> Any:
        _announce(operator, device_of(key))
        with below_versions():
            results = redispatch(_WITHOUT_KERNEL, *args, **options)
            values = plain(*args, **options)
            if not operator.written:
                for result, value in zip(_listed(results), _listed(values), strict=True):
                    result.copy_(value)
        return results

    return kernel


def _listed(results: Any) -> Sequence[Any]:
    return (results,) if isinstance(results, Tensor) else results


def _announce(operator: Operator, device: str) -> None:
    """Says once a device that it has no kernels, or raises."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "error":
        raise RuntimeError(f"{operator.op}: {reason(device)} ({ENVIRONMENT_VARIABLE}=error)")
    if device not in announced:
        announced.add(device)
        warnings.warn(
            f"rope_ext: {reason(device)}. Its operators run as plain PyTorch there, with several "
            f"times the memory traffic; {ENVIRONMENT_VARIABLE}=error makes this an error",
            stacklevel=3,
        )


def device_of(key: str) -> str:
    """What torch calls the device of a dispatch key."""
    return privateuse1_name() if key == "PrivateUse1" else key.lower()


def reason(device: str) -> str:
    """Why a type of device has no kernels."""
    if device != "cuda":
        return f"no kernels for tensors on {device}"
    if torch.version.hip is not None:
        return "no kernels for ROCm, which this torch is built for"
    return f"built without CUDA: {_C.build_info()['no_cuda_reason']}"


def reasons() -> dict[str, str]:
    """Of each type of device whose operators are plain PyTorch."""
    devices = map(device_of, KEYS)
    return {device: reason(device) for device in devices if device not in with_kernels}
