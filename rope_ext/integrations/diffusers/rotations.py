"""The rotations of diffusers models, each as calls of the operators.

diffusers has a function for nearly each model. They differ in three ways, and so a form is

- what holds the tables (:data:`HOLDERS`): two tensors, a pair of them, complex numbers, ...,
- how the tables are broadcast to the channels that they rotate (:data:`PLACEMENTS`), and
- one or two tensors that rotate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rope_ext.integrations.patching.pairs import Pairs, rotate

Tables = tuple[Tensor, Tensor]


def rotate_broadcast(pairs: Pairs, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D], of 3 or 4 axes, rotated by tables [..., W] that are broadcast to its others."""
    while cos.dim() > x.dim() and cos.shape[0] == 1:
        cos, sin = cos.squeeze(0), sin.squeeze(0)
    lead, axes = x.shape[:-1], (1,) * (x.dim() - cos.dim()) + cos.shape[:-1]
    fits = len(axes) == len(lead) and all(n in (1, m) for n, m in zip(axes, lead, strict=True))
    if x.dim() not in (3, 4) or not fits:
        raise ValueError(
            "rope_ext.integrations.diffusers: expected x of 3 or 4 axes and tables of cos and sin "
            f"that are broadcast to all but its last, got {list(x.shape)} and {list(cos.shape)}"
        )
    cos, sin = (table.view(*axes, table.shape[-1]) for table in (cos, sin))
    if axes[-1] == 1:  # [B, S, H, D] or [T, H, D]: heads have the same rows
        return rotate(pairs, x, *_rows(lead[:-1], cos, sin, -2), -2)
    if x.dim() == 4 and axes[-2] == 1:  # [B, H, S, D]
        return rotate(pairs, x, *_rows((lead[0], lead[2]), cos, sin, -3), -3)
    # Each head has rows of its own: they are tokens of one head.
    cos, sin = (t.expand(-1, *lead[1:], -1).flatten(1, -2) for t in (cos, sin))
    return rotate(pairs, x.flatten(1, -2).unsqueeze(-2), cos, sin, -2).view(x.shape)


def _rows(tokens: tuple[int, ...], cos: Tensor, sin: Tensor, heads_axis: int) -> list[Tensor]:
    """The rows of tables, without an axis of heads, for each token."""
    return [t.squeeze(heads_axis).expand(-1, *tokens[1:], -1) for t in (cos, sin)]


# ------------------------------------------------------------------------- what holds the tables


def two_tensors(cos: Tensor, sin: Tensor) -> Tables:
    return cos, sin


def pair(tables: Tables) -> Tables:
    cos, sin = tables
    return cos, sin


def complex_numbers(freqs: Tensor) -> Tables:
    return freqs.real, freqs.imag


def angles(freqs: Tensor) -> Tables:
    return freqs.cos(), freqs.sin()


def matrices(freqs: Tensor) -> Tables:
    """[..., 2, 2]: ((cos, -sin), (sin, cos))."""
    return freqs[..., 0, 0], freqs[..., 1, 0]


def side_by_side(freqs: Tensor) -> Tables:
    cos, sin = freqs.chunk(2, dim=-1)
    return cos, sin


# How many arguments each takes.
HOLDERS: dict[Callable[..., Tables], int] = {
    two_tensors: 2,
    pair: 1,
    complex_numbers: 1,
    angles: 1,
    matrices: 1,
    side_by_side: 1,
}

# ---------------------------------------------------------------- how tables are broadcast to x


class Placement(NamedTuple):
    """What is broadcast: x and a table, changed."""

    table: Callable[[Tensor, Tensor], Tensor]  # (table, x) -> table
    x: Callable[[Tensor, Tensor], Tensor] = lambda x, table: x
    back: Callable[[Tensor, Tensor], Tensor] = lambda out, x: out  # (out, x) -> out, as x is


def _with_axis(axis: int) -> Placement:
    return Placement(lambda table, x: table.unsqueeze(axis))


def _heads_of(x: Tensor, table: Tensor) -> Tensor:
    """x [B, S, H * D] with the heads of a table [B, H, S, W]."""
    if x.dim() == 4 or table.dim() != 4:
        return x
    return x.unflatten(-1, (table.shape[1], -1))


PLACEMENTS = (
    Placement(lambda table, x: table),
    *map(_with_axis, (-2, -3, 0, 1, 2)),
    # rows of the tokens, in any shape
    Placement(lambda table, x: table.reshape(x.shape[1], 1, -1)),
    # rows of the last tokens
    Placement(lambda table, x: table[-x.shape[-3] :].unsqueeze(1)),
    # x [B, S, H * D], tables [B, H, S, W]
    Placement(
        lambda table, x: table.transpose(1, 2) if table.dim() == 4 and x.dim() == 3 else table,
        _heads_of,
        lambda out, x: out.reshape(x.shape),
    ),
    # x [B, H, D, S]
    Placement(
        lambda table, x: table,
        lambda x, table: x.transpose(-1, -2),
        lambda out, x: out.transpose(-1, -2),
    ),
)


def form(
    tensors: int, holder: Callable[..., Tables], placement: Placement
) -> Callable[[Pairs], Callable[..., Any]]:
    """A form: so many tensors that rotate, then the tables."""

    def fill(pairs: Pairs) -> Callable[..., Any]:
        def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            tables = [placement.table(table, x) for table in (cos, sin)]
            return placement.back(rotate_broadcast(pairs, placement.x(x, cos), *tables), x)

        def apply_rotary_emb(*arguments: Any) -> Any:
            tables = holder(*arguments[tensors:])
            results = [rotated(x, *tables) for x in arguments[:tensors]]
            return results[0] if tensors == 1 else tuple(results)

        return apply_rotary_emb

    return fill


def axes_of_one_tensor(pairs: Pairs) -> Callable[..., Any]:
    """x [B, H, S, 3 * D]: each third is rotated by the rows [L, W] of its axis at positions [S] or
    [B, S] (allegro).
    """

    def apply_rotary_emb(x: Tensor, tables: tuple[Tables, ...], positions: Any) -> Tensor:
        # The parts of a head become tokens, each with its own rows: [B * S, A, H, D].
        parts = x.transpose(1, 2).unflatten(-1, (len(tables), -1)).transpose(2, 3)
        cos, sin = (
            torch.stack(
                [axis[i][position] for axis, position in zip(tables, positions, strict=True)], -2
            )
            .expand(*parts.shape[:3], -1)
            .flatten(0, 1)
            for i in (0, 1)
        )
        rotated = rotate(pairs, parts.flatten(0, 1), cos, sin, -2)
        return rotated.unflatten(0, parts.shape[:2]).transpose(2, 3).flatten(-2).transpose(1, 2)

    return apply_rotary_emb
