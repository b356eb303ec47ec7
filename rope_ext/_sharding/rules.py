"""A rule for each operator on DTensors: batch, sequence and heads shard freely, and a pending sum
(Partial) passes through x, in which a rotation is linear. The ranks of a mesh never have to talk.

On interfaces that every torch has alike: torch.library.register_torch_dispatch, and to_local,
from_local and redistribute of DTensor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from rope_ext._sharding.plan import (
    BATCH,
    HEADS,
    HEADS_OF,
    PAIRS,
    SEQUENCE,
    Operand,
    Plan,
    checked,
    distributed,
    parts_of,
    plan_for,
)
from rope_ext._token_order import tokens_by_row


def register() -> None:
    for op, rule in (
        ("apply_rotary", _rotate),
        ("apply_rotary_qk", _rotate),
        ("apply_rotary_", _rotate),
        ("apply_rotary_qk_", _rotate),
        ("apply_rotary.out", _rotate),
        ("apply_rotary_qk.out", _rotate),
        ("apply_rotary_table_backward", _table_backward),
        ("cos_sin_cache", _cos_sin_cache),
        ("cos_sin", _cos_sin),
        ("cos_sin_backward", _cos_sin_backward),
        ("apply_rotary_qk_at", _rotate_at),
        ("apply_rotary_qk_at_", _rotate_at),
        ("apply_rotary_qk_append_kv_", _append_kv),
        ("apply_rotary_mla_append_", _mla_append),
    ):
        torch.library.register_torch_dispatch(f"rope::{op}", DTensor, _as_dispatch(rule))


def _as_dispatch(rule: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch(
        cls: type,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        arguments = func._schema.arguments
        values = {a.name: a.default_value for a in arguments if a.has_default_value()}
        values.update(zip((a.name for a in arguments), args, strict=False))
        values.update(kwargs or {})
        with torch.no_grad():  # autograd is above: this is what the operator does
            return rule(func, **values)

    return dispatch


# What the axes of an operand are


def _name(func: Any) -> str:
    overload = func._schema.overload_name
    return func._schema.name + (f".{overload}" if overload else "")


def _axes_of_x(x: Tensor, heads: str) -> tuple[str | None, ...]:
    return {4: (BATCH, SEQUENCE, heads, None), 3: (SEQUENCE, heads, None)}.get(
        x.dim(), (None,) * x.dim()
    )


def _axes_of_rows(cos: Tensor, x: Tensor, position_ids: Tensor | None) -> tuple[str | None, ...]:
    """Of rows [1|B, S, W] or [T, W]; a table [L, W] stays whole, for any position may be asked."""
    if cos.dim() == 3:
        return (None if cos.shape[0] == 1 else BATCH, SEQUENCE, None)
    if cos.dim() == 2 and position_ids is None and cos.shape[0] == x.shape[-3]:
        return (SEQUENCE, None)
    return (None,) * cos.dim()


def _axes_of_positions(
    position_ids: Tensor | None, of_pairs: Tensor | None = None
) -> tuple[str | None, ...]:
    """Of position_ids [S], [1|B, S] or [T]; of_pairs, the argument axes: with a leading A."""
    lead = () if of_pairs is None else (None,)
    shape = () if position_ids is None else position_ids.shape[len(lead) :]
    if len(shape) not in (1, 2):
        return ()
    batch = () if len(shape) == 1 else (None if shape[0] == 1 else BATCH,)
    return (*lead, *batch, SEQUENCE)


def _range(start: int, length: int, like: Any, axis: str, plan: Plan) -> Tensor | None:
    """The rank's part of start, start + 1, ..., where the axis is sharded; None where it is not."""
    if not any(axis in on for on in plan.sharded):
        return None
    whole = torch.arange(start, start + length, device=like.to_local().device)
    everywhere = DTensor.from_local(whole, like.device_mesh, run_check=False)
    return everywhere.redistribute(placements=plan.place((axis,), Replicate())).to_local()


