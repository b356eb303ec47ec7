"""A benchmark case: functions to be timed side by side, and its goals."""

from collections.abc import Callable
from dataclasses import dataclass, field

OURS, FLOOR, PEER = "rope_ext", "floor", "peer"
PEER_GIVEN_OUTPUTS = "peer, given outputs"  # writes into existing memory
PEER_IN_PLACE = "peer, in place"


@dataclass(frozen=True)
class Goal:
    """`way` takes at most `limit` times as long as `floor`; without a floor, `limit` seconds."""

    way: str
    floor: str | None
    limit: float


@dataclass
class Benchmark:
    """Functions by name. kind: one of the constants above."""

    goals: list[Goal]
    functions: dict[str, Callable[[], object]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # name -> reason

    def add(self, kind: str, name: str, function: Callable[[], object]) -> None:
        self.functions[name] = function
        self.kinds[name] = kind


@dataclass(frozen=True)
class Options:
    quick: bool = False
    max_tokens: int | None = None  # limit for a case, for tests
    peers: list[str] = field(default_factory=list)  # parts of their names; empty: all


@dataclass(frozen=True)
class CpuCase:
    name: str
    make: Callable[[Options], Benchmark]
    inference: bool = True  # made and timed in inference mode
    new_memory: bool = True  # see measuring.measure
