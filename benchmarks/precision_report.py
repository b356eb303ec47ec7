"""Writes the results of precision.py as Markdown, CSV and a chart."""

import csv
from dataclasses import dataclass
from pathlib import Path

from rope_ext.viz.figures.style import new_figure, save, styled

QUANTITIES = {
    "table": "Tables: error of cos and sin, absolute",
    "ulp": "Tables of rope_ext: the same in units in the last place of their dtype",
    "frequency": "Angles against the formula of inv_freq: radians",
    "rotation": "A rotated bfloat16 vector: error of a pair, relative to its length",
    "score": "Score of two tokens 1 to 64 apart, q · k / sqrt(D): off from that at position 0",
}
CHARTED_BASE = 500_000
CHARTED = {
    "table": [
        "rope_ext",
        "usual",
        "usual, inv_freq cast to float16",
        "usual, inv_freq cast to bfloat16",
        "usual, positions in bfloat16",
        "usual, table in bfloat16",
    ],
    "score": [
        "rope_ext, float32",
        "transformers, float32",
        "rope_ext, bfloat16",
        "transformers, bfloat16",
    ],
}


@dataclass(frozen=True)
class Row:
    """An error of a way: the largest, and the one that 99% of the errors do not exceed."""

    quantity: str
    base: float
    way: str
    context: int
    largest: float
    high: float


def markdown(rows: list[Row], setting: str) -> str:
    """A section for each quantity, a column for each context."""
    contexts = sorted({row.context for row in rows})
    what = "The largest error of all positions, pairs and heads (and what 99% do not exceed)."
    lines = [f"{setting}.", "", what]
    for quantity, what in QUANTITIES.items():
        cells: dict[tuple, list[str]] = {}
        for row in sorted((r for r in rows if r.quantity == quantity), key=lambda r: r.context):
            digits = 4 if quantity == "ulp" else 2  # half a unit is the least possible
            cell = f"{row.largest:.{digits}g} ({row.high:.{digits}g})"
            cells.setdefault((row.base, row.way), []).append(cell)
        lines += ["", f"## {what}", ""]
        lines.append(f"| base | way | {' | '.join(f'{context:,}' for context in contexts)} |")
        lines.append("|---" * (2 + len(contexts)) + "|")
        for (base, way), of in cells.items():
            lines.append(f"| {base:,.0f} | {way} | {' | '.join(of)} |")
    return "\n".join(lines) + "\n"


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["quantity", "base", "way", "context", "largest", "quantile_99"])
        for row in rows:
            figures = (f"{x:.4g}" for x in (row.largest, row.high))
            writer.writerow([row.quantity, f"{row.base:.0f}", row.way, row.context, *figures])


@styled
def chart(path: Path, rows: list[Row]) -> None:
    """The largest error of tables and of scores against the context."""
    figure = new_figure(f"Largest error, base {CHARTED_BASE:,}, head_dim 128", 11, 5)
    for axes, (quantity, ways) in zip(figure.subplots(1, 2), CHARTED.items(), strict=True):
        for way in ways:
            of = [r for r in rows if (r.quantity, r.way, r.base) == (quantity, way, CHARTED_BASE)]
            axes.plot([r.context for r in of], [r.largest for r in of], label=way, marker=".")
        axes.set(xscale="log", yscale="log", xlabel="context (tokens)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize="small")
    figure.axes[0].set_ylabel("cos and sin, absolute")
    figure.axes[1].set_ylabel("score of two tokens 1 to 64 apart")
    save(figure, path)


def write(folder: Path, rows: list[Row], setting: str) -> None:
    """Writes precision.md, precision.csv and precision.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "precision.md").write_text(f"# precision\n\n{markdown(rows, setting)}")
    write_csv(folder / "precision.csv", rows)
    chart(folder / "precision.png", rows)
