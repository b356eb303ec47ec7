"""Numbered cases in a separate process, where a crash is a failure that names its case.

A case is made from its number alone, so the number suffices to run it again. Hypothesis would
shrink a case, but drawing one takes longer than running these, which describe themselves.
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
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PER_CASE = 60  # seconds after which a case hangs
KINDS_SHOWN = 20
MEMORY = 4 * 2**30  # that a case may take beyond what the process has at first

Attack = Callable[[int, Callable[[str], None]], None]  # (number, function that describes the case)


def survive(script: str, seconds: float) -> None:
    """Runs the cases of a script for some seconds. Fails if one fails, or ends the process."""
    with tempfile.NamedTemporaryFile("w+") as current:
        done = subprocess.run(
            [sys.executable, script, "--seconds", str(seconds), "--current", current.name],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
                "OMP_WAIT_POLICY": "PASSIVE",  # otherwise threads spin and slow other processes
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds + 10 * PER_CASE,
        )
        case = current.read().rstrip()
    print(done.stdout)
    ended = f"exit status {done.returncode}"
    if done.returncode < 0:
        ended = signal.Signals(-done.returncode).name
    assert done.returncode == 0, f"{ended}, the last was {case}\n{done.stdout[-8000:]}"


def main(script: str, attack: Attack) -> None:
    """Runs all cases until the time is over, or one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", type=int, help="run this one alone")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--current", default=os.devnull, help="where the case is written that runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)
    used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    if given.case is not None:
        return attack(given.case, print)
    sys.exit(_walk(script, attack, given.seconds, given.current))


def _walk(script: str, attack: Attack, seconds: float, current: str) -> int:
    file = os.open(current, os.O_WRONLY)
    command = f"PYTHONPATH=.:tests python {Path(script).relative_to(ROOT)}"
    failures: dict[str, str] = {}
    deadline = time.monotonic() + seconds
    said = ""

    for number in itertools.count():
        if time.monotonic() > deadline or len(failures) == KINDS_SHOWN:
            break

        def note(text: str, number: int = number) -> None:
            nonlocal said
            said = f"{command} {number}  # {text}"
            os.pwrite(file, said.encode().ljust(4000)[:4000], 0)

        signal.alarm(PER_CASE)
        try:
            attack(number, note)
        except Exception as error:
            if "DefaultCPUAllocator" in str(error):
                continue  # too large for memory
            kind = re.sub(r"\d+", "", f"{type(error).__name__} {said.split(';')[0]} {error}")[:160]
            if kind not in failures:
                failures[kind] = said
                print(f"{said}\n{traceback.format_exc()}", flush=True)
    signal.alarm(0)
    print(f"{number} cases, {len(failures)} kinds of failures")
    return min(len(failures), 1)
