"""The report of the CPU benchmark: Markdown tables, a CSV file and a chart."""

import csv
from dataclasses import dataclass
from pathlib import Path

from benchmark import FLOOR, OURS, PEER, PEER_GIVEN_OUTPUTS, PEER_IN_PLACE, Goal
from measuring import Summary, ratio, summary

COLORS = {
    OURS: "#2a78b5",
    FLOOR: "#9a9a9a",
    PEER: "#d9822b",
    PEER_GIVEN_OUTPUTS: "#e8b27a",
    PEER_IN_PLACE: "#c0504d",
}
REACHED, MISSED, NOT_MEASURED = "reached", "**missed**", "not measured"
CSV_COLUMNS = (
    *("case", "way", "kind", "rounds", "median_us", "p10_us", "p90_us", "best_us"),
    *("floor", "ratio", "ratio_p10", "ratio_p90", "ratio_best", "goal", "fastest_peer"),
    *("peer_median_over_way",),
)


@dataclass
class Result:
    """The times of one case: seconds a call, [rounds] for each way, in the same rounds."""

    case: str
    goals: list[Goal]
    times: dict[str, list[float]]
    kinds: dict[str, str]
    left_out: dict[str, str]

    def fastest_peer(self, way: str) -> str | None:
        """The fastest of those that write into new or into existing memory as `way` does."""
        goal = self.goal_of(way)
        new_memory = goal is not None and (goal.floor or "").startswith("clone")
        kinds = (PEER,) if new_memory else (PEER, PEER_GIVEN_OUTPUTS, PEER_IN_PLACE)
        peers = [name for name, kind in self.kinds.items() if kind in kinds]
        return min(peers, key=lambda name: summary(self.times[name]).median, default=None)

    def goal_of(self, way: str) -> Goal | None:
        return next((goal for goal in self.goals if goal.way == way), None)

    def measured(self, goal: Goal) -> Summary | None:
        """The ratio to the floor, or microseconds without a floor; None if it was not timed."""
        if goal.way not in self.times:
            return None
        if goal.floor is None:
            of = summary(self.times[goal.way])
            return Summary(*(1e6 * t for t in (of.median, of.low, of.high, of.best)))
        return ratio(self.times[goal.way], self.times[goal.floor])

    def verdict(self, goal: Goal) -> str:
        measured = self.measured(goal)
        if measured is None:
            return NOT_MEASURED
        limit = goal.limit if goal.floor else 1e6 * goal.limit
        return REACHED if measured.median <= limit else MISSED


