"""The overhead of a call at decode sizes: boxing, checks, allocations, Python.

    python benchmarks/bench_overhead.py [--quick] [--out DIR]

q [1, 1, 32, 128] and k [1, 1, 8, 128] in bfloat16, one thread; in inference mode, in no_grad, and
in grad mode (with q and k that require grad or not). Differences are taken round by round. The
goal: a function of rope_ext adds at most a microsecond to the same call by torch.ops. For bhsd that
call includes the views that a caller makes for it; for the module it is made in a module that does
nothing else.
"""

import argparse
import contextlib
import csv
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import floors
import torch
from common import FIRST_POSITION
from measuring import Summary, machine, measure, summary
from torch import Tensor, nn
from tqdm import tqdm

import rope_ext

HEADS, KEY_HEADS, HEAD_DIM, CONTEXT = 32, 8, 128, 4096
ROUNDS, QUICK_ROUNDS, ROUND_SECONDS = 41, 5, 0.004
GOAL = 1e-6  # most seconds that a Python function may add to torch.ops

OPS, FUNCTION = "torch.ops.rope.apply_rotary_qk", "rope_ext.apply_rotary_qk"
MODULE, LEAST_MODULE = "RotaryEmbedding", f"{OPS} in a module"
EMPTY, LEAST_FUNCTION = f"{OPS}_, no tokens", f"{OPS} in a function of 13 parameters"
NULL_ONE, NULL = "null(x)", "null_qk_(q, k, cos, sin, ...)"
NULL_OUT, ROWS = "null_qk, two outputs", "torch.ops.rope.cos_sin"
IN_PLACE, HEADS_FIRST = ", in place", ", bhsd"

# description -> (way, the way that it adds to); the report marks those that have a goal
DIFFERENCES = {
    "seven more arguments to box": (NULL, NULL_ONE),
    "checks and dispatch of the kernel": (EMPTY, NULL),
    "rotation of a token in place": (f"{OPS}_", EMPTY),
    "two allocations": (NULL_OUT, NULL),
    "torch.ops by overload": (f"{OPS}_.default", f"{OPS}_"),
    "those 13 parameters alone": (LEAST_FUNCTION, OPS),
    FUNCTION: (FUNCTION, OPS),
    FUNCTION + HEADS_FIRST: (FUNCTION + HEADS_FIRST, OPS + HEADS_FIRST),
    FUNCTION + IN_PLACE: (FUNCTION + IN_PLACE, f"{OPS}_"),
    FUNCTION + IN_PLACE + HEADS_FIRST: (
        FUNCTION + IN_PLACE + HEADS_FIRST,
        f"{OPS}_" + HEADS_FIRST,
    ),
    MODULE: (MODULE, LEAST_MODULE),
    MODULE + IN_PLACE: (MODULE + IN_PLACE, LEAST_MODULE + IN_PLACE),
}
WITH_GOAL = (FUNCTION, MODULE)


def of_13_parameters(operator: Callable[..., object]) -> Callable[..., object]:
    """The operator in a function with the parameters of rope_ext.apply_rotary_qk."""

    def call(
        q, k, cos, sin, position_ids=None, *, rotary_dim=None, rotary_offset=0, interleaved=False,
        interleaved_out=None, inverse=False, layout="bshd", inplace=False, out=None,
    ):  # fmt: skip
        return operator(q, k, cos, sin, position_ids)

    return call


