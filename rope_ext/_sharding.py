"""The operators on DTensors: what may be sharded, and what each rank then computes by itself.

Batch, sequence and heads shard freely, and a pending sum (Partial) passes through x: a rotation is
linear in it. The ranks of a mesh never have to talk. Where an operand is replicated and another one
sharded along the same axis, each rank takes its part of it; what would need a collective is refused
by name, as only its caller knows where it is cheapest.

Only public interfaces: torch.library.register_torch_dispatch, DTensor.to_local, from_local and
redistribute. torch.distributed.tensor takes long to import, so its import brings the rules along.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from rope_ext._token_order import tokens_by_row

_MODULE = "torch.distributed.tensor"
_BATCH, _SEQUENCE, _HEADS, _PAIRS = "batch", "sequence", "heads", "pairs"
# q and k have heads of their own: one may be sharded along them and the other not.
_HEADS_OF = ("heads of q", "heads of k")


def register() -> None:
    """Registers the rules: now if there can be a DTensor already, or with the import of DTensor."""
    if _MODULE in sys.modules:
        _register_rules()
    else:
        sys.meta_path.insert(0, _Importing())


class _Importing:
    """Finds torch.distributed.tensor as ever, and registers the rules once it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _MODULE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _register_rules()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register_rules() -> None:
    from torch.distributed.tensor import DTensor

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


# What the axes of an operand are, and where each is sharded


class _Operand(NamedTuple):
    name: str
    tensor: Any  # a DTensor
    axes: tuple[str | None, ...]  # of each dimension; None: it stays whole
    linear: bool = False  # the result is linear in it, so that its sum may be pending
    written: bool = False


class _Plan(NamedTuple):
    """Placements of each operand, and on each mesh dimension the axes that are sharded."""

    placements: list[tuple[Any, ...]]
    sharded: list[list[str]]

    def place(self, axes: Sequence[str | None], otherwise: Any) -> list[Any]:
        """Placements of a tensor with these axes; `otherwise` where another one is sharded."""
        from torch.distributed.tensor import Replicate, Shard

        return [
            (Shard(axes.index(on[0])) if on[0] in axes else otherwise) if on else Replicate()
            for on in self.sharded
        ]


def _name(func: Any) -> str:
    overload = func._schema.overload_name
    return func._schema.name + (f".{overload}" if overload else "")


def _axes_of_x(x: Tensor, heads: str) -> tuple[str | None, ...]:
    return {4: (_BATCH, _SEQUENCE, heads, None), 3: (_SEQUENCE, heads, None)}.get(
        x.dim(), (None,) * x.dim()
    )


def _axes_of_rows(cos: Tensor, x: Tensor, position_ids: Tensor | None) -> tuple[str | None, ...]:
    """Of rows [1|B, S, W] or [T, W]; a table [L, W] stays whole, for any position may be asked."""
    if cos.dim() == 3:
        return (None if cos.shape[0] == 1 else _BATCH, _SEQUENCE, None)
    if cos.dim() == 2 and position_ids is None and cos.shape[0] == x.shape[-3]:
        return (_SEQUENCE, None)
    return (None,) * cos.dim()


def _axes_of_positions(position_ids: Tensor | None) -> tuple[str | None, ...]:
    if position_ids is None or position_ids.dim() not in (1, 2):
        return ()
    batch = () if position_ids.dim() == 1 else (None if position_ids.shape[0] == 1 else _BATCH,)
    return (*batch, _SEQUENCE)


def _operands(op: str, *operands: _Operand) -> list[_Operand]:
    """Those that are not None, as DTensors of one mesh. Plain tensors are refused, as PyTorch's own
    operators do, unless torch.distributed.tensor.experimental.implicit_replication() allows them.
    """
    from torch.distributed.tensor import DTensor

    operands = tuple(operand for operand in operands if operand.tensor is not None)
    mesh = next(o.tensor.device_mesh for o in operands if isinstance(o.tensor, DTensor))
    result, sizes = [], {}
    for operand in operands:
        name, tensor = operand.name, operand.tensor
        if not isinstance(tensor, DTensor):
            if not getattr(DTensor._op_dispatcher, "_allow_implicit_replication", False):
                raise RuntimeError(
                    f"{op}: expected {name} to be a DTensor, as others are, got a plain tensor: "
                    f"distribute_tensor({name}, mesh, [Replicate()]) makes it one"
                )
            tensor = DTensor.from_local(tensor, mesh, run_check=False)
        if tensor.device_mesh != mesh:
            raise RuntimeError(
                f"{op}: expected {name} on the mesh of the others, {mesh}, got {tensor.device_mesh}"
            )
        for axis, size in zip(operand.axes, tensor.shape, strict=False):
            if axis in (_BATCH, _SEQUENCE) and size != sizes.setdefault(axis, size):
                raise RuntimeError(
                    f"{op}: expected {name} to have {axis} {sizes[axis]}, as "
                    f"{operands[0].name} has, got {size}"
                )
        result.append(operand._replace(tensor=tensor))
    return result


