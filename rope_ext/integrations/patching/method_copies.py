"""Copies of the methods of a class that rotate, with other rotations (function_copies.py).

If a method is wrapped, by a decorator or by a library, the wrapper is copied too, and the copy of
the wrapped function replaces the original in a cell or in a global of the wrapper. The same holds
for a function of the model's file that a method calls to rotate. A rotation may also be imported or
defined within the method.
"""

import contextlib
import dis
import functools
import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from rope_ext.integrations.patching.function_copies import (
    Import,
    Key,
    Needed,
    bind,
    copied,
    name_of,
)
from rope_ext.integrations.patching.library import Library
from rope_ext.integrations.patching.recognition import Rotation

# Names that rotations have. The parameters and results then decide.
_ROTATION = re.compile(r"(^|_)(rotary|rope|rotate)(_|$)")
_ROTATION_METHOD = re.compile(r"^_?apply_(rotary|rope)(_|$)")

# Makes the replacement from a function and its rotation.
Substitute = Callable[[Callable[..., Any], Rotation], Callable[..., Any]]


class UnrecognizedRotation(ValueError):
    """A model rotates in a way that rope_ext does not know. Nothing has been changed."""


def method_copies(owner: type, library: Library, substitute: Substitute) -> "dict[str, MethodCopy]":
    """The methods of a class and its bases that rotate, with their rotations replaced.

    Nothing is changed before they are bound. Raises UnrecognizedRotation.
    """
    methods: dict[str, MethodCopy] = {}
    for defining in owner.__mro__:
        if defining.__module__.partition(".")[0] in ("torch", "builtins", "rope_ext"):
            continue
        for name, attribute in vars(defining).items():
            if name not in methods:
                methods[name] = MethodCopy(defining, name, attribute, library, substitute)
            elif methods[name].may_call_one_of(defining):
                base = MethodCopy(defining, name, attribute, library, substitute)
                if base.function:
                    where = f"{owner.__name__}.{name}"
                    raise _refusal(f"{where} to rotate itself", f"{base.where}, too")
    return {name: method for name, method in methods.items() if method.function}


class MethodCopy:
    """A copy of a method: `function`, with other rotations. None if the method does not rotate."""

    def __init__(
        self, owner: type, name: str, attribute: Any, library: Library, substitute: Substitute
    ) -> None:
        self.where, self.name = f"{owner.__name__}.{name}", name
        self.library, self.substitute = library, substitute
        self.static = isinstance(attribute, staticmethod)
        self.original = attribute.__func__ if self.static else attribute
        self.rotations: dict[str, Rotation] = {}  # by the names in the method's code
        self._file = getattr(sys.modules.get(owner.__module__), "__dict__", None)
        self._unbound: list[tuple[types.FunctionType, Needed]] = []
        self._replacements: dict[types.FunctionType, Callable[..., Any] | None] = {}
        new = [self._replacement(function) for function in _functions_in(self.original)]
        self.function = next(filter(None, new), None)
        if self.function and type(self.original) is not types.FunctionType:
            kind = type(attribute).__name__
            raise _refusal(f"{self.where} to be a plain method", f"a {kind}")
        if self.function and name == "__init__":  # it ran before, with effects that stay
            called = ", ".join(self.rotations)
            raise _refusal(f"{self.where} to leave rotations to other methods", f"{called} in it")

    def bind(self) -> None:
        """Adds the globals that the copies need."""
        while self._unbound:
            bind(*self._unbound.pop())

    def may_call_one_of(self, base: type) -> bool:
        """Whether it may call the method of a base that it overrides."""
        codes = [function.__code__ for function in self._replacements]  # all that it may call
        return any("__class__" in c.co_freevars or base.__name__ in c.co_names for c in codes)

    def _replacement(self, function: types.FunctionType) -> Callable[..., Any] | None:
        """The replacement of a function; None if it leads to no rotation."""
        if function not in self._replacements:
            self._replacements[function] = function  # ends recursion
            self._replacements[function] = self._made(function)
        return self._replacements[function]

    def _made(self, function: types.FunctionType) -> Callable[..., Any] | None:
        values: dict[Key, Any] = {}  # the replacements that a copy holds
        unfit, scope, held = "", function.__globals__, _held(function)
        for key, value in held.items():
            if self._is_rotation(key, value):
                name = name_of(key) or value.__name__
                values[key] = self._substituted(value, name, self.library.recognize)
            if isinstance(key, (Import, types.CodeType)) or key in values:
                continue
            for inner in _functions_in(value):
                if isinstance(key, str) and inner.__globals__ is not scope is self._file:
                    continue  # from a third file: only a wrapper may be in another file
                new = self._replacement(inner)
                if new is inner and isinstance(key, str):  # allowed in a cell: for own attributes
                    unfit = "calls itself"
                elif new and new is not inner:
                    values[key] = new
                    if type(value) is not types.FunctionType:
                        unfit = f"has a {type(value).__name__}"
        if values.keys() == {None}:
            unfit = "has it elsewhere"
        if values and unfit:
            raise _refusal(
                f"{self.where} to lead to its rotation by functions in closures and globals",
                f"{_name(function)}, which {unfit}",
            )
        if values:
            try:
                copy, needed = copied(function, values)
            except OverflowError as error:
                called = " and ".join(map(str, values))
                where = f"{_name(function)} to have no attribute of the name of a function"
                raise _refusal(where, called) from error
            self._unbound.append((copy, needed))
            for key, new in values.items():  # such as __wrapped__
                vars(copy).update((n, new) for n, old in vars(function).items() if old is held[key])
            return copy
        code = function.__code__
        if (
            _ROTATION_METHOD.match(self.name)
            and (function is self.original or code.co_name == self.name)
            and code.co_argcount != 1  # a property has one argument
        ):
            return self._substituted(function, self.name, self.library.recognize_method)
        return None

    def _is_rotation(self, key: Key, value: Any) -> bool:
        if (name := name_of(key)) is not None:
            return (
                bool(_ROTATION.search(name))
                and callable(value)
                and not isinstance(value, type)
                and self.library.may_rotate(value)
            )
        return (
            type(value) is types.FunctionType
            and value.__name__ != self.name  # a wrapper's method has this name
            and bool(_ROTATION.search(value.__name__))
            and self.library.recognize(value) is not None
        )

    def _substituted(
        self, function: Any, name: str, recognized_by: Callable[[Any], Rotation | None]
    ) -> Callable[..., Any]:
        rotation = recognized_by(function)
        if rotation is None:
            shown = type(function).forward if isinstance(function, nn.Module) else function
            raise _refusal(
                f"{self.where} to rotate as one of the known conventions",
                f"{name}{inspect.signature(shown)} of {shown.__module__}, which computes something "
                "else",
            )
        self.rotations[name] = rotation
        return self.substitute(function, rotation)


