"""Runs programs at the same time until a deadline, each with a log."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

GRACE = 8  # seconds from the interrupt, after which a program may still report, to the kill


@dataclass
class Job:
    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)  # in addition to the common environment


def run_all(
    jobs: Iterable[Job], *, cwd: Path, env: dict[str, str], logs: Path, deadline: float
) -> dict[str, int | None]:
    """Exit statuses by name, None: interrupted before the deadline (of time.monotonic).

    The output of a job is in logs/NAME.log.
    """
    processes: dict[str, subprocess.Popen] = {}
    with contextlib.ExitStack() as stack:
        for job in jobs:
            process = subprocess.Popen(
                job.command,
                cwd=cwd,
                env=env | job.env,
                stdin=subprocess.DEVNULL,
                stdout=stack.enter_context((logs / f"{job.name}.log").open("w")),
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=interruptible,
            )
            stack.callback(kill_group, process)
            processes[job.name] = process
        wait(processes.values(), deadline - GRACE)
        late = {name for name, process in processes.items() if process.poll() is None}
        for name in late:
            processes[name].send_signal(signal.SIGINT)
        wait(processes.values(), deadline)
    return {n: None if n in late else p.returncode for n, p in processes.items()}


def interruptible() -> None:
    """Programs that a shell starts with `&` ignore SIGINT, and so do theirs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait(processes: Iterable[subprocess.Popen], until: float) -> None:
    """Waits until all have ended, or until the time `until`."""
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))


def kill_group(process: subprocess.Popen) -> None:
    """Kills the program and its child processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
