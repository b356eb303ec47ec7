"""cos and sin of positions, as a table and as rows, and the gradient to their frequencies.

An angle is position * inv_freq. Its derivatives by the position are cos' = -inv_freq sin and
sin' = inv_freq cos; for those by inv_freq the factor is the position. Positions seldom require
gradients, so their derivatives are composed of the operators in float64 and of PyTorch's own.
"""

from typing import Any

import torch
from torch import Tensor

from rope_ext._engine.autograd import both, save_all, sum_of, zero_unless_given
from rope_ext._engine.record import Derivative, Given, Grads, Operator
from rope_ext._engine.sharding import PAIRS, Axes, PartOfRange, Result, Sharding
from rope_ext._engine.vmap import one_by_one, samples_of

rope = torch.ops.rope


def table_dtype(inv_freq: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of cos and sin."""
    if dtype is not None:
        return dtype
    return torch.float64 if inv_freq.dtype == torch.float64 else torch.float32


# Without axes, all pairs of a token share its position; with axes, a pair has the position of its
# axis. Sums are taken axis by axis, as index_add_ is not deterministic on CUDA.


def _of_pairs(positions: Tensor, axes: Tensor | None) -> Tensor:
    """positions [..] -> [.., 1], or with axes [A, ..] -> [.., P]; float64, NaN where axes is not in
    [0, A).
    """
    positions = positions.double().unsqueeze(-1)
    if axes is None:
        return positions
    of_pairs: Any = torch.nan
    for axis in range(positions.shape[0]):
        of_pairs = torch.where(axes == axis, positions[axis], of_pairs)
    return of_pairs


def _over_pairs(terms: Tensor, positions: Tensor, axes: Tensor | None) -> Tensor:
    """The transpose: terms [.., P] -> the shape of positions, summed over the pairs of each."""
    if axes is None:
        return terms.sum(-1).to(positions.dtype)
    sums = [torch.where(axes == i, terms, 0.0).sum(-1) for i in range(positions.shape[0])]
    return torch.stack(sums).to(positions.dtype)


def _exact(
    inv_freq: Tensor, position_ids: Tensor, axes: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """cos and sin in float64."""
    options = {"attention_scaling": scaling, "dtype": torch.float64}
    return rope.cos_sin(inv_freq, position_ids, axes, **options)


# Derivatives of cos and sin


def _cos_sin_cache_backward(ctx: Any, grad_cos: Tensor | None, grad_sin: Tensor | None) -> Grads:
    grad_cos, grad_sin = both(grad_cos, grad_sin)
    inv_freq, _ = ctx.saved_tensors
    options = {name: ctx.options[name] for name in ("start", "attention_scaling")}
    return rope.cos_sin_backward(grad_cos, grad_sin, inv_freq, **options), None


def _cos_sin_backward(ctx: Any, grad_cos: Tensor | None, grad_sin: Tensor | None) -> Grads:
    grads = both(grad_cos, grad_sin)
    needed = ctx.needs_input_grad[:2]
    return *angle_grads(needed, *grads, *ctx.saved_tensors, ctx.options), None


def angle_grads(
    needed: tuple[bool, ...],
    grad_cos: Tensor,
    grad_sin: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None,
    axes: Tensor | None,
    options: dict[str, Any],
) -> Grads:
    """The gradients to inv_freq and position_ids, from those to cos and sin."""
    to_inv_freq = to_positions = None
    scaling = options["attention_scaling"]
    if needed[0]:
        to_inv_freq = rope.cos_sin_backward(
            grad_cos, grad_sin, inv_freq, position_ids, axes, attention_scaling=scaling
        )
    if needed[1]:
        cos, sin = _exact(inv_freq, position_ids, axes, scaling)
        to_pairs = (cos * grad_sin - sin * grad_cos) * inv_freq
        to_positions = _over_pairs(to_pairs, position_ids, axes)
    return to_inv_freq, to_positions


def cos_sin_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    inv_freq, position_ids, axes = inputs
    dtype = table_dtype(inv_freq, options["dtype"])
    of_angle = None
    if tangents[0] is not None:
        of_angle = _of_pairs(position_ids, axes) * tangents[0]
    if tangents[1] is not None:
        of_angle = sum_of(of_angle, _of_pairs(tangents[1], axes) * inv_freq)
    if of_angle is None:
        return None, None
    cos, sin = _exact(inv_freq, position_ids, axes, options["attention_scaling"])
    return (-(sin * of_angle)).to(dtype), (cos * of_angle).to(dtype)


def _cos_sin_cache_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    inv_freq, length = inputs
    position_ids = consecutive(options["start"], length, inv_freq)
    return cos_sin_tangent([inv_freq, position_ids, None], (tangents[0], None), options)


def consecutive(start: int, length: int, like: Tensor) -> Tensor:
    return torch.arange(start, start + length, device=like.device)


# Derivatives of cos_sin_backward, F = sum over positions p of p (cos grad_sin - sin grad_cos)


def _by_inv_freq(
    grad_cos: Tensor,
    grad_sin: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor,
    axes: Tensor | None,
    scaling: float,
) -> Tensor:
    """dF / d inv_freq [P]."""
    position = _of_pairs(position_ids, axes)
    return rope.cos_sin_backward(
        position * grad_sin, -position * grad_cos, inv_freq, position_ids, axes,
        attention_scaling=scaling,
    )  # fmt: skip


def _by_position(
    grad_cos: Tensor,
    grad_sin: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor,
    axes: Tensor | None,
    scaling: float,
) -> Tensor:
    """dF / dp, pair by pair: [.., P]."""
    cos, sin = _exact(inv_freq, position_ids, axes, scaling)
    angle = _of_pairs(position_ids, axes) * inv_freq
    return cos * grad_sin - sin * grad_cos - angle * (sin * grad_sin + cos * grad_cos)


def _with_positions(inputs: Any, options: dict[str, Any]) -> list[Any]:
    """grad_cos, grad_sin, inv_freq, position_ids (given, or start, start + 1, ...), axes."""
    grad_cos, grad_sin, inv_freq, position_ids, axes = inputs
    if position_ids is None:
        position_ids = consecutive(options["start"], grad_cos.shape[0], inv_freq)
    return [grad_cos, grad_sin, inv_freq, position_ids, axes]


def _cos_sin_backward_backward(ctx: Any, grad: Tensor) -> Grads:
    inputs = _with_positions(ctx.saved_tensors, ctx.options)
    grad_cos, grad_sin, inv_freq, position_ids, axes = inputs
    scaling = ctx.options["attention_scaling"]
    cos, sin = _exact(inv_freq, position_ids, axes, scaling)
    weight = _of_pairs(position_ids, axes) * grad
    to_grad_cos, to_grad_sin = -(weight * sin), weight * cos
    to_inv_freq = grad * _by_inv_freq(*inputs, scaling)
    to_positions = None
    if ctx.needs_input_grad[3]:
        to_positions = _over_pairs(grad * _by_position(*inputs, scaling), position_ids, axes)
    return (
        to_grad_cos.to(grad_cos.dtype),
        to_grad_sin.to(grad_sin.dtype),
        to_inv_freq,
        to_positions,
        None,
    )


def _cos_sin_backward_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    grad_cos, grad_sin, *rest = inputs
    inv_freq, _, axes = rest
    scaling = options["attention_scaling"]
    of_grads = of_inv_freq = of_positions = None
    if tangents[0] is not None or tangents[1] is not None:
        to_cos = zero_unless_given(tangents[0], grad_cos)
        to_sin = zero_unless_given(tangents[1], grad_sin)
        of_grads = rope.cos_sin_backward(to_cos, to_sin, *rest, **options)
    if tangents[2] is not None:
        of_inv_freq = tangents[2] * _by_inv_freq(*_with_positions(inputs, options), scaling)
    if tangents[3] is not None:
        terms = _of_pairs(tangents[3], axes) * _by_position(*inputs, scaling)
        terms = terms.reshape(-1, terms.shape[-1]).sum(0) if terms.dim() > 1 else terms
        of_positions = terms.to(inv_freq.dtype)
    return sum_of(sum_of(of_grads, of_inv_freq), of_positions)


# Fakes


def _table_of(given: Given) -> tuple[Tensor, Tensor]:
    return _empty_rows(given, (given["length"],))


def _rows_of(given: Given) -> tuple[Tensor, Tensor]:
    return _empty_rows(given, given["position_ids"].shape[0 if given["axes"] is None else 1 :])


def _empty_rows(given: Given, positions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    inv_freq = given["inv_freq"]
    shape, dtype = (*positions, inv_freq.shape[0]), table_dtype(inv_freq, given["dtype"])
    return inv_freq.new_empty(shape, dtype=dtype), inv_freq.new_empty(shape, dtype=dtype)


# vmap: samples become positions, or their frequencies become one long vector


def cos_sin_of_samples(
    operator: Operator, count: int, dims: dict[str, int | None], given: Given
) -> Any:
    """The rule of cos_sin and cos_sin_cache."""
    axes = given.get("axes")
    of_axes, of_positions = dims.get("axes"), dims.get("position_ids")
    if dims["inv_freq"] is None and of_axes is None:
        samples = given["position_ids"].movedim(of_positions, 0 if axes is None else 1)
        return operator.overload(**{**given, "position_ids": samples}), (0, 0)
    if of_positions is None and of_axes is None:  # the frequencies of all samples in one vector
        inv_freq = given["inv_freq"].movedim(dims["inv_freq"], 0)
        arguments = {**given, "inv_freq": inv_freq.flatten()}
        if axes is not None:
            arguments["axes"] = axes.repeat(count)
        tables = operator.overload(**arguments)
        return tuple(t.unflatten(-1, inv_freq.shape) for t in tables), (-2, -2)
    return one_by_one(operator, count, dims, given)


def _cos_sin_backward_of_samples(
    operator: Operator, count: int, dims: dict[str, int | None], given: Given
) -> Any:
    if dims["position_ids"] is not None or dims["axes"] is not None:
        return one_by_one(operator, count, dims, given)
    grads = {
        name: samples_of(given[name], dims[name], count).movedim(0, -2).flatten(-2)
        for name in ("grad_cos", "grad_sin")
    }
    inv_freq = samples_of(given["inv_freq"], dims["inv_freq"], count)
    arguments = {**given, **grads, "inv_freq": inv_freq.flatten()}
    if given["axes"] is not None:
        arguments["axes"] = given["axes"].repeat(count)
    return operator.overload(**arguments).view(inv_freq.shape), 0


# DTensors: rows are sharded as their positions, and pairs as the frequencies


def _axes_of_any_positions(rank: int) -> Axes:
    return tuple(f"dimension {dim} of the positions" for dim in range(rank))


def _cos_sin_cache_sharding(operator: Operator, given: Given) -> Sharding:
    table = Result((None, PAIRS), (given["length"], *given["inv_freq"].shape))
    return Sharding({"inv_freq": (PAIRS,)}, (table, table))


def _cos_sin_sharding(operator: Operator, given: Given) -> Sharding:
    lead = () if given["axes"] is None else (None,)
    shape = given["position_ids"].shape[len(lead) :]
    of_rows = _axes_of_any_positions(len(shape))
    axes = {"inv_freq": (PAIRS,), "position_ids": (*lead, *of_rows), "axes": (PAIRS,)}
    rows = Result((*of_rows, PAIRS), (*shape, *given["inv_freq"].shape))
    return Sharding(axes, (rows, rows))


def _cos_sin_backward_sharding(operator: Operator, given: Given) -> Sharding:
    of_rows = _axes_of_any_positions(given["grad_cos"].dim() - 1)
    terms = (frozenset(("grad_cos",)), frozenset(("grad_sin",)))
    grad = Result((PAIRS,), given["inv_freq"].shape, summed=of_rows, terms=terms)

    def complete(arguments: Given, part_of_range: PartOfRange) -> None:
        if given["position_ids"] is None:
            length = given["grad_cos"].shape[0]
            arguments["position_ids"] = part_of_range(given["start"], length, of_rows[0])

    axes = {
        "grad_cos": (*of_rows, PAIRS),
        "grad_sin": (*of_rows, PAIRS),
        "inv_freq": (PAIRS,),
        "position_ids": (*(() if given["axes"] is None else (None,)), *of_rows),
        "axes": (PAIRS,),
    }
    return Sharding(axes, (grad,), complete)


COS_SIN_CACHE = Operator(
    "cos_sin_cache",
    pairs="inv_freq",
    results=_table_of,
    derivative=Derivative(save_all, _cos_sin_cache_backward, _cos_sin_cache_tangent),
    vmap=cos_sin_of_samples,
    sharding=_cos_sin_cache_sharding,
)
COS_SIN = Operator(
    "cos_sin",
    pairs="inv_freq",
    results=_rows_of,
    derivative=Derivative(save_all, _cos_sin_backward, cos_sin_tangent),
    vmap=cos_sin_of_samples,
    sharding=_cos_sin_sharding,
)
ANGLES = (
    COS_SIN_CACHE,
    COS_SIN,
    Operator(
        "cos_sin_backward",
        pairs="inv_freq",
        results=("inv_freq",),
        derivative=Derivative(save_all, _cos_sin_backward_backward, _cos_sin_backward_tangent),
        vmap=_cos_sin_backward_of_samples,
        sharding=_cos_sin_backward_sharding,
    ),
)
