"""The overhead of a call at decode sizes: boxing, checks, allocations, Python.

    python benchmarks/bench_overhead.py [CALL ...] [--quick] [--out DIR]

The calls of decode_calls.py, one token on one thread; in inference mode, in no_grad, and in grad
mode (with q and k that require grad or not). Each is compared, round by round, with the call that
is named beside it.
"""

import argparse
import contextlib
import csv
from collections.abc import Callable
from pathlib import Path

import torch
from common import matching
from decode_calls import KERNEL, ROWS, Call, Goal, all_calls, kernel_alone, one_rank
from measuring import Summary, machine, measure, ratio, summary
from tqdm import tqdm

ROUNDS, QUICK_ROUNDS, ROUND_SECONDS = 41, 5, 0.004

Times = dict[str, list[float]]

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


def spread(of: Summary, unit: float = 1e6) -> str:
    return f"{unit * of.median:.2f} ({unit * of.low:.2f}-{unit * of.high:.2f})"


def compared(goal: Goal | None, times: list[float], floor: list[float]) -> tuple[str, float]:
    """What a goal is about, or the ratio to the floor: with its spread, and its median."""
    if goal is None or goal.unit == "times":
        of = ratio(times, floor)
        return spread(of, 1), of.median
    if goal.unit == "us":
        of = summary(times)
    else:
        of = summary([a - b for a, b in zip(times, floor, strict=True)])
    return spread(of), 1e6 * of.median


def report(calls: dict[str, Call], times: dict[str, Times], counts: dict[str, int]) -> str:
    """A Markdown report of the times by mode and call."""
    modes = list(times)
    rule = "|---" * len(modes) + "|"
    lines = ["Microseconds: median (10th-90th percentile).", ""]
    lines += [f"| call | allocations | {' | '.join(modes)} |", f"|---|---{rule}"]
    for name, count in counts.items():
        cells = [spread(summary(times[m][name])) if name in times[m] else "" for m in modes]
        lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    lines += [
        "",
        "Times the call beside it, or what the goal is about; goals are without gradients.",
        "",
    ]
    lines += [f"| call | beside | goal | {' | '.join(modes)} |", f"|---|---|---{rule}"]
    for name, call in calls.items():
        if not call.floor:
            continue
        cells = []
        for mode in modes:
            if name not in times[mode] or call.floor not in times[mode]:
                cells.append("")
                continue
            text, value = compared(call.goal, times[mode][name], times[mode][call.floor])
            if call.goal is not None and not MODES[mode][1]:
                text += ": reached" if value <= call.goal.most else ": **missed**"
            cells.append(text)
        goal = "" if call.goal is None else str(call.goal)
        lines.append(f"| {name} | {call.floor} | {goal} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_csv(path: Path, times: dict[str, Times], counts: dict[str, int]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mode", "call", "allocations", "rounds", "median_us", "p10_us", "p90_us"])
        for mode, of_mode in times.items():
            for name, values in of_mode.items():
                of = summary(values)
                figures = (f"{1e6 * x:.4f}" for x in (of.median, of.low, of.high))
                writer.writerow([mode, name, counts[name], len(values), *figures])


def chosen(calls: dict[str, Call], patterns: list[str]) -> dict[str, Call]:
    """The calls that contain one of the patterns, and those that they are compared with."""
    names = {*matching(list(calls), patterns)}
    names |= {calls[name].floor for name in names}
    return {name: call for name, call in calls.items() if name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calls", nargs="*", metavar="CALL", help="a part of the calls' names")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--quick", action="store_true", help="seconds: does everything run?")
    parser.add_argument("--out", type=Path, help="folder for bench_overhead.md and .csv")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    setting = machine()
    calls: dict[str, Call] = {}
    times, counts = {}, {}
    with one_rank(), tqdm(total=rounds * len(MODES), dynamic_ncols=True) as bar:
        for name, (mode, requires_grad) in MODES.items():
            bar.set_description(name)
            with mode():
                found = chosen(all_calls(requires_grad), arguments.calls)
                calls |= found
                functions = {name: call.function for name, call in found.items()}
                if not requires_grad:
                    counts = {name: allocations(function) for name, function in functions.items()}
                of_mode = measure(functions, rounds, bar.update, round_seconds=ROUND_SECONDS)
            if KERNEL in of_mode:
                of_mode[KERNEL] = kernel_alone(of_mode[ROWS], of_mode[KERNEL])
            times[name] = of_mode
    text = f"{setting}.\n\n{report(calls, times, counts)}"
    print("\n" + text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "bench_overhead.md").write_text(f"# bench_overhead\n\n{text}")
        write_csv(arguments.out / "bench_overhead.csv", times, counts)


if __name__ == "__main__":
    main()
