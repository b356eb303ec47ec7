"""Times the rotation of q and k on a GPU, out of L2; run as `bench_rope.py --device cuda`.

Each call works on the next of several buffer sets, together more than four times the L2 cache, and
its result stays alive until its set comes round again: reads and writes go to memory. The tables
are shared, as the layers of a model share them. Times are between CUDA events around several calls
as Python makes them, so small shapes show the rate of launches. GB/s counts the fewest bytes that
the rotation needs (q, k and a float32 table in, q and k out), for everyone; `copy` is a device copy
of q and k in the same rounds.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from common import FIRST_POSITION, Case, microseconds
from rivals import RIVALS, Rotation, Skip, Tables
from torch import Tensor

import rope_ext

ROUND_SECONDS = 0.005
L2_MULTIPLE = 4
IN_PLACE, OUT_OF_PLACE = "rope_ext, in place", "rope_ext"
SECTOR = 32  # bytes: what memory moves at least


@dataclass
class BufferSet:
    q: Tensor  # [B, S, Hq, D], in front of k in `both`
    k: Tensor  # [B, S, Hk, D]
    both: Tensor  # [B * S * H * D]
    copy: Tensor  # as both
    result: object = None  # of the last call


def set_count(set_bytes: int, l2_bytes: int) -> int:
    """Sets of which calls touch set_bytes each, in all above L2_MULTIPLE L2 caches; at least 2."""
    return max(2, L2_MULTIPLE * l2_bytes // set_bytes + 1)


def channel_bytes(case: Case, itemsize: int, in_place: bool) -> int:
    """Of q and k: whole heads, or in place the sectors of their rotated channels."""
    head = case.head_dim * itemsize
    if in_place:
        head = min(head, -(-case.rotary_dim * itemsize // SECTOR) * SECTOR)
    return case.tokens * case.heads * head


def needed_bytes(case: Case, itemsize: int, in_place: bool) -> int:
    """Channels read and written, and a float32 table read."""
    return 2 * channel_bytes(case, itemsize, in_place) + case.seq * case.rotary_dim * 4


def call_count(seconds: float) -> int:
    """Calls of that length that fill a round."""
    return max(1, int(ROUND_SECONDS / max(seconds, 1e-7)))


def buffer_sets(case: Case, dtype: torch.dtype, count: int) -> list[BufferSet]:
    q_numel = case.tokens * case.q_heads * case.head_dim
    numel = case.tokens * case.heads * case.head_dim
    slab = torch.randn(count, numel, dtype=dtype, device="cuda")
    copies = torch.empty_like(slab)
    q_shape = (case.batch, case.seq, case.q_heads, case.head_dim)
    k_shape = (case.batch, case.seq, case.k_heads, case.head_dim)
    return [
        BufferSet(both[:q_numel].view(q_shape), both[q_numel:].view(k_shape), both, copy)
        for both, copy in zip(slab.unbind(0), copies.unbind(0), strict=True)
    ]


def tables_of(case: Case) -> Tables:
    inv_freq, _ = rope_ext.frequencies.default(case.head_dim, rotary_dim=case.rotary_dim)
    cos, sin = rope_ext.cos_sin_cache(inv_freq, case.seq, start=FIRST_POSITION)
    positions = torch.arange(FIRST_POSITION, FIRST_POSITION + case.seq).double()
    angles = (positions[:, None] * inv_freq.double()).float()
    return Tables(cos.cuda(), sin.cuda(), angles.cuda())


def check(case: Case, dtype: torch.dtype, tables: Tables, rotation: Rotation, slack: float) -> None:
    """Raises ValueError where q or k differs from float64 by more than slack times its maximum."""
    q, k = (
        torch.randn(case.batch, case.seq, heads, case.head_dim, dtype=dtype, device="cuda")
        for heads in (case.q_heads, case.k_heads)
    )
    exact = [
        rope_ext.reference.apply_rotary(
            x.double(), tables.cos.double(), tables.sin.double(), interleaved=case.interleaved
        )
        for x in (q, k)
    ]
    for name, got, expected in zip("qk", rotation(q, k), exact, strict=True):
        error = (got - expected).abs().max().item()
        allowed = slack * expected.abs().max().item()
        if not error <= allowed:
            raise ValueError(f"wrong {name}: error {error:.3g} above {allowed:.3g}")


def ours(case: Case, tables: Tables) -> dict[str, Rotation]:
    arguments = (tables.cos, tables.sin)
    options = {"interleaved": case.interleaved}

    def in_place(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        torch.ops.rope.apply_rotary_qk_(q, k, *arguments, **options)
        return q, k

    def out_of_place(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.rope.apply_rotary_qk(q, k, *arguments, **options)

    return {IN_PLACE: in_place, OUT_OF_PLACE: out_of_place}


def verified(case: Case, dtype: torch.dtype) -> tuple[dict[str, Rotation], list[str]]:
    """The rotations that give the right result, by name; and why the others are left out."""
    tables = tables_of(case)
    eps = torch.finfo(dtype).eps
    rotations = ours(case, tables)
    for name, rotation in rotations.items():
        try:
            check(case, dtype, tables, rotation, 2 * eps)
        except ValueError as error:
            raise SystemExit(f"{case.label(dtype)}, {name}: {error}") from error
    notes = []
    for name, rival in RIVALS.items():
        # Tables, products and sum rounded to the dtype: 1.5 eps of a pair's length, below sqrt(2)
        # times the maximum; and an angle rounded to float32 with the sine computed from it.
        slack = 3 * eps
        if rival.takes_angles:
            slack += (FIRST_POSITION + case.seq) * torch.finfo(torch.float32).eps
        try:
            rotation = rival.make(case, tables, dtype)
            check(case, dtype, tables, rotation, slack)
            rotations[name] = rotation
        except ImportError as error:
            notes.append(f"{name}: not importable ({error})")
        except Skip as error:
            notes.append(f"{name}, {case.label(dtype)}: {error}")
        except Exception as error:  # one that fails must not stop the others
            reason = (str(error).splitlines() or [""])[0]
            notes.append(f"{name}, {case.label(dtype)}: {type(error).__name__}: {reason}")
    return rotations, notes


def seconds_a_call(
    function: Callable[[BufferSet], object], ring: Iterator[BufferSet], calls: int
) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        buffers = next(ring)
        buffers.result = function(buffers)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def measure(
    functions: dict[str, Callable[[BufferSet], object]], sets: list[BufferSet], rounds: int
) -> dict[str, list[float]]:
    """Seconds a call, [rounds] for each function, interleaved, after a pass over all sets."""
    ring = itertools.cycle(sets)
    calls = {}
    for name, function in functions.items():
        seconds_a_call(function, ring, len(sets))  # the allocator has its blocks after this
        calls[name] = call_count(seconds_a_call(function, ring, min(len(sets), 20)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds_a_call(function, ring, calls[name]))
    return times


def bench(case: Case, dtype: torch.dtype, rounds: int, l2_bytes: int) -> list[str]:
    """Prints a row for each rotation, returns notes; l2_bytes: of the cache to be avoided."""
    rotations, notes = verified(case, dtype)
    least_touched = channel_bytes(case, dtype.itemsize, in_place=True)
    sets = buffer_sets(case, dtype, set_count(least_touched, l2_bytes))
    functions: dict[str, Callable[[BufferSet], object]] = {"copy": lambda b: b.copy.copy_(b.both)}
    for name, rotation in rotations.items():
        functions[name] = lambda b, rotation=rotation: rotation(b.q, b.k)
    times = measure(functions, sets, rounds)

    median = {name: statistics.median(t) for name, t in times.items()}
    copy_rate = 2 * channel_bytes(case, dtype.itemsize, in_place=False) / median["copy"]
    for name in functions:
        in_place = name == IN_PLACE or (name in RIVALS and RIVALS[name].in_place)
        rate, ratio = copy_rate, ""
        if name != "copy":
            rate = needed_bytes(case, dtype.itemsize, in_place) / median[name]
            ratio = f"{median[name] / median[IN_PLACE if in_place else OUT_OF_PLACE]:.2f}"
        share = f"{100 * rate / copy_rate:.0f}%"
        cells = [case.label(dtype), name, microseconds(times[name]), f"{1e-9 * rate:.4g}"]
        print("| " + " | ".join([*cells, share, ratio]) + " |", flush=True)
    return notes


def run(cases: list[Case], rounds: int, cold: bool) -> None:
    """Prints the table; without `cold` two buffer sets do, whatever the size of the L2 cache."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    print(
        f"{device.name}, compute capability {device.major}.{device.minor}, "
        f"L2 {device.L2_cache_size >> 20} MiB, CUDA {torch.version.cuda}"
    )
    print("\nMicroseconds: median (10th-90th percentile).\n")
    print("| case | way | microseconds | GB/s | share of copy | time / rope_ext |")
    print("|---" * 6 + "|")
    notes = []
    with torch.no_grad():
        for case in cases:
            for dtype in (torch.float32, torch.bfloat16):
                notes += bench(case, dtype, rounds, device.L2_cache_size if cold else 0)
    if notes:
        print("\nLeft out:\n\n" + "\n".join(f"- {note}" for note in dict.fromkeys(notes)))
