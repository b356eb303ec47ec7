"""Writes roofline.md: the times that memory bandwidth allows, and the bytes of other methods.

    python benchmarks/roofline.py

Nothing is timed. An emulator of the CUDA runtime (see CONTRIBUTING.md; FAKEGPU_FOOTPRINT=1) counts
the bytes of rope_ext's kernels in a launch over at most 64 tokens, scaled per token. Without an
emulator the report uses the least bytes that the operation needs, and says so.
"""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import GPU_CASES, Case
from operator_case import POSITION_BYTES, SECTOR, TABLE_BYTES, in_sectors

import rope_ext

try:
    import fakegpu_torch
except ImportError:
    fakegpu_torch = None

COUNTED_TOKENS = 64
LAUNCH_US = 2.5  # assumed: 2 to 3 us between the starts of two kernels that Python launches


@dataclass(frozen=True)
class Gpu:
    name: str
    bandwidth: float  # bytes a second, of the data sheet
    l2_bytes: int


GPUS = [
    Gpu("H100 SXM", 3.35e12, 50 << 20),
    Gpu("A100 80GB SXM", 2.04e12, 40 << 20),
    Gpu("RTX 4090", 1.008e12, 72 << 20),
]

HEAD = """\
# Roofline: computed, not measured on a GPU

Written by `python benchmarks/roofline.py`. **No number here is a measured time**; those of an H100
are in [results/h100.md](results/h100.md). A floor is bytes
over the memory bandwidth of the data sheet, which no kernel quite reaches:
{bandwidths}.

{source}

## Floors of rope_ext

A call rotates q and k of one layer. Bytes per token: q and k in and out, and a row of the float32
tables cos and sin, [S, P] in prefill, [B, 1, P] in decode. In place moves the same bytes, but for
partial rotation, which leaves the rest of a head alone and has its own rows. 1 MB is 10^6 bytes.
`*`: the call moves fewer bytes than L2 holds, and can beat its floor where they are there already.
A floor below {launch} us, the assumed cost of a launch, is academic.

"""

RATIOS = """\
## What others must move

Computed, over rope_ext's in the same mode: bytes, and time on an {gpu} if a method takes the
longer of its floor and {launch} us a launch (assumed: 2 to 3). Above 1, rope_ext does less.

- **eager**, out of place: `x * cos + rotate_half(x) * sin` of Hugging Face, for q and for k. Where
  N channels turn:

  | pass | reads | writes |
  |---|---|---|
  | `-x2` | N/2 | N/2 |
  | `cat((-x2, x1))`, or `stack` if interleaved | N | N |
  | `x * cos` | N, cos | N |
  | `half * sin` | N, sin | N |
  | `+` | 2 N | N |
  | all | 5.5 N, cos, sin | 4.5 N |

  So 10 N where one pass moves 2 N, in 5 launches for q and 5 for k. Partial rotation adds a `cat`
  with the rest of the head: every channel once more in and out, 6 launches. cos and sin are in the
  model's dtype, with a column a channel. This is a lower bound: of sectors that a pass uses in part
  (interleaved, partial) only that part is counted, while rope_ext's sectors are counted whole.
- **two launches**, out of place: q and k by a kernel each: the same channels, the table twice.
- **vLLM-style**, in place: one launch, cos and sin in the model's dtype, an int64 position a token.
  In bfloat16 its table is half of rope_ext's, which is float32 by default to keep 16 more bits of
  each sine: up to 4% fewer bytes. How well a kernel asks for its bytes is not in this table.

Decode at batch 1 is bound by the latency of launches, not by bytes, as is every call whose floor is
below the cost of a launch: the ratio of times is the ratio of launches, if Python launches them; a
CUDA graph shrinks it. What fits in L2 stays there between eager's passes, which then cost less.

"""


def head_bytes(case: Case, itemsize: int, in_place: bool) -> int:
    """Bytes of a head that a call reads, and writes. In all cases heads start at sectors."""
    assert case.head_dim * itemsize % SECTOR == 0
    return in_sectors((case.rotary_dim if in_place else case.head_dim) * itemsize)


def least_bytes(case: Case, itemsize: int, in_place: bool) -> float:
    """Per token: each channel read and written once, and a row of the table."""
    channels = case.heads * head_bytes(case, itemsize, in_place)
    return 2 * channels + case.rotary_dim * TABLE_BYTES


def eager_bytes(case: Case, itemsize: int) -> float:
    rotated = case.heads * case.rotary_dim * itemsize
    rest = 2 * case.heads * case.head_dim * itemsize if case.rotary_dim < case.head_dim else 0
    return 10 * rotated + rest + 2 * 2 * case.rotary_dim * itemsize


def eager_launches(case: Case) -> int:
    return 2 * (6 if case.rotary_dim < case.head_dim else 5)


def vllm_bytes(case: Case, itemsize: int) -> float:
    channels = case.heads * head_bytes(case, itemsize, in_place=True)
    return 2 * channels + case.rotary_dim * itemsize + POSITION_BYTES


