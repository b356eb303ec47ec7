"""The forms of diffusers' functions, and which of them a function has.

The names of parameters differ from model to model, so the results alone decide: the number of
arguments selects the forms that a function may have (rotations.py). Arguments with a default that
is a bool or an integer are options. Such a function is a rotation for each choice of its options,
and is recognized if each choice that it accepts is.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rope_ext.integrations.diffusers import probes, rotations
from rope_ext.integrations.patching.recognition import Form, Recognition, Rotation, remembered

# The values of options that are tried: dimensions and the like.
_VALUES = {bool: (False, True), int: (-2, -1, 1, 2)}
# Arguments of functions that make tables. They have a rotation's name, but rotate nothing.
_OF_TABLES = {"theta", "dim", "embed_dim", "seq_len", "head_dim", "max_seq_len"}


def may_rotate(function: Callable[..., Any]) -> bool:
    return not _OF_TABLES & inspect.signature(function).parameters.keys()


def recognize(function: Callable[..., Any]) -> Rotation | None:
    return remembered(function, lambda: _recognized(function))


def _recognized(function: Callable[..., Any]) -> Rotation | None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # it has no signature
        return None
    names = [p.name for p in parameters if p.default is p.empty]
    options = {p.name: p.default for p in parameters if p.default is not p.empty}
    kinds = {p.kind for p in parameters}
    if kinds != {inspect.Parameter.POSITIONAL_OR_KEYWORD} or not all(
        type(default) in _VALUES for default in options.values()
    ):
        return None
    forms = [form for tensors, form in _FORMS if tensors == len(names)]
    choices: dict[tuple[Any, ...], Rotation] = {}
    for values in itertools.product(*(_VALUES[type(default)] for default in options.values())):
        chosen = functools.partial(function, **dict(zip(options, values, strict=True)))
        recognition = Recognition(_keeping_shapes(chosen))
        rotation = recognition.first_match(forms)
        if rotation is not None:
            choices[values] = rotation
        elif any(recognition.results(form) for form in forms):
            return None
    default = choices.get(tuple(options.values()))
    if default is None or not options:
        return default
    convention = " or ".join(dict.fromkeys(r.convention for r in (default, *choices.values())))
    replacement = _choosing(function, names, options, choices)
    return default._replace(convention=convention, replacement=replacement)


def _keeping_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function where its results have the shapes of its first arguments. It raises otherwise:
    tables of some shapes add axes to the result, which is no rotation of x.
    """

    def keeping(*arguments: Any) -> Any:
        results = function(*arguments)
        rotated = results if isinstance(results, tuple) else (results,)
        for result, x in zip(rotated, arguments, strict=False):
            if not isinstance(result, Tensor) or result.shape != x.shape:
                raise ValueError
        return results

    return keeping


def _choosing(
    function: Callable[..., Any],
    names: list[str],
    options: dict[str, Any],
    choices: dict[tuple[Any, ...], Rotation],
) -> Callable[..., Any]:
    """The replacement of a function with options. The function itself refuses other choices."""

    def apply_rotary_emb(*arguments: Any, **keywords: Any) -> Any:
        tensors = [*arguments[: len(names)]]
        tensors += [keywords[name] for name in names[len(tensors) :]]
        values = list(arguments[len(names) :])
        values += [keywords.get(name, options[name]) for name in [*options][len(values) :]]
        rotation = choices.get(tuple(values))
        if rotation is None:
            return function(*arguments, **keywords)
        return rotation.replacement(*tensors)

    return apply_rotary_emb


def _forms() -> list[tuple[int, Form]]:
    """Each form with its number of arguments."""
    forms = [
        (3, Form("three axes", rotations.axes_of_one_tensor, probes.axes_of_one_tensor)),
    ]
    for tensors in (1, 2):
        for holder, count in rotations.HOLDERS.items():
            arguments = probes.probes(tensors, holder)
            tables = holder in (rotations.two_tensors, rotations.pair)
            label = "" if tables else holder.__name__.replace("_", " ")
            # Of a matrix, an own function may read entries that the operators do not need.
            differentiated = tensors if holder is rotations.matrices else None
            for placement in rotations.PLACEMENTS:
                fill = rotations.form(tensors, holder, placement)
                form = Form(label, fill, arguments, differentiated)
                forms.append((tensors + count, form))
    return forms


_FORMS = _forms()
