"""Recognizes the rotation of a model's own function by its results.

The function is called with small tensors of irregular numbers, and so is each form that it may
have, with each way to pair channels. The first that agrees with all results of the function is its
rotation. So nothing depends on a model's name or on how its code is written. A function that does
anything else, such as using other columns of the tables, is not recognized.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rope_ext.integrations.patching.pairs import ALL_PAIRS, Pairs
from rope_ext.integrations.patching.probes import Numbers, Probe

# Tolerance of a result, in units of the dtype's eps times the largest |x| (|cos| + |sin|). The
# functions round each product and the sum, some round tables too. A wrong pair or column is off by
# about 1 / eps.
TOLERANCE = 8

_INTEGERS = (torch.int32, torch.int64)


class Rotation(NamedTuple):
    """The rotation of a function, and a replacement that computes the same with rope_ext."""

    convention: str
    replacement: Callable[..., Any]
    form: Callable[[Pairs], Callable[..., Any]]
    pairs: Pairs


class Form(NamedTuple):
    label: str  # for reports; '': q and k
    fill: Callable[[Pairs], Callable[..., Any]]
    probes: Callable[[Numbers], Iterator[Probe]]


_known: WeakKeyDictionary[Callable[..., Any], Rotation | None] = WeakKeyDictionary()


def recognized(
    function: Callable[..., Any],
    forms: Iterable[Form],
    completed: Callable[[Callable[..., Any], Callable[..., Any]], Callable[..., Any]],
) -> Rotation | None:
    """The rotation of a function that has one of the forms; None if it computes anything else.

    completed: makes the replacement from the function and a form that is filled with its pairs.
    """
    key = getattr(function, "__func__", function)
    if key not in _known:
        # A new thread has no transform, mode, autocast or tracing of the caller.
        with ThreadPoolExecutor(1) as thread:
            _known[key] = thread.submit(_first_match, function, forms, completed).result()
    return _known[key]


def _first_match(
    function: Callable[..., Any],
    forms: Iterable[Form],
    completed: Callable[[Callable[..., Any], Callable[..., Any]], Callable[..., Any]],
) -> Rotation | None:
    for form in forms:
        expected = [
            (probe, result)
            for dtype in (torch.float32, torch.bfloat16)
            for probe in form.probes(Numbers(dtype))
            if (result := _call(function, probe)) is not None
        ]
        for pairs in ALL_PAIRS:
            replacement = completed(function, form.fill(pairs))
            if (
                expected
                and all(_agree(_call(replacement, p), r, p) for p, r in expected)
                and _same_gradients(function, replacement, expected[0][0])
            ):
                convention = f"{pairs.name}; {form.label}" if form.label else pairs.name
                return Rotation(convention, replacement, form.fill, pairs)
    return None


def _call(function: Callable[..., Any], probe: Probe) -> tuple[Tensor | None, ...] | None:
    """The results; None where the function can't be called with such arguments."""
    arguments, keywords = probe
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    try:
        with torch.no_grad():
            results = function(*copies, **keywords)
    except Exception:  # a model's function may raise anything for arguments that it does not take
        return None
    results = results if isinstance(results, tuple) else (results,)
    unchanged = all(
        torch.equal(a, b) for a, b in zip(arguments, copies, strict=True) if isinstance(a, Tensor)
    )
    tensors = all(r is None or isinstance(r, Tensor) for r in results)
    return results if unchanged and tensors else None


def _agree(
    results: tuple[Tensor | None, ...] | None,
    expected: tuple[Tensor | None, ...],
    probe: Probe,
) -> bool:
    if results is None or len(results) != len(expected):
        return False
    inputs = [a for a in probe[0] if isinstance(a, Tensor) and a.dtype not in _INTEGERS]
    largest = max(float(a.abs().max()) for a in inputs)
    eps = max(torch.finfo(a.dtype).eps for a in inputs)
    for result, other in zip(results, expected, strict=True):
        if result is None or other is None:
            if result is not other:
                return False
            continue
        if result.shape != other.shape:
            return False
        if not (result.double() - other.double()).abs().max() <= TOLERANCE * eps * largest**2:
            return False
    return True


def _same_gradients(
    function: Callable[..., Any], replacement: Callable[..., Any], probe: Probe
) -> bool:
    """Whether the gradients to all inputs agree: a function may stop them."""
    own, new = _gradients(function, probe), _gradients(replacement, probe)
    if own is None or new is None:
        return False
    largest = max(float(g.abs().max()) for g in own if g is not None)
    for a, b in zip(own, new, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        # sums over up to HEADS and BATCH terms, each with its own roundings
        elif not (a - b).abs().max() <= 1e-5 * largest:
            return False
    return True


def _gradients(function: Callable[..., Any], probe: Probe) -> tuple[Tensor | None, ...] | None:
    """Gradients of a sum over the results to each floating tensor; None if there are none."""
    leaves = [
        a.clone().requires_grad_(a.dtype not in _INTEGERS) if isinstance(a, Tensor) else a
        for a in probe[0]
    ]
    try:
        results = function(*leaves, **probe[1])
        results = results if isinstance(results, tuple) else (results,)
        total = sum(((i + 1) * r.square()).sum() for i, r in enumerate(results) if r is not None)
        inputs = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        return torch.autograd.grad(total, inputs, allow_unused=True)
    except Exception:  # a model's function may not be differentiable
        return None