def _plan(op: str, operands: list[_Operand]) -> _Plan:
    mesh = operands[0].tensor.device_mesh
    columns = [_plan_on(op, operands, mesh_dim) for mesh_dim in range(mesh.ndim)]
    placements = [tuple(column[0][i] for column in columns) for i in range(len(operands))]
    return _Plan(placements, [column[1] for column in columns])


def _plan_on(op: str, operands: list[_Operand], mesh_dim: int) -> tuple[list[Any], list[str]]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    def refuse(operand: _Operand, expected: str) -> NoReturn:
        raise RuntimeError(
            f"{op}: expected {operand.name} to be {expected} on dimension {mesh_dim} of the mesh, "
            f"got {operand.tensor.placements[mesh_dim]}: redistribute it before, as no collective "
            "is inserted"
        )

    def beside(axis: str) -> str:
        return f"beside {by[axis].name} as {by[axis].tensor.placements[mesh_dim]}"

    by: dict[str, _Operand] = {}  # the axes that are sharded, each by its first operand
    for operand in operands:
        given = operand.tensor.placements[mesh_dim]
        if type(given) is Shard and given.dim < len(operand.axes) and operand.axes[given.dim]:
            by.setdefault(operand.axes[given.dim], operand)
        elif type(given) is not Replicate:
            is_sum = type(given) is Partial and given.reduce_op in ("sum", "avg")
            if not (operand.linear and is_sum):
                refuse(operand, "Replicate(), as it is needed whole,")
    if len(by) > 1 and not all(axis in _HEADS_OF for axis in by):
        first, second = list(by)[:2]
        refuse(by[second], f"Replicate() or sharded along {first}, {beside(first)},")

    placements = []
    for operand in operands:
        given = operand.tensor.placements[mesh_dim]
        own = next((axis for axis in operand.axes if axis in by), None)
        wanted = given if own is None else Shard(operand.axes.index(own))
        if wanted != given and (type(given) is not Replicate or operand.written):
            refuse(operand, f"{wanted}, {beside(own)},")
        placements.append(wanted)
    return placements, list(by)


# Between DTensors and what a rank has


def _parts(operands: list[_Operand], plan: _Plan) -> dict[str, Tensor]:
    """What the rank has of each operand: it cuts a shard out of what is replicated by itself."""
    parts = {}
    for operand, placements in zip(operands, plan.placements, strict=True):
        tensor = operand.tensor
        if tensor.placements != placements:
            tensor = tensor.detach().redistribute(placements=placements)
        parts[operand.name] = tensor.to_local()
    return parts


def _distributed(
    local: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int], like: Any = None
) -> Any:
    """A DTensor of this shape, with the dimensions in memory in the operator's order."""
    from torch.distributed.tensor import DTensor

    order = list(range(len(shape)))
    if like is not None and like.stride(-1) == 1:  # as output_like in apply_rotary.cpp
        order.sort(key=like.stride, reverse=True)
    strides, step = [1] * len(shape), 1
    for dim in reversed(order):
        strides[dim], step = step, step * max(shape[dim], 1)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )


def _range(start: int, length: int, like: Any, axis: str, plan: _Plan) -> Tensor | None:
    """The rank's part of start, start + 1, ..., where the axis is sharded; None where it is not."""
    from torch.distributed.tensor import DTensor, Replicate

    if not any(axis in on for on in plan.sharded):
        return None
    whole = torch.arange(start, start + length, device=like.to_local().device)
    everywhere = DTensor.from_local(whole, like.device_mesh, run_check=False)
    return everywhere.redistribute(placements=plan.place((axis,), Replicate())).to_local()


def _positions_in_table(op: str, x: Any, cos: Any, plan: _Plan) -> Tensor | None:
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
    return _range(0, length, x, _SEQUENCE, plan)


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
    operands = _operands(
        op,
        *(
            _Operand(name, x, _axes_of_x(x, heads), linear=True, written=in_place)
            for name, x, heads in zip(names, xs, _HEADS_OF, strict=False)
        ),
        *(
            _Operand(name, to, () if to is None else _axes_of_x(to, heads), True, written=True)
            for (name, to), heads in zip(outs.items(), _HEADS_OF, strict=False)
        ),
        _Operand("cos", cos, rows),
        _Operand("sin", sin, rows),
        _Operand("position_ids", position_ids, _axes_of_positions(position_ids)),
    )
    plan = _plan(op, operands)
    for i, (to, placements) in enumerate(zip(operands, plan.placements, strict=True)):
        if to.written and placements != plan.placements[i % len(xs)]:
            raise RuntimeError(
                f"{op}: expected {to.name} to be placed as the result, "
                f"{plan.placements[i % len(xs)]}, got {placements}"
            )
    parts = _parts(operands, plan)
    if position_ids is None:
        parts["position_ids"] = _positions_in_table(op, operands[0].tensor, cos, plan)
    results = func(**parts, **options)
    if func._schema.is_mutable:
        return None
    wrapped = tuple(
        _distributed(result, x.tensor.device_mesh, placements, x.tensor.shape, x.tensor)
        for result, x, placements in zip(
            (results,) if len(xs) == 1 else results, operands, plan.placements, strict=False
        )
    )
    return wrapped[0] if len(xs) == 1 else wrapped


