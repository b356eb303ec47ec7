"""Prints the README's six rows of numbers, and draws its chart, from the results of the benchmarks.

`python benchmarks/overview.py docs/images/speed.png` draws; without an argument it only prints.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmark import FLOOR, OURS, PEER
from report import COLORS, row

RESULTS = Path(__file__).with_name("results")
GPU, CPU = "H100", "2 CPU cores"
GPU_CASES = {
    "Llama-3-8B prefill, B=1 S=4096, bfloat16": "4,096 tokens, bfloat16",
    "Llama-3-8B prefill, B=1 S=32768, bfloat16": "32,768 tokens, bfloat16",
    "Llama-3-8B decode, B=64 S=1, bfloat16": "decoding 64 sequences, bfloat16",
}
CPU_CASES = {
    "prefill 4096, fp32, in place": "4,096 tokens, float32",
    "prefill 4096, bf16, in place": "4,096 tokens, bfloat16",
    "decode 64, bf16, in place": "decoding 64 sequences, bfloat16",
}
WORDS = {
    FLOOR: "only moving the same bytes",
    OURS: "rope_ext, in place",
    PEER: "the fastest other",
}


def number(microseconds: float) -> str:
    return f"{microseconds:,.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


@dataclass
class Line:
    """Microseconds of q and k of Llama-3-8B, by kind; `other` is the fastest of the peers."""

    machine: str
    case: str
    times: dict[str, float]
    other: str

    def cells(self) -> list[str]:
        floor, ours, peer = (self.times[kind] for kind in (FLOOR, OURS, PEER))
        times = [number(floor), number(ours), f"{number(peer)} ({self.other})"]
        return [f"{self.machine}: {self.case}", *times, f"{peer / ours:.1f}"]


def line(machine: str, case: str, ways: list[tuple[str, str, float]]) -> Line:
    """ways: name, kind and median. The first of rope_ext is the one in place."""
    times = {kind: next(t for _, k, t in ways if k == kind) for kind in (FLOOR, OURS)}
    peers = [(t, name) for name, kind, t in ways if kind.startswith(PEER)]
    times[PEER], other = min(peers)
    return Line(machine, case, times, other.replace("torch.compile of eager", "torch.compile"))


def of_gpu() -> list[Line]:
    ways: dict[str, list[tuple[str, str, float]]] = {}
    for text in (RESULTS / "h100.md").read_text().splitlines():
        cells = [cell.strip() for cell in text.split("|")[1:-1]]
        if cells and cells[0] in GPU_CASES:
            kind = {"copy": FLOOR, "rope_ext, in place": OURS}.get(cells[1], PEER)
            if cells[1] != "rope_ext":
                ways.setdefault(cells[0], []).append((cells[1], kind, float(cells[2].split()[0])))
    return [line(GPU, words, ways[case]) for case, words in GPU_CASES.items()]


def of_cpu() -> list[Line]:
    with (RESULTS / "cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for case, words in CPU_CASES.items():
        ways = [(r["way"], r["kind"], float(r["median_us"])) for r in rows if r["case"] == case]
        lines.append(line(CPU, words, ways))
    return lines


def markdown() -> list[str]:
    return [row(each.cells()) for each in of_gpu() + of_cpu()]


def chart(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 2.1), layout="constrained")
    markers = {FLOOR: ("|", 260), OURS: ("o", 60), PEER: ("X", 60)}
    for axis, lines, machine in zip(axes, (of_gpu(), of_cpu()), (GPU, CPU), strict=True):
        for kind, (marker, size) in markers.items():
            xs = [each.times[kind] for each in lines]
            style = {"marker": marker, "s": size, "color": COLORS[kind], "zorder": 3}
            axis.scatter(xs, range(len(xs)), label=WORDS[kind], **style)
        for place, each in enumerate(lines):
            axis.plot([min(each.times.values()), max(each.times.values())], [place] * 2, "#d0d0d0")
            name = each.other.partition(",")[0].replace("transformers", "compiled")
            style = {"xytext": (6, -3), "textcoords": "offset points", "fontsize": 7}
            axis.annotate(name, (each.times[PEER], place), **style)
        axis.set_yticks(range(len(lines)), [each.case for each in lines], fontsize=8)
        axis.set_xscale("log")
        axis.set_xlabel("microseconds, logarithmic; left is faster", fontsize=8)
        axis.set_title(machine, loc="left", fontsize=9)
        axis.margins(x=0.2, y=0.3)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    if sys.argv[1:]:
        chart(Path(sys.argv[1]))
    print("\n".join(markdown()))
