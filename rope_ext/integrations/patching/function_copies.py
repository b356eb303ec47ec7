"""A copy of a function that has other values in some of its globals, imports and cells.

The copy's code loads these globals under new names, which only the copy uses, from the globals of
the same file, and imports under new names from the same other files. A function that its code
defines anew in each call becomes one that calls such a global. Nothing is compiled and no source is
read. Everything else is that of the original: other globals and cells, defaults, `super()`, the
lines in a traceback.
"""

import dis
import functools
import itertools
import sys
import types
import weakref
from typing import Any, NamedTuple

# LOAD_GLOBAL's argument is an index into co_names; from Python 3.11 on, its lowest bit is a flag.
_INDEX_SHIFTS = {"LOAD_GLOBAL": 1 if sys.version_info >= (3, 11) else 0, "IMPORT_FROM": 0}

_numbers = itertools.count()


class Import(NamedTuple):
    """A name that a function imports when it runs."""

    file: types.ModuleType
    name: str


# What a function holds: a global by its name, a cell by its index, an import, the code of a
# function that it defines, the wrapped function by None.
Key = str | int | Import | types.CodeType | None
# New globals: those of a file, a name, its value.
Needed = list[tuple[dict[str, Any], str, Any]]


def name_of(key: Key) -> str | None:
    """The name by which a function's code gets what it holds; None for cells and so on."""
    if isinstance(key, types.CodeType):
        return key.co_name
    return key.name if isinstance(key, Import) else key if isinstance(key, str) else None


def copied(
    function: types.FunctionType, values: dict[Key, Any]
) -> tuple[types.FunctionType, Needed]:
    """A copy that holds other values, and the new globals that it needs (see bind).

    Raises OverflowError if a function has hundreds of names and one is a global and an attribute.
    """
    cells = list(function.__closure__ or ())
    needed: Needed = []
    names: dict[tuple[str, str], str] = {}
    codes: dict[types.CodeType, types.CodeType] = {}
    for key, value in values.items():
        if isinstance(key, int):
            cells[key] = types.CellType(value)
        if (old := name_of(key)) is None:
            continue
        new = f"_rope_ext_{next(_numbers)}_{old}"
        if isinstance(key, types.CodeType):
            codes[key] = _renamed(_calling.__code__, {("LOAD_GLOBAL", "_called"): new}, {})
        else:
            names["LOAD_GLOBAL" if isinstance(key, str) else "IMPORT_FROM", old] = new
        scope = vars(key.file) if isinstance(key, Import) else function.__globals__
        needed.append((scope, new, value))
    copy = types.FunctionType(
        _renamed(function.__code__, names, codes),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells) or None,
    )
    functools.update_wrapper(copy, function, updated=())
    copy.__kwdefaults__, copy.__dict__ = function.__kwdefaults__, dict(vars(function))
    return copy, needed


def bind(copy: types.FunctionType, needed: Needed) -> None:
    """Adds a copy's new globals to their files, and removes them when the copy is deleted."""
    for scope, name, value in needed:
        scope[name] = value
        weakref.finalize(copy, scope.pop, name, None).atexit = False


def _calling(*args: Any, **kwargs: Any) -> Any:
    return _called(*args, **kwargs)  # noqa: F821 (_renamed gives it the name of a global)


def _renamed(
    code: types.CodeType,
    names: dict[tuple[str, str], str],
    codes: dict[types.CodeType, types.CodeType],
) -> types.CodeType:
    """A code that loads globals and imports by other names, also in its inner functions.

    names: the new ones, by instruction and old name. codes: others for inner functions.
    """
    table, bytecode = list(code.co_names), bytearray(code.co_code)
    instructions = [i for i in dis.get_instructions(code) if i.opcode in dis.hasname]
    for (instruction, old), new in names.items():
        if old not in code.co_names:
            continue
        uses = [i for i in instructions if i.argval == old]
        loads = [i for i in uses if i.opname == instruction]
        if len(loads) == len(uses):
            table[code.co_names.index(old)] = new
            continue
        table.append(new)  # an attribute or an import of that name keeps its entry
        added = len(table) - 1 - code.co_names.index(old)
        for load in loads:
            argument = load.arg + (added << _INDEX_SHIFTS[instruction])
            width = (load.arg.bit_length() + 7) // 8 or 1  # bytes: the first ones are EXTENDED_ARGs
            for i, byte in enumerate(argument.to_bytes(width, "little")):
                bytecode[load.offset + 1 - 2 * i] = byte
    constants = (
        codes.get(constant) or _renamed(constant, names, codes)
        if isinstance(constant, types.CodeType)
        else constant
        for constant in code.co_consts
    )
    return code.replace(co_names=tuple(table), co_code=bytes(bytecode), co_consts=tuple(constants))
