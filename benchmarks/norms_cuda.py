"""GPU cases of RMSNorm and rotation of x, or of q and k, and of its backward."""

from collections.abc import Callable
from typing import Any

import torch
from common import Case
from operator_case import EAGER, Arguments, Call, OperatorCase, Way, in_float64
from other_libraries_cuda import NORMS_OF_OTHER_LIBRARIES, norm_then_rotate
from rotations_cuda import (
    eager_arguments,
    eager_rotation,
    grads_of,
    heads_of,
    llama,
    qkv_of,
    row_bytes,
    rows_of,
)
from torch import Tensor

from rope_ext import reference

rope = torch.ops.rope

EPS = 1e-6
MODEL = torch.bfloat16
LEAVES = {  # by the first of them
    "x": ("x", "weight"),
    "q": ("q", "k", "q_weight", "k_weight"),
    "qkv": ("qkv", "q_weight", "k_weight"),
}


def leaves_of(named: Any) -> tuple[str, ...]:
    """The tensors and weights among the arguments of a call."""
    return LEAVES[next(name for name in LEAVES if name in named)]


def torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [B, S, H, D]; a row is a head, or with a weight [H, D] all heads."""
    row = x.flatten(-weight.dim())
    return torch.nn.functional.rms_norm(row, row.shape[-1:], weight.flatten(), eps).view_as(x)


def norm_steps(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, **rows: Any) -> Any:
    return norm_then_rotate(torch_norm, q, k, q_weight, k_weight, eps=EPS, **rows)


def eager_norm(cos: Tensor, sin: Tensor, interleaved: bool, **leaves: Tensor) -> tuple[Tensor, ...]:
    tensors = [leaves[name] for name in leaves_of(leaves)]
    count = len(tensors) // 2
    xs = [torch_norm(x, w, EPS) for x, w in zip(tensors[:count], tensors[count:], strict=True)]
    return eager_rotation(xs, cos, sin, interleaved)


def without_eps(arguments: Arguments) -> Arguments:
    return {name: value for name, value in arguments.items() if name != "eps"}


def eager_norm_arguments(arguments: Arguments) -> Arguments:
    kept = {n: v for n, v in arguments.items() if n in leaves_of(arguments) or n.startswith("grad")}
    rows = eager_arguments({n: v for n, v in without_eps(arguments).items() if n not in kept})
    rows.pop("xs")
    return {**kept, **rows}


def leaves(shape: Case, names: tuple[str, ...], all_heads: bool) -> Arguments:
    """The tensors, and their weights [D] or [H, D]."""
    xs = heads_of(shape, MODEL)[: len(names) // 2]
    weights = [
        (1 + torch.randn(*((x.shape[2],) * all_heads + (shape.head_dim,)), device="cuda") / 4)
        for x in xs
    ]
    return dict(zip(names, (*xs, *(w.to(MODEL) for w in weights)), strict=True))


def moved_bytes(shape: Case, both: bool, all_heads: bool, times: int, weight_times: int) -> int:
    """Bytes of the tensors `times` times and of their weights `weight_times` times."""
    heads = shape.heads if both else shape.q_heads
    weights = shape.head_dim * (heads if all_heads else 1 + both)
    channels = times * shape.tokens * heads * shape.head_dim + weight_times * weights
    return channels * MODEL.itemsize + row_bytes(shape)


def norm(
    operator: Any, form: str, step: str, tokens: int, all_heads: bool, compiled: bool = False
) -> OperatorCase:
    """A case of rms_norm_rotary or rms_norm_rotary_qk: new, in place or out."""
    shape, names = llama(step, tokens), [a.name for a in operator._schema.arguments]
    both, outs = "k" in names, [name for name in names if name.startswith("out")]

    def arguments() -> Arguments:
        made = leaves(shape, leaves_of(names), all_heads)
        made |= {o: torch.empty_like(x) for o, x in zip(outs, list(made.values()), strict=False)}
        return {**made, **rows_of(shape), "eps": EPS}

    def exact(arguments: Arguments) -> tuple[Tensor, ...]:
        a = in_float64({n: v for n, v in arguments.items() if n not in outs})
        return reference.rms_norm_rotary_qk(**a) if both else (reference.rms_norm_rotary(**a),)

    def without_outs(arguments: Arguments) -> Arguments:
        return eager_norm_arguments({n: v for n, v in arguments.items() if n not in outs})

    ways = {EAGER: Way(eager_norm, without_outs)}
    if both and not outs and not operator._schema.name.endswith("_"):
        ways["two F.rms_norm, apply_rotary_qk"] = Way(norm_steps, without_eps)
        ways.update(NORMS_OF_OTHER_LIBRARIES)
    return OperatorCase(
        operator,
        form,
        shape,
        arguments,
        exact,
        moved_bytes(shape, both, all_heads, times=2, weight_times=1),
        ways,
        compiled=compiled,
        roundings=16,
    )


# ---- backward


def bind_backward(function: Callable[..., Any], arguments: Arguments) -> Call:
    """The backward of a function, without its forward, which has run already."""
    a = dict(arguments)
    grads = [a.pop(name) for name in arguments if name.startswith("grad")]
    differentiated = {name: a.pop(name).detach().requires_grad_() for name in leaves_of(arguments)}
    with torch.enable_grad():
        outputs = function(**differentiated, **a)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, list(differentiated.values()), grads, retain_graph=True)

    return backward


def norm_backward(
    operator: Any, form: str, step: str, tokens: int, all_heads: bool, compiled: bool = False
) -> OperatorCase:
    shape, names = llama(step, tokens), [a.name for a in operator._schema.arguments]
    both = "k" in names

    def arguments() -> Arguments:
        made = leaves(shape, leaves_of(names), all_heads)
        grads = {n: torch.randn_like(made[n[5:]]) for n in names if n.startswith("grad")}
        return {**grads, **made, **rows_of(shape), "eps": EPS}

    def exact(arguments: Arguments) -> tuple[Tensor, ...]:
        function = reference.rms_norm_rotary_qk if both else reference.rms_norm_rotary
        return tuple(bind_backward(function, in_float64(arguments))())

    ways = {EAGER: Way(eager_norm, eager_norm_arguments, bind_backward)}
    if both:
        steps = Way(norm_steps, without_eps, bind_backward)
        ways["two F.rms_norm, apply_rotary_qk"] = steps
    return OperatorCase(
        operator,
        form,
        shape,
        arguments,
        exact,
        moved_bytes(shape, both, all_heads, times=3, weight_times=2),
        ways,
        compiled=compiled,
        roundings=256,
    )


# ---- packed


def packed_leaves(shape: Case) -> Arguments:
    """qkv, flat, and the weights."""
    of_qk = leaves(shape, LEAVES["q"], all_heads=False)
    return {**qkv_of(shape, MODEL, by_group=False), **{n: of_qk[n] for n in LEAVES["qkv"][1:]}}


def packed_bytes(shape: Case, times: int, weight_times: int) -> int:
    """q and k `times` times; v is read and written."""
    of_v = 2 * shape.tokens * shape.k_heads * shape.head_dim * MODEL.itemsize
    return of_v + moved_bytes(shape, True, False, times, weight_times)


def split_steps(qkv: Tensor, kv_heads: int, **others: Any) -> tuple[Tensor, ...]:
    q, k, v = reference.split_qkv(qkv, kv_heads)
    return *rope.rms_norm_rotary_qk(q, k, **others), v


def norm_qkv(form: str, step: str, tokens: int) -> OperatorCase:
    shape = llama(step, tokens)
    return OperatorCase(
        rope.rms_norm_rotary_qkv.default,
        form,
        shape,
        lambda: {**packed_leaves(shape), **rows_of(shape), "eps": EPS},
        lambda a: reference.rms_norm_rotary_qkv(**in_float64(a)),
        packed_bytes(shape, times=2, weight_times=1),
        {EAGER: Way(reference.rms_norm_rotary_qkv), "split, rms_norm_rotary_qk": Way(split_steps)},
        roundings=16,
    )


def norm_qkv_backward(form: str, step: str, tokens: int) -> OperatorCase:
    shape = llama(step, tokens)

    def exact(arguments: Arguments) -> tuple[Tensor, ...]:
        return tuple(bind_backward(reference.rms_norm_rotary_qkv, in_float64(arguments))())

    return OperatorCase(
        rope.rms_norm_rotary_qkv_backward.default,
        form,
        shape,
        lambda: {**grads_of(shape, MODEL), **packed_leaves(shape), **rows_of(shape), "eps": EPS},
        exact,
        packed_bytes(shape, times=3, weight_times=2),
        {
            EAGER: Way(reference.rms_norm_rotary_qkv, bind=bind_backward),
            "split, rms_norm_rotary_qk": Way(split_steps, bind=bind_backward),
        },
        roundings=256,
    )
