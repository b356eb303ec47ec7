"""Times rope_ext against the length, batch and heads, on one thread and on all.

    python benchmarks/bench_scaling.py [--quick] [--threads 1 2] [--out DIR]

Each sweep varies one size of a Llama-3-8B shape in bfloat16. Time should grow in proportion to the
bytes, with steps only where moving the bytes (rmw in place, clone out of place) has them. A step is
reported if the ratio to the floor is STEP times that of the next smaller size. --out writes
Markdown, CSV and a plot of the time a byte.
"""

import argparse
import csv
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import floors
import torch
from common import FIRST_POSITION, Case
from measuring import machine, measure, ratio, settle_allocator, summary
from tqdm import tqdm

import rope_ext

DTYPE = torch.bfloat16
ROUNDS, QUICK_ROUNDS = 15, 3
QUICK_TOKENS = 8192
STEP = 1.5
NEW_MEMORY = 1 << 20  # bytes: larger results lie in new memory, see measuring.py
LLAMA = Case("Llama-3-8B", 1, 1, 32, 8, 128, 128)
FLOOR_OF = {"in place": "rmw", "out of place": "clone"}


def powers(first: int, last: int) -> list[int]:
    return [1 << n for n in range(first.bit_length() - 1, last.bit_length())]


# name -> the shapes of a sweep, by the size that varies
SWEEPS: dict[str, dict[int, Case]] = {
    "S": {seq: replace(LLAMA, seq=seq) for seq in powers(256, 131072)},
    "H": {heads: replace(LLAMA, seq=2048, q_heads=heads, k_heads=1) for heads in powers(1, 128)},
    "B, S=512": {batch: replace(LLAMA, batch=batch, seq=512) for batch in powers(1, 64)},
    "B, S=1": {batch: replace(LLAMA, batch=batch) for batch in powers(1, 4096)},
}


@dataclass
class Point:
    """The times of one shape on a number of threads: seconds a call, [rounds] for each way."""

    sweep: str
    threads: int
    size: int
    bytes: int  # of q and k
    times: dict[str, list[float]]

    def to_floor(self, way: str) -> float:
        return ratio(self.times[way], self.times[FLOOR_OF[way]]).median


def functions(shape: Case) -> tuple[dict[str, Callable[[], object]], int]:
    """The functions to time, and the bytes of q and k."""
    q, k = (
        torch.randn(shape.batch, shape.seq, heads, shape.head_dim).to(DTYPE)
        for heads in (shape.q_heads, shape.k_heads)
    )
    inv_freq, _ = rope_ext.frequencies.default(shape.head_dim)
    cos, sin = rope_ext.cos_sin_cache(inv_freq, shape.seq, start=FIRST_POSITION)
    if shape.seq == 1:  # decoding: each sequence has its own position
        positions = FIRST_POSITION + torch.arange(shape.batch)[:, None]
        cos, sin = rope_ext.cos_sin(inv_freq, positions)
    arguments = (q, k, cos, sin)
    ways = {
        "in place": functools.partial(torch.ops.rope.apply_rotary_qk_, *arguments),
        "rmw": functools.partial(floors.load().rmw_qk_, *arguments),
        "out of place": functools.partial(torch.ops.rope.apply_rotary_qk, *arguments),
        "clone": lambda: (q.clone(), k.clone()),
    }
    return ways, q.nbytes + k.nbytes


def steps(points: list[Point]) -> list[str]:
    """The steps, where a way's ratio to its floor rises from one size to the next, as text."""
    found = []
    for before, after in itertools.pairwise(points):
        if (before.sweep, before.threads) != (after.sweep, after.threads):
            continue
        for way in FLOOR_OF:
            a, b = before.to_floor(way), after.to_floor(way)
            if b > STEP * a:
                found.append(
                    f"{way}, {after.sweep}: {a:.2f} times {FLOOR_OF[way]} at {before.size:,}, "
                    f"{b:.2f} at {after.size:,} ({after.threads} threads)"
                )
    return found


