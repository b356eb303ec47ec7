"""The rotation by rows of cos and sin (new results, in place, into out), and the gradient to them.

The rotation is linear in x: its gradient is the transposed rotation. It is also linear in (cos,
sin): the gradient to these is bilinear in x and the incoming gradient, and its derivatives are
rotations. Tangents are computed by the operators themselves.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rope_ext._engine.autograd import both, last_stride_one, save_all, sum_of, zero_unless_given
from rope_ext._engine.record import Derivative, Given, Grads, Operator
from rope_ext._engine.sharding import (
    BATCH,
    HEADS,
    SEQUENCE,
    PartOfRange,
    Result,
    Sharding,
    axes_of_rows,
    axes_of_x,
    positions_in_table,
)
from rope_ext._engine.vmap import by_sequences, samples_of, sequences
from rope_ext._operators.token_order import distributed_tokens_by_row, is_dtensor, tokens_by_row

rope = torch.ops.rope


def _save(ctx: Any, args: list[Any], rotated: int) -> None:
    """Saves what backward needs. Only gradients to the table need the tensors that rotate."""
    cos, sin, position_ids = args[rotated : rotated + 3]
    ctx.table_needs_grad = any(ctx.needs_input_grad[rotated : rotated + 2])
    xs = args[:rotated] if ctx.table_needs_grad else ()
    ctx.save_for_backward(cos, sin, position_ids, *xs)


def _save_one(ctx: Any, args: list[Any]) -> None:
    _save(ctx, args, rotated=1)


def _save_two(ctx: Any, args: list[Any]) -> None:
    _save(ctx, args, rotated=2)


def _apply_rotary_backward(ctx: Any, grad: Tensor) -> Grads:
    cos, sin, position_ids, *xs = ctx.saved_tensors
    grad = last_stride_one(grad)
    grad_x = grad_cos = grad_sin = None
    if ctx.needs_input_grad[0]:
        grad_x = rope.apply_rotary(grad, cos, sin, position_ids, **inverted(ctx.options))
    if ctx.table_needs_grad:
        grad_cos, grad_sin = table_grad(grad, xs[0], None, None, cos, position_ids, ctx.options)
    return grad_x, grad_cos, grad_sin, None


def _apply_rotary_qk_backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> Grads:
    cos, sin, position_ids, *xs = ctx.saved_tensors
    grads = [None if grad is None else last_stride_one(grad) for grad in (grad_q, grad_k)]
    grad_q, grad_k = (
        g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)
    )
    rows, inverse = (cos, sin, position_ids), inverted(ctx.options)
    to_q = to_k = grad_cos = grad_sin = None
    if grad_q is not None and grad_k is not None:
        to_q, to_k = rope.apply_rotary_qk(grad_q, grad_k, *rows, **inverse)
    elif grad_q is not None:
        to_q = rope.apply_rotary(grad_q, *rows, **inverse)
    elif grad_k is not None:
        to_k = rope.apply_rotary(grad_k, *rows, **inverse)
    terms = [pair for pair in zip(grads, xs, strict=False) if pair[0] is not None]
    if ctx.table_needs_grad and terms:
        first, second = (*terms, (None, None))[:2]
        grad_cos, grad_sin = table_grad(*first, *second, cos, position_ids, ctx.options)
    return to_q, to_k, grad_cos, grad_sin, None


def inverted(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the backward: the inverse, with the two orders of the pairs swapped."""
    inverse = {**options, "inverse": not options.get("inverse", False)}
    if options.get("interleaved_out") is not None:
        inverse["interleaved"] = options["interleaved_out"]
        inverse["interleaved_out"] = options.get("interleaved", False)
    return inverse


