"""Cases of cos and sin: a whole table, and the rows of a decode step."""

import functools

import floors
import torch
from benchmark import FLOOR, OURS, PEER, Benchmark, Goal, Options
from common import DECODE_STRIDE, FIRST_POSITION
from torch import Tensor
from verify import check_angles, check_table, exact_rows

import rope_ext

LENGTH, HEAD_DIM, BASE = 131072, 128, 500000.0
DECODE_BATCH = 64
ULPS = 1.0


def whole_table(options: Options) -> Benchmark:
    length = min(LENGTH, options.max_tokens or LENGTH)
    inv_freq, _ = rope_ext.frequencies.default(HEAD_DIM, base=BASE)
    positions = torch.arange(length)
    make = functools.partial(torch.ops.rope.cos_sin_cache, inv_freq, length)
    exact = exact_rows(inv_freq, positions)
    benchmark = Benchmark([Goal("cos_sin_cache", "fill", 3.0)])
    verify_tables(make(), exact)
    benchmark.add(OURS, "cos_sin_cache", make)

    fill, given = (
        floors.load().fill_,
        (torch.empty(length, HEAD_DIM // 2), torch.empty(length, HEAD_DIM // 2)),
    )

    def fill_new() -> tuple[Tensor, ...]:
        new = torch.empty(length, HEAD_DIM // 2), torch.empty(length, HEAD_DIM // 2)
        for table in new:
            fill(table, streaming=False)
        return new

    benchmark.add(FLOOR, "fill", fill_new)
    benchmark.add(
        FLOOR, "fill, warm memory", lambda: [fill(table, streaming=True) for table in given]
    )
    add_angle_peer(benchmark, inv_freq, positions, exact)
    return benchmark


def decode_rows(options: Options) -> Benchmark:
    inv_freq, _ = rope_ext.frequencies.default(HEAD_DIM, base=BASE)
    positions = FIRST_POSITION + DECODE_STRIDE * torch.arange(DECODE_BATCH)[:, None]
    make = functools.partial(torch.ops.rope.cos_sin, inv_freq, positions)
    exact = exact_rows(inv_freq, positions)
    benchmark = Benchmark([Goal("cos_sin", None, 10e-6)])
    verify_tables(make(), exact)
    benchmark.add(OURS, "cos_sin", make)
    rows = torch.empty(DECODE_BATCH, 1, HEAD_DIM // 2)
    benchmark.add(FLOOR, "two empty rows", lambda: (torch.empty_like(rows), torch.empty_like(rows)))
    add_angle_peer(benchmark, inv_freq, positions, exact)
    return benchmark


def verify_tables(got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    for name, table, true in zip(("cos", "sin"), got, exact, strict=True):
        check_table(name, table, true, ulps=ULPS)


def add_angle_peer(
    benchmark: Benchmark, inv_freq: Tensor, positions: Tensor, exact: tuple[Tensor, ...]
) -> None:
    """PyTorch as model libraries use it: angles are rounded to float32."""

    def make() -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * inv_freq
        return angles.cos(), angles.sin()

    slack = int(positions.max()) * torch.finfo(torch.float32).eps
    for name, table, true in zip(("cos", "sin"), make(), exact, strict=True):
        check_angles(name, table, true, slack=slack)
    benchmark.add(PEER, "PyTorch, float32 angles", make)