def _positions_in_table(op: str, x: Any, cos: Any, plan: Plan) -> Tensor | None:
    """A table without positions has a row for each index in the whole sequence, which is not the
    index in a rank's part of it.
    """
    length = x.shape[-3]
    if cos.dim() != 2 or cos.shape[0] == length:  # rows of tokens are sharded as the tokens
        return None
    if cos.shape[0] < length:
        raise RuntimeError(
            f"{op}: expected cos to have at least {length} rows, the length of the whole sequence, "
            f"got {cos.shape[0]}"
        )
    return _range(0, length, x, SEQUENCE, plan)


# The rules


def _rotate(
    func: Any, cos: Any, sin: Any, position_ids: Any, out: Any = None, out_q: Any = None,
    out_k: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """The six forms of the rotation: results are placed as x, or as q and k."""
    op = _name(func)
    names = ("x",) if "x" in options else ("q", "k")
    xs = [options.pop(name) for name in names]
    outs = {"out": out} if out is not None else {"out_q": out_q, "out_k": out_k}
    in_place = func._schema.is_mutable and all(to is None for to in outs.values())
    rows = _axes_of_rows(cos, xs[0], position_ids)
    operands = checked(
        op,
        *(
            Operand(name, x, _axes_of_x(x, heads), linear=True, written=in_place)
            for name, x, heads in zip(names, xs, HEADS_OF, strict=False)
        ),
        *(
            Operand(name, to, () if to is None else _axes_of_x(to, heads), True, written=True)
            for (name, to), heads in zip(outs.items(), HEADS_OF, strict=False)
        ),
        Operand("cos", cos, rows),
        Operand("sin", sin, rows),
        Operand("position_ids", position_ids, _axes_of_positions(position_ids)),
    )
    plan = plan_for(op, operands)
    _check_placed_as_results(op, operands, plan, len(xs))
    parts = parts_of(operands, plan)
    if position_ids is None:
        parts["position_ids"] = _positions_in_table(op, operands[0].tensor, cos, plan)
    results = func(**parts, **options)
    if func._schema.is_mutable:
        return None
    wrapped = _placed_as(operands, plan, (results,) if len(xs) == 1 else results)
    return wrapped[0] if len(xs) == 1 else wrapped


def _check_placed_as_results(op: str, operands: list[Operand], plan: Plan, rotated: int) -> None:
    for i, (to, placements) in enumerate(zip(operands, plan.placements, strict=True)):
        if to.written and placements != plan.placements[i % rotated]:
            raise RuntimeError(
                f"{op}: expected {to.name} to be placed as the result, "
                f"{plan.placements[i % rotated]}, got {placements}"
            )


def _placed_as(operands: list[Operand], plan: Plan, results: Sequence[Tensor]) -> tuple[Any, ...]:
    """Results of a rank, placed as the first operands, which they are like."""
    return tuple(
        distributed(result, x.tensor.device_mesh, placements, x.tensor.shape, x.tensor)
        for result, x, placements in zip(results, operands, plan.placements, strict=False)
    )


def _rotate_at(
    func: Any, q: Any, k: Any, inv_freq: Any, position_ids: Any, axes: Any, **options: Any
) -> Any:
    """The rotation by angles; frequencies stay whole."""
    op, in_place = _name(func), func._schema.is_mutable
    operands = checked(
        op,
        *(
            Operand(name, x, _axes_of_x(x, heads), linear=True, written=in_place)
            for name, x, heads in zip(("q", "k"), (q, k), HEADS_OF, strict=True)
        ),
        Operand("inv_freq", inv_freq, (None,)),
        Operand("position_ids", position_ids, _axes_of_positions(position_ids, axes)),
        Operand("axes", axes, (None,)),
    )
    plan = plan_for(op, operands)
    _check_placed_as_results(op, operands, plan, 2)
    parts = parts_of(operands, plan)
    if position_ids is None:
        whole = operands[0].tensor
        parts["position_ids"] = _range(0, whole.shape[-3], whole, SEQUENCE, plan)
    results = func(**parts, **options)
    return None if in_place else _placed_as(operands, plan, results)


def _sums(
    op: str, axes: tuple[str | None, ...], operands: list[Operand], plan: Plan, *terms: set[str]
) -> list[Any]:
    """Placements of a sum over all axes but these, of one term or two that are each linear in the
    operands that they name.
    """
    placements = plan.place(axes, Partial())
    for mesh_dim in range(len(placements)):
        pending = {o.name: o.tensor.placements[mesh_dim] for o in operands}
        pending = {name: p for name, p in pending.items() if type(p) is Partial}
        if not pending:
            continue
        if any(len(term & pending.keys()) != 1 for term in terms) or len({*pending.values()}) > 1:
            raise RuntimeError(
                f"{op}: expected on dimension {mesh_dim} of the mesh the same pending sum in each "
                f"term of the result, once, got {pending}: redistribute before, as no collective "
                "is inserted"
            )
        placements[mesh_dim] = next(iter(pending.values()))
    return placements


def _table_backward(
    func: Any, grad_q: Any, q: Any, grad_k: Any, k: Any, cos: Any, token_order: Any,
    row_offsets: Any, **options: Any,
) -> Any:  # fmt: skip
    """token_order and row_offsets are those of :func:`tokens_by_row`, of each rank's tokens."""
    op, axes = _name(func), _axes_of_x(q, HEADS)
    rows = _axes_of_rows(cos, q, token_order)
    operands = checked(
        op,
        Operand("grad_q", grad_q, axes, linear=True),
        Operand("q", q, axes, linear=True),
        Operand("grad_k", grad_k, axes, linear=True),
        Operand("k", k, axes, linear=True),
        Operand("cos", cos, rows),
    )
    plan = plan_for(op, operands)
    terms = ({"grad_q", "q"}, {"grad_k", "k"})[: 1 if k is None else 2]
    placements = _sums(op, rows, operands, plan, *terms)
    parts = parts_of(operands, plan)
    if token_order is not None:
        parts.update(token_order=token_order.to_local(), row_offsets=row_offsets.to_local())
    elif (positions := _positions_in_table(op, operands[1].tensor, cos, plan)) is not None:
        tokens = positions.expand(parts["q"].shape[:-2])
        parts["token_order"], parts["row_offsets"] = tokens_by_row(tokens, cos.shape[0])
    mesh = operands[0].tensor.device_mesh
    grads = func(**{"grad_k": None, "k": None, **parts}, **options)
    return tuple(distributed(grad, mesh, placements, cos.shape) for grad in grads)


def _cos_sin(func: Any, inv_freq: Any, position_ids: Any, axes: Any, **options: Any) -> Any:
    lead = () if axes is None else (None,)
    shape = position_ids.shape[len(lead) :]
    of_rows = _axes_of_any_positions(len(shape))
    operands = checked(
        _name(func),
        Operand("inv_freq", inv_freq, (PAIRS,)),
        Operand("position_ids", position_ids, (*lead, *of_rows)),
        Operand("axes", axes, (PAIRS,)),
    )
    return _cos_sin_of(func, operands, (*of_rows, PAIRS), (*shape, *inv_freq.shape), options)


def _cos_sin_cache(func: Any, inv_freq: Any, length: int, **options: Any) -> Any:
    operands = checked(_name(func), Operand("inv_freq", inv_freq, (PAIRS,)))
    shape = (length, *inv_freq.shape)
    return _cos_sin_of(func, operands, (None, PAIRS), shape, {"length": length, **options})


def _cos_sin_of(
    func: Any,
    operands: list[Operand],
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    options: dict[str, Any],
) -> Any:
    plan = plan_for(_name(func), operands)
    tables = func(**parts_of(operands, plan), **options)
    mesh, placements = operands[0].tensor.device_mesh, plan.place(axes, Replicate())
    return tuple(distributed(table, mesh, placements, shape) for table in tables)


def _cos_sin_backward(
    func: Any, grad_cos: Any, grad_sin: Any, inv_freq: Any, position_ids: Any, axes: Any,
    start: int, **options: Any,
) -> Any:  # fmt: skip
    op, of_rows = _name(func), _axes_of_any_positions(grad_cos.dim() - 1)
    operands = checked(
        op,
        Operand("grad_cos", grad_cos, (*of_rows, PAIRS), linear=True),
        Operand("grad_sin", grad_sin, (*of_rows, PAIRS), linear=True),
        Operand("inv_freq", inv_freq, (PAIRS,)),
        Operand("position_ids", position_ids, (*(() if axes is None else (None,)), *of_rows)),
        Operand("axes", axes, (PAIRS,)),
    )
    plan = plan_for(op, operands)
    placements = _sums(op, (PAIRS,), operands, plan, {"grad_cos"}, {"grad_sin"})
    parts = parts_of(operands, plan)
    if position_ids is None:
        whole = operands[0].tensor
        parts["position_ids"] = _range(start, whole.shape[0], whole, of_rows[0], plan)
    grad = func(**parts, start=start, **options)
    return distributed(grad, operands[0].tensor.device_mesh, placements, inv_freq.shape)


def _axes_of_any_positions(rank: int) -> tuple[str, ...]:
    return tuple(f"dimension {dim} of the positions" for dim in range(rank))


def _append_kv(
    func: Any, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, cos: Any,
    sin: Any, position_ids: Any, k_scale: Any, v_scale: Any, **options: Any,
) -> None:  # fmt: skip
    """Tensor parallel: each rank has heads of all tokens, and those heads of the caches."""
    of_q, of_k = HEADS_OF

    def of_heads(scale: Any) -> tuple[str | None, ...]:
        one_each = scale is not None and scale.dim() == 1 and scale.shape[0] == k.shape[-2]
        return (of_k,) if one_each and k.shape[-2] > 1 else ()

    _append(
        func,
        Operand("q", q, _axes_of_x(q, of_q), written=True),
        Operand("k", k, _axes_of_x(k, of_k), written=True),
        Operand("v", v, _axes_of_x(v, of_k)),
        Operand("k_cache", k_cache, (None, None, of_k, None), written=True),
        Operand("v_cache", v_cache, (None, None, of_k, None), written=True),
        Operand("slot_mapping", slot_mapping, ()),
        Operand("cos", cos, ()),
        Operand("sin", sin, ()),
        Operand("position_ids", position_ids, ()),
        Operand("k_scale", k_scale, of_heads(k_scale)),
        Operand("v_scale", v_scale, of_heads(v_scale)),
        options=options,
    )


def _mla_append(
    func: Any, q: Any, k_pe: Any, kv_c: Any, kv_cache: Any, slot_mapping: Any, cos: Any, sin: Any,
    position_ids: Any, scale: Any, **options: Any,
) -> None:  # fmt: skip
    """Tensor parallel: each rank has heads of q, and writes the cache, which has none, whole."""
    _append(
        func,
        Operand("q", q, _axes_of_x(q, HEADS), written=True),
        Operand("k_pe", k_pe, (), written=True),
        Operand("kv_c", kv_c, ()),
        Operand("kv_cache", kv_cache, (), written=True),
        Operand("slot_mapping", slot_mapping, ()),
        Operand("cos", cos, ()),
        Operand("sin", sin, ()),
        Operand("position_ids", position_ids, ()),
        Operand("scale", scale, ()),
        options=options,
    )


def _append(func: Any, *operands: Operand, options: dict[str, Any]) -> None:
    op = _name(func)
    given = checked(op, *operands)
    plan = plan_for(op, given)
    for mesh_dim, axes in enumerate(plan.sharded):
        if any(axis in (BATCH, SEQUENCE) for axis in axes):
            raise RuntimeError(
                f"{op}: expected tokens to be replicated on dimension {mesh_dim} of the mesh, as "
                f"the caches that take them are, got {given[0].name} or another one sharded along "
                f"{axes[0]}"
            )
    func(**parts_of(given, plan), **options)
