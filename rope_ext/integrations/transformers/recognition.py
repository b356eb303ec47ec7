"""Recognizes the rotation of a model's own function by its parameters and by its results.

The names of a function's parameters select the forms that it may have (rotations.py). The function
is then called with small tensors of irregular numbers, and so is each form with each way to pair
channels. The first that agrees with all results of the function is its rotation. So nothing depends
on a model's name or on how its code is written. A function that does anything else, such as using
other columns of the tables, is not recognized.
"""

import inspect
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rope_ext.integrations.transformers import probes, rotations
from rope_ext.integrations.transformers.probes import Numbers, Probe
from rope_ext.integrations.transformers.rotations import ALL_PAIRS, Pairs

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


def recognize(function: Callable[..., Any] | nn.Module) -> Rotation | None:
    """The rotation of a function, or of the function in a hook of the `kernels` package."""
    if isinstance(function, nn.Module):
        return recognize_hook(type(function))
    return _recognize_among(_FORMS, function)


def recognize_hook(hook: type[nn.Module]) -> Rotation | None:
    """As :func:`recognize`, for the class of a hook: its own forward, even if a kernel is set.

    A hook's forward takes the hook and then the function's arguments, and ignores the hook.
    """
    return _recognize_among(_FORMS, types.MethodType(hook.forward, hook))


def recognize_method(function: Callable[..., Any]) -> Rotation | None:
    """As :func:`recognize`, for functions that are methods of an attention class."""
    return _recognize_among(_METHOD_FORMS, function)


_known: WeakKeyDictionary[Callable[..., Any], Rotation | None] = WeakKeyDictionary()


def _recognize_among(forms: tuple[Form, ...], function: Callable[..., Any]) -> Rotation | None:
    key = getattr(function, "__func__", function)
    if key not in _known:
        # A new thread has no transform, mode, autocast or tracing of the caller.
        with ThreadPoolExecutor(1) as thread:
            _known[key] = thread.submit(_first_match, forms, function).result()
    return _known[key]


def _first_match(forms: tuple[Form, ...], function: Callable[..., Any]) -> Rotation | None:
    try:
        parameters = _names_and_kinds(function)
    except (TypeError, ValueError):  # it has no signature
        return None
    for form in forms:
        if _names_and_kinds(form.fill(ALL_PAIRS[0])) != parameters:
            continue
        expected = [
            (probe, result)
            for dtype in (torch.float32, torch.bfloat16)
            for probe in form.probes(Numbers(dtype))
            if (result := _call(function, probe)) is not None
        ]
        for pairs in ALL_PAIRS:
            replacement = _with_defaults_of(function, form.fill(pairs))
            if (
                expected
                and all(_agree(_call(replacement, p), r, p) for p, r in expected)
                and _same_gradients(function, replacement, expected[0][0])
            ):
                convention = f"{pairs.name}; {form.label}" if form.label else pairs.name
                return Rotation(convention, replacement, form.fill, pairs)
    return None


def _names_and_kinds(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]


def _with_defaults_of(
    function: Callable[..., Any], replacement: Callable[..., Any]
) -> Callable[..., Any]:
    parameters = inspect.signature(function).parameters.values()
    replacement.__defaults__ = tuple(p.default for p in parameters if p.default is not p.empty)
    return replacement


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


_FORMS = (
    Form("", rotations.q_and_k, probes.q_and_k_in_every_way),
    Form("q shorter than k", rotations.q_shorter_than_k, probes.q_and_k_in_every_way),
    Form("", rotations.q_and_k_unused_position_ids, probes.q_and_k_position_ids),
    Form("", rotations.q_and_optional_k, probes.q_and_k_in_every_way),
    Form("a section for an axis", rotations.q_and_k_by_sections, probes.q_and_k_by_sections),
    Form("q, k and v", rotations.q_k_and_v, probes.q_k_and_v),
    Form("one tensor", rotations.one_tensor, probes.one_tensor),
    Form("one tensor", rotations.one_tensor_sin_first, probes.one_tensor_sin_first),
    Form("longer tables", rotations.one_tensor_longer_tables, probes.one_tensor_longer_tables),
    Form("from angles", rotations.angles_of_one_tensor, probes.angles_of_one_tensor),
    Form("no heads", rotations.one_tensor_without_heads, probes.one_tensor_without_heads),
    Form(
        "a part of each head for an axis", rotations.axes_of_one_tensor, probes.axes_of_one_tensor
    ),
    Form("vision", rotations.q_and_k_heads_last, probes.heads_last),
    Form("2D", rotations.q_and_k_heads_first, probes.heads_first),
    Form("after a prefix", rotations.q_and_k_after_prefix, probes.after_prefix),
    Form("2D, memory", rotations.q_and_k_memory, probes.memory),
    Form("2D, memory in groups", rotations.q_and_k_memory_groups, probes.memory_groups),
    Form("complex", rotations.complex_heads_last, probes.complex_heads_last),
    Form("complex", rotations.complex_heads_first, probes.complex_heads_first),
    Form("complex", rotations.complex_of_tokens, probes.complex_of_tokens),
    Form("from positions", rotations.positions_of_one_tensor, probes.positions_of_one_tensor),
)

_METHOD_FORMS = (
    Form("on hidden states", rotations.method_on_hidden_states, probes.method_on_hidden_states),
    Form(
        "sin and cos in one",
        rotations.method_with_sinusoidal_pos,
        probes.method_with_sinusoidal_pos,
    ),
)
