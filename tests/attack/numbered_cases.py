"""Numbered cases in a separate process, where a crash is a failure that names its case.

A case is made from its number alone, so the number suffices to run it again:
`PYTHONPATH=.:tests python tests/attack/test_memory.py 1234`. Hypothesis would shrink a case, but
drawing one takes longer than running these, which describe themselves.

ROPE_EXT_ATTACK_SECONDS is the time to spend; without it, tests have a fixed number of cases.
"""

import argparse
import faulthandler
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PER_CASE = 60  # seconds after which a case hangs
KINDS_SHOWN = 20
MEMORY = 4 * 2**30  # that a case may take beyond what the process has at first

RunCase = Callable[[int, Callable[[str], None]], None]  # (number, function that describes the case)


def numbers(count: int) -> Iterator[int]:
    """0, 1, 2, ... below count, or until ROPE_EXT_ATTACK_SECONDS are over."""
    if "ROPE_EXT_ATTACK_SECONDS" not in os.environ:
        return iter(range(count))
    end = time.monotonic() + float(os.environ["ROPE_EXT_ATTACK_SECONDS"])
    return itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())


def run_in_a_process(script: str, count: int) -> None:
    """Runs `count` cases of a script. Fails if one fails, or ends the process."""
    with tempfile.NamedTemporaryFile("w+") as current:
        done = subprocess.run(
            [sys.executable, script, "--count", str(count), "--current", current.name],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
                "OMP_WAIT_POLICY": "PASSIVE",  # otherwise threads spin and slow other processes
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        case = current.read().rstrip()
    print(done.stdout)
    ended = f"exit status {done.returncode}"
    if done.returncode < 0:
        ended = signal.Signals(-done.returncode).name
    assert done.returncode == 0, f"{ended}, the last was {case}\n{done.stdout[-8000:]}"


def main(script: str, run_case: RunCase) -> None:
    """Runs many cases, or one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", type=int, help="run this one alone")
    parser.add_argument("--count", type=int, default=1000, help="of cases, from 0 on")
    parser.add_argument("--current", default=os.devnull, help="where the case is written that runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)
    used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    if given.case is not None:
        return run_case(given.case, print)
    command = f"PYTHONPATH=.:tests python {Path(script).relative_to(ROOT)}"
    sys.exit(_run_all(command, run_case, numbers(given.count), os.open(given.current, os.O_WRONLY)))


def _run_all(command: str, run_case: RunCase, cases: Iterator[int], current: int) -> int:
    failures: dict[str, str] = {}
    said, number = "", 0

    for number in cases:
        if len(failures) == KINDS_SHOWN:
            break

        def note(text: str, number: int = number) -> None:
            nonlocal said
            said = f"{command} {number}  # {text}"
            os.pwrite(current, said.encode().ljust(4000)[:4000], 0)

        signal.alarm(PER_CASE)
        try:
            run_case(number, note)
        except Exception as error:
            if "DefaultCPUAllocator" in str(error):
                continue  # too large for memory
            kind = re.sub(r"\d+", "", f"{type(error).__name__} {said.split(';')[0]} {error}")[:160]
            if kind not in failures:
                failures[kind] = said
                print(f"{said}\n{traceback.format_exc()}", flush=True)
    signal.alarm(0)
    print(f"{number + 1} cases, {len(failures)} kinds of failures")
    return min(len(failures), 1)
