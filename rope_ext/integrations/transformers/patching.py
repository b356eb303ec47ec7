"""patch(model): the rotation of one loaded model, replaced.

The methods of a model's modules that call a rotation are compiled once more from their own source,
with the rotation's name bound to its replacement, and set on the module itself. So neither classes
nor their files' globals change: another model of the same family goes on as it was. Everything else
that these methods use is looked up where it always was.
"""

import ast
import contextlib
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from rope_ext.integrations.transformers.recognition import (
    Rotation,
    recognize,
    recognize_method,
)

# What is taken for a rotation by its name, and then has to be one by its parameters and results.
_ROTATION = re.compile(r"rotary|rope|rotat", re.IGNORECASE)
_ROTATION_METHOD = re.compile(r"^_?(apply_)?(rotary|rope|rotat)", re.IGNORECASE)

_ORIGINAL = "_rope_ext_original"  # on a replacement: the function that it stands in for
_SITES = "_rope_ext_sites"


class UnrecognizedRotation(ValueError):
    """A model rotates in a way that rope_ext does not know. Nothing has been changed."""


@dataclass(frozen=True)
class Site:
    """A place where a model rotates."""

    module: str  # its name in the model, '' for the model itself
    method: str  # that calls the rotation, or is it
    function: str  # the rotation, as the model's code names it
    convention: str  # which pairs of channels turn by which columns of cos and sin


@dataclass(frozen=True)
class Report:
    """What :func:`patch` replaced."""

    sites: tuple[Site, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules that now rotate with rope_ext."""
        return tuple(dict.fromkeys(site.module for site in self.sites))

    @property
    def conventions(self) -> tuple[str, ...]:
        """The different conventions, in the order of the model's modules."""
        return tuple(dict.fromkeys(site.convention for site in self.sites))

    def __str__(self) -> str:
        lines = [f"rope_ext rotates in {len(self.modules)} modules:"]
        for convention in self.conventions:
            sites = [site for site in self.sites if site.convention == convention]
            calls = ", ".join(dict.fromkeys(f"{site.method} -> {site.function}" for site in sites))
            lines.append(
                f"  {convention}: {calls} ({len(sites)}, from {sites[0].module or 'model'})"
            )
        return "\n".join(lines)


def patch(model: nn.Module) -> Report:
    """Lets a loaded transformers model rotate its queries and keys with rope_ext.

    Only this model changes; its parameters, tables of cos and sin, cache and outputs keep their
    form. A patched model trains, generates, compiles and is saved as before; a model compiled
    earlier keeps its old graph. The result has q's dtype: where a model's own function would return
    float32 for a bfloat16 q because its tables are float32, the patched model does not.

    Each rotation is recognized by the names of its parameters and by what it computes for a few
    numbers, never by the model's name: see :mod:`~.recognition`.

    Args:
        model: any module that holds transformers' attention modules, such as a model, or one layer.

    Returns:
        The places that now rotate with rope_ext. For a model that is patched already, those of
        before.

    Raises:
        UnrecognizedRotation: when the model has no rotation, or one that is not recognized. Nothing
            has been changed then.
    """
    found = _patched_sites(model)
    if found:
        return Report(found)
    sites: list[Site] = []
    overrides: list[tuple[nn.Module, str, Callable[..., Any]]] = []
    rebuilt: dict[Any, tuple[Callable[..., Any], dict[str, Rotation]] | None] = {}
    for name, module in model.named_modules():
        for method, function, owner in _methods(module):
            key = (owner, method)
            if key not in rebuilt:
                rebuilt[key] = _replacement_of(owner, method, function)
            replacement = rebuilt[key]
            if replacement is None:
                continue
            attribute = _attribute_for(module, method, name)
            overrides.append((module, attribute, replacement[0]))
            sites += [
                Site(name, method, rotation, found.convention)
                for rotation, found in replacement[1].items()
            ]
    if not sites:
        raise UnrecognizedRotation(
            f"patch: expected model to have modules that call a rotation, such as "
            f"apply_rotary_pos_emb, got {type(model).__name__} without any"
        )
    for module, attribute, function in overrides:
        static = isinstance(inspect.getattr_static(type(module), attribute, None), staticmethod)
        setattr(module, attribute, function if static else types.MethodType(function, module))
    return Report(tuple(sites))


def unpatch(model: nn.Module) -> None:
    """Undoes :func:`patch`, for a model or any part of one, if it was patched."""
    for module in model.modules():
        for attribute, value in list(vars(module).items()):
            original = getattr(value, _ORIGINAL, None)
            if original is None:
                continue
            if attribute == _HOOKED_FORWARD:
                setattr(module, attribute, types.MethodType(original, module))
            else:
                delattr(module, attribute)


@contextlib.contextmanager
def patched(model: nn.Module) -> Iterator[Report]:
    """A model, patched for the length of a ``with`` block, which gets the report."""
    was_patched = bool(_patched_sites(model))
    report = patch(model)
    try:
        yield report
    finally:
        if not was_patched:
            unpatch(model)


# Where accelerate's hooks (device_map, offloading) keep the forward that they wrap.
_HOOKED_FORWARD = "_old_forward"


def _patched_sites(model: nn.Module) -> tuple[Site, ...]:
    return tuple(
        Site(name, *site)
        for name, module in model.named_modules()
        for value in vars(module).values()
        for site in getattr(value, _SITES, ())
    )


def _attribute_for(module: nn.Module, method: str, name: str) -> str:
    if method not in vars(module):
        return method
    hooked = vars(module).get(_HOOKED_FORWARD)
    if method == "forward" and inspect.ismethod(hooked) and hooked.__self__ is module:
        return _HOOKED_FORWARD
    raise UnrecognizedRotation(
        f"patch: expected module {name!r} to have the {method} of its class "
        f"{type(module).__name__}, got one of its own: patch before whatever replaces it"
    )


def _methods(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any], type]]:
    """Name, function and class of each method written outside of torch.nn."""
    found: dict[str, Callable[..., Any]] = {}
    for owner in type(module).__mro__:
        if owner.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, attribute in vars(owner).items():
            if isinstance(attribute, staticmethod):
                attribute = attribute.__func__
            if not isinstance(attribute, types.FunctionType):
                continue
            if name not in found:
                found[name] = attribute
                yield name, attribute, owner
            elif _calls_super(found[name]) and _called_rotations(inspect.unwrap(attribute)):
                raise UnrecognizedRotation(
                    f"patch: expected {type(module).__name__}.{name} to rotate itself, got "
                    f"one that may call {owner.__name__}.{name}, which rotates; nothing has been "
                    "changed"
                )