def markdown(points: list[Point], setting: str) -> str:
    lines = [f"{setting}.", "", "Microseconds: medians; ratios to the floor round by round.", ""]
    columns = ["sweep", "threads", "size", "MiB", *FLOOR_OF, "in place / rmw"]
    lines += [f"| {' | '.join([*columns, 'out of place / clone'])} |", "|---" * 8 + "|"]
    for point in points:
        cells = [point.sweep, str(point.threads), f"{point.size:,}", f"{point.bytes / 2**20:.3g}"]
        cells += [f"{1e6 * summary(point.times[way]).median:,.1f}" for way in FLOOR_OF]
        cells += [f"{point.to_floor(way):.2f}" for way in FLOOR_OF]
        lines.append(f"| {' | '.join(cells)} |")
    found = steps(points)
    lines += ["", f"Steps above {STEP} times the next smaller size's ratio:", ""]
    lines += [f"- {step}" for step in found] or ["none."]
    return "\n".join(lines) + "\n"


def write_csv(path: Path, points: list[Point]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("sweep", "threads", "size", "bytes", "way", "rounds"),
                "median_us",
                "p10_us",
                "p90_us",
            ]
        )
        for point in points:
            for way, times in point.times.items():
                of = summary(times)
                figures = (f"{1e6 * x:.4f}" for x in (of.median, of.low, of.high))
                writer.writerow(
                    [point.sweep, point.threads, point.size, point.bytes, way, len(times), *figures]
                )


def plot(path: Path, points: list[Point]) -> None:
    """Plots the time a byte against the size: flat if time is linear. One row a thread count."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = list(dict.fromkeys(point.sweep for point in points))
    threads = list(dict.fromkeys(point.threads for point in points))
    figure, axes = plt.subplots(
        *(len(threads), len(sweeps)),
        figsize=(3.6 * len(sweeps), 3 * len(threads)),
        squeeze=False,
        layout="constrained",
    )
    styles = {"in place": "C0o-", "rmw": "C0--", "out of place": "C1o-", "clone": "C1--"}
    for row, count in zip(axes, threads, strict=True):
        for axis, sweep in zip(row, sweeps, strict=True):
            own = [p for p in points if (p.sweep, p.threads) == (sweep, count)]
            for way, style in styles.items():
                rates = [1e9 * summary(p.times[way]).median / p.bytes for p in own]
                axis.plot([p.size for p in own], rates, style, label=way, markersize=3)
            axis.set(xscale="log", yscale="log", xlabel=sweep, title=f"{count} threads")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("ns a byte of q and k")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--quick", action="store_true", help="about a minute: up to 8,192 tokens")
    parser.add_argument("--out", type=Path, help="folder for bench_scaling.md, .csv and .png")
    parser.add_argument("--max-tokens", type=int, help="B * S of the largest shape")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    limit = arguments.max_tokens or (QUICK_TOKENS if arguments.quick else 1 << 30)
    sweeps = {
        name: {size: shape for size, shape in sweep.items() if shape.tokens <= limit}
        for name, sweep in SWEEPS.items()
    }
    torch.manual_seed(0)
    settle_allocator()
    setting = machine()
    threads = list(dict.fromkeys(arguments.threads))
    points = []
    total = rounds * len(threads) * sum(len(sweep) for sweep in sweeps.values())
    with torch.inference_mode(), tqdm(total=total, dynamic_ncols=True) as bar:
        for name, sweep in sweeps.items():
            for count in threads:
                torch.set_num_threads(count)
                for size, shape in sweep.items():
                    bar.set_description(f"{name} = {size:,}, {count} threads")
                    ways, size_bytes = functions(shape)
                    new_memory = size_bytes >= NEW_MEMORY
                    times = measure(ways, rounds, bar.update, new_memory=new_memory)
                    points.append(Point(name, count, size, size_bytes, times))
    text = markdown(points, setting)
    print("\n" + text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "bench_scaling.md").write_text(f"# bench_scaling\n\n{text}")
        write_csv(arguments.out / "bench_scaling.csv", points)
        plot(arguments.out / "bench_scaling.png", points)


if __name__ == "__main__":
    main()
