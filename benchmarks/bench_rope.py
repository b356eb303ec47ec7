"""Times rope_ext against what moving the bytes takes, and against other libraries.

    python benchmarks/bench_rope.py [--quick] [--case NAME ...] [--out DIR]   # on the CPU
    python benchmarks/bench_rope.py --device cuda                             # see bench_cuda.py

Every result is verified against float64 before it is timed. On the CPU, each case has a goal: a
ratio to a floor, which carries over between machines where times do not. cases_cpu.py lists cases
and goals; floors.cpp has the floors; rivals_cpu.py the other libraries, of which those that are not
installed are left out (pip install 'rope_ext[bench]' has them). --out writes Markdown, CSV and a
chart. Close what else uses the processor: a goal is judged by medians.
"""

import argparse
from pathlib import Path

import torch
<<<<<<< HEAD
from common import CPU_CASES, GPU_CASES, Case, microseconds
from rivals import eager, widened

import rope_ext


def measure(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds a call, [rounds] for each function, interleaved; a round takes 5 ms or one call."""
    repeats = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        repeats[name] = max(1, int(0.005 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


@torch.inference_mode()
def bench(case: Case, dtype: torch.dtype, rounds: int) -> None:
    q = torch.randn(case.batch, case.seq, case.q_heads, case.head_dim, dtype=dtype)
    k = torch.randn(case.batch, case.seq, case.k_heads, case.head_dim, dtype=dtype)
    inv_freq, _ = rope_ext.frequencies.default(case.head_dim, rotary_dim=case.rotary_dim)
    cos, sin = rope_ext.cos_sin_cache(inv_freq, case.seq)
    options = {**case.options, "interleaved_out": case.interleaved_out}
    halves_out = case.interleaved and case.interleaved_out is False
    interleaved = case.interleaved and not halves_out
    wide_cos = widened(cos, interleaved)[None, :, None].to(dtype)
    wide_sin = widened(sin, interleaved)[None, :, None].to(dtype)

    def eagerly(x: torch.Tensor) -> torch.Tensor:
        """The last channels are cut off, and put back; halves are made of neighbours first."""
        if case.rotary_offset == 0:
            return eager(x, wide_cos, wide_sin, interleaved)
        kept, last = x[..., : case.rotary_offset], x[..., case.rotary_offset :]
        if halves_out:
            last = last.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return torch.cat((kept, eager(last, wide_cos, wide_sin, interleaved)), -1)

    exact = rope_ext.reference.apply_rotary(q.double(), cos.double(), sin.double(), **options)
    error = (rope_ext.apply_rotary(q, cos, sin, **options) - exact).abs().max().item()
    allowed = 2.0 * torch.finfo(dtype).eps * exact.abs().max().item()
    if error > allowed:
        raise SystemExit(f"{case.name}: wrong result, error {error:.3g} above {allowed:.3g}")

    functions: dict[str, Callable[[], object]] = {
        "in place": lambda: torch.ops.rope.apply_rotary_qk_(q, k, cos, sin, **case.options),
        "floor rmw": lambda: (q.mul_(1), k.mul_(1)),
        "out of place": lambda: torch.ops.rope.apply_rotary_qk(q, k, cos, sin, **options),
        "floor clone": lambda: (q.clone(), k.clone()),
        "eager": lambda: (eagerly(q), eagerly(k)),
    }
    times = measure(functions, rounds)
    median = {name: statistics.median(t) for name, t in times.items()}
    row = [case.label(dtype), *(microseconds(times[function]) for function in functions)]
    row.append(f"{median['in place'] / median['floor rmw']:.2f}")
    row.append(f"{median['out of place'] / median['floor clone']:.2f}")
    row.append(f"{median['eager'] / median['out of place']:.1f}")
    print("| " + " | ".join(row) + " |", flush=True)


def run(cases: list[Case], rounds: int) -> None:
    print("\nMicroseconds: median (10th-90th percentile).\n")
    print(
        "| case | in place | rmw | out of place | clone | eager | in place / rmw "
        "| out of place / clone | eager / out of place |"
    )
    print("|---" * 9 + "|")
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16):
            bench(case, dtype, rounds)
=======

import rope_ext

ROUNDS, QUICK_ROUNDS = 30, 3
>>>>>>> bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--quick", action="store_true", help="about a minute: does everything run?")
    parser.add_argument("--case", action="append", default=[], help="CPU: cases with this in them")
    parser.add_argument("--out", type=Path, help="CPU: folder for bench_rope.md, .csv and .png")
    parser.add_argument("--max-tokens", type=int, help="CPU: of a case; for tests")
    arguments = parser.parse_args()
<<<<<<< HEAD
    cases = GPU_CASES if arguments.device == "cuda" else CPU_CASES
=======
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.device == "cuda":
        run_cuda(arguments)
        return
    import bench_cpu
    from benchmark import Options

    bench_cpu.run(
        bench_cpu.chosen(arguments.case),
        Options(arguments.quick, arguments.max_tokens),
        arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS),
        arguments.out,
    )


def run_cuda(arguments: argparse.Namespace) -> None:
    import bench_cuda
    from common import GPU_CASES

    cases = GPU_CASES
>>>>>>> bench
    if arguments.quick:
        cases = [case.with_few_tokens() for case in cases]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rope_ext.__version__}")
    bench_cuda.run(cases, arguments.rounds or ROUNDS, cold=not arguments.quick)


if __name__ == "__main__":
    main()
