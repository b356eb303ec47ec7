"""GPU cases of cos and sin, of the gradient to inv_freq, and of the gradient to a table."""

import functools

import torch
from common import FIRST_POSITION
from operator_case import (
    EAGER,
    POSITION_BYTES,
    TABLE_BYTES,
    Arguments,
    OperatorCase,
    Way,
    in_float64,
    in_sectors,
)
from rotations_cuda import (
    AXES,
    axes_of,
    float32_angles,
    heads_of,
    inv_freq_of,
    llama,
    positions_of,
    rows_of,
)
from torch import Tensor

from rope_ext import reference

rope = torch.ops.rope

HEAD_DIM = 128
PAIRS = HEAD_DIM // 2


def angle_bytes(rows: int, axes: int | None, positions: bool) -> int:
    """Bytes of cos and sin, inv_freq, and the positions with their axes."""
    table = 2 * rows * PAIRS * TABLE_BYTES + in_sectors(PAIRS * TABLE_BYTES)
    if axes is not None:
        table += PAIRS * POSITION_BYTES
    return table + (in_sectors((axes or 1) * rows * POSITION_BYTES) if positions else 0)


# ---- cos and sin


def eager_cache(inv_freq: Tensor, length: int, start: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(start, start + length, device=inv_freq.device)
    return eager_rows(inv_freq, positions)


def eager_rows(
    inv_freq: Tensor, position_ids: Tensor, axes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    angles = float32_angles(inv_freq, position_ids, axes)
    return angles.cos(), angles.sin()


def whole_table(form: str, length: int) -> OperatorCase:
    def arguments() -> Arguments:
        inv_freq = inv_freq_of(HEAD_DIM, HEAD_DIM).clone()
        return {"inv_freq": inv_freq, "length": length, "start": FIRST_POSITION}

    def exact(a: Arguments) -> tuple[Tensor, ...]:
        positions = torch.arange(a["start"], a["start"] + a["length"], device="cuda")
        return reference.cos_sin(a["inv_freq"], positions)

    return OperatorCase(
        rope.cos_sin_cache.default,
        form,
        llama("prefill", length),
        arguments,
        exact,
        angle_bytes(length, None, positions=False),
        {EAGER: Way(eager_cache, angle_roundings=2)},
        compiled=True,
        roundings=2,
    )


def rows(form: str, step: str, tokens: int, axes: bool = False) -> OperatorCase:
    shape = llama(step, tokens)

    def arguments() -> Arguments:
        made = {"inv_freq": inv_freq_of(HEAD_DIM, HEAD_DIM).clone()}
        made["position_ids"] = step_positions(step, tokens, axes).clone()
        return {**made, "axes": axes_of(PAIRS)} if axes else made

    return OperatorCase(
        rope.cos_sin.default,
        form,
        shape,
        arguments,
        lambda a: reference.cos_sin(**a),
        angle_bytes(tokens, AXES if axes else None, positions=True),
        {EAGER: Way(eager_rows, angle_roundings=2)},
        roundings=2,
    )


@functools.cache
def step_positions(step: str, tokens: int, axes: bool) -> Tensor:
    positions = positions_of(llama(step, tokens), axes)
    if positions is None:
        positions = torch.arange(FIRST_POSITION, FIRST_POSITION + tokens)[None].cuda()
    return positions


# ---- the gradient to inv_freq


def eager_backward(
    grad_cos: Tensor,
    grad_sin: Tensor,
    inv_freq: Tensor,
    position_ids: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    if position_ids is None:
        position_ids = torch.arange(start, start + len(grad_cos), device=inv_freq.device)
    angles = float32_angles(inv_freq, position_ids)
    grad = grad_sin * angles.cos() - grad_cos * angles.sin()
    return (grad * position_ids[..., None]).flatten(0, -2).sum(0)


def backward(form: str, tokens: int, positions: bool) -> OperatorCase:
    """The gradient of cos_sin or, without positions, of cos_sin_cache."""

    def arguments() -> Arguments:
        shape = (1, tokens, PAIRS) if positions else (tokens, PAIRS)
        made = {name: torch.randn(shape, device="cuda") for name in ("grad_cos", "grad_sin")}
        made["inv_freq"] = inv_freq_of(HEAD_DIM, HEAD_DIM)
        if positions:
            return {**made, "position_ids": step_positions("prefill", tokens, False)}
        return {**made, "start": FIRST_POSITION}

    def exact(arguments: Arguments) -> tuple[Tensor, ...]:
        a = in_float64(arguments)
        inv_freq = a["inv_freq"].requires_grad_()
        ids = step_positions("prefill", tokens, False).view(a["grad_cos"].shape[:-1])
        with torch.enable_grad():
            tables = reference.cos_sin(inv_freq, ids)
        return torch.autograd.grad(tables, inv_freq, (a["grad_cos"], a["grad_sin"]))

    return OperatorCase(
        rope.cos_sin_backward.default,
        form,
        llama("prefill", tokens),
        arguments,
        exact,
        angle_bytes(tokens, None, positions) + in_sectors(PAIRS * TABLE_BYTES),
        {EAGER: Way(eager_backward, angle_roundings=2)},
        roundings=64,
    )


# ---- the gradient to a table


@functools.cache
def two_sequences(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of two sequences of tokens / 2, packed, and the tokens of each row of the table."""
    positions = torch.arange(tokens) % (tokens // 2)
    in_order, order = torch.sort(positions, stable=True)
    offsets = torch.searchsorted(in_order, torch.arange(tokens // 2 + 1))
    return positions.cuda(), order.cuda(), offsets.cuda()


def eager_table_backward(
    grad_q: Tensor,
    q: Tensor,
    grad_k: Tensor,
    k: Tensor,
    cos: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradient in float32: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin."""
    to_cos, to_sin = 0, 0
    for grad, x in ((grad_q, q), (grad_k, k)):
        (g1, g2), (x1, x2) = grad.float().chunk(2, -1), x.float().chunk(2, -1)
        to_cos = to_cos + (g1 * x1 + g2 * x2).sum((0, 2))
        to_sin = to_sin + (g2 * x1 - g1 * x2).sum((0, 2))
    if positions is None:
        return to_cos, to_sin
    zeros = torch.zeros_like(cos)
    return zeros.index_add(0, positions, to_cos), zeros.index_add(0, positions, to_sin)


def table_backward(form: str, tokens: int, positions: bool) -> OperatorCase:
    shape, dtype = llama("prefill", tokens), torch.bfloat16
    table_rows = tokens // 2 if positions else tokens

    def arguments() -> Arguments:
        q, k = heads_of(shape, dtype)
        made = {"grad_q": torch.randn_like(q), "q": q, "grad_k": torch.randn_like(k), "k": k}
        made["cos"] = rows_of(shape)["cos"][:table_rows]
        if positions:
            _, made["token_order"], made["row_offsets"] = two_sequences(tokens)
        return made

    def ids() -> Tensor | None:
        return two_sequences(tokens)[0] if positions else None

    def exact(arguments: Arguments) -> tuple[Tensor, ...]:
        a = in_float64(arguments)
        tables = [t.requires_grad_() for t in (a["cos"], torch.zeros_like(a["cos"]))]
        with torch.enable_grad():
            outputs = [reference.apply_rotary(a[n], *tables, ids()) for n in "qk"]
        return torch.autograd.grad(outputs, tables, (a["grad_q"], a["grad_k"]))

    def eager_arguments(arguments: Arguments) -> Arguments:
        made = {n: v for n, v in arguments.items() if n not in ("token_order", "row_offsets")}
        return {**made, "positions": ids()}

    channels = 2 * tokens * shape.heads * shape.head_dim * dtype.itemsize
    least = channels + 2 * table_rows * PAIRS * TABLE_BYTES
    if positions:
        least += sum(in_sectors(n * POSITION_BYTES) for n in (tokens, table_rows + 1))
    return OperatorCase(
        rope.apply_rotary_table_backward.default,
        form,
        shape,
        arguments,
        exact,
        least,
        {EAGER: Way(eager_table_backward, eager_arguments)},
        compiled=not positions,
        roundings=64,
    )
