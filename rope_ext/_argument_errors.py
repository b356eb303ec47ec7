"""Errors that name an argument of the wrong type or layout.

A function checks its arguments only after it has failed, so a correct call pays nothing::

    try:
        ...
    except Exception:
        raise_argument_error(function)
        raise
"""

import reprlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import torch
from torch import Tensor
from torch.compiler import is_compiling

# A value is a number or a flag if it has this method: Python calls it, and so does PyTorch.
_METHODS: dict[Any, str] = {int: "__index__", float: "__float__", bool: "__bool__"}
_WORDS: dict[Any, str] = {
    Tensor: "a Tensor",
    int: "an int",
    float: "a float",
    bool: "a bool",
    torch.dtype: "a torch.dtype",
    types.NoneType: "None",
    tuple[Tensor, Tensor]: "two Tensors",
    Sequence: "a list",
}
_TABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _Shown(reprlib.Repr):
    """repr that is short enough for a message, for a value of any size and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()
        return repr(x) if bits <= 128 else f"an integer of {bits} bits"


shown = _Shown().repr


def raise_argument_error(
    function: Callable[..., Any], name: str = "", given: dict[str, Any] | None = None
) -> None:
    """Raises an error that names the wrong argument of the caller, if there is one.

    function: the caller, whose annotations are checked; name: the name in messages, by default its
    name in rope_ext; given: its arguments, by default the caller's variables. Does nothing while a
    compiler traces: the caller has no frame then.
    """
    if is_compiling():
        return
    given = sys._getframe(1).f_locals if given is None else given
    name = name or f"rope_ext.{function.__name__}"
    for argument, kind in function.__annotations__.items():
        if argument != "return":
            check_type(name, argument, given[argument], kind)
            _check_dense(name, argument, given[argument])
    dtype = given.get("dtype")
    if dtype is not None and dtype not in _TABLE_DTYPES:  # PyTorch can't pass on some of them
        expected = "dtype to be float64, float32, float16 or bfloat16"
        _refuse(RuntimeError, name, expected, str(dtype).removeprefix("torch."))
    if given.get("layout") in ("bshd", "bhsd"):
        _check_layout(name, given)
    if "cache_layout" in given and "k" in given:
        _check_cache_layout(name, given)


def describe(value: object) -> str:
    """A value, as an error about its type shows it: 64.0, 'bshd', a list of 5, a numpy.ndarray."""
    if isinstance(value, (str, int, float, type(None), torch.dtype)):
        return shown(value)
    if isinstance(value, Tensor):
        return "a Tensor"
    kind = value if isinstance(value, type) else type(value)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__}.{name}"
    if kind is value:
        return f"the class {name}"
    article = "an" if name[0] in "aeioAEIO" else "a"
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{article} {name}{size}"


def check_type(function: str, name: str, value: object, kind: Any) -> None:
    """Raises TypeError for a value that the annotation `kind` does not allow."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if any(_is_a(value, kind) for kind in kinds):
        return
    for of_parts in (get_args(kind) for kind in kinds if get_origin(kind) is tuple):
        if isinstance(value, (tuple, list)) and len(value) == len(of_parts):
            for i, part in enumerate(value):
                check_type(function, f"{name}[{i}]", part, of_parts[i])
    *words, last = (_words_of(kind) for kind in kinds)
    expected = f"{', '.join(words)} or {last}" if words else last
    is_list = isinstance(value, (tuple, list)) and not any(isinstance(x, Tensor) for x in value)
    is_array = is_list or type(value).__module__ == "numpy"
    advice = ": torch.as_tensor makes one of it" if Tensor in kinds and is_array else ""
    if int in kinds and isinstance(value, int):
        advice = ", which 64 bits do not hold"
    _refuse(TypeError, function, f"{name} to be {expected}", describe(value) + advice)


def _check_dense(function: str, name: str, value: object) -> None:
    """Raises for tensors of kinds that have no kernels: sparse, mkldnn, quantized, nested."""
    if isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            _check_dense(function, f"{name}[{i}]", part)
    elif isinstance(value, Tensor):
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
        if kind != torch.strided:
            expected = f"{name} to be a dense tensor (torch.strided)"
            _refuse(NotImplementedError, function, expected, f"one that is {kind}")


def _is_a(value: object, kind: Any) -> bool:
    if kind in _METHODS:
        try:
            number = getattr(value, _METHODS[kind])()
        except Exception:
            return False
        if kind is bool and isinstance(value, int):
            number = value
        return kind is float or -(2**63) <= number < 2**63  # PyTorch passes integers as int64
    if get_origin(kind) is Literal:
        return isinstance(value, str)
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        fits = isinstance(value, (tuple, list)) and len(value) == len(parts)
        return fits and all(map(_is_a, value, parts))
    return isinstance(value, kind)


def _words_of(kind: Any) -> str:
    return _WORDS[kind] if kind in _WORDS else f"one of {', '.join(get_args(kind))}"


def _check_layout(function: str, given: dict[str, Any]) -> None:
    """Raises if the shape of x or q contradicts `layout` but fits the other layout."""
    name = "x" if "x" in given else "q"
    x, k, cos = given[name], given.get("k"), given.get("cos")
    if x.dim() != 4:
        return
    layout, other = given["layout"], "bhsd" if given["layout"] == "bshd" else "bshd"
    seq, heads = (1, 2) if layout == "bshd" else (2, 1)
    lengths = {}  # other argument -> the sequence's length that follows from it
    if given.get("position_ids") is not None:
        lengths["position_ids"] = given["position_ids"].shape[-1:]
    elif cos is not None and cos.dim() in (2, 3):
        rows = cos.shape[-2]
        lengths["cos"] = () if cos.dim() == 2 and rows >= x.shape[seq] else (rows,)
    if k is not None and k.dim() == 4 and k.shape[seq] > 0 and x.shape[seq] % k.shape[seq] == 0:
        lengths["k"] = () if k.shape[seq] == x.shape[seq] else (k.shape[heads],)
    for of, length in lengths.items():
        if length == (x.shape[heads],) != (x.shape[seq],):
            shape = ", ".join(layout.upper())
            expected = f"{name} to have shape [{shape}] (layout {layout!r}) that fits {of}"
            got = f"{list(x.shape)} and {list(given[of].shape)}"
            _refuse(ValueError, function, expected, f'{got}: layout="{other}" fits')


def _check_cache_layout(function: str, given: dict[str, Any]) -> None:
    """Raises if the shape of a cache contradicts cache_layout but fits the other one."""
    k, layout = given["k"], given["cache_layout"]
    if k.dim() < 3 or layout not in ("NHD", "HND"):
        return
    k_heads, channels = k.shape[1 if given["layout"] == "bhsd" else -2], k.shape[-1]
    heads, other = (2, "HND") if layout == "NHD" else (1, "NHD")
    shape = "[blocks, block_size, Hk, D]" if layout == "NHD" else "[blocks, Hk, block_size, D]"
    for name in ("k_cache", "v_cache"):
        sizes = list(given[name].shape)
        if len(sizes) != 4:
            return
        if sizes[3] == channels and sizes[heads] != k_heads == sizes[3 - heads]:
            expected = f"{name} to have shape {shape} (cache_layout {layout!r}) with Hk = {k_heads}"
            _refuse(ValueError, function, expected, f'{sizes}: cache_layout="{other}" fits')


def _refuse(error: type[Exception], function: str, expected: str, got: str) -> NoReturn:
    raise error(f"{function}: expected {expected}, got {got}") from None
