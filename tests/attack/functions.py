"""The functions of rope_ext as calls of the operators: layouts, inplace and out."""

import inspect

import torch
from drawing import Arguments, Draw

import rope_ext

# Function -> the operators that it calls, each with the other arguments of the function.
FUNCTIONS: dict[str, dict[str, Arguments]] = {
    "apply_rotary": {
        "rope::apply_rotary": {},
        "rope::apply_rotary_": {"inplace": True},
        "rope::apply_rotary.out": {},
    },
    "apply_rotary_qk": {
        "rope::apply_rotary_qk": {},
        "rope::apply_rotary_qk_": {"inplace": True},
        "rope::apply_rotary_qk.out": {},
    },
    "apply_rotary_qk_at": {
        "rope::apply_rotary_qk_at": {},
        "rope::apply_rotary_qk_at_": {"inplace": True},
    },
    "apply_rotary_qk_append_kv_": {"rope::apply_rotary_qk_append_kv_": {}},
    "apply_rotary_mla_append_": {"rope::apply_rotary_mla_append_": {}},
    "rms_norm_rotary_qk": {"rope::rms_norm_rotary_qk": {}},
    "cos_sin": {"rope::cos_sin": {}},
    "cos_sin_cache": {"rope::cos_sin_cache": {}},
}
ENTRIES = [(name, function) for function, names in FUNCTIONS.items() for name in names]

SWAPS = {"bshd": None, "thd": None, "bhsd": (1, 2), "sbhd": (0, 1)}
IN_LAYOUT = ("x", "q", "k", "v", "out", "out_q", "out_k")
CACHES = ("k_cache", "v_cache")


def arguments_of(d: Draw, name: str, function: str, call: Arguments) -> Arguments:
    """The arguments of the function, from those of the operator."""
    takes = inspect.signature(getattr(rope_ext, function)).parameters
    call = {**call, **FUNCTIONS[function][name]}
    if "layout" in takes:
        packed = call.get("x", call.get("q")).dim() == 3
        call["layout"] = "thd" if packed else d.choice(("bshd", "bhsd", "sbhd"))
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