def _calls_super(function: Callable[..., Any]) -> bool:
    return "__class__" in inspect.unwrap(function).__code__.co_freevars


def _called_rotations(function: types.FunctionType) -> dict[str, Callable[..., Any]]:
    """The globals that a function calls and that are rotations by their names."""
    return {
        name: function.__globals__[name]
        for name in sorted(_global_names(function.__code__))
        if _ROTATION.search(name)
        and isinstance(function.__globals__.get(name), (types.FunctionType, nn.Module))
    }


def _replacement_of(
    owner: type, method: str, function: Callable[..., Any]
) -> tuple[Callable[..., Any], dict[str, Rotation]] | None:
    """The method with its rotations replaced, and these; None for a method that does not rotate."""
    written = inspect.unwrap(function)  # inside of decorators
    called = _called_rotations(written)
    if not called and _ROTATION_METHOD.match(method):
        rotation = recognize_method(written)
        if rotation is None:
            raise _unrecognized(owner, method, written)
        replacement, rotations = rotation.replacement, {method: rotation}
    elif called:
        rotations = {}
        for name, called_function in called.items():
            rotation = recognize(called_function)
            if rotation is None:
                raise _unrecognized(owner, method, called_function, name)
            rotations[name] = rotation
        bindings = {name: rotation.replacement for name, rotation in rotations.items()}
        replacement = _compiled_with(owner, written, bindings)
    else:
        return None
    setattr(replacement, _ORIGINAL, function)
    setattr(replacement, _SITES, [(method, n, r.convention) for n, r in rotations.items()])
    return replacement, rotations


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _compiled_with(
    owner: type, function: types.FunctionType, bindings: dict[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """The method, decorators included, with some of its globals bound to other values.

    It is compiled inside a function that has these as parameters, and ``__class__``, which super()
    looks for; its globals are those of its file still.
    """
    where = f"{owner.__module__}.{function.__qualname__}"
    free = set(function.__code__.co_freevars) - {"__class__"}
    if free:
        raise UnrecognizedRotation(
            f"patch: expected {where} to be a plain method, got one that uses {', '.join(free)} of "
            "an enclosing function"
        )
    try:
        lines, first_line = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError) as error:
        raise UnrecognizedRotation(f"patch: expected the source of {where}, got {error}") from error
    ast.increment_lineno(tree, first_line - 1)  # tracebacks show the lines of the model's file
    names = [*bindings, "__class__"]
    factory = ast.parse("def bind(): pass").body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.args.args = [ast.arg(name) for name in names]
    factory.body = [tree.body[0], ast.Return(ast.Name(function.__name__, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([factory], []))
    flags = function.__code__.co_flags & _FUTURE_ANNOTATIONS
    code = compile(module, inspect.getfile(function), "exec", flags, dont_inherit=True)
    local: dict[str, Any] = {}
    exec(code, function.__globals__, local)
    made = local["bind"](*bindings.values(), owner)
    made = made.__func__ if isinstance(made, staticmethod) else made
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    return made


_FUTURE_ANNOTATIONS = 0x1000000  # CO_FUTURE_ANNOTATIONS of `from __future__ import annotations`


def _unrecognized(
    owner: type, method: str, function: Any, name: str | None = None
) -> UnrecognizedRotation:
    function = type(function).forward if isinstance(function, nn.Module) else function
    return UnrecognizedRotation(
        f"patch: expected {owner.__name__}.{method} to rotate as one of the known conventions, got "
        f"{name or method}{inspect.signature(function)} of {function.__module__}, which computes "
        "something else; nothing has been changed"
    )
