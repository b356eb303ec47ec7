"""Calls of operators that go past the dispatcher, where nothing needs it (csrc/host/direct.cpp)."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rope_ext import _C
from rope_ext._engine.record import Given, Operator
from rope_ext._torch_private import (
    count_versions,
    exchange_api_of,
    forward_level,
    needs_dispatcher,
    version_of,
)
from rope_ext.options import CACHE_ORDERS, ORDERS

ENVIRONMENT_VARIABLE = "ROPE_EXT_DIRECT"


def direct_call(operator: str) -> Callable[..., Any]:
    """The operator as a function of (layout, cache_layout, head_dim, *all its arguments), by their
    place. head_dim: that which x, q, k and v have to have, or None.

    It returns NotImplemented, before anything is written, where the operator has to be called:
    also for all that it refuses. Not to be called while a compiler traces.
    """
    return _C.direct_calls[operator]


def call_directly(operator: Operator, arguments: Given) -> Any:
    """The operator with all its arguments, in the order of its schema."""
    layout = "thd" if arguments[operator.leading].dim() == 3 else "bshd"
    results = _C.direct_calls[operator.name](layout, "NHD", None, *arguments.values())
    return operator.overload(**arguments) if results is NotImplemented else results


def why_off() -> str:
    """Why direct calls are off; empty if they are on."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return f"{ENVIRONMENT_VARIABLE}=0"
    if exchange_api_of(Tensor) is None:
        return f"torch {torch.__version__} has no DLPack exchange API"
    return ""


def _start() -> None:
    if why_off():
        return
    _C.set_pytorch(
        {
            "exchange_api": exchange_api_of(Tensor),
            "types": (Tensor, Parameter),
            "dtypes": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
            "unless": needs_dispatcher,
            "is_negative": Tensor.is_neg,
            "requires_grad": Tensor.requires_grad,
            "version": version_of,
            "forward_level": forward_level,
            "is_inference_mode": torch.is_inference_mode_enabled,
            "increment_version": count_versions,
            "empty_like": torch.empty_like,
            "new_empty_strided": Tensor.new_empty_strided,
            "transpose": Tensor.transpose,
            "layouts": ORDERS,
            "cache_layouts": CACHE_ORDERS,
        }
    )
    _C.use_direct_calls(True)


_start()