def number(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


def times_cell(times: list[float]) -> str:
    of = summary(times)
    return f"{number(1e6 * of.median)} ({number(1e6 * of.low)}-{number(1e6 * of.high)})"


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def goal_line(result: Result, goal: Goal) -> str:
    """A row of the table of goals."""
    measured = result.measured(goal)
    meant = f"<= {goal.limit:.2f} {goal.floor}" if goal.floor else f"< {1e6 * goal.limit:.4g} us"
    cells = [result.case, goal.way, meant, result.verdict(goal)]
    if measured is None:
        return row([*cells, result.left_out.get(goal.way, ""), "", ""])
    unit = "" if goal.floor else " us"
    peer = result.fastest_peer(goal.way)
    against = ""
    if peer is not None:
        against = f"{ratio(result.times[peer], result.times[goal.way]).median:.1f} ({peer})"
    return row(
        [
            *cells,
            f"{measured.median:.2f} ({measured.low:.2f}-{measured.high:.2f}){unit}",
            f"{measured.best:.2f}",
            against,
        ]
    )


FLOORS = (
    "Floors: `rmw` reads, modifies and writes the same bytes, called as an operator with the same "
    "arguments; `null` is such an operator that does nothing; `mul_` multiplies q and k by 1 in "
    "place; `neg_` negates the same bytes as int32; `clone` copies into new memory; "
    "`copy` copies into memory in use, past the caches; `fill` writes a new table."
)


def goals_table(results: list[Result]) -> list[str]:
    lines = [goal_line(result, goal) for result in results for goal in result.goals]
    if not lines:
        return []
    columns = "| case | way | goal | | measured | best rounds | fastest peer / rope_ext |"
    return ["", FLOORS, "", columns, "|---" * 7 + "|", *lines]


def case_table(result: Result) -> list[str]:
    """Every way of a case; the last column is relative to the first way of rope_ext."""
    first = next(name for name, kind in result.kinds.items() if kind == OURS)
    lines = [f"### {result.case}", "", f"| way | | microseconds | / floor | / {first} |"]
    lines.append("|---" * 5 + "|")
    for name, times in result.times.items():
        goal = result.goal_of(name)
        floor = goal.floor if goal else None
        cells = [name, result.kinds[name], times_cell(times)]
        cells.append(f"{ratio(times, result.times[floor]).median:.2f}" if floor else "")
        lines.append(row([*cells, f"{ratio(times, result.times[first]).median:.3f}"]))
    if result.left_out:
        lines += ["", *(f"- {name} left out: {why}" for name, why in result.left_out.items())]
    return lines


def markdown(results: list[Result], setting: str) -> str:
    lines = [
        f"{setting}.",
        "",
        "Microseconds, ratios: median of interleaved rounds (10th-90th percentile). A ratio is "
        "taken round by round; `best rounds` is that of the fastest rounds of each.",
        *goals_table(results),
    ]
    for result in results:
        lines += ["", *case_table(result)]
    return "\n".join(lines) + "\n"


def write_csv(path: Path, results: list[Result]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        for result in results:
            for name, times in result.times.items():
                of = summary(times)
                line = {
                    "case": result.case,
                    "way": name,
                    "kind": result.kinds[name],
                    "rounds": len(times),
                    "median_us": f"{1e6 * of.median:.4f}",
                    "p10_us": f"{1e6 * of.low:.4f}",
                    "p90_us": f"{1e6 * of.high:.4f}",
                    "best_us": f"{1e6 * of.best:.4f}",
                }
                goal = result.goal_of(name)
                if goal is not None:
                    line["goal"] = f"{goal.limit:g}"
                if goal is not None and goal.floor is not None:
                    to = ratio(times, result.times[goal.floor])
                    line |= {"floor": goal.floor, "ratio": f"{to.median:.4f}"}
                    line |= {"ratio_p10": f"{to.low:.4f}", "ratio_p90": f"{to.high:.4f}"}
                    line["ratio_best"] = f"{to.best:.4f}"
                peer = result.fastest_peer(name)
                if peer is not None and result.kinds[name] == OURS:
                    line["fastest_peer"] = peer
                    line["peer_median_over_way"] = f"{ratio(result.times[peer], times).median:.4f}"
                writer.writerow(line)


def chart(path: Path, results: list[Result], setting: str) -> None:
    """One panel a case: the times of all ways as bars, and the goal as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    heights = [len(result.times) + 1.5 for result in results]
    figure, axes = plt.subplots(
        len(results),
        figsize=(9, 0.28 * sum(heights) + 1),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for axis, result in zip(axes[:, 0], results, strict=True):
        of = {name: summary(times) for name, times in result.times.items()}
        names = sorted(of, key=lambda name: of[name].median)
        medians = [1e6 * of[name].median for name in names]
        spread = [
            [1e6 * (of[name].median - of[name].low) for name in names],
            [1e6 * (of[name].high - of[name].median) for name in names],
        ]
        colors = [COLORS[result.kinds[name]] for name in names]
        axis.barh(names, medians, xerr=spread, color=colors, ecolor="#404040", capsize=2)
        for place, median in enumerate(medians):
            axis.annotate(
                f" {number(median)}", (medians[place] + spread[1][place], place), va="center"
            )
        for goal in result.goals:
            limit = goal.limit * (of[goal.floor].median if goal.floor else 1.0)
            axis.axvline(1e6 * limit, color="#b03030", linestyle="--", linewidth=1)
        axis.set_title(result.case, loc="left", fontsize=10)
        axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("microseconds; dashed: the goal")
    figure.suptitle(setting, fontsize=7, wrap=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    few_colors = Image.open(path).convert("RGB").quantize(64)  # a third of the bytes
    few_colors.save(path, optimize=True)


def write(folder: Path, stem: str, results: list[Result], setting: str) -> list[Path]:
    """Writes STEM.md, STEM.csv and STEM.png. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.{suffix}" for suffix in ("md", "csv", "png")]
    paths[0].write_text(f"# {stem}\n\n{markdown(results, setting)}")
    write_csv(paths[1], results)
    chart(paths[2], results, setting)
    return paths
