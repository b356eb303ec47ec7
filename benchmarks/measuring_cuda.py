"""Times calls on a GPU: in a CUDA graph, which leaves the cost of launches to nobody, and as Python
makes them.

The calls of a way go round several sets of tensors, together more than four times the L2 cache, and
each result stays alive until its set comes round again: reads and writes go to memory. There are at
most 64 sets, and those of a few tokens stay in L2, as what the layer before has just written does.
"""

import contextlib
import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from operator_case import Call
from rivals import reason

L2_MULTIPLE, MOST_SETS = 4, 64
CALLS_IN_A_GRAPH = 20  # at least
BATCH_SECONDS = 0.002  # of calls between two events
EAGER_CALLS = (3, 200)  # in a batch: at least, at most
LEAST_ROUNDS = 3
COPY_BYTES = 1 << 30


def set_count(set_bytes: int, l2_bytes: int) -> int:
    """Sets of which calls touch set_bytes each, in all above L2_MULTIPLE L2 caches; at least 2."""
    return max(2, min(MOST_SETS, L2_MULTIPLE * l2_bytes // set_bytes + 1))


def copies(byte_count: int, count: int) -> list[Call]:
    """Device copies that read and write so many bytes together."""
    pairs = [
        torch.zeros(2, byte_count // 2, dtype=torch.uint8, device="cuda") for _ in range(count)
    ]
    return [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]


def copy_rate(byte_count: int = 2 * COPY_BYTES) -> float:
    """Bytes a second, read and written, of the fastest of some copies past every cache."""
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
        """In a graph, where there is one."""
        return self.graph or self.eager


class Timed:
    """The calls of a way, one for each set of tensors, in and out of a graph."""

    def __init__(self, calls: list[Call], graphs: bool = True) -> None:
        self.calls = calls
        self.results: list[object] = [None] * len(calls)
        self.times = Times()
        self.no_graph: str | None = None  # the reason
        for _ in range(2):  # compiles, and the allocator has its blocks after this
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
        """A graph of calls that go round the sets, and what they return."""
        self.calls_in_graph = -(-CALLS_IN_A_GRAPH // len(self.calls)) * len(self.calls)
        graph, kept = torch.cuda.CUDAGraph(), [None] * len(self.calls)
        gc.disable()  # what is freed elsewhere could end the capture
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
            self._captured.replay()  # the GPU is busy while what is timed is launched
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
    """Where there are no CUDA graphs: why."""
    return Timed(copies(64, 1)).no_graph


def measure(ways: dict[str, Timed], rounds: int, seconds: float) -> dict[str, Times]:
    """Of interleaved rounds, so many or for so long."""
    end = time.perf_counter() + seconds
    names = list(ways)
    for done in itertools.count(1):
        for name in names[done % len(names) :] + names[: done % len(names)]:
            ways[name].time_round()
        if done >= rounds or (done >= LEAST_ROUNDS and time.perf_counter() > end):
            return {name: timed.times for name, timed in ways.items()}
