"""Times every operator of torch.ops.rope on a GPU; run as `bench_rope.py --device cuda`.

Each case of operators_cuda.py is verified against float64. Then it is timed together with a device
copy of as many bytes, the same operation in separate steps, and other libraries. The cases that
take longest come last, and the report is written after each case, so that an interrupted run loses
little. The exit status is not 0 if a result is wrong, a call fails, or an operator has no
case.
"""

import contextlib
import importlib.util
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import report_cuda
import torch
from benchmark import OURS
from common import DECODE_STRIDE, FIRST_POSITION, matching
from measuring import summary
from measuring_cuda import Timed, copies, copy_rate, measure, set_count, why_no_graphs
from operator_case import EAGER, OperatorCase, Way
from operators_cuda import cases, without_case
from other_libraries import reason
from report_cuda import COPY, Measured
from verify import check_once_rounded, check_roughly

import rope_ext

RUN_SECONDS = 140  # after that, torch.compile is left out and rounds are few
ROUNDS_SECONDS = 0.6  # of a case
CASE_SECONDS, COMPILE_SECONDS = 1.2, 4.0  # planned for rounds, verification and graph capture
QUICK_COPY_BYTES = 1 << 20


def emulation() -> contextlib.AbstractContextManager[object]:
    """For an emulator of the CUDA runtime (CONTRIBUTING.md): PyTorch's kernels run on the CPU."""
    if importlib.util.find_spec("fakegpu_torch") is None:
        return contextlib.nullcontext()
    import fakegpu_torch

    return fakegpu_torch.cpu_fallback() if fakegpu_torch.active() else contextlib.nullcontext()


def planned_seconds(case: OperatorCase, quick: bool) -> float:
    return CASE_SECONDS + COMPILE_SECONDS * (case.compiled and not quick)


def verify(case: OperatorCase, way: Way | None = None) -> None:
    """Verifies the results of the operator, or of another way; raises WrongResult."""
    arguments = case.arguments()
    exact = case.exact(arguments)
    call = case.call(arguments) if way is None else way.call(arguments)
    got = case.results(arguments, call())
    for name, result, true in zip(case.result_names, got, exact, strict=True):
        if way is None:
            check_once_rounded(name, result, true, roundings=case.roundings)
        else:
            between = DECODE_STRIDE if case.shape_name == "decode" else 1
            last_angle = FIRST_POSITION + between * case.tokens
            slack = way.angle_roundings * last_angle * torch.finfo(torch.float32).eps
            check_roughly(name, result, true, angle_slack=slack)


def right_ways(
    case: OperatorCase, no_compiling: str | None
) -> tuple[dict[str, Way], dict[str, str]]:
    """The ways whose result is right, and why the others are left out."""
    ways, left_out = dict(case.ways), {}
    if case.compiled:
        if no_compiling is None:
            ways[f"torch.compile of {EAGER}"] = ways[EAGER].compiled()
        else:
            left_out[f"torch.compile of {EAGER}"] = no_compiling
    right = {}
    for name, way in ways.items():
        try:
            verify(case, way)
            right[name] = way
        except Exception as error:  # a failure must not stop the other ways
            left_out[name] = reason(error)
    return right, left_out


@dataclass(frozen=True)
class Effort:
    rounds: int
    seconds: float  # of rounds of a case
    l2_bytes: int  # size of the L2 cache, which reads and writes should miss
    graphs: bool
    no_compiling: str | None = None  # the reason


def time_case(result: Measured, effort: Effort) -> None:
    """Fills the result. Raises the errors of rope_ext's calls, and WrongResult."""
    case = result.case
    torch.cuda.empty_cache()  # frees the memory of deleted graphs
    verify(case)
    ways, result.left_out = right_ways(case, effort.no_compiling)
    count = set_count(case.least_bytes, effort.l2_bytes)
    sets = [case.arguments() for _ in range(count)]
    timed = {
        OURS: Timed([case.call(arguments) for arguments in sets], effort.graphs),
        COPY: Timed(copies(case.least_bytes, count), effort.graphs),
    }
    for name, way in ways.items():
        try:
            timed[name] = Timed([way.call(arguments) for arguments in sets], effort.graphs)
        except Exception as error:
            result.left_out[name] = reason(error)
    result.ways = measure(timed, effort.rounds, effort.seconds)
    for name, way in timed.items():
        if way.no_graph is not None:
            result.left_out[f"{name} in a graph"] = way.no_graph


