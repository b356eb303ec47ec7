"""Copies of the methods of a class that rotate, with other rotations in them.

Nothing is compiled and no source is read. A copy has its function's own code, but for the names of
some globals: its rotation has a name of its own, bound in the same globals for as long as the copy
exists. All else, such as the other globals and the cells, is what the function has. A wrapper, by a
decorator or by a library that has put it around the class's method, is copied in the same way: the
copy of what it wraps takes the place of the original, in a cell or a global of the wrapper.
"""

import contextlib
import dis
import functools
import inspect
import itertools
import re
import sys
import types
import weakref
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

# LOAD_GLOBAL's argument is an index into co_names, from Python 3.11 on above a bit.
_INDEX_SHIFT = 1 if sys.version_info >= (3, 11) else 0

_copies = itertools.count()  # for names that no other copy has

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
    bindings: list[tuple[types.FunctionType, str, Any]]  # a copy, and a global that it needs

    def bind(self) -> None:
        """Gives the copies their globals, until there is no copy any more."""
        for copy, name, value in self.bindings:
            copy.__globals__[name] = value
            weakref.finalize(copy, copy.__globals__.pop, name, None).atexit = False


def rebuilt_methods(owner: type, substitute: Substitute) -> dict[str, RebuiltMethod]:
    """Those of a class and its bases that rotate, with substitutes for their rotations.

    Nothing is changed before they are bound. Raises UnrecognizedRotation.
    """
    rebuilt: dict[str, RebuiltMethod] = {}
    found: dict[str, Any] = {}  # what overrides the methods of the bases that follow
    for defining in owner.__mro__:
        if defining.__module__.partition(".")[0] in ("torch", "builtins", "rope_ext"):
            continue
        for name, attribute in vars(defining).items():
            static = isinstance(attribute, staticmethod)
            function = attribute.__func__ if static else attribute
            method = _Method(defining, name, function)
            rotating = any(method.rotates(f) for f in _functions_in(function))
            if name in found:
                if rotating and _may_call(found[name], defining):
                    raise _refusal(
                        f"{owner.__name__}.{name} to rotate itself", f"{method.where}, too"
                    )
                continue
            found[name] = function
            if not rotating:
                continue
            if type(function) is not types.FunctionType:
                kind = type(attribute).__name__
                raise _refusal(f"{method.where} to be a plain method", f"a {kind}")
            new = method.replacement(function, substitute)
            if name == "__init__":  # it ran before: what it has kept can't be replaced
                raise _refusal(
                    f"{method.where} to leave rotations to the methods that call them",
                    f"{', '.join(method.rotations)} in it",
                )
            rebuilt[name] = RebuiltMethod(new, function, method.rotations, static, method.bindings)
    return rebuilt


def rotates(function: Any, owner: type, name: str) -> bool:
    """Whether something that is called as the method of a class leads to a rotation."""
    return any(_Method(owner, name, function).rotates(f) for f in _functions_in(function))


