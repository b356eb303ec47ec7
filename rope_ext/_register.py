"""What PyTorch has to know about the operators beside their kernels: here fakes and FLOPs.

Fakes give shapes, dtypes and strides and check devices alone: the operators check, when they run.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from rope_ext._angle_derivatives import register_angle_derivatives, table_dtype
from rope_ext._batching import register_batching
from rope_ext._derivatives import register_derivatives
from rope_ext._on_import import on_import
from rope_ext._writes import register_writes

rope = torch.ops.rope


@cache  # PyTorch takes it once
def register() -> None:
    """Registers everything, when the package is imported."""
    register_fake("rope::apply_rotary", _fake_apply_rotary)
    register_fake("rope::apply_rotary_qk", _fake_apply_rotary_qk)
    register_fake("rope::apply_rotary_", _fake_apply_rotary_)
    register_fake("rope::apply_rotary_qk_", _fake_apply_rotary_qk_)
    register_fake("rope::apply_rotary.out", _fake_apply_rotary_out)
    register_fake("rope::apply_rotary_qk.out", _fake_apply_rotary_qk_out)
    register_fake("rope::apply_rotary_qk_append_kv_", _fake_append_kv)
    register_fake("rope::apply_rotary_mla_append_", _fake_mla_append)
    register_fake("rope::apply_rotary_table_backward", _fake_table_backward)
    register_fake("rope::cos_sin_cache", _fake_cos_sin_cache)
    register_fake("rope::cos_sin", _fake_cos_sin)
    register_fake("rope::cos_sin_backward", _fake_cos_sin_backward)
    register_fake("rope::apply_rotary_qk_at", _fake_apply_rotary_qk_at)
    register_fake("rope::apply_rotary_qk_at_", _fake_apply_rotary_qk_at_)

    register_derivatives()
    register_angle_derivatives()
    register_batching()
    on_import("torch.utils.flop_counter", _register_flops)

    register_writes()


# Fakes


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _output_like(x: Tensor) -> Tensor:
    """As output_like in apply_rotary.cpp."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else _empty(x)


