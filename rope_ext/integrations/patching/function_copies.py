"""A copy of a function that has other values in some of its globals and cells.

The copy's code loads these globals under new names, which only the copy uses, from the globals of
the same file. Nothing is compiled and no source is read. Everything else is that of the original:
other globals and cells, defaults, `super()`, the lines in a traceback.
"""

import dis
import functools
import itertools
import sys
import types
import weakref
from typing import Any

# LOAD_GLOBAL's argument is an index into co_names; from Python 3.11 on, its lowest bit is a flag.
_INDEX_SHIFT = 1 if sys.version_info >= (3, 11) else 0

_numbers = itertools.count()

# What a function holds: a global by its name, a cell by its index, the wrapped function by None.
Key = str | int | None


def copied(
    function: types.FunctionType, values: dict[Key, Any]
) -> tuple[types.FunctionType, dict[str, Any]]:
    """A copy that holds other values, and the new globals that it needs (see bind).

    Raises OverflowError if a function has hundreds of names and one is a global and an attribute.
    """
    cells = list(function.__closure__ or ())
    names = {key: f"_rope_ext_{next(_numbers)}_{key}" for key in values if isinstance(key, str)}
    for index, value in values.items():
        if isinstance(index, int):
            cells[index] = types.CellType(value)
    copy = types.FunctionType(
        _renamed(function.__code__, names),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells) or None,
    )
    functools.update_wrapper(copy, function, updated=())
    copy.__kwdefaults__, copy.__dict__ = function.__kwdefaults__, dict(vars(function))
    return copy, {name: values[key] for key, name in names.items()}


def bind(copy: types.FunctionType, needed: dict[str, Any]) -> None:
    """Adds a copy's new globals to its file, and removes them when the copy is deleted."""
    copy.__globals__.update(needed)
    for name in needed:
        weakref.finalize(copy, copy.__globals__.pop, name, None).atexit = False


def _renamed(code: types.CodeType, names: dict[str, str]) -> types.CodeType:
    """A code that loads globals by other names, also in its inner functions."""
    table, bytecode = list(code.co_names), bytearray(code.co_code)
    instructions = [i for i in dis.get_instructions(code) if i.opcode in dis.hasname]
    for old in names.keys() & code.co_names:
        uses = [i for i in instructions if i.argval == old]
        loads = [i for i in uses if i.opname == "LOAD_GLOBAL"]
        if len(loads) == len(uses):
            table[table.index(old)] = names[old]
            continue
        table.append(names[old])  # an attribute or an import of that name keeps its entry
        for load in loads:
            argument = load.arg + ((len(table) - 1 - table.index(old)) << _INDEX_SHIFT)
            width = (load.arg.bit_length() + 7) // 8 or 1  # bytes: the first ones are EXTENDED_ARGs
            for i, byte in enumerate(argument.to_bytes(width, "little")):
                bytecode[load.offset + 1 - 2 * i] = byte
    constants = (
        _renamed(constant, names) if isinstance(constant, types.CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_names=tuple(table), co_code=bytes(bytecode), co_consts=tuple(constants))