class _Method:
    """A method of a class, with what it wraps and calls on the way to its rotations."""

    def __init__(self, defining: type, name: str, function: Any) -> None:
        self.where = f"{defining.__name__}.{name}"
        self.name = name
        self.function = function
        self.home = getattr(sys.modules.get(defining.__module__), "__dict__", None)
        self.rotations: dict[str, Rotation] = {}
        self.bindings: list[tuple[types.FunctionType, str, Any]] = []

    def rotates(
        self, function: types.FunctionType, seen: set[types.FunctionType] | None = None
    ) -> bool:
        """Whether a function is a rotation, or leads to one. seen: functions on the way here."""
        seen = set() if seen is None else seen
        if function in seen:
            return False
        seen.add(function)
        return self._is_rotating_method(function) or any(
            self._is_rotation(key, value) or any(self.rotates(f, seen) for f in functions)
            for key, value, functions in self._held(function)
        )

    def replacement(
        self,
        function: types.FunctionType,
        substitute: Substitute,
        callers: tuple[types.FunctionType, ...] = (),
    ) -> Callable[..., Any]:
        """What to call instead of a function that rotates. callers: those that call it."""
        callers = (*callers, function)
        replaced: dict[str | int, Any] = {}
        unreached: list[types.FunctionType] = []
        for key, value, functions in self._held(function):
            if self._is_rotation(key, value):
                name = key if isinstance(key, str) else value.__code__.co_name
                replaced[key] = substitute(value, self._recognized(value, name))
            elif any(value is caller for caller in callers):
                if isinstance(key, str):  # a cell with it is what a wrapper keeps attributes on
                    raise _refusal(f"{self.where} to rotate without recursion", f"that of {key}")
            elif key is None:
                unreached = functions
            elif not any(self.rotates(f) for f in functions):
                continue
            elif type(value) is not types.FunctionType:
                raise _refusal(
                    f"{self.where} to be wrapped in functions",
                    f"a {type(value).__module__}.{type(value).__qualname__}",
                )
            else:
                replaced[key] = self.replacement(value, substitute, callers)
        if replaced:
            return self._copy(function, replaced)
        if unreached:
            raise _refusal(
                f"{self.where} to be wrapped in functions that hold it in a closure or a global",
                f"{_name(function)}, which does not",
            )
        return substitute(function, self._recognized(function, self.name, recognize_method))

    def _held(self, function: types.FunctionType) -> Iterator[tuple[str | int | None, Any, list]]:
        """What a function may call, and the functions in that.

        With the name of its global, the index of its cell, or None for what it says to have
        wrapped. A global function is looked into if it is of the same file, or if this is a
        wrapper from another file than the method's.
        """
        scope = function.__globals__
        functions = {
            name: [
                f
                for f in _functions_in(scope.get(name))
                if f.__globals__ is scope or scope is not self.home
            ]
            for name in _names(function.__code__)
        }
        if any(held or _ROTATION.search(name) for name, held in functions.items()):
            for name in _loaded_globals(function):
                yield name, scope[name], functions[name]
        for index, value in _closure(function):
            yield index, value, _functions_in(value)
        wrapped = getattr(function, "__wrapped__", None)
        yield None, wrapped, _functions_in(wrapped)

    def _is_rotation(self, key: str | int | None, value: Any) -> bool:
        """Whether a function rotates by a value: of a global by its name, or of a cell."""
        if isinstance(key, str):
            return bool(_ROTATION.search(key)) and callable(value) and not isinstance(value, type)
        return (
            key is not None
            and type(value) is types.FunctionType
            and value.__code__.co_name != self.name
            and bool(_ROTATION.search(value.__code__.co_name))
            and recognize(value) is not None
        )

    def _is_rotating_method(self, function: types.FunctionType) -> bool:
        """Whether the method is the rotation, and this its innermost function."""
        code = function.__code__
        return (
            bool(_ROTATION_METHOD.match(self.name))
            and (code.co_name == self.name or function is self.function)
            and code.co_argcount != 1  # as a property of that name has
        )

    def _recognized(
        self,
        function: Any,
        name: str,
        recognized_by: Callable[[Any], Rotation | None] = recognize,
    ) -> Rotation:
        """What a function computes that is called by a name."""
        rotation = recognized_by(function)
        if rotation is None:
            shown = type(function).forward if isinstance(function, nn.Module) else function
            raise _refusal(
                f"{self.where} to rotate as one of the known conventions",
                f"{name}{inspect.signature(shown)} of {shown.__module__}, which computes something "
                "else",
            )
        self.rotations[name] = rotation
        return rotation

    def _copy(
        self, function: types.FunctionType, replaced: dict[str | int, Any]
    ) -> types.FunctionType:
        """A function with other values in some globals, by name, and in some cells, by index."""
        scope, attributes = function.__globals__, dict(vars(function))
        cells, names = list(function.__closure__ or ()), {}
        for key, new in replaced.items():
            if isinstance(key, str):
                old = scope[key]
                names[key] = f"_rope_ext_{next(_copies)}_{key}"
            else:
                old = cells[key].cell_contents
                cells[key] = types.CellType(new)
            attributes |= {name: new for name, value in attributes.items() if value is old}
        copy = types.FunctionType(
            _renamed(function.__code__, names),
            scope,
            function.__name__,
            function.__defaults__,
            tuple(cells) or None,
        )
        functools.update_wrapper(copy, function, updated=())
        copy.__kwdefaults__, copy.__dict__ = function.__kwdefaults__, attributes
        self.bindings += [(copy, new, replaced[old]) for old, new in names.items()]
        return copy


