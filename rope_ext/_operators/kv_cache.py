"""Rotations that also write a paged KV cache, and of keys in it: without derivatives.

DTensors: tokens must not be sharded; each rank has heads of all tokens (tensor parallel).
"""

from typing import Any

from rope_ext._engine.record import Given, Operator
from rope_ext._engine.sharding import HEADS, HEADS_OF, Axes, Sharding, axes_of_x
from rope_ext._operators.rotation import TWO

_WHY_WHOLE = "the caches that take them are"


def _append_sharding(operator: Operator, given: Given) -> Sharding:
    """Each rank writes its heads to its part of the caches."""
    of_q, of_k = HEADS_OF
    k_heads = given["k"].shape[-2]

    def of_scale(scale: Any) -> Axes:
        one_each = scale is not None and scale.dim() == 1 and scale.shape[0] == k_heads > 1
        return (of_k,) if one_each else ()

    axes: dict[str, Axes] = dict.fromkeys(operator.tensors, ())
    axes |= {
        "q": axes_of_x(given["q"], of_q),
        "k": axes_of_x(given["k"], of_k),
        "v": axes_of_x(given["v"], of_k),
        "k_cache": (None, None, of_k, None),
        "v_cache": (None, None, of_k, None),
        "k_scale": of_scale(given["k_scale"]),
        "v_scale": of_scale(given["v_scale"]),
    }
    return Sharding(axes, tokens_stay_whole=_WHY_WHOLE)


def _mla_append_sharding(operator: Operator, given: Given) -> Sharding:
    """Each rank has heads of q, and writes the whole cache, which has no heads."""
    axes = {**dict.fromkeys(operator.tensors, ()), "q": axes_of_x(given["q"], HEADS)}
    return Sharding(axes, tokens_stay_whole=_WHY_WHOLE)


def _shift_sharding(operator: Operator, given: Given) -> Sharding:
    """Each rank moves its heads."""
    axes: dict[str, Axes] = dict.fromkeys(operator.tensors, ())
    return Sharding(axes | {"k_cache": (None, None, HEADS, None)}, tokens_stay_whole=_WHY_WHOLE)


def _shifted_channels(shapes: Given) -> int:
    return shapes["slot_mapping"][0] * shapes["k_cache"][2] * 2 * shapes["inv_freq"][0]


KV_CACHE = (
    Operator("apply_rotary_qk_append_kv_", TWO, sharding=_append_sharding),
    Operator("apply_rotary_mla_append_", ("q", "k_pe"), sharding=_mla_append_sharding),
    Operator(
        "shift_cached_k_", pairs="inv_freq", rotated=_shifted_channels, sharding=_shift_sharding
    ),
)