class LeastModule(nn.Module):
    """An operator with its table in a module without anything else."""

    def __init__(self, operator: Callable[..., object], table: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.operator, self.table = operator, table

    def forward(self, q: Tensor, k: Tensor) -> object:
        return self.operator(q, k, *self.table)


def heads_first(operator: Callable[..., Any], q: Tensor, k: Tensor, *table: Tensor) -> object:
    """The operator on q and k [B, H, S, D], with the views that a caller makes."""
    rotated = operator(q.transpose(1, 2), k.transpose(1, 2), *table)
    return rotated and (rotated[0].transpose(1, 2), rotated[1].transpose(1, 2))


def ways(requires_grad: bool) -> dict[str, Callable[[], object]]:
    """Functions by name; in-place ones only if nothing requires grad."""

    def heads(count: int, seq: int = 1) -> Tensor:
        x = torch.randn(1, seq, count, HEAD_DIM, dtype=torch.bfloat16)
        return x.requires_grad_(requires_grad)

    q, k, none = heads(HEADS), heads(KEY_HEADS), (heads(HEADS, 0), heads(KEY_HEADS, 0))
    q_bhsd, k_bhsd = q.transpose(1, 2), k.transpose(1, 2)
    module = rope_ext.RotaryEmbedding(HEAD_DIM, max_position_embeddings=CONTEXT)
    positions = torch.full((1, 1), FIRST_POSITION)
    table = module.table(CONTEXT)  # not inference tensors, even in inference mode
    no_rows = tuple(rows[:0] for rows in table)
    rope, null = torch.ops.rope, floors.load()
    partial = functools.partial
    found = {
        NULL_ONE: partial(null.null_one_, q),
        NULL: partial(null.null_qk_, q, k, *table),
        NULL_OUT: partial(null.null_qk, q, k, *table),
        OPS: partial(rope.apply_rotary_qk, q, k, *table),
        LEAST_FUNCTION: partial(of_13_parameters(rope.apply_rotary_qk), q, k, *table),
        OPS + HEADS_FIRST: partial(heads_first, rope.apply_rotary_qk, q_bhsd, k_bhsd, *table),
        FUNCTION: partial(rope_ext.apply_rotary_qk, q, k, *table),
        FUNCTION + HEADS_FIRST: partial(
            rope_ext.apply_rotary_qk, q_bhsd, k_bhsd, *table, layout="bhsd"
        ),
        LEAST_MODULE: partial(LeastModule(rope.apply_rotary_qk, table), q, k),
        MODULE: partial(module, q, k),
        f"{MODULE}, position_ids": partial(module, q, k, positions),
        ROWS: partial(rope.cos_sin, module.inv_freq, positions),
    }
    if not requires_grad:
        found |= {
            EMPTY: partial(rope.apply_rotary_qk_, *none, *no_rows),
            f"{OPS}_": partial(rope.apply_rotary_qk_, q, k, *table),
            f"{OPS}_.default": partial(rope.apply_rotary_qk_.default, q, k, *table),
            f"{OPS}_" + HEADS_FIRST: partial(
                heads_first, rope.apply_rotary_qk_, q_bhsd, k_bhsd, *table
            ),
            LEAST_MODULE + IN_PLACE: partial(LeastModule(rope.apply_rotary_qk_, table), q, k),
            FUNCTION + IN_PLACE: partial(rope_ext.apply_rotary_qk, q, k, *table, inplace=True),
            FUNCTION + IN_PLACE + HEADS_FIRST: partial(
                rope_ext.apply_rotary_qk, q_bhsd, k_bhsd, *table, layout="bhsd", inplace=True
            ),
            MODULE + IN_PLACE: partial(module, q, k, inplace=True),
        }
    return found


MODES: dict[str, tuple[Callable[[], contextlib.AbstractContextManager], bool]] = {
    "inference_mode": (torch.inference_mode, False),
    "no_grad": (torch.no_grad, False),
    "grad mode": (torch.enable_grad, False),
    "requires_grad": (torch.enable_grad, True),
}


def allocations(function: Callable[[], object]) -> int:
    """Blocks that PyTorch's allocator allocates in one call."""
    function()
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


def spread(of: Summary) -> str:
    return f"{1e6 * of.median:.2f} ({1e6 * of.low:.2f}-{1e6 * of.high:.2f})"


def report(times: dict[str, dict[str, list[float]]], counts: dict[str, int]) -> str:
    """A Markdown report of the times by mode and way."""
    modes = list(times)
    rule = "|---" * len(modes) + "|"
    lines = ["Microseconds: median (10th-90th percentile).", ""]
    lines += [f"| call | allocations | {' | '.join(modes)} |", f"|---|---{rule}"]
    for way, count in counts.items():
        cells = [spread(summary(times[m][way])) if way in times[m] else "" for m in modes]
        lines.append(f"| {way} | {count} | {' | '.join(cells)} |")
    lines += ["", f"| what it adds | goal | {' | '.join(modes)} |", f"|---|---{rule}"]
    for what, (way, base) in DIFFERENCES.items():
        goal = what.startswith(WITH_GOAL)
        cells = []
        for mode in modes:
            if way not in times[mode] or base not in times[mode]:
                cells.append("")
                continue
            both = zip(times[mode][way], times[mode][base], strict=True)
            added = summary([a - b for a, b in both])
            verdict = (": reached" if added.median <= GOAL else ": **missed**") if goal else ""
            cells.append(spread(added) + verdict)
        meant = f"<= {1e6 * GOAL:.3g}" if goal else ""
        lines.append(f"| {what} | {meant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_csv(path: Path, times: dict[str, dict[str, list[float]]], counts: dict[str, int]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mode", "call", "allocations", "rounds", "median_us", "p10_us", "p90_us"])
        for mode, of_mode in times.items():
            for way, values in of_mode.items():
                of = summary(values)
                figures = (f"{1e6 * x:.4f}" for x in (of.median, of.low, of.high))
                writer.writerow([mode, way, counts[way], len(values), *figures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--quick", action="store_true", help="seconds: does everything run?")
    parser.add_argument("--out", type=Path, help="folder for bench_overhead.md and .csv")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    setting = machine()
    times, counts = {}, {}
    with tqdm(total=rounds * len(MODES), dynamic_ncols=True) as bar:
        for name, (mode, requires_grad) in MODES.items():
            bar.set_description(name)
            with mode():
                functions = ways(requires_grad)
                if not requires_grad:
                    counts = {way: allocations(function) for way, function in functions.items()}
                times[name] = measure(functions, rounds, bar.update, round_seconds=ROUND_SECONDS)
    text = f"{setting}.\n\n{report(times, counts)}"
    print("\n" + text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "bench_overhead.md").write_text(f"# bench_overhead\n\n{text}")
        write_csv(arguments.out / "bench_overhead.csv", times, counts)


if __name__ == "__main__":
    main()
