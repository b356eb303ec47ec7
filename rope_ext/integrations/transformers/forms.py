"""The forms of transformers' functions, and which of them a function has.

The names of a function's parameters select the forms that it may have (rotations.py). Their results
then decide.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from rope_ext.integrations.patching.pairs import ALL_PAIRS
from rope_ext.integrations.patching.recognition import Form, Recognition, Rotation, remembered
from rope_ext.integrations.transformers import probes, rotations


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


def _recognize_among(forms: tuple[Form, ...], function: Callable[..., Any]) -> Rotation | None:
    try:
        parameters = _names_and_kinds(function)
    except (TypeError, ValueError):  # it has no signature
        return None
    fitting = [f for f in forms if _names_and_kinds(f.fill(ALL_PAIRS[0])) == parameters]
    completed = functools.partial(_with_defaults_of, function)
    return remembered(function, lambda: Recognition(function).first_match(fitting, completed))


def _names_and_kinds(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]


def _with_defaults_of(
    function: Callable[..., Any], replacement: Callable[..., Any]
) -> Callable[..., Any]:
    parameters = inspect.signature(function).parameters.values()
    replacement.__defaults__ = tuple(p.default for p in parameters if p.default is not p.empty)
    return replacement


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
