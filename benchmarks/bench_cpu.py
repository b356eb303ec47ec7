"""Times the CPU cases one after another; run as `bench_rope.py --device cpu`."""

import contextlib
from pathlib import Path

import report
import torch
from benchmark import CpuCase, Options
from cases_cpu import CPU_CASES
from common import matching
from measuring import machine, measure, settle_allocator
from other_libraries_cpu import versions
from tqdm import tqdm
from verify import WrongResult


def chosen(patterns: list[str]) -> list[CpuCase]:
    """The cases whose name contains one of the patterns; all, if there are none."""
    names = matching([case.name for case in CPU_CASES], patterns)
    return [case for case in CPU_CASES if case.name in names]


def time_case(case: CpuCase, options: Options, rounds: int, bar: tqdm) -> report.Result:
    mode = torch.inference_mode() if case.inference else contextlib.nullcontext()
    with mode:
        bar.set_description(f"{case.name}: verifying")
        try:
            benchmark = case.make(options)
        except WrongResult as error:
            raise SystemExit(f"{case.name}: {error}") from error
        bar.set_description(case.name)
        times = measure(benchmark.functions, rounds, bar.update, new_memory=case.new_memory)
    return report.Result(
        case.name, benchmark.goals, times, benchmark.kinds, dict(benchmark.left_out)
    )


def run(cases: list[CpuCase], options: Options, rounds: int, out: Path | None) -> None:
    settle_allocator()
    setting = f"{machine()}; {versions()}"
    results = []
    with tqdm(total=len(cases) * rounds, dynamic_ncols=True) as bar:
        for case in cases:
            result = time_case(case, options, rounds, bar)
            results.append(result)
            for goal in result.goals:
                bar.write(report.goal_line(result, goal))
        bar.set_description("done")
    print("\n" + report.markdown(results, setting))
    if out is not None:
        print("\n".join(str(path) for path in report.write(out, "bench_rope", results, setting)))