def _functions_in(value: Any, seen: tuple[int, ...] = ()) -> list[types.FunctionType]:
    """A function itself; of another callable or a descriptor, those that it shows to hold."""
    if type(value) is types.FunctionType:
        return [value]
    if isinstance(value, (type, types.ModuleType, nn.Module)) or id(value) in seen:
        return []
    if not (callable(value) or hasattr(type(value), "__get__")):
        return []
    shown = ("fget", "func", "__func__", "__wrapped__")
    held = [getattr(value, name, None) for name in shown if hasattr(type(value), name)]
    held += getattr(value, "__dict__", {}).values()
    return [f for inner in held for f in _functions_in(inner, (*seen, id(value)))]


def _closure(function: types.FunctionType) -> Iterator[tuple[int, Any]]:
    for index, cell in enumerate(function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # it is empty
            yield index, cell.cell_contents


def _may_call(overriding: Any, base: type, seen: tuple[Any, ...] = ()) -> bool:
    """Whether a method, or what it wraps, may call the one of a base that it overrides."""
    return any(
        "__class__" in function.__code__.co_freevars
        or base.__name__ in function.__code__.co_names
        or any(_may_call(value, base, (*seen, function)) for _, value in _closure(function))
        for function in _functions_in(overriding)
        if function not in seen
    )


def _loaded_globals(function: types.FunctionType) -> list[str]:
    """The names of the globals that a function loads.

    Refuses one that takes a rotation from elsewhere: by an import in it, or from another file's
    namespace.
    """
    scope = function.__globals__
    loaded, hidden = set(), set()
    owner = None  # what the attributes of a dotted name are looked up in
    for instruction in _instructions(function.__code__):
        name, value = instruction.argval, None
        if instruction.opname == "LOAD_GLOBAL" and name in scope:
            loaded.add(name)
            value = scope[name]
        elif instruction.opname == "IMPORT_FROM" and _ROTATION.search(name):
            hidden.add(f"{name}, imported inside of it")
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            # vars: some modules import or fail when they are asked for what they do not hold
            value = vars(owner).get(name) if isinstance(owner, types.ModuleType) else None
            if _ROTATION.search(name) and callable(value):
                hidden.add(f"{owner.__name__}.{name}")
        owner = value
    if hidden:
        raise _refusal(
            f"{_name(function)} to rotate with functions of its file", "; ".join(sorted(hidden))
        )
    return sorted(loaded)


def _names(code: types.CodeType) -> set[str]:
    nested = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*nested)


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)


def _renamed(code: types.CodeType, names: dict[str, str]) -> types.CodeType:
    """A code that loads globals, in its functions too, by other names. names: new ones by old."""
    table, bytecode = list(code.co_names), bytearray(code.co_code)
    instructions = list(dis.get_instructions(code))
    for old in names.keys() & code.co_names:
        uses = [i for i in instructions if i.opcode in dis.hasname and i.argval == old]
        loads = [i for i in uses if i.opname == "LOAD_GLOBAL"]
        if len(loads) == len(uses):
            table[table.index(old)] = names[old]
            continue
        table.append(names[old])  # an attribute or an import of that name keeps the entry
        for load in loads:
            width = (load.arg.bit_length() + 7) // 8 or 1  # bytes: further ones are EXTENDED_ARGs
            argument = load.arg + ((len(table) - 1 - table.index(old)) << _INDEX_SHIFT)
            if argument >= 256**width:
                raise _refusal(
                    f"{code.co_name} to use {old} as a global alone", "an attribute of that name"
                )
            for i, byte in enumerate(argument.to_bytes(width, "little")):
                bytecode[load.offset + 1 - 2 * i] = byte
    constants = (_renamed(c, names) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    return code.replace(co_names=tuple(table), co_code=bytes(bytecode), co_consts=tuple(constants))


def _name(function: types.FunctionType) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _refusal(expected: str, got: str) -> UnrecognizedRotation:
    return UnrecognizedRotation(f"patch: expected {expected}, got {got}; nothing has been changed")
