"""Times functions in interleaved rounds, so that other load slows all of them alike."""

import ctypes
import functools
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import rope_ext

ROUND_SECONDS = 0.005
LARGEST_HEAP_BLOCK = 32 << 20  # bytes; glibc's own limit
INSTRUCTION_SETS = re.compile(r"avx2|avx512(f|bw|dq|vl|_bf16|_fp16)|amx_\w+|asimdhp|bf16|sve2?")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Summary:
    """Times of one function over the rounds, in seconds; or their ratios to another's."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    best: float


def summary(values: list[float]) -> Summary:
    ordered = sorted(values)
    low, high = (ordered[round(p * (len(ordered) - 1))] for p in (0.1, 0.9))
    return Summary(statistics.median(ordered), low, high, ordered[0])


def ratio(times: list[float], to: list[float]) -> Summary:
    """Ratios of a function's times to another's in the same rounds; `best`: of the best rounds."""
    rounds = summary([a / b for a, b in zip(times, to, strict=True)])
    return Summary(rounds.median, rounds.low, rounds.high, min(times) / min(to))


def seconds_a_call(function: Callable[[], object], calls: int, new_memory: bool = False) -> float:
    """new_memory: free memory is returned to the system before each call."""
    if not new_memory:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    seconds = 0.0
    for _ in range(calls):
        give_back_free_memory()
        start = time.perf_counter()
        function()
        seconds += time.perf_counter() - start
    return seconds / calls


def measure(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    tick: Callable[[], object] = lambda: None,
    *,
    round_seconds: float = ROUND_SECONDS,
    new_memory: bool = False,
) -> dict[str, list[float]]:
    """Seconds a call, [rounds] for each function; a round is one call or fills round_seconds.

    Calls tick after each round. new_memory: results and temporary tensors lie in memory that the
    operating system provides again for each call. For large results that is always so. For smaller
    ones it depends on earlier frees, so this makes it the same for all.
    """
    calls = {}
    for name, function in functions.items():
        once = seconds_a_call(function, 1, new_memory)
        if once < round_seconds:
            once = seconds_a_call(function, 3, new_memory)
        calls[name] = max(1, int(round_seconds / max(once, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:  # each comes first in turn
            times[name].append(seconds_a_call(functions[name], calls[name], new_memory))
        tick()
    return times


@functools.cache
def c_library() -> ctypes.CDLL | None:
    """glibc, if it is the C library."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def settle_allocator() -> None:
    """Fixes glibc's thresholds at the values that freeing large blocks would lead to.

    A block of at least LARGEST_HEAP_BLOCK then lies in new memory, unless the heap has a hole.
    """
    if (library := c_library()) is not None:
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)
        library.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_HEAP_BLOCK)


def give_back_free_memory() -> None:
    if (library := c_library()) is not None:
        library.malloc_trim(0)


def machine() -> str:
    """The machine and the versions that the times depend on, in one line."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    info = rope_ext._C.build_info()
    return (
        f"{processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} processors, "
        f"load {load:.1f}; torch {torch.__version__}, rope_ext {rope_ext.__version__} "
        f"({info['cpu_capability']}); {time.strftime('%Y-%m-%d')}"
    )


@functools.cache
def cpuinfo() -> dict[str, str]:
    """The first processor in /proc/cpuinfo, if there is one."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def processor() -> str:
    """Its name, its family and model, and those of its instruction sets that kernels are for."""
    name = cpuinfo().get("model name") or platform.processor() or platform.machine()
    known = [f"{key} {cpuinfo()[key]}" for key in ("cpu family", "model") if key in cpuinfo()]
    flags = cpuinfo().get("flags", cpuinfo().get("Features", "")).split()  # x86, arm64
    known += filter(INSTRUCTION_SETS.fullmatch, flags)
    return f"{name} ({', '.join(known)})" if known else name
