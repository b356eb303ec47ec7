"""The report of the GPU benchmark: Markdown tables, a CSV file and a chart."""

import csv
from dataclasses import dataclass, field
from pathlib import Path

from benchmark import FLOOR, OURS, PEER
from measuring import Summary, ratio, summary
from measuring_cuda import Times
from operator_case import FUNCTION, OperatorCase, operator_name
from report import COLORS, MISSED, REACHED, number, row, times_cell

COPY = "copy"  # the floor of each case: a device copy of as many bytes
LAUNCH_SECONDS = 2e-6  # approximate time of a launch in a graph
JUDGED_SECONDS = 10e-6  # a launch is a small part of it
ALLOWED = 1.10  # times the expected time
CSV_COLUMNS = (
    *("case", "operator", "shape", "tokens", "way", "kind", "rounds", "least_bytes"),
    *("expected_us", "graph_median_us", "graph_p10_us", "graph_p90_us", "eager_median_us"),
    *("host_median_us", "gb_per_s", "copy_share", "over_expected", "verdict", "over_rope_ext"),
)


@dataclass
class Measured:
    """A case's times by way, in the same rounds, or the reason why there are none."""

    case: OperatorCase
    copy_rate: float  # bytes a second, of a large copy
    ways: dict[str, Times] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failure: str | None = None

    @property
    def expected(self) -> float:
        """Seconds to move the least bytes at the rate of a large copy."""
        return self.case.least_bytes / self.copy_rate

    def over_expected(self, way: str) -> Summary:
        return summary([seconds / self.expected for seconds in self.ways[way].seconds])

    @property
    def verdict(self) -> str:
        """The verdict on rope_ext in a graph."""
        if self.expected < JUDGED_SECONDS:
            return f"a launch takes {1e6 * LAUNCH_SECONDS:.0f} us"
        if not self.ways[OURS].graph:
            return "no graph"
        return MISSED if self.over_expected(OURS).median > ALLOWED else REACHED

    def kind(self, way: str) -> str:
        return {OURS: OURS, FUNCTION: OURS, COPY: FLOOR}.get(way, PEER)


def over_expected_cell(result: Measured, way: str) -> str:
    """Empty if a launch alone takes longer."""
    if result.expected < LAUNCH_SECONDS:
        return ""
    return f"{result.over_expected(way).median:.2f}"


def time_rows(result: Measured) -> list[str]:
    case, ours = result.case, result.ways[OURS]
    lines = []
    for name, times in result.ways.items():
        rate = case.least_bytes / summary(times.seconds).median
        lines.append(
            row(
                [
                    case.label if name == OURS else "",
                    name,
                    times_cell(times.graph) if times.graph else "",
                    f"{1e-9 * rate:,.0f}",
                    f"{100 * ratio(result.ways[COPY].seconds, times.seconds).median:.0f}%",
                    number(1e6 * result.expected) if name == OURS else "",
                    over_expected_cell(result, name),
                    result.verdict if name == OURS else "",
                    times_cell(times.eager),
                    number(1e6 * summary(times.host).median),
                    f"{ratio(times.seconds, ours.seconds).median:.2f}",
                ]
            )
        )
    return lines


COLUMNS = (
    "| case | way | us in a graph | GB/s | of the copy | expected us | / expected | "
    "| us eager | host us | / rope_ext |"
)


def explanation(copy_rate: float) -> str:
    judged, launch = f"{1e6 * JUDGED_SECONDS:.0f} us", f"{1e6 * LAUNCH_SECONDS:.0f} us"
    return (
        "Microseconds a call and ratios: median of interleaved rounds (10th-90th percentile). "
        "`in a graph`: calls in a CUDA graph, without the cost of launches to the host; `eager`: "
        "calls as Python makes them; `host`: until the call returns. Ratios and GB/s are of the "
        "times in a graph, or eager where there is none. GB/s counts the fewest bytes that the "
        f"operator must read and write, for everyone; `{COPY}` is a device copy of as many in the "
        "same rounds. `expected`: those bytes at the rate of a large copy, "
        f"{1e-12 * copy_rate:.2f} TB/s, which rope_ext reaches within {ALLOWED - 1:.0%} or misses. "
        f"Where less than {judged} are expected, a launch of about {launch} bounds the time, and "
        "tensors of a few tokens stay in L2."
    )


