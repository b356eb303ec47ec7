"""Test arguments for functions that may be rotations, by what holds their tables (rotations.py).

A function may refuse some of them; only those that it accepts are compared.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rope_ext.integrations.diffusers import rotations
from rope_ext.integrations.patching.probes import BATCH, HEAD_DIM, SEQ, WIDTHS, Numbers, Probe

HEADS = 3  # no width of a table
AXES = 3

# Shapes of x, and of tables without their columns.
SHAPES = (
    (BATCH, SEQ, HEADS, HEAD_DIM),
    (BATCH, HEADS, SEQ, HEAD_DIM),
    (BATCH, SEQ, HEAD_DIM),
    (BATCH, SEQ, HEADS * HEAD_DIM),
    TOKENS_LAST := (BATCH, HEADS, HEAD_DIM, SEQ),
)
ROWS = (
    (SEQ,),
    (1, SEQ),
    (BATCH, SEQ),
    (SEQ, 1),
    (1, SEQ, 1),
    (BATCH, SEQ, 1),
    (1, 1, SEQ),
    (BATCH, 1, SEQ),
    (SEQ, HEADS),
    (BATCH, SEQ, HEADS),
    (BATCH, HEADS, SEQ),
    (SEQ + 2,),
)

_HELD: dict[Callable[..., Any], Callable[[Tensor, Tensor], list[Any]]] = {
    rotations.two_tensors: lambda cos, sin: [cos, sin],
    rotations.pair: lambda cos, sin: [(cos, sin)],
    rotations.complex_numbers: lambda cos, sin: [torch.complex(cos.float(), sin.float())],
    rotations.angles: lambda cos, sin: [cos],
    rotations.matrices: lambda cos, sin: [
        torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
    ],
    rotations.side_by_side: lambda cos, sin: [torch.cat([cos, sin], -1)],
}


def probes(tensors: int, holder: Callable[..., Any]) -> Callable[[Numbers], Iterator[Probe]]:
    """For functions of so many tensors that rotate and tables that are held so."""

    def made(numbers: Numbers) -> Iterator[Probe]:
        for shape in SHAPES:
            for rows in ROWS:
                for width in (*WIDTHS, HEADS * HEAD_DIM):
                    if (width > HEAD_DIM) == (shape[-1] > HEAD_DIM):
                        held = _HELD[holder](*numbers.pair(*rows, width))
                        yield [*(_rotated(numbers, shape) for _ in range(tensors)), *held], {}

    return made


def _rotated(numbers: Numbers, shape: tuple[int, ...]) -> Tensor:
    """Tokens are last in views only: in memory, the channels of a token are adjacent."""
    if shape == TOKENS_LAST:
        return numbers(BATCH, HEADS, SEQ, HEAD_DIM).transpose(-1, -2)
    return numbers(*shape)


def axes_of_one_tensor(numbers: Numbers) -> Iterator[Probe]:
    for positions in (torch.tensor([3, 0, 1, 6, 2]), torch.arange(BATCH * SEQ).view(BATCH, SEQ)):
        x = numbers(BATCH, HEADS, SEQ, AXES * HEAD_DIM)
        tables = tuple(numbers.pair(BATCH * SEQ, HEAD_DIM) for _ in range(AXES))
        yield [x, tables, (positions, positions.flip(0), positions.flip(-1))], {}
