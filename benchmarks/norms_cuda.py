"""GPU cases of RMSNorm of q and k with their rotation, and of its backward."""

from collections.abc import Callable
from typing import Any

import torch
from common import Case
from operator_case import EAGER, Arguments, Call, OperatorCase, Way, in_float64
from other_libraries_cuda import NORMS_OF_OTHER_LIBRARIES, norm_then_rotate
from rotations_cuda import (
    eager_arguments,
    eager_rotation,
    heads_of,
    llama,
    row_bytes,
    rows_of,
)
from torch import Tensor

from rope_ext import reference

rope = torch.ops.rope

EPS = 1e-6
MODEL = torch.bfloat16
GRADS = ("grad_q", "grad_k")
LEAVES = ("q", "k", "q_weight", "k_weight")


def torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [B, S, H, D]; a row is a head, or with a weight [H, D] all heads."""
    row = x.flatten(-weight.dim())
    return torch.nn.functional.rms_norm(row, row.shape[-1:], weight.flatten(), eps).view_as(x)


def norm_steps(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, **rows: Any) -> Any:
    return norm_then_rotate(torch_norm, q, k, q_weight, k_weight, eps=EPS, **rows)


def eager_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
) -> tuple[Tensor, ...]:
    xs = [torch_norm(x, weight, EPS) for x, weight in ((q, q_weight), (k, k_weight))]
    return eager_rotation(xs, cos, sin, interleaved)


def without_eps(arguments: Arguments) -> Arguments:
    return {name: value for name, value in arguments.items() if name != "eps"}


def eager_norm_arguments(arguments: Arguments) -> Arguments:
    rows = eager_arguments({n: v for n, v in without_eps(arguments).items() if n not in GRADS})
    rows.pop("xs")
    return {**{n: arguments[n] for n in (*GRADS, *LEAVES) if n in arguments}, **rows}


def weights_of(shape: Case, all_heads: bool) -> list[Tensor]:
    """The weights of q and of k, [D] or [H, D]."""
    sizes = [(heads,) * all_heads + (shape.head_dim,) for heads in (shape.q_heads, shape.k_heads)]
    return [(1 + torch.randn(*size, device="cuda") / 4).to(MODEL) for size in sizes]


def moved_bytes(shape: Case, all_heads: bool, times: int, weight_times: int) -> int:
    """Bytes of q and k `times` times and of their weights `weight_times` times."""
    weights = shape.head_dim * (shape.heads if all_heads else 2)
    channels = times * shape.tokens * shape.heads * shape.head_dim + weight_times * weights
    return channels * MODEL.itemsize + row_bytes(shape)


def norm(
    form: str, step: str, tokens: int, all_heads: bool, compiled: bool = False
) -> OperatorCase:
    shape = llama(step, tokens)

    def arguments() -> Arguments:
        tensors = *heads_of(shape, MODEL), *weights_of(shape, all_heads)
        return {**dict(zip(LEAVES, tensors, strict=True)), **rows_of(shape), "eps": EPS}

    return OperatorCase(
        rope.rms_norm_rotary_qk.default,
        form,
        shape,
        arguments,
        lambda a: reference.rms_norm_rotary_qk(**in_float64(a)),
        moved_bytes(shape, all_heads, times=2, weight_times=1),
        {
            "two F.rms_norm, apply_rotary_qk": Way(norm_steps, without_eps),
            EAGER: Way(eager_norm, eager_norm_arguments),
            **NORMS_OF_OTHER_LIBRARIES,
        },
        compiled=compiled,
        roundings=16,
    )


# ---- backward


def bind_backward(function: Callable[..., Any], arguments: Arguments) -> Call:
    """The backward of a function, without its forward, which has run already."""
    a = dict(arguments)
    grads = [a.pop(name) for name in GRADS]
    leaves = {name: a.pop(name).detach().requires_grad_() for name in LEAVES}
    with torch.enable_grad():
        outputs = function(**leaves, **a)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, list(leaves.values()), grads, retain_graph=True)

    return backward


def exact_backward(arguments: Arguments) -> tuple[Tensor, ...]:
    return tuple(bind_backward(reference.rms_norm_rotary_qk, in_float64(arguments))())


def norm_backward(
    form: str, step: str, tokens: int, all_heads: bool, compiled: bool = False
) -> OperatorCase:
    shape = llama(step, tokens)

    def arguments() -> Arguments:
        q, k = heads_of(shape, MODEL)
        tensors = (torch.randn_like(q), torch.randn_like(k), q, k, *weights_of(shape, all_heads))
        made = dict(zip((*GRADS, *LEAVES), tensors, strict=True))
        return {**made, **rows_of(shape), "eps": EPS}

    return OperatorCase(
        rope.rms_norm_rotary_qk_backward.default,
        form,
        shape,
        arguments,
        exact_backward,
        moved_bytes(shape, all_heads, times=3, weight_times=2),
        {
            "two F.rms_norm, apply_rotary_qk": Way(norm_steps, without_eps, bind_backward),
            EAGER: Way(eager_norm, eager_norm_arguments, bind_backward),
        },
        compiled=compiled,
        roundings=256,
    )