def markdown(results: list[Measured], setting: str, problems: list[str]) -> str:
    """problems: the reasons why the run fails."""
    timed = [result for result in results if result.failure is None]
    lines = [f"{setting}.", ""]
    if problems:
        lines += ["**Failed:**", "", *(f"- {problem}" for problem in problems), ""]
    if timed:
        lines += [explanation(timed[0].copy_rate), "", COLUMNS, "|---" * 11 + "|"]
    for result in timed:
        lines += time_rows(result)
    if missed := [result for result in timed if result.verdict == MISSED]:
        lines += ["", "Missed:", ""]
        lines += [f"- {r.case.label}: {r.over_expected(OURS).median:.2f}" for r in missed]
    if by_function := [result for result in timed if FUNCTION in result.ways]:
        lines += ["", f"Host time of `{FUNCTION}` / of the copy (goal in place: at most 1):", ""]
    for result in by_function:
        host = ratio(result.ways[FUNCTION].host, result.ways[COPY].host)
        lines.append(f"- {result.case.label}: {host.median:.2f} ({host.low:.2f}-{host.high:.2f})")
    if left_out := left_out_lines(results):
        lines += ["", "Left out:", "", *left_out]
    return "\n".join(lines) + "\n"


def left_out_lines(results: list[Measured]) -> list[str]:
    """The ways that are left out, one line a reason."""
    labels: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, why in result.left_out.items():
            labels.setdefault((name, why), []).append(result.case.label)
    return [
        f"- {name}, {of[0] if len(of) == 1 else f'{len(of)} cases'}: {why}"
        for (name, why), of in labels.items()
    ]


def write_csv(path: Path, results: list[Measured]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        for result in results:
            for name, times in result.ways.items():
                writer.writerow(csv_row(result, name, times))


def csv_row(result: Measured, name: str, times: Times) -> dict[str, object]:
    case = result.case
    line: dict[str, object] = {
        "case": case.label,
        "operator": operator_name(case.operator),
        "shape": case.shape_name,
        "tokens": case.tokens,
        "way": name,
        "kind": result.kind(name),
        "rounds": len(times.seconds),
        "least_bytes": case.least_bytes,
        "expected_us": f"{1e6 * result.expected:.4f}",
        "eager_median_us": f"{1e6 * summary(times.eager).median:.4f}",
        "host_median_us": f"{1e6 * summary(times.host).median:.4f}",
        "gb_per_s": f"{1e-9 * case.least_bytes / summary(times.seconds).median:.1f}",
        "copy_share": f"{ratio(result.ways[COPY].seconds, times.seconds).median:.4f}",
        "over_expected": f"{result.over_expected(name).median:.4f}",
        "over_rope_ext": f"{ratio(times.seconds, result.ways[OURS].seconds).median:.4f}",
    }
    if times.graph:
        of = summary(times.graph)
        line["graph_median_us"] = f"{1e6 * of.median:.4f}"
        line |= {"graph_p10_us": f"{1e6 * of.low:.4f}", "graph_p90_us": f"{1e6 * of.high:.4f}"}
    if name == OURS:
        line["verdict"] = result.verdict.strip("*")
    return line


def chart(path: Path, results: list[Measured], setting: str) -> None:
    """One line a case: each way's time over the expected time, or over that of a launch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    markers = {OURS: ("o", 36), FLOOR: ("|", 90), PEER: ("x", 22)}
    figure, axis = plt.subplots(figsize=(9, 0.22 * len(results) + 1.5), layout="constrained")
    for kind, (marker, size) in markers.items():
        points = [
            (summary(times.seconds).median / max(result.expected, LAUNCH_SECONDS), place)
            for place, result in enumerate(results)
            for name, times in result.ways.items()
            if result.kind(name) == kind
        ]
        label = {OURS: OURS, FLOOR: "copy of as many bytes", PEER: "other ways"}[kind]
        xs, ys = zip(*points, strict=True)
        axis.scatter(xs, ys, marker=marker, s=size, color=COLORS[kind], label=label)
    axis.axvline(1, color="#404040", linewidth=0.8)
    axis.axvline(ALLOWED, color="#b03030", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(results)), [result.case.label for result in results], fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.margins(y=0.01)
    axis.grid(axis="y", linewidth=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    launch = f"{1e6 * LAUNCH_SECONDS:.0f} us"
    axis.set_xlabel(f"time / expected time (at least {launch}); dashed: {ALLOWED:g} times")
    figure.legend(fontsize=7, frameon=False, loc="outside lower left", ncols=len(markers))
    figure.suptitle(setting, fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_tables(
    folder: Path, stem: str, results: list[Measured], setting: str, problems: list[str]
) -> list[Path]:
    """Writes STEM.md and STEM.csv. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.{suffix}" for suffix in ("md", "csv")]
    paths[0].write_text(f"# {stem}\n\n{markdown(results, setting, problems)}")
    write_csv(paths[1], results)
    return paths