def _check_device(op: str, of: str, x: Tensor, **others: Tensor | None) -> None:
    """A tensor without data beside real ones comes here, not to the operator: as check_device."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise RuntimeError(
                f"rope::{op}: expected {name} on the device of {of}, {x.device}, got {other.device}"
            )


def _fake_apply_rotary_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    op: str = "apply_rotary_",
    **options: Any,
) -> None:
    _check_device(op, "x", x, cos=cos, sin=sin, position_ids=position_ids)


def _fake_apply_rotary(x: Tensor, *args: Any, **options: Any) -> Tensor:
    _fake_apply_rotary_(x, *args, op="apply_rotary", **options)
    return _output_like(x)


def _fake_apply_rotary_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    op: str = "apply_rotary_qk_",
    **options: Any,
) -> None:
    _check_device(op, "q", q, k=k, cos=cos, sin=sin, position_ids=position_ids)


def _fake_apply_rotary_qk(
    q: Tensor, k: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    _fake_apply_rotary_qk_(q, k, *args, op="apply_rotary_qk", **options)
    return _output_like(q), _output_like(k)


def _fake_apply_rotary_out(x: Tensor, *args: Any, out: Tensor, **options: Any) -> None:
    _fake_apply_rotary_(x, *args, op="apply_rotary.out", **options)
    _check_device("apply_rotary.out", "x", x, out=out)


def _fake_apply_rotary_qk_out(
    q: Tensor, k: Tensor, *args: Any, out_q: Tensor, out_k: Tensor, **options: Any
) -> None:
    _fake_apply_rotary_qk_(q, k, *args, op="apply_rotary_qk.out", **options)
    _check_device("apply_rotary_qk.out", "q", q, out_q=out_q, out_k=out_k)


def _fake_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    **options: Any,
) -> None:
    op = "apply_rotary_qk_append_kv_"
    _check_device(op, "q", q, k=k, cos=cos, sin=sin, position_ids=position_ids, v=v)
    _check_device(op, "q", q, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping)
    _check_device(op, "q", q, k_scale=k_scale, v_scale=v_scale)


def _fake_mla_append(
    q: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    **options: Any,
) -> None:
    op = "apply_rotary_mla_append_"
    _check_device(op, "q", q, cos=cos, sin=sin, position_ids=position_ids, k_pe=k_pe, kv_c=kv_c)
    _check_device(op, "q", q, kv_cache=kv_cache, slot_mapping=slot_mapping, scale=scale)


def _fake_table_backward(
    grad_q: Tensor,
    q: Tensor,
    grad_k: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    token_order: Tensor | None = None,
    row_offsets: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    _check_device("apply_rotary_table_backward", "q", q, grad_q=grad_q, grad_k=grad_k, k=k, cos=cos,
                  token_order=token_order, row_offsets=row_offsets)  # fmt: skip
    return _empty(cos), _empty(cos)


def _fake_cos_sin_backward(
    grad_cos: Tensor,
    grad_sin: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None = None,
    axes: Tensor | None = None,
    **options: Any,
) -> Tensor:
    _check_device("cos_sin_backward", "inv_freq", inv_freq, grad_cos=grad_cos, grad_sin=grad_sin,
                  position_ids=position_ids, axes=axes)  # fmt: skip
    return _empty(inv_freq)


def _fake_cos_sin_cache(
    inv_freq: Tensor,
    length: int,
    *,
    start: int = 0,
    attention_scaling: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = table_dtype(inv_freq, dtype)
    shape = (length, inv_freq.shape[0])
    return inv_freq.new_empty(shape, dtype=dtype), inv_freq.new_empty(shape, dtype=dtype)


def _fake_cos_sin(
    inv_freq: Tensor,
    position_ids: Tensor,
    axes: Tensor | None = None,
    *,
    attention_scaling: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    _check_device("cos_sin", "inv_freq", inv_freq, position_ids=position_ids, axes=axes)
    dtype = table_dtype(inv_freq, dtype)
    shape = (*position_ids.shape[0 if axes is None else 1 :], inv_freq.shape[0])
    return inv_freq.new_empty(shape, dtype=dtype), inv_freq.new_empty(shape, dtype=dtype)


def _fake_apply_rotary_qk_at_(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    op: str = "apply_rotary_qk_at_",
    **options: Any,
) -> None:
    _check_device(op, "q", q, k=k, inv_freq=inv_freq, position_ids=position_ids, axes=axes)


def _fake_apply_rotary_qk_at(
    q: Tensor, k: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    _fake_apply_rotary_qk_at_(q, k, *args, op="apply_rotary_qk_at", **options)
    return _output_like(q), _output_like(k)


# What torch.utils.flop_counter counts, from shapes: 4 products and 2 sums a pair, so 3 a channel
# that rotates; 4 products and 4 sums, so 4, for the gradient to the table. Sines count nothing.

Shape = torch.Size


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula([rope.apply_rotary, rope.apply_rotary_])(_flops_of_one)
    register_flop_formula([rope.apply_rotary_qk, rope.apply_rotary_qk_])(_flops_of_two)
    register_flop_formula(rope.apply_rotary_table_backward)(_flops_of_table_backward)
    register_flop_formula(rope.apply_rotary_qk_append_kv_)(_flops_of_append_kv)
    register_flop_formula(rope.apply_rotary_mla_append_)(_flops_of_mla_append)
    register_flop_formula([rope.apply_rotary_qk_at, rope.apply_rotary_qk_at_])(_flops_at)


def _rotating(x: Shape, cos: Shape, rotary_dim: int | None) -> int:
    return math.prod(x[:-1]) * (2 * cos[-1] if rotary_dim is None else rotary_dim)


def _flops_of_one(
    x: Shape, cos: Shape, *args: Any, rotary_dim: int | None = None, **options: Any
) -> int:
    return 3 * _rotating(x, cos, rotary_dim)


def _flops_of_two(
    q: Shape, k: Shape, cos: Shape, *args: Any, rotary_dim: int | None = None, **options: Any
) -> int:
    return 3 * (_rotating(q, cos, rotary_dim) + _rotating(k, cos, rotary_dim))


def _flops_of_append_kv(
    q: Shape,
    k: Shape,
    v: Shape,
    k_cache: Shape,
    v_cache: Shape,
    slot_mapping: Shape,
    cos: Shape,
    *args: Any,
    rotary_dim: int | None = None,
    **options: Any,
) -> int:
    return _flops_of_two(q, k, cos, rotary_dim=rotary_dim)


def _flops_of_mla_append(
    q: Shape,
    k_pe: Shape,
    kv_c: Shape,
    kv_cache: Shape,
    slot_mapping: Shape,
    cos: Shape,
    *args: Any,
    **options: Any,
) -> int:
    return _flops_of_two(q, k_pe, cos)


def _flops_at(q: Shape, k: Shape, inv_freq: Shape, *args: Any, **options: Any) -> int:
    return _flops_of_two(q, k, inv_freq)


def _flops_of_table_backward(
    grad_q: Shape,
    q: Shape,
    grad_k: Shape | None,
    k: Shape | None,
    cos: Shape,
    *args: Any,
    rotary_dim: int | None = None,
    **options: Any,
) -> int:
    return 4 * sum(_rotating(x, cos, rotary_dim) for x in (q, k) if x is not None)