def can_count() -> bool:
    active = fakegpu_torch is not None and fakegpu_torch.active()
    return active and os.environ.get("FAKEGPU_FOOTPRINT") == "1"


def counted_bytes(case: Case, dtype: torch.dtype, in_place: bool) -> float:
    """Per token: distinct sectors that one launch over a few tokens reads and writes."""
    decode = case.seq == 1
    few = min(case.tokens, COUNTED_TOKENS)
    case = replace(case, batch=few if decode else 1, seq=1 if decode else few)
    q, k = (
        torch.randn(case.batch, case.seq, heads, case.head_dim).to(dtype).cuda()
        for heads in (case.q_heads, case.k_heads)
    )
    inv_freq, _ = rope_ext.frequencies.default(case.head_dim, rotary_dim=case.rotary_dim)
    positions = torch.arange(few).view(few, 1) if decode else torch.arange(few)
    cos, sin = (table.cuda() for table in rope_ext.cos_sin(inv_freq, positions))
    operator = torch.ops.rope.apply_rotary_qk_ if in_place else torch.ops.rope.apply_rotary_qk
    fakegpu_torch.reset()
    operator(q, k, cos, sin, interleaved=case.interleaved)
    report = fakegpu_torch.stats()
    (kernel,) = (k for n, k in report["kernels"].items() if "rope::" in n and k["launches"])
    if report["errors"] or kernel["launches"] != 1:
        raise SystemExit(f"{case.label(dtype)}: {kernel['launches']} launches, {report['errors']}")
    return (kernel["load_unique_sectors"] + kernel["store_unique_sectors"]) * SECTOR / few


def moved_bytes(case: Case, dtype: torch.dtype, in_place: bool, count: bool) -> float:
    """Bytes per token: counted, and checked against the least; or the least."""
    least = least_bytes(case, dtype.itemsize, in_place)
    moved = counted_bytes(case, dtype, in_place) if count else least
    if moved < least:
        raise SystemExit(f"{case.label(dtype)}: {moved} bytes a token, below the least, {least}")
    return moved


def floor_us(byte_count: float, gpu: Gpu) -> float:
    return 1e6 * byte_count / gpu.bandwidth


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def document(count: bool) -> str:
    floors, ratios, all_least = [], [], True
    for case in sorted(GPU_CASES, key=lambda case: case.name):
        for dtype in (torch.bfloat16, torch.float32):
            label, tokens, size = case.label(dtype), case.tokens, dtype.itemsize
            outside = moved_bytes(case, dtype, False, count)
            inside = moved_bytes(case, dtype, True, count)
            modes = {"": outside} if inside == outside else {"": outside, ", in place": inside}
            for mode, moved in modes.items():
                least = least_bytes(case, size, bool(mode))
                all_least &= moved == least
                row = [label + mode, f"{moved:,.0f}", f"{moved / least:.3f}"]
                row.append(f"{1e-6 * moved * tokens:.4g}")
                for gpu in GPUS:
                    mark = "*" if moved * tokens < gpu.l2_bytes else ""
                    row.append(f"{floor_us(moved * tokens, gpu):.4g}{mark}")
                floors.append(row)
            row = [label]
            for bytes_a_token, launches, ours in (
                (eager_bytes(case, size), eager_launches(case), outside),
                (outside + case.rotary_dim * TABLE_BYTES, 2, outside),
                (vllm_bytes(case, size), 1, inside),
            ):
                theirs = max(floor_us(bytes_a_token * tokens, GPUS[0]), launches * LAUNCH_US)
                time = theirs / max(floor_us(ours * tokens, GPUS[0]), LAUNCH_US)
                row += [f"{bytes_a_token / ours:.2f}", f"{time:.2f}"]
            ratios.append(row)
    source = "Bytes: the theoretical minimum; there was no emulator to count them with."
    if count:
        source = (
            "Bytes: distinct 32-byte sectors that the kernels touched in an emulator of the CUDA\n"
            f"runtime, in a launch over at most {COUNTED_TOKENS} tokens, scaled per token; "
        ) + ("all equal the minimum." if all_least else "see `moved / least`.")
    bandwidths = ", ".join(f"{gpu.name} {1e-12 * gpu.bandwidth:.4g} TB/s" for gpu in GPUS)
    floors_header = ["shape", "bytes per token", "moved / least", "MB"]
    floors_header += [f"{gpu.name}, us" for gpu in GPUS]
    methods = ("eager", "two launches", "vLLM-style, in place")
    ratios_header = ["shape", *(f"{m}: {what}" for m in methods for what in ("bytes", "time"))]
    return (
        HEAD.format(bandwidths=bandwidths, source=source, launch=LAUNCH_US)
        + table(floors_header, floors)
        + "\n"
        + RATIOS.format(gpu=GPUS[0].name, launch=LAUNCH_US)
        + table(ratios_header, ratios)
    )


if __name__ == "__main__":
    count = can_count()
    with fakegpu_torch.cpu_fallback() if count else contextlib.nullcontext():
        text = document(count)
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)
