"""Recognizes the rotation of a model's own function by its results.

The function is called with small tensors of irregular numbers, and so is each form that it may
have, with each way to pair channels. The first that agrees with all results of the function is its
rotation. So nothing depends on a model's name or on how its code is written. A function that does
anything else, such as using other columns of the tables, is not recognized.
"""

import functools
import warnings
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
    # Gradients to all tensors are compared, or to so many of the first arguments.
    differentiated: int | None = None


_known: WeakKeyDictionary[Callable[..., Any], Rotation | None] = WeakKeyDictionary()


def remembered(
    function: Callable[..., Any], recognize: Callable[[], Rotation | None]
) -> Rotation | None:
    """What recognize() finds out about a function: asked once, in a thread of its own."""
    key = getattr(function, "__func__", function)
    if key not in _known:
        # A new thread has no transform, mode, autocast or tracing of the caller. A function may
        # warn of arguments that no model gives to it.
        with warnings.catch_warnings(), ThreadPoolExecutor(1) as thread:
            warnings.simplefilter("ignore")
            _known[key] = thread.submit(recognize).result()
    return _known[key]


@functools.cache
def _made(probes: Callable[[Numbers], Iterator[Probe]], dtype: torch.dtype) -> list[Probe]:
    return [*probes(Numbers(dtype))]


class Recognition:
    """Compares a function with forms."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._expected: dict[Any, list[tuple[Probe, Any]]] = {}  # by the probes

    def results(self, form: Form) -> list[tuple[Probe, Any]]:
        """The probes of a form that the function accepts, with its results."""
        if form.probes not in self._expected:
            expected = self._expected[form.probes] = []
            for dtype in (torch.float32, torch.bfloat16):
                called = ((p, _call(self.function, p)) for p in _made(form.probes, dtype))
                expected += [(probe, result) for probe, result in called if result is not None]
                if not expected:
                    break
        return self._expected[form.probes]

    def first_match(
        self,
        forms: Iterable[Form],
        completed: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda filled: filled,
    ) -> Rotation | None:
        """The rotation of a function that has one of the forms; None if it computes anything else.

        completed: makes the replacement from a form that is filled with its pairs.
        """
        for form in forms:
            expected = self.results(form)
            for pairs in ALL_PAIRS if expected else ():
                replacement = completed(form.fill(pairs))
                if all(_agree(_call(replacement, p), r, p) for p, r in expected) and (
                    _same_gradients(self.function, replacement, expected[0], form.differentiated)
                ):
                    convention = f"{pairs.name}; {form.label}" if form.label else pairs.name
                    return Rotation(convention, replacement, form.fill, pairs)
        return None


def _call(function: Callable[..., Any], probe: Probe) -> tuple[Tensor | None, ...] | None:
    """The results; None where the function can't be called with such arguments."""
    arguments, keywords = probe
    copies = _mapped(arguments, Tensor.clone)
    try:
        with torch.no_grad():
            results = function(*copies, **keywords)
    except Exception:  # a model's function may raise anything for arguments that it does not take
        return None
    results = results if isinstance(results, tuple) else (results,)
    unchanged = all(
        torch.equal(a, b) for a, b in zip(_tensors(arguments), _tensors(copies), strict=True)
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
    inputs = [a for a in _tensors(probe[0]) if a.dtype not in _INTEGERS]
    largest = max(float(a.abs().max()) for a in inputs)
    rounded = [*inputs, *(r for r in expected if r is not None)]
    eps = max(torch.finfo(a.dtype).eps for a in rounded)
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
    function: Callable[..., Any],
    replacement: Callable[..., Any],
    expected: tuple[Probe, tuple[Tensor | None, ...]],
    count: int | None,
) -> bool:
    """Whether the gradients to the first `count` inputs agree: a function may stop them."""
    probe, results = expected
    own, new = _gradients(function, probe, count), _gradients(replacement, probe, count)
    if own is None or new is None:
        return False
    # sums over up to HEADS and BATCH terms, each with its own roundings
    eps = max(torch.finfo(r.dtype).eps for r in results if r is not None)
    tolerance = max(1e-5, 4 * eps)
    largest = max(float(g.abs().max()) for g in own if g is not None)
    for a, b in zip(own, new, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif not (a - b).abs().max() <= tolerance * largest:
            return False
    return True


def _gradients(
    function: Callable[..., Any], probe: Probe, count: int | None
) -> tuple[Tensor | None, ...] | None:
    """Gradients of a sum over the results to each floating tensor; None if there are none."""
    leaves = _mapped(probe[0], lambda a: a.clone().requires_grad_(a.dtype not in _INTEGERS))
    try:
        results = function(*leaves, **probe[1])
        results = results if isinstance(results, tuple) else (results,)
        total = sum(((i + 1) * r.square()).sum() for i, r in enumerate(results) if r is not None)
        inputs = [a for a in _tensors(leaves[:count]) if a.requires_grad]
        return torch.autograd.grad(total, inputs, allow_unused=True)
    except Exception:  # a model's function may not be differentiable
        return None


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in lists and tuples."""
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _tensors(value)]
    return [values] if isinstance(values, Tensor) else []


def _mapped(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Lists and tuples with function(tensor) for each tensor."""
    if isinstance(values, (list, tuple)):
        return type(values)(_mapped(value, function) for value in values)
    return function(values) if isinstance(values, Tensor) else values
