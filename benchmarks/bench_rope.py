"""Times rope_ext against the time to move its bytes, and against other libraries.

    python benchmarks/bench_rope.py [--quick] [--case NAME ...] [--out DIR]   # on the CPU
    python benchmarks/bench_rope.py --device cuda [the same]                  # see bench_cuda.py

Every result is verified against float64 before it is timed. On the CPU, each case has a goal: a
ratio to a floor, which is comparable between machines, unlike times. cases_cpu.py lists cases and
goals, floors.cpp has the floors, and other_libraries_cpu.py has the other libraries; those that are
not installed are left out (pip install 'rope_ext[bench]' installs most of them, and
other_libraries_cpu.py says how to install the rest). --out writes Markdown, CSV and a chart. Stop
other programs first: a goal is judged by medians.
"""

import argparse
from pathlib import Path

import torch

ROUNDS, QUICK_ROUNDS = 30, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--quick", action="store_true", help="about a minute: does everything run?")
    parser.add_argument("--case", action="append", default=[], help="cases with this in their name")
    parser.add_argument("--peer", action="append", default=[], help="CPU: libraries, as --case")
    parser.add_argument("--out", type=Path, help="folder for bench_rope.md or GPU.md, .csv, .png")
    parser.add_argument("--max-tokens", type=int, help="CPU: of a case; for tests")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    if arguments.device == "cuda":
        import bench_cuda

        bench_cuda.run(arguments.case, arguments.quick, rounds, arguments.out)
        return
    import bench_cpu
    from benchmark import Options

    bench_cpu.run(
        bench_cpu.chosen(arguments.case),
        Options(arguments.quick, arguments.max_tokens, arguments.peer),
        rounds,
        arguments.out,
    )


if __name__ == "__main__":
    main()