def _held(function: types.FunctionType) -> dict[Key, Any]:
    """What a function may call: globals by their names, cells by index, the wrapped one by None;
    what has a rotation's name also by its import, or by its code if it is defined inside.

    Raises if it gets a rotation from elsewhere, as an attribute of a file.
    """
    held: dict[Key, Any] = {None: getattr(function, "__wrapped__", None)}
    attributes: dict[str, Any] = {}  # of the module loaded by the previous instruction
    imported = ""  # the file that names are imported from
    for load, name in _loads(function.__code__):
        value = attributes.get(name)
        if load == "LOAD_GLOBAL":
            value = held[name] = function.__globals__.get(name)
        elif load == "IMPORT_NAME":
            imported = name
        elif load == "IMPORT_FROM" and _ROTATION.search(name):
            try:
                file = importlib.import_module(imported, function.__globals__.get("__package__"))
                held[Import(file, name)] = getattr(file, name)
            except (ImportError, AttributeError) as error:
                where = f"{_name(function)} to rotate with functions that can be imported"
                raise _refusal(where, f"{name} from {imported}: {error}") from error
        elif _ROTATION.search(name) and callable(value):
            raise _refusal(
                f"{_name(function)} to rotate with functions of its file",
                f"{name}, which it has from another",
            )
        attributes = vars(value) if isinstance(value, types.ModuleType) else {}
    for code in _codes_in(function.__code__):
        if _ROTATION.search(code.co_name):
            if code.co_freevars:
                raise _refusal(
                    f"{code.co_name} in {_name(function)} to depend on its arguments alone",
                    f"one that uses {', '.join(code.co_freevars)}",
                )
            held[code] = _inner(code, function)
    for index, cell in enumerate(function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # an empty cell
            held[index] = cell.cell_contents
    return held


_known: WeakKeyDictionary[types.CodeType, types.FunctionType] = WeakKeyDictionary()


def _inner(code: types.CodeType, outer: types.FunctionType) -> types.FunctionType:
    """The function that `outer` defines with the code: the same one for each look-up."""
    if code not in _known or _known[code].__globals__ is not outer.__globals__:
        _known[code] = types.FunctionType(code, outer.__globals__)
    return _known[code]


@functools.cache
def _loads(code: types.CodeType) -> list[tuple[str, str]]:
    """The look-ups of names in a function and its inner functions, in order: LOAD_GLOBAL etc."""
    instructions = [i for i in dis.get_instructions(code) if i.opname != "EXTENDED_ARG"]
    loads = [
        # The number of dots of a relative import is loaded two instructions before.
        (i.opname, "." * instructions[n - 2].argval + i.argval)
        if i.opname == "IMPORT_NAME"
        else (i.opname, i.argval)
        for n, i in enumerate(instructions)
        if i.opcode in dis.hasname
    ]
    return [*loads, *(load for inner in _codes_in(code) for load in _loads(inner))]


def _codes_in(code: types.CodeType) -> list[types.CodeType]:
    """The codes of the functions that a code defines."""
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _functions_in(value: Any, seen: tuple[int, ...] = ()) -> list[types.FunctionType]:
    """The function itself; for another callable or a descriptor, the functions that it exposes."""
    if type(value) is types.FunctionType:
        return [value]
    runs = callable(value) or hasattr(type(value), "__get__")
    if not runs or isinstance(value, (type, types.ModuleType, nn.Module)) or id(value) in seen:
        return []
    names = ("fget", "func", "__func__", "__wrapped__")
    shown = [getattr(value, name, None) for name in names if hasattr(type(value), name)]
    shown += getattr(value, "__dict__", {}).values()
    return [f for inner in shown for f in _functions_in(inner, (*seen, id(value)))]


def _name(function: types.FunctionType) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _refusal(expected: str, got: str) -> UnrecognizedRotation:
    return UnrecognizedRotation(f"patch: expected {expected}, got {got}; nothing has been changed")
