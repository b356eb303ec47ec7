"""The methods of a class that rotate, compiled once more with other rotations.

Everything else that such a method uses is looked up where it always was.
"""

import ast
import dis
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from rope_ext.integrations.transformers.recognition import (
    Rotation,
    recognize,
    recognize_method,
)

# What is taken for a rotation by its name, and then has to be one by its parameters and results.
_ROTATION = re.compile(r"(^|_)(rotary|rope|rotate)(_|$)")
_ROTATION_METHOD = re.compile(r"^_?apply_(rotary|rope)(_|$)")

_FUTURE_ANNOTATIONS = 0x1000000  # CO_FUTURE_ANNOTATIONS of `from __future__ import annotations`


# Makes what is called instead of a function, from the function and what it computes.
Substitute = Callable[[Callable[..., Any], Rotation], Callable[..., Any]]


class UnrecognizedRotation(ValueError):
    """A model rotates in a way that rope_ext does not know. Nothing has been changed."""


class RebuiltMethod(NamedTuple):
    """A method with its rotations replaced."""

    function: Callable[..., Any]
    original: Callable[..., Any]
    rotations: dict[str, Rotation]  # by the names that the method calls them by
    static: bool


def rebuilt_methods(owner: type, substitute: Substitute) -> dict[str, RebuiltMethod]:
    """Those of a class and its bases that rotate, with substitutes for their rotations.

    Raises UnrecognizedRotation.
    """
    rebuilt: dict[str, RebuiltMethod] = {}
    for name, attribute, defining in _methods(owner):
        static = isinstance(attribute, staticmethod)
        function = attribute.__func__ if static else attribute
        written = inspect.unwrap(function)  # inside of decorators
        if not isinstance(written, types.FunctionType):
            continue
        called = _called_rotations(written)
        if called and name == "__init__":  # it ran before: what it has kept can't be replaced
            raise _refusal(
                f"{defining.__name__}.__init__ to leave rotations to the methods that call them",
                f"{', '.join(called)} in it",
            )
        if called:
            rotations = {n: _recognized(defining, name, f, n) for n, f in called.items()}
            bindings = {n: substitute(f, rotations[n]) for n, f in called.items()}
            new = _compiled_with(defining, written, bindings)
        elif _ROTATION_METHOD.match(name):  # it is the rotation
            rotations = {name: _recognized(defining, name, written, name, recognize_method)}
            new = substitute(function, rotations[name])
        else:
            continue
        rebuilt[name] = RebuiltMethod(new, function, rotations, static)
    return rebuilt


def _methods(owner: type) -> Iterator[tuple[str, Any, type]]:
    """Name, attribute and class of all written outside of torch and rope_ext and not overridden.

    Refuses what can't be rebuilt and rotates: methods of a class, properties, those that an
    overriding one calls, and those hidden in a decorator.
    """
    found: dict[str, Any] = {}
    for defining in owner.__mro__:
        if defining.__module__.partition(".")[0] in ("torch", "builtins", "rope_ext"):
            continue
        for name, attribute in vars(defining).items():
            function = _function_of(attribute)
            if not isinstance(function, types.FunctionType):
                continue
            where = f"{defining.__name__}.{name}"
            if name in found:
                if _may_call(found[name], defining) and _rotates(function):
                    raise _refusal(f"{owner.__name__}.{name} to rotate itself", f"{where}, too")
                continue
            found[name] = function
            if not isinstance(attribute, (types.FunctionType, staticmethod)):
                if _rotates(function):
                    kind = type(attribute).__name__
                    raise _refusal(f"{where} to be a plain method", f"a {kind}")
                continue
            if _hides_a_rotation(function):
                raise _refusal(
                    f"the decorators of {where} to use functools.wraps", "one that hides it"
                )
            yield name, attribute, defining


def _function_of(attribute: Any) -> Any:
    """What an attribute of a class runs; itself where it is no method."""
    if isinstance(attribute, property):
        return attribute.fget
    if isinstance(attribute, functools.cached_property):
        return attribute.func
    return getattr(attribute, "__func__", attribute)


def _may_call(function: Any, base: type) -> bool:
    code = inspect.unwrap(function).__code__
    return "__class__" in code.co_freevars or base.__name__ in code.co_names


