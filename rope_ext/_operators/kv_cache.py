"""Rotations that also write a paged KV cache, and of keys in it: without derivatives.

DTensors: tokens must not be sharded; each rank has heads of all tokens (tensor parallel).
"""

from typing import Any

from torch import Tensor

from rope_ext._engine.record import Given, Operator
from rope_ext._engine.sharding import HEADS, HEADS_OF, Axes, Sharding, axes_of_x
from rope_ext._operators.rotation import TWO

_WHY_WHOLE = "the caches that take them are"


def _axes_of_scale(scale: Any, x: Tensor, heads: str) -> Axes:
    one_each = scale is not None and scale.dim() == 1 and scale.shape[0] == x.shape[-2] > 1
    return (heads,) if one_each else ()


def _axes_of_float8_q(given: Given, heads: str) -> dict[str, Axes]:
    q = given["q"]
    of_q = axes_of_x(q, heads)
    return {
        "q_out": of_q,
        "q_scale": _axes_of_scale(given["q_scale"], q, heads),
        "q_scale_out": of_q[:-1],
    }


def _append_sharding(operator: Operator, given: Given) -> Sharding:
    """Each rank writes its heads to its part of the caches."""
    of_q, of_k = HEADS_OF
    axes: dict[str, Axes] = dict.fromkeys(operator.tensors, ())
    axes |= {
        "q": axes_of_x(given["q"], of_q),
        "k": axes_of_x(given["k"], of_k),
        "v": axes_of_x(given["v"], of_k),
        "k_cache": (None, None, of_k, None),
        "v_cache": (None, None, of_k, None),
        "k_scale": _axes_of_scale(given["k_scale"], given["k"], of_k),
        "v_scale": _axes_of_scale(given["v_scale"], given["k"], of_k),
        **_axes_of_float8_q(given, of_q),
    }
    return Sharding(axes, tokens_stay_whole=_WHY_WHOLE)


def _normed_append_sharding(operator: Operator, given: Given) -> Sharding:
    """With weights [H, D] a row is all heads of a token, so every rank has all of them."""
    sharding = _append_sharding(operator, given)
    if given["q_weight"].dim() != 1:
        whole = {name: tuple(None if axis in HEADS_OF else axis for axis in axes)
                 for name, axes in sharding.axes.items()}  # fmt: skip
        sharding.axes = whole
    return sharding


def _mla_append_sharding(operator: Operator, given: Given) -> Sharding:
    """Each rank has heads of q, and writes the whole cache, which has no heads."""
    axes: dict[str, Axes] = dict.fromkeys(operator.tensors, ())
    axes |= {"q": axes_of_x(given["q"], HEADS), **_axes_of_float8_q(given, HEADS)}
    return Sharding(axes, tokens_stay_whole=_WHY_WHOLE)


def _shift_sharding(operator: Operator, given: Given) -> Sharding:
    """Each rank moves its heads."""
    axes: dict[str, Axes] = dict.fromkeys(operator.tensors, ())
    return Sharding(axes | {"k_cache": (None, None, HEADS, None)}, tokens_stay_whole=_WHY_WHOLE)


def _shifted_channels(shapes: Given) -> int:
    return shapes["slot_mapping"][0] * shapes["k_cache"][2] * 2 * shapes["inv_freq"][0]


KV_CACHE = (
    Operator("apply_rotary_qk_append_kv_", TWO, sharding=_append_sharding),
    Operator(
        "rms_norm_rotary_qk_append_kv_", TWO, flops_channel=4, sharding=_normed_append_sharding
    ),
    Operator("apply_rotary_mla_append_", ("q", "k_pe"), sharding=_mla_append_sharding),
    Operator(
        "shift_cached_k_", pairs="inv_freq", rotated=_shifted_channels, sharding=_shift_sharding
    ),
)
