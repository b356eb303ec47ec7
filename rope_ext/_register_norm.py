"""What PyTorch has to know about rms_norm_rotary_qk and its backward, as _register.py has it of the
other operators.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from rope_ext._norm_derivatives import register_norm_derivatives
from rope_ext._on_import import on_import
from rope_ext._register import Shape, _check_device, _empty, _output_like, _rotating

rope = torch.ops.rope


@cache  # PyTorch takes it once
def register() -> None:
    """Registers everything but the rules of vmap and of DTensors."""
    register_fake("rope::rms_norm_rotary_qk", _fake_rms_norm_rotary_qk)
    register_fake("rope::rms_norm_rotary_qk_backward", _fake_rms_norm_rotary_qk_backward)
    register_norm_derivatives()
    on_import("torch.utils.flop_counter", _register_flops)


def _fake_rms_norm_rotary_qk(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    _check_device("rms_norm_rotary_qk", "q", q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos,
                  sin=sin, position_ids=position_ids)  # fmt: skip
    return _output_like(q), _output_like(k)


def _fake_rms_norm_rotary_qk_backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_device("rms_norm_rotary_qk_backward", "q", q, grad_q=grad_q, grad_k=grad_k, k=k,
                  q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin,
                  position_ids=position_ids)  # fmt: skip
    return _output_like(q), _output_like(k), _empty(q_weight), _empty(k_weight)


# RMSNorm takes 4 operations a channel (a square, its sum, two products), its backward 12: the sums
# of x x and of g w x (5), n (1), the gradient to x (4) and that to the weight (2).


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(rope.rms_norm_rotary_qk)(_flops_of_norm)
    register_flop_formula(rope.rms_norm_rotary_qk_backward)(_flops_of_norm_backward)


def _flops_of_norm(
    q: Shape,
    k: Shape,
    q_weight: Shape,
    k_weight: Shape,
    cos: Shape,
    *args: Any,
    rotary_dim: int | None = None,
    **options: Any,
) -> int:
    rotations = sum(3 * _rotating(x, cos, rotary_dim) for x in (q, k))
    return 4 * (math.prod(q) + math.prod(k)) + rotations


def _flops_of_norm_backward(
    grad_q: Shape | None,
    grad_k: Shape | None,
    q: Shape,
    k: Shape,
    q_weight: Shape,
    k_weight: Shape,
    cos: Shape,
    *args: Any,
    rotary_dim: int | None = None,
    **options: Any,
) -> int:
    given = [x for grad, x in ((grad_q, q), (grad_k, k)) if grad is not None]
    return sum(12 * math.prod(x) + 3 * _rotating(x, cos, rotary_dim) for x in given)
