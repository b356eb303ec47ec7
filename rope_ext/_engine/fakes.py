"""Fakes: shapes, dtypes and strides of results.

A fake checks only the devices of the arguments. The operator checks everything else when it runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from rope_ext._engine.record import Given, Operator


def register_fakes(operators: Sequence[Operator]) -> None:
    for operator in operators:
        register_fake(operator.op, _fake(operator))


def _fake(operator: Operator) -> Callable[..., Any]:
    def fake(*args: Any, **options: Any) -> Any:
        given = operator.given(args, options)
        _check_device(operator, given)
        if operator.written:
            return None
        results = _results(operator, given)
        return results if operator.result_count > 1 else results[0]

    return fake


def _check_device(operator: Operator, given: Given) -> None:
    """PyTorch passes a call with a meta tensor among real ones to the fake, not to the operator."""
    leading = next((n for n in operator.rotates if given[n] is not None), operator.pairs)
    device = given[leading].device
    for name in operator.tensors:
        other = given[name]
        if other is not None and other.device != device:
            raise RuntimeError(
                f"{operator.op}: expected {name} on the device of {leading}, {device}, got "
                f"{other.device}"
            )


def _results(operator: Operator, given: Given) -> tuple[Tensor, ...]:
    if callable(operator.results):
        return operator.results(given)
    names = operator.rotates if operator.results is None else operator.results
    return tuple(
        _rotated_like(given[name]) if name in operator.rotates else _contiguous_like(given[name])
        for name in names
    )


def _rotated_like(x: Tensor) -> Tensor:
    """An empty tensor like x, in x's order of dimensions in memory if the channels come last."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else _contiguous_like(x)


def _contiguous_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)
