"""The precision of tables, rotations and scores at long context: rope_ext's and the usual ones.

    python benchmarks/precision.py [--quick] [--out DIR]

On the CPU, without timing, with the same results in every run: head_dim 128, random positions from
contexts of 4,096 to 2^31 tokens, and the last of each. The truth is cos and sin of position *
inv_freq in 40 digits (rope_ext/viz/figures/errors.py), for the same float32 inv_freq. The usual way
is that of transformers; its bits are compared with transformers first. --out writes Markdown, CSV
and a chart.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import precision_report
import torch
from measuring import machine
from precision_report import Row
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from verify import WrongResult, ulp

import rope_ext
from rope_ext import reference
from rope_ext.viz.figures.errors import exact, exact_parts

HEAD_DIM, HEADS = 128, 4
BASES = (10_000.0, 500_000.0)
CONTEXTS = (4096, 32_768, 131_072, 1 << 20, 1 << 24, 1 << 31)
FARTHEST = 64  # most tokens between q and k of a score
POSITIONS, QUICK_POSITIONS = 256, 4  # of each context
HIGH = 0.99  # the quantile that a row shows besides the largest error
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

Table = tuple[Tensor, Tensor]  # cos, sin [N, P]
# (inv_freq [P], positions [N]) -> the table
MakeTable = Callable[[Tensor, Tensor], Table]
# (x [N, H, D], inv_freq [P], positions [N]) -> x rotated
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


# ---- the ways


def usual(inv_freq: Tensor, positions: Tensor, dtype: torch.dtype = F32) -> Table:
    """As in LlamaRotaryEmbedding of transformers: the product, cos and sin in float32."""
    angle = positions[:, None].float() * inv_freq.float()
    return angle.cos().to(dtype), angle.sin().to(dtype)


OURS, USUAL = "rope_ext", "usual"
TABLES: dict[str, MakeTable] = {
    OURS: rope_ext.cos_sin,
    f"{OURS}, float64": functools.partial(rope_ext.cos_sin, dtype=F64),
    USUAL: usual,
    f"{USUAL}, inv_freq cast to float16": lambda f, p: usual(f.half(), p),
    f"{USUAL}, inv_freq cast to bfloat16": lambda f, p: usual(f.bfloat16(), p),
    f"{USUAL}, positions in bfloat16": lambda f, p: usual(f, p.bfloat16()),
    f"{USUAL}, table in float16": functools.partial(usual, dtype=F16),
    f"{USUAL}, table in bfloat16": functools.partial(usual, dtype=BF16),
}


def turn(table: MakeTable, x: Tensor, inv_freq: Tensor, positions: Tensor) -> Tensor:
    """Rotates in float32 by rope_ext's kernel, rounded once to x's dtype."""
    return rope_ext.apply_rotary(x, *table(inv_freq, positions), layout="thd")


def turn_op_by_op(x: Tensor, inv_freq: Tensor, positions: Tensor) -> Tensor:
    """Rotates as transformers does: its table is in x's dtype, and each operation rounds to it."""
    table = (torch.cat((part, part), -1)[None] for part in usual(inv_freq, positions, x.dtype))
    heads_first = x.transpose(0, 1)[None]  # [1, H, N, D]
    turned, _ = apply_rotary_pos_emb(heads_first, heads_first, *table)
    return turned[0].transpose(0, 1)


ROTATIONS: dict[str, Rotate] = {
    f"{OURS}: float32 table, one rounding": functools.partial(turn, rope_ext.cos_sin),
    "usual float32 table, one rounding": functools.partial(turn, usual),
    "patch(model): usual bfloat16 table, one rounding": functools.partial(
        turn, functools.partial(usual, dtype=BF16)
    ),
    "transformers: bfloat16 table, op by op": turn_op_by_op,
}
SCORES: dict[str, tuple[torch.dtype, Rotate]] = {
    f"{OURS}, float32": (F32, functools.partial(turn, rope_ext.cos_sin)),
    "transformers, float32": (F32, turn_op_by_op),
    f"{OURS}, bfloat16": (BF16, functools.partial(turn, rope_ext.cos_sin)),
    "transformers, bfloat16": (BF16, turn_op_by_op),
}


def check_usual(inv_freq: Tensor, base: float, positions: Tensor) -> None:
    """Raises WrongResult if the usual way has other bits than transformers."""
    config = LlamaConfig(
        head_dim=HEAD_DIM, rope_parameters={"rope_type": "default", "rope_theta": base}
    )
    for cast in (F32, F16, BF16):  # a cast of transformers' module casts inv_freq
        module = LlamaRotaryEmbedding(config).to(cast)
        for dtype in (F32, F16, BF16):
            theirs = module(torch.empty((), dtype=dtype), positions[None])
            mine = usual(inv_freq.to(cast), positions, dtype)
            for name, a, b in zip(("cos", "sin"), mine, theirs, strict=True):
                if not torch.equal(torch.cat((a, a), -1), b[0]):
                    raise WrongResult(f"{name} of transformers differs: cast to {cast}, {dtype}")


# ---- their errors


def table_errors(got: Table, truth: list[Table]) -> Tensor:
    """Absolute errors of cos and sin [2, N, P]; truth from exact_parts."""
    parts = [(of.double() - near) - rest for of, (near, rest) in zip(got, truth, strict=True)]
    return torch.stack(parts).abs()


