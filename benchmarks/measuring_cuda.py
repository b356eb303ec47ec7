"""Times calls on a GPU: in a CUDA graph, which has no launch cost on the host, and eagerly.

The calls of a way cycle through several sets of tensors, together more than four times the L2
cache, and each result stays alive until its set is used again: reads and writes go to memory. There
are at most 64 sets. Sets of a few tokens stay in L2, like the output of the previous layer.
"""

import contextlib
import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from operator_case import Call
from other_libraries import reason

L2_MULTIPLE, MOST_SETS = 4, 64
CALLS_IN_A_GRAPH = 20  # at least
BATCH_SECONDS = 0.002  # of the calls between two events
EAGER_CALLS = (3, 200)  # in a batch: at least, at most
LEAST_ROUNDS = 3
COPY_BYTES = 1 << 30


def set_count(set_bytes: int, l2_bytes: int) -> int:
    """Number of sets, each of set_bytes, that exceed L2_MULTIPLE L2 caches together; at least 2."""
    return max(2, min(MOST_SETS, L2_MULTIPLE * l2_bytes // set_bytes + 1))


def copies(byte_count: int, count: int) -> list[Call]:
    """Device copies that read and write byte_count bytes in all."""
    pairs = [
        torch.zeros(2, byte_count // 2, dtype=torch.uint8, device="cuda") for _ in range(count)
    ]
    return [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]


def copy_rate(byte_count: int = 2 * COPY_BYTES) -> float:
    """Bytes a second, read and written, of the fastest of some copies larger than the caches."""
    (copy,) = copies(byte_count, 1)
    copy()
    several = 4
    seconds = min(
        seconds_between_events(lambda: [copy() for _ in range(several)]) for _ in range(10)
    )
    return several * byte_count / seconds


def seconds_between_events(launch: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    launch()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


@dataclass
class Times:
    """Seconds a call, [rounds] each."""

    graph: list[float] = field(default_factory=list)  # empty without a graph
    eager: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # until the call has returned

    @property
    def seconds(self) -> list[float]:
        """The times in a graph, if there is one, else eager."""
        return self.graph or self.eager


class Timed:
    """The calls of a way, one for each set of tensors, in a graph and eagerly."""

    def __init__(self, calls: list[Call], graphs: bool = True) -> None:
        self.calls = calls
        self.results: list[object] = [None] * len(calls)
        self.times = Times()
        self.no_graph: str | None = None  # the reason
        for _ in range(2):  # compiles, and fills the allocator's cache
            self._launch(len(calls))
        torch.cuda.synchronize()
        once = seconds_between_events(lambda: self._launch(len(calls))) / len(calls)
        least, most = EAGER_CALLS
        self.eager_calls = min(most, max(least, int(BATCH_SECONDS / max(once, 1e-7))))
        self._captured = None
        if not graphs:
            return
        try:
            self._captured, self._kept = self._capture()
        except Exception as error:
            self.no_graph = reason(error)
            return
        self._captured.replay()
        seconds = seconds_between_events(self._captured.replay)
        self.replays = max(1, int(BATCH_SECONDS / max(seconds, 1e-7)))

    def _launch(self, count: int) -> None:
        for i in range(count):
            self.results[i % len(self.calls)] = self.calls[i % len(self.calls)]()

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, list[object]]:
        """A graph of calls that cycle through the sets, and their results."""
        self.calls_in_graph = -(-CALLS_IN_A_GRAPH // len(self.calls)) * len(self.calls)
        graph, kept = torch.cuda.CUDAGraph(), [None] * len(self.calls)
        gc.disable()  # freeing an unrelated tensor could end the capture
        try:
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for i in range(self.calls_in_graph):
                    kept[i % len(kept)] = self.calls[i % len(kept)]()
            except Exception:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        finally:
            gc.enable()
        return graph, kept

    def time_round(self) -> None:
        if self._captured is not None:
            self._captured.replay()  # keeps the GPU busy during the timed launches
            seconds = seconds_between_events(
                lambda: [self._captured.replay() for _ in range(self.replays)]
            )
            self.times.graph.append(seconds / (self.replays * self.calls_in_graph))
        torch.cuda.synchronize()
        self.times.eager.append(seconds_between_events(self._launch_batch) / self.eager_calls)

    def _launch_batch(self) -> None:
        start = time.perf_counter()
        self._launch(self.eager_calls)
        self.times.host.append((time.perf_counter() - start) / self.eager_calls)


def why_no_graphs() -> str | None:
    """The reason why there are no CUDA graphs, or None."""
    return Timed(copies(64, 1)).no_graph


def measure(ways: dict[str, Timed], rounds: int, seconds: float) -> dict[str, Times]:
    """Times in interleaved rounds, up to a number of rounds or of seconds."""
    end = time.perf_counter() + seconds
    names = list(ways)
    for done in itertools.count(1):
        for name in names[done % len(names) :] + names[: done % len(names)]:
            ways[name].time_round()
        if done >= rounds or (done >= LEAST_ROUNDS and time.perf_counter() > end):
            return {name: timed.times for name, timed in ways.items()}