def table_grad(
    grad_q: Tensor,
    q: Tensor,
    grad_k: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    position_ids: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The gradient to cos and sin."""
    order = offsets = None
    if position_ids is not None:
        position_ids = position_ids.expand(q.shape[:-2])
        if is_dtensor(position_ids):
            others = (x for x in (grad_q, q, grad_k, k) if x is not None)
            order, offsets = distributed_tokens_by_row(position_ids, cos.shape[0], *others)
        else:
            order, offsets = tokens_by_row(position_ids, cos.shape[0])
    return rope.apply_rotary_table_backward(grad_q, q, grad_k, k, cos, order, offsets, **options)


def rotated_alone(
    x: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    options: dict[str, Any],
) -> Tensor | None:
    """The derivative by the table in the direction (cos, sin): the rotation of x by these, and zero
    in channels that do not rotate.
    """
    if x is None:
        return None
    dim, offset = options["rotary_dim"], options["rotary_offset"]
    dim = 2 * cos.shape[-1] if dim is None else dim
    rotating = last_stride_one(x)[..., offset : offset + dim]
    out = rope.apply_rotary(rotating, cos, sin, position_ids, **{**options, "rotary_offset": 0})
    return pad(out, (offset, x.shape[-1] - offset - dim))


def rotary_tangent(
    x: Tensor,
    x_tangent: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor | None],
    row_tangents: tuple[Tensor | None, Tensor | None],
    options: dict[str, Any],
) -> Tensor | None:
    cos, _, position_ids = rows
    of_x = of_table = None
    if x_tangent is not None:
        of_x = rope.apply_rotary(last_stride_one(x_tangent), *rows, **options)
    if any(t is not None for t in row_tangents):
        table = (zero_unless_given(t, cos) for t in row_tangents)
        of_table = rotated_alone(x, *table, position_ids, options)
    return sum_of(of_x, of_table)


def _apply_rotary_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    x, *rows = inputs
    return rotary_tangent(x, tangents[0], tuple(rows), tangents[1:3], options)


def _apply_rotary_qk_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    *xs, cos, sin, position_ids = inputs
    rows = cos, sin, position_ids
    return tuple(
        rotary_tangent(x, tangent, rows, tangents[2:4], options)
        for x, tangent in zip(xs, tangents[:2], strict=True)
    )


def _table_backward_backward(ctx: Any, table_cos: Tensor | None, table_sin: Tensor | None) -> Grads:
    """The results are linear in grad_q and in q: the gradient to either is the other one rotated by
    the incoming gradients (table_cos, table_sin), and zero in channels that do not rotate.
    """
    table_cos, table_sin = both(table_cos, table_sin)
    grad_q, q, grad_k, k, _, order, offsets = ctx.saved_tensors
    position_ids = None
    if is_dtensor(order):
        raise NotImplementedError(
            "rope::apply_rotary: expected no second derivative to cos and sin of DTensors with "
            "position_ids, got one: rows of cos_sin(inv_freq, position_ids) have it"
        )
    if order is not None:
        place = torch.arange(order.numel(), device=order.device)
        row = torch.searchsorted(offsets[1:].contiguous(), place, right=True)
        position_ids = torch.empty_like(order).scatter_(0, order, row).view(q.shape[:-2])
    rows = last_stride_one(table_cos), last_stride_one(table_sin), position_ids
    forward, inverse = ctx.options, inverted(ctx.options)
    return (
        rotated_alone(q, *rows, forward),
        rotated_alone(grad_q, *rows, inverse),
        rotated_alone(k, *rows, forward),
        rotated_alone(grad_k, *rows, inverse),
        None,
        None,
        None,
    )


def _table_backward_tangent(inputs: list[Any], tangents: Grads, options: dict[str, Any]) -> Any:
    """The operator is bilinear: in the gradients (grad_q, grad_k) and in the tensors (q, k)."""
    grad_q, q, grad_k, k, *rest = inputs
    first, second = None, None
    if tangents[0] is not None or tangents[2] is not None:
        to_q = zero_unless_given(tangents[0], grad_q)
        to_k = None if k is None else zero_unless_given(tangents[2], grad_k)
        first = rope.apply_rotary_table_backward(to_q, q, to_k, k, *rest, **options)
    if tangents[1] is not None or tangents[3] is not None:
        to_q = zero_unless_given(tangents[1], q)
        to_k = None if k is None else zero_unless_given(tangents[3], k)
        second = rope.apply_rotary_table_backward(grad_q, to_q, grad_k, to_k, *rest, **options)
    if first is None or second is None:
        return first or second or (None, None)
    return tuple(a + b for a, b in zip(first, second, strict=True))


# The gradient to rows: vmap and DTensors


def _table_backward_of_samples(
    operator: Operator, count: int, dims: dict[str, int | None], given: Given
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    xs_given = [(given[name], dims[name]) for name in ("grad_q", "q", "grad_k", "k")]
    samples = [None if x is None else samples_of(x, dim, count) for x, dim in xs_given]
    xs = [None if x is None else sequences(x) for x in samples]
    cos = given["cos"]
    shape = samples_of(cos, dims["cos"], count).shape[1:]
    rows, width = shape[-2:]
    batch, seq = 1 if samples[1].dim() == 4 else samples[1].shape[1], xs[1].shape[1]
    options = {n: x for n, x in given.items() if n not in operator.positional}
    if len(shape) == 3 and shape[0] == batch:  # a row a token: nothing to sum over tokens
        grads = operator.overload(*xs, cos.new_empty(count * batch, rows, width), **options)
        return tuple(g.view(count, *shape) for g in grads), (0, 0)

    # One table: each sample has its rows and one more, for its tokens with positions outside of the
    # table, which come after those of its last row.
    tokens, device = batch * seq, cos.device
    token_order, row_offsets = given["token_order"], given["row_offsets"]
    if token_order is None:  # row i: token i of each sequence
        token_order = torch.arange(tokens, device=device).view(batch, seq).T.flatten()
        row_offsets = batch * torch.arange(rows + 1, device=device).clamp(max=seq)
    first = tokens * torch.arange(count, device=device)[:, None]
    order = (samples_of(token_order, dims["token_order"], count) + first).flatten()
    offsets = (samples_of(row_offsets, dims["row_offsets"], count) + first).flatten()
    offsets = torch.cat((offsets, offsets.new_full((1,), count * tokens)))
    table = cos.new_empty(count * (rows + 1), width)
    grads = operator.overload(*xs, table, order, offsets, **options)
    return tuple(g.view(count, rows + 1, width)[:, :rows].reshape(count, *shape)
                 for g in grads), (0, 0)  # fmt: skip


def _table_backward_sharding(operator: Operator, given: Given) -> Sharding:
    """token_order and row_offsets describe the rank's tokens (:func:`tokens_by_row`)."""
    q, cos, token_order = given["q"], given["cos"], given["token_order"]
    of_x, rows = axes_of_x(q, HEADS), axes_of_rows(cos, q, token_order)
    terms = (frozenset(("grad_q", "q")), frozenset(("grad_k", "k")))
    grad = Result(
        rows,
        cos.shape,
        summed=(BATCH, SEQUENCE, HEADS),
        terms=terms[: 1 if given["k"] is None else 2],
    )

    def complete(arguments: Given, part_of_range: PartOfRange) -> None:
        if token_order is not None:
            for name in ("token_order", "row_offsets"):
                arguments[name] = arguments[name].to_local()
            return
        positions = positions_in_table(operator.op, q, cos, part_of_range)
        if positions is not None:
            tokens = positions.expand(arguments["q"].shape[:-2])
            arguments["token_order"], arguments["row_offsets"] = tokens_by_row(tokens, cos.shape[0])

    axes = {**dict.fromkeys(("grad_q", "q", "grad_k", "k"), of_x), "cos": rows}
    return Sharding(axes, (grad, grad), complete)


# Under vmap, a rotation in place calls the operator that returns new results, which would accept
# another order of the pairs


def check_order_stays(operator: Operator, given: Given) -> None:
    """Raises the error that the operator in place raises."""
    interleaved, interleaved_out = given["interleaved"], given["interleaved_out"]
    if interleaved_out is not None and interleaved_out != interleaved:
        raise RuntimeError(
            f"{operator.op}: expected interleaved_out to be None or interleaved, {interleaved}, as "
            f"a rotation in place leaves the pairs where they are, got {interleaved_out}"
        )


def _in_place_by_sequences(
    operator: Operator, count: int, dims: dict[str, int | None], given: Given
) -> Any:
    check_order_stays(operator, given)
    return by_sequences(operator, count, dims, given)


ONE, TWO = ("x",), ("q", "k")
ROTATE_QK = Operator(
    "apply_rotary_qk",
    TWO,
    derivative=Derivative(_save_two, _apply_rotary_qk_backward, _apply_rotary_qk_tangent),
)
ROTATE_QK_IN_PLACE = Operator("apply_rotary_qk_", TWO, vmap=_in_place_by_sequences)

ROTATION = (
    Operator(
        "apply_rotary",
        ONE,
        derivative=Derivative(_save_one, _apply_rotary_backward, _apply_rotary_tangent),
    ),
    Operator("apply_rotary_", ONE, vmap=_in_place_by_sequences),
    Operator("apply_rotary.out", ONE),
    ROTATE_QK,
    ROTATE_QK_IN_PLACE,
    Operator("apply_rotary_qk.out", TWO),
    Operator(
        "apply_rotary_table_backward",
        TWO,
        results=("cos", "cos"),
        derivative=Derivative(save_all, _table_backward_backward, _table_backward_tangent),
        flops_rotated=4,  # 4 products and 4 sums a pair; of the rotation 4 and 2, so 3 a channel
        vmap=_table_backward_of_samples,
        sharding=_table_backward_sharding,
    ),
)
