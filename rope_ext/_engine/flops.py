"""Formulas for torch.utils.flop_counter, from shapes. Sines are not counted."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rope_ext._engine.record import Operator


def register_flops(operators: Sequence[Operator]) -> None:
    from torch.utils.flop_counter import register_flop_formula

    for operator in operators:
        rotates = operator.rotates or operator.rotated
        if rotates and "." not in operator.name:  # one formula for all overloads
            register_flop_formula(getattr(torch.ops.rope, operator.name))(_formula(operator))


def _formula(operator: Operator) -> Callable[..., int]:
    def flops(*args: Any, out_shape: Any = None, **options: Any) -> int:
        given = operator.given(args, options)
        if operator.rotated is not None:
            return operator.flops_rotated * operator.rotated(given)
        total = 0
        for name in operator.rotates:
            shape = given[name]
            if shape is None or given.get(f"grad_{name}", shape) is None:
                continue
            rotary_dim = given.get("rotary_dim") or 2 * given[operator.pairs][-1]
            rotated = math.prod(shape[:-1]) * rotary_dim
            total += operator.flops_rotated * rotated + operator.flops_channel * math.prod(shape)
        return total

    return flops