def _rotates(function: Any) -> bool:
    written = inspect.unwrap(function)
    return isinstance(written, types.FunctionType) and bool(_called_rotations(written))


def _hides_a_rotation(function: Any) -> bool:
    """Whether a decorator holds a function that rotates, other than in __wrapped__."""
    shown = set()
    while isinstance(function, types.FunctionType):
        shown.add(function)
        for cell in function.__closure__ or ():
            with_contents = getattr(cell, "cell_contents", None)
            if (
                isinstance(with_contents, types.FunctionType)
                and with_contents is not getattr(function, "__wrapped__", None)
                and not _ROTATION.search(with_contents.__name__)
                and _called_rotations(with_contents)
            ):
                return True
        function = getattr(function, "__wrapped__", None)
    return False


def _recognized(
    owner: type,
    method: str,
    function: Any,
    name: str,
    recognized_by: Callable[[Any], Rotation | None] = recognize,
) -> Rotation:
    """What a function computes that a method of a class calls by a name."""
    rotation = recognized_by(function)
    if rotation is None:
        shown = type(function).forward if isinstance(function, nn.Module) else function
        raise _refusal(
            f"{owner.__name__}.{method} to rotate as one of the known conventions",
            f"{name}{inspect.signature(shown)} of {shown.__module__}, which computes something "
            "else",
        )
    return rotation


def _called_rotations(
    function: types.FunctionType, seen: frozenset[types.FunctionType] = frozenset()
) -> dict[str, Callable[..., Any]]:
    """The globals that a function uses and that are rotations by their names.

    Refuses a function that rotates in ways that can't be replaced in it: by what it imports, by
    what another file's namespace holds, or by a function of its file that rotates. seen: functions
    on the way here.
    """
    scope = function.__globals__
    loaded, hidden = set(), set()
    owner = None  # what the attributes of a dotted name are looked up in
    for instruction in _instructions(function.__code__):
        name, value = instruction.argval, None
        if instruction.opname == "LOAD_GLOBAL":
            loaded.add(name)
            value = scope.get(name)
        elif instruction.opname == "IMPORT_FROM" and _ROTATION.search(name):
            hidden.add(f"{name}, imported inside of it")
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            # vars: some modules import or fail when they are asked for what they do not hold
            value = vars(owner).get(name) if isinstance(owner, types.ModuleType) else None
            if _ROTATION.search(name) and _is_called(value):
                hidden.add(f"{owner.__name__}.{name}")
        owner = value
    called = {name: scope[name] for name in sorted(loaded) if _is_called(scope.get(name))}
    for name, other in called.items():
        if not _ROTATION.search(name) and getattr(other, "__globals__", None) is scope:
            written = inspect.unwrap(other)
            if isinstance(written, types.FunctionType) and written not in seen:
                within = _called_rotations(written, seen | {function, written})
                hidden.update(f"{name}, which calls {rotation}" for rotation in within)
    if hidden:
        raise _refusal(
            f"{function.__module__}.{function.__qualname__} to rotate with functions of its file",
            "; ".join(sorted(hidden)),
        )
    return {name: other for name, other in called.items() if _ROTATION.search(name)}


def _is_called(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, nn.Module))


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)


def _compiled_with(
    owner: type, function: types.FunctionType, bindings: dict[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """The method, decorators included, with some of its globals bound to other values.

    It is compiled inside a function that has these as parameters, and ``__class__``, which super()
    looks for; its globals are those of its file still.
    """
    where = f"{owner.__module__}.{function.__qualname__}"
    free = sorted(set(function.__code__.co_freevars) - {"__class__"})
    if free:
        raise _refusal(f"{where} to be a plain method", f"one that uses {', '.join(free)} outside")
    try:
        lines, first_line = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError) as error:
        raise _refusal(f"the source of {where}", str(error)) from error
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if private := sorted(n for n in names if n.startswith("__") and not n.endswith("__")):
        # in a class their names would be others
        raise _refusal(f"{where} to use no private names", ", ".join(private))
    ast.increment_lineno(tree, first_line - 1)  # tracebacks show the lines of the model's file
    factory = ast.parse("def bind(): pass").body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.args.args = [ast.arg(name) for name in (*bindings, "__class__")]
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


def _refusal(expected: str, got: str) -> UnrecognizedRotation:
    return UnrecognizedRotation(f"patch: expected {expected}, got {got}; nothing has been changed")