def table_ulps(got: Table, truth: list[Table], dtype: torch.dtype) -> Tensor:
    """The same in units in the last place of dtype at the true value."""
    units = torch.stack([ulp(near, dtype) for near, _ in truth])
    return table_errors(got, truth) / units


def frequency_errors(inv_freq: Tensor, base: float, positions: Tensor) -> dict[str, Tensor]:
    """Errors of angles in radians [N, P], against base^(-2i / D), which float32 has to round.

    In float64: exponents are exact, the power and its product are rounded. So an angle is off by at
    most 2^-51 of its value, which is 2^-20 radians at position 2^31.
    """
    formula = base ** (-torch.arange(0, HEAD_DIM, 2, dtype=F64) / HEAD_DIM)
    steps = positions[:, None].double()
    product = positions[:, None].float() * inv_freq
    return {
        "inv_freq rounded to float32 (all)": (steps * (inv_freq.double() - formula)).abs(),
        "and position * inv_freq as well (usual)": (product.double() - steps * formula).abs(),
    }


def rotation_errors(
    rotate: Rotate, x: Tensor, inv_freq: Tensor, positions: Tensor, truth: Table
) -> Tensor:
    """Errors of each pair [N, H, P], relative to its length: an angle error is in radians."""
    right = reference.apply_rotary(x.double(), *truth)
    error = rotate(x, inv_freq, positions).double() - right
    return lengths(error) / lengths(x.double())


def lengths(x: Tensor) -> Tensor:
    """Lengths of the pairs (i, i + P) of x [..., D]: [..., P]."""
    return torch.hypot(*x.chunk(2, -1))


def score_errors(
    rotate: Rotate,
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor,
    first: Tensor,
    distance: Tensor,
    truth: Table,
) -> Tensor:
    """Errors of q · k / sqrt(D) [N, H] against the score of the same tokens with k at position 0.

    The sums are in float64, so that all errors come from the rotations.

    Args:
        q, k: [N, H, D].
        first, distance: int64 [N]: k's position, and the tokens from k to q.
        truth: exact cos and sin of distance, [N, P].
    """
    got = scores(rotate(q, inv_freq, first + distance), rotate(k, inv_freq, first))
    return (got - scores(reference.apply_rotary(q.double(), *truth), k)).abs()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q.double() * k.double()).sum(-1) / q.shape[-1] ** 0.5


def largest_and_high(errors: Tensor) -> tuple[float, float]:
    """The largest error and its HIGH quantile; NaN if any error is NaN."""
    ordered = errors.flatten().sort().values  # NaN last
    return ordered[-1].item(), ordered[round(HIGH * (len(ordered) - 1))].item()


# ---- all of them


def drawn_positions(context: int, count: int, generator: torch.Generator) -> Tensor:
    """Sorted random positions, including the last of the context: int64 [count]."""
    some = torch.randint(0, context, (count - 1,), generator=generator)
    return torch.cat((some, torch.tensor([context - 1]))).sort().values


def measured(base: float, context: int, count: int) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(context)
    inv_freq, _ = rope_ext.frequencies.default(HEAD_DIM, base=base)
    positions = drawn_positions(context, count, generator)
    check_usual(inv_freq, base, positions)
    truth = exact_parts(positions, inv_freq)

    def row(quantity: str, way: str, errors: Tensor) -> Row:
        return Row(quantity, base, way, context, *largest_and_high(errors))

    for way, table in TABLES.items():
        yield row("table", way, table_errors(table(inv_freq, positions), truth))
    for way, dtype in ((OURS, F32), (f"{OURS}, float64", F64)):
        yield row("ulp", way, table_ulps(TABLES[way](inv_freq, positions), truth, dtype))
    for way, errors in frequency_errors(inv_freq, base, positions).items():
        yield row("frequency", way, errors)

    def heads(dtype: torch.dtype) -> Tensor:
        return torch.randn(count, HEADS, HEAD_DIM, generator=generator).to(dtype)

    x = heads(BF16)
    nearest = tuple(part for part, _ in truth)
    for way, rotate in ROTATIONS.items():
        errors = rotation_errors(rotate, x, inv_freq, positions, nearest)
        yield row("rotation", way, errors)

    q, k = heads(F32), heads(F32)
    distance = torch.randint(1, FARTHEST + 1, (count,), generator=generator)
    first = drawn_positions(context - FARTHEST, count, generator)
    near = exact(distance, inv_freq)
    for way, (dtype, rotate) in SCORES.items():
        of = (q.to(dtype), k.to(dtype), inv_freq, first, distance, near)
        yield row("score", way, score_errors(rotate, *of))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds: does everything run?")
    parser.add_argument("--out", type=Path, help="folder for precision.md, .csv and .png")
    arguments = parser.parse_args()
    count = QUICK_POSITIONS if arguments.quick else POSITIONS
    torch.set_num_threads(1)
    cases = [(base, context) for base in BASES for context in CONTEXTS]
    rows = []
    for base, context in tqdm(cases, dynamic_ncols=True):
        rows += measured(base, context, count)
    setting = f"{count:,} positions of each context; {machine()}"
    print("\n" + precision_report.markdown(rows, setting))
    if arguments.out is not None:
        precision_report.write(arguments.out, rows, setting)


if __name__ == "__main__":
    main()