def _sums(
    op: str, axes: tuple[str | None, ...], operands: list[_Operand], plan: _Plan, *terms: set[str]
) -> list[Any]:
    """Placements of a sum over all axes but these, of one term or two that are each linear in the
    operands that they name.
    """
    from torch.distributed.tensor import Partial

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
    op, axes = _name(func), _axes_of_x(q, _HEADS)
    rows = _axes_of_rows(cos, q, token_order)
    operands = _operands(
        op,
        _Operand("grad_q", grad_q, axes, linear=True),
        _Operand("q", q, axes, linear=True),
        _Operand("grad_k", grad_k, axes, linear=True),
        _Operand("k", k, axes, linear=True),
        _Operand("cos", cos, rows),
    )
    plan = _plan(op, operands)
    terms = ({"grad_q", "q"}, {"grad_k", "k"})[: 1 if k is None else 2]
    placements = _sums(op, rows, operands, plan, *terms)
    parts = _parts(operands, plan)
    if token_order is not None:
        parts.update(token_order=token_order.to_local(), row_offsets=row_offsets.to_local())
    elif (positions := _positions_in_table(op, operands[1].tensor, cos, plan)) is not None:
        tokens = positions.expand(parts["q"].shape[:-2])
        parts["token_order"], parts["row_offsets"] = tokens_by_row(tokens, cos.shape[0])
    mesh = operands[0].tensor.device_mesh
    grads = func(**{"grad_k": None, "k": None, **parts}, **options)
    return tuple(_distributed(grad, mesh, placements, cos.shape) for grad in grads)


def _cos_sin(func: Any, inv_freq: Any, position_ids: Any, **options: Any) -> Any:
    op, axes = _name(func), _axes_of_any_positions(position_ids.dim())
    operands = _operands(
        op, _Operand("inv_freq", inv_freq, (_PAIRS,)), _Operand("position_ids", position_ids, axes)
    )
    shape = (*position_ids.shape, *inv_freq.shape)
    return _cos_sin_of(func, operands, (*axes, _PAIRS), shape, options)


def _cos_sin_cache(func: Any, inv_freq: Any, length: int, **options: Any) -> Any:
    operands = _operands(_name(func), _Operand("inv_freq", inv_freq, (_PAIRS,)))
    shape = (length, *inv_freq.shape)
    return _cos_sin_of(func, operands, (None, _PAIRS), shape, {"length": length, **options})


def _cos_sin_of(
    func: Any,
    operands: list[_Operand],
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    options: dict[str, Any],
) -> Any:
    from torch.distributed.tensor import Replicate

    plan = _plan(_name(func), operands)
    tables = func(**_parts(operands, plan), **options)
    mesh, placements = operands[0].tensor.device_mesh, plan.place(axes, Replicate())
    return tuple(_distributed(table, mesh, placements, shape) for table in tables)


def _cos_sin_backward(
    func: Any, grad_cos: Any, grad_sin: Any, inv_freq: Any, position_ids: Any, start: int,
    **options: Any,
) -> Any:  # fmt: skip
    op, axes = _name(func), _axes_of_any_positions(grad_cos.dim() - 1)
    operands = _operands(
        op,
        _Operand("grad_cos", grad_cos, (*axes, _PAIRS), linear=True),
        _Operand("grad_sin", grad_sin, (*axes, _PAIRS), linear=True),
        _Operand("inv_freq", inv_freq, (_PAIRS,)),
        _Operand("position_ids", position_ids, axes),
    )
    plan = _plan(op, operands)
    placements = _sums(op, (_PAIRS,), operands, plan, {"grad_cos"}, {"grad_sin"})
    parts = _parts(operands, plan)
    if position_ids is None:
        whole = operands[0].tensor
        parts["position_ids"] = _range(start, whole.shape[0], whole, axes[0], plan)
    grad = func(**parts, start=start, **options)
    return _distributed(grad, operands[0].tensor.device_mesh, placements, inv_freq.shape)


def _axes_of_any_positions(rank: int) -> tuple[str, ...]:
    return tuple(f"dimension {dim} of the positions" for dim in range(rank))