def setting(quick: bool, no_graphs: str | None) -> str:
    device = torch.cuda.get_device_properties("cuda")
    return (
        f"{device.name}, compute capability {device.major}.{device.minor}, "
        f"L2 {device.L2_cache_size >> 20} MiB, CUDA {torch.version.cuda}; "
        f"torch {torch.__version__}, rope_ext {rope_ext.__version__}; {time.strftime('%Y-%m-%d')}"
        + (f"; no graphs: {no_graphs}" if no_graphs else "")
        + "; few tokens, times mean nothing" * quick
    )


def slug(name: str) -> str:
    """A device's name for a file name: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run(patterns: list[str], quick: bool, rounds: int, out: Path | None) -> None:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # or a backward runs only once
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()), emulation():
        problems = run_cases(patterns, quick, rounds, out)
    if problems:
        raise SystemExit("failed:\n  " + "\n  ".join(problems))


def run_cases(patterns: list[str], quick: bool, rounds: int, out: Path | None) -> list[str]:
    """Returns the reasons why the run fails."""
    start, every, no_graphs = time.perf_counter(), cases(quick), why_no_graphs()
    about, stem = setting(quick, no_graphs), slug(torch.cuda.get_device_name())
    problems = [f"{name}: no case in operators_cuda.py" for name in without_case(every)]
    names = matching([case.label for case in every], patterns)
    plan = [case for case in every if case.label in names]
    plan.sort(key=lambda case: planned_seconds(case, quick))
    l2_bytes = 0 if quick else torch.cuda.get_device_properties("cuda").L2_cache_size
    effort = Effort(
        rounds, ROUNDS_SECONDS, l2_bytes, no_graphs is None, "--quick" if quick else None
    )
    rate = copy_rate(*(QUICK_COPY_BYTES,) * quick)
    print(f"{about}.\nA copy of memory: {1e-12 * rate:.3g} TB/s, read and written.")
    planned = sum(planned_seconds(case, quick) for case in plan)
    print(f"{len(plan)} cases, {planned:.0f} s planned; what takes longest comes last:")
    results: dict[str, Measured] = {}
    for case in plan:
        gone, planned = time.perf_counter() - start, planned_seconds(case, quick)
        if gone + planned > RUN_SECONDS:
            effort = replace(effort, seconds=0, no_compiling="no time left")
        print(f"{gone:5.0f} s, {planned:.1f} planned  {case.label}", end="", flush=True)
        result = results[case.label] = Measured(case, rate)
        try:
            time_case(result, effort)
            took = 1e6 * summary(result.ways[OURS].seconds).median
            print(f": {took:.4g} us, {1e6 * result.expected:.4g} expected, {result.verdict}")
        except Exception as error:
            result.failure = reason(error)
            problems.append(f"{case.label}: {result.failure}")
            print(f": FAILED, {result.failure}")
        in_order = [results[c.label] for c in every if c.label in results]
        if out is not None:
            paths = report_cuda.write_tables(out, stem, in_order, about, problems)
    print("\n" + report_cuda.markdown(in_order, about, problems))
    if out is not None:
        print("\n".join(map(str, [*paths, *chart_in(out, stem, in_order, about)])))
    return problems


def chart_in(out: Path, stem: str, results: list[Measured], about: str) -> list[Path]:
    timed = [result for result in results if result.failure is None]
    if not timed:
        return []
    if importlib.util.find_spec("matplotlib") is None:
        print("no chart: matplotlib is not installed")
        return []
    path = out / f"{stem}.png"
    report_cuda.chart(path, timed, about)
    return [path]
