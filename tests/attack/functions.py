"""The functions of rope_ext as calls of the operators: layouts, inplace and out."""

import inspect

import torch
from calls import CALLS
from random_arguments import Arguments, Draw

import rope_ext


def function_of(name: str) -> tuple[str, Arguments] | None:
    """The function that calls an operator, and what else it is given; None for derivatives."""
    operator = name.removeprefix("rope::")
    for suffix, given in (("", {}), (".out", {}), ("_", {"inplace": True})):
        if operator.removesuffix(suffix) in rope_ext.__all__:
            return operator.removesuffix(suffix), given
    return None


# Operator to its function.
FUNCTIONS = {name: function for name in CALLS if (function := function_of(name))}
ENTRIES = [(name, function) for name, (function, _) in FUNCTIONS.items()]

SWAPS = {"bshd": None, "thd": None, "bhsd": (1, 2), "sbhd": (0, 1)}
IN_LAYOUT = ("x", "q", "k", "v", "qkv", "q_out", "x_out", "scale_out", "out", "out_q", "out_k")
CACHES = ("k_cache", "v_cache")


def arguments_of(d: Draw, name: str, function: str, call: Arguments) -> Arguments:
    """The arguments of the function, from those of the operator."""
    takes = inspect.signature(getattr(rope_ext, function)).parameters
    call = {**call, **FUNCTIONS[name][1]}
    if "layout" in takes:
        of_qkv = "qkv" in call
        x = next(call[name] for name in ("x", "q", "qkv") if name in call)
        packed = x.dim() - (of_qkv and call["kv_heads"] is None) == 3
        layouts = ("bshd", "sbhd") if of_qkv else ("bshd", "bhsd", "sbhd")
        call["layout"] = "thd" if packed else d.choice(layouts)
    if "cache_layout" in takes:
        call["cache_layout"] = d.choice(("NHD", "HND"))
    return in_layout(call)


def in_layout(call: Arguments) -> Arguments:
    """Transposes from the operators' orders of dimensions to those of the call, or back."""
    swap = SWAPS[call.get("layout", "bshd")]
    swaps = dict.fromkeys(IN_LAYOUT, swap)
    swaps |= dict.fromkeys(CACHES, (1, 2) if call.get("cache_layout") == "HND" else None)
    return {n: x.transpose(*swaps[n]) if isinstance(x, torch.Tensor) and swaps.get(n) else x
            for n, x in call.items()}  # fmt: skip


def call_function(function: str, call: Arguments) -> object:
    call = dict(call)
    if "out_q" in call:
        call["out"] = call.pop("out_q"), call.pop("out_k")
    return getattr(rope_ext, function)(**call)


def operator_of(function: str, call: Arguments) -> str:
    """The operator that a call of the function has to equal."""
    if call.get("out") is not None or call.get("out_q") is not None:
        return f"rope::{function}.out"
    return f"rope::{function}_" if call.get("inplace") else f"rope::{function}"


def of_operator(call: Arguments) -> Arguments:
    """The arguments that the operator has too, in its order of dimensions."""
    own = ("layout", "cache_layout", "inplace")
    return {n: x for n, x in in_layout(call).items() if n not in own}
