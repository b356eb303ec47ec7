"""The bytes that each kernel moves at prefill and decode, compared to the minimum.

    python benchmarks/bytes_moved.py --out DIR [--quick]

On a GPU, Nsight Compute (ncu) measures the bytes that DRAM reads and writes, the bytes requested
from the L2 cache, time, share of the DRAM's peak rate, and occupancy. Caches are emptied before
each kernel. Written data may stay in L2 after the kernel's end, so DRAM can show fewer bytes than
were written. An emulator of the CUDA runtime (CONTRIBUTING.md) counts the bytes of the 32-byte
sectors that the threads request, and of the distinct ones. results/bytes_emulated.csv has these
counts for all cases; the table from a GPU shows them too. DIR gets DEVICE-bytes.md,
DEVICE-bytes.csv and, from a GPU, ncu.log.
"""

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from bench_cuda import emulation, slug
from operator_case import OperatorCase
from operators_cuda import cases

try:
    import fakegpu_torch
except ImportError:
    fakegpu_torch = None

SECTOR = 32  # bytes
MORE, LARGE = 1.1, 1 << 20  # a ratio above MORE is marked if it is of LARGE bytes or more
EMULATED = Path(__file__).parent / "results/bytes_emulated.csv"
MARKER = "spin_kernel"  # the kernel of torch.cuda._sleep, launched before each case
METRICS = {  # metric of Nsight Compute: our column, and the factor to its unit
    "gpu__time_duration.sum": ("microseconds", 1e-3),
    "dram__bytes_read.sum": ("dram_read", 1),
    "dram__bytes_write.sum": ("dram_write", 1),
    "lts__t_sectors_srcunit_tex_op_read.sum": ("l2_read", SECTOR),
    "lts__t_sectors_srcunit_tex_op_write.sum": ("l2_write", SECTOR),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("dram_percent", 1),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy_percent", 1),
    "launch__registers_per_thread": ("registers", 1),
}
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "n": 1, "u": 1e3, "m": 1e6}  # of bytes, of seconds
CASE = ("case", "kernel", "least")
MEASURED = tuple(column for column, _ in METRICS.values())
COUNTED = ("asked_read", "asked_write", "distinct_read", "distinct_write")

Row = dict[str, str | float]  # a launch: CASE, and MEASURED or COUNTED


def kernel_name(text: str) -> str:
    """The name in `void rope::(anonymous namespace)::name<...>(...)`; NVIDIA writes <unnamed>."""
    plain = re.match(r"[^<(]*", re.sub(r"\(anonymous namespace\)::|<unnamed>::", "", text))
    return re.split(r"::|\s", plain[0].strip())[-1] if plain else text


def of_case(case: OperatorCase, kernel: str) -> Row:
    return {"case": case.label, "kernel": kernel, "least": case.least_bytes}


# ---------------------------------------------------------------------------------------- counting


def launch(chosen: list[OperatorCase]) -> None:
    """The program that ncu runs: each case once, after a marker."""
    for case in chosen:
        (call,) = case.make(1)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def profile(quick: bool, log: Path) -> str:
    """The output of ncu for all cases, without the metrics that this ncu does not have."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("ncu is not in PATH: nothing to count the bytes with")
    metrics = list(METRICS)
    program = [sys.executable, __file__, "--launch", *(["--quick"] if quick else [])]
    options = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    options += ["--profile-from-start", "off"]
    while metrics:
        command = [ncu, *options, "--log-file", str(log), "--metrics", ",".join(metrics), *program]
        status = subprocess.run(command).returncode
        text = log.read_text(errors="replace") if log.exists() else ""
        errors = [line for line in text.splitlines() if line.startswith("==ERROR==")]
        if "ERR_NVGPUCTRPERM" in text:
            raise SystemExit("ncu may not read the counters of this GPU (ERR_NVGPUCTRPERM)")
        unknown = [metric for metric in metrics if any(metric in line for line in errors)]
        if status == 0 and not unknown:
            return text
        if not unknown:
            raise SystemExit("\n".join([*text.splitlines()[-10:], f"ncu: exit status {status}"]))
        print(f"ncu does not know {', '.join(unknown)}")
        metrics = [metric for metric in metrics if metric not in unknown]
    raise SystemExit("ncu knows none of the metrics")


def launches(text: str) -> Iterator[tuple[str, Row]]:
    """Kernels and their metrics from ncu's page `raw` in CSV: names, units, one line a launch."""
    table = csv.DictReader(line for line in text.splitlines() if line.startswith('"'))
    units = next(table, {})
    for line in table:
        row: Row = {}
        for metric, (column, factor) in METRICS.items():
            value = (line.get(metric) or "").replace(",", "")
            unit = re.match(r"([KMGnum]?)(?:byte|second|s$)", units.get(metric) or "")
            factor *= UNITS[unit[1]] if unit else 1
            row[column] = float(value) * factor if value[:1].isdigit() else ""  # not: n/a
        yield kernel_name(line["Kernel Name"]), row


def measured(text: str, chosen: list[OperatorCase]) -> list[Row]:
    rows, current = [], -1
    for kernel, row in launches(text):
        if kernel == MARKER:
            current += 1
        else:
            rows.append(of_case(chosen[current], kernel) | row)
    return rows


def counted(chosen: list[OperatorCase]) -> list[Row]:
    """The same from the emulator, with one row for all launches of a kernel."""
    rows = []
    with emulation():
        for case in chosen:
            (call,) = case.make(1)
            fakegpu_torch.reset()
            call()
            for name, k in fakegpu_torch.stats()["kernels"].items():
                if k["launches"] and "rope::" in name:
                    sectors = (k["load_sectors"], k["store_sectors"])
                    sectors += (k["load_unique_sectors"], k["store_unique_sectors"])
                    counts = (SECTOR * n for n in sectors)
                    rows.append(
                        of_case(case, kernel_name(name)) | dict(zip(COUNTED, counts, strict=True))
                    )
    return rows


# ---------------------------------------------------------------------------------------- report


def ratio(count: float, expected: float) -> str:
    over = count / expected
    return f"**{over:.2f}**" if over > MORE and expected >= LARGE else f"{over:.2f}"


def with_least(rows: list[Row]) -> list[str]:
    """Adds the ratio of the emulator's count to the least bytes to the first row of each case.
    Returns the cases whose count is impossible.
    """
    moved: dict[str, float] = defaultdict(float)
    for row in rows:
        moved[row["case"]] += row["distinct_read"] + row["distinct_write"]
    wrong = []
    for case, total in moved.items():
        first = next(row for row in rows if row["case"] == case)
        first["over_least"] = ratio(total, first["least"])
        if total < first["least"]:
            wrong.append(f"{case}: {total:,} bytes are fewer than the least, {first['least']:,}")
    return wrong


def with_emulated(rows: list[Row], emulated: Iterable[Row]) -> None:
    """Adds the emulator's counts of the same kernel and case, and the GPU's ratio to them."""
    known: dict[tuple, Row] = {(row["case"], row["kernel"]): row for row in emulated}
    for row in rows:
        counts = known.get((row["case"], row["kernel"]))
        if counts is None:
            continue
        row |= {column: counts[column] for column in COUNTED}
        if row["dram_read"] != "":
            row["dram_over"] = ratio(row["dram_read"], row["distinct_read"])
        if "" not in (row["l2_read"], row["l2_write"]):
            asked = row["asked_read"] + row["asked_write"]
            row["l2_over"] = ratio(row["l2_read"] + row["l2_write"], asked)


def number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"


def write(out: Path, rows: list[Row], columns: tuple[str, ...], about: str) -> list[Path]:
    table = out / f"{slug(torch.cuda.get_device_name())}-bytes.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [[column.replace("_", " ") for column in columns], ["---"] * len(columns)]
    lines += [[number(row.get(column, "")) for column in columns] for row in rows]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    text = f"# Bytes that kernels move: {torch.cuda.get_device_name()}\n\n{about}\n\n{text}"
    table.with_suffix(".md").write_text(text)
    return [table.with_suffix(".md"), table]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) if k in COUNTED else v for k, v in row.items()} for row in rows]


ABOUT = (
    "A row is a launch; numbers are bytes where the column does not say otherwise. least: what the "
    "call has to move at least. asked, distinct: the 32-byte sectors that threads ask for, and "
    "those of them that differ, counted by an emulator. Ratios above "
    f"{MORE} are marked where that is of a megabyte and more. "
)
ABOUT_EMULATED = ABOUT + "over least: the distinct sectors of all kernels of the call."
ABOUT_GPU = ABOUT + (
    "dram over: what DRAM reads over the distinct sectors read, of empty caches; what is written "
    "may stay in L2. l2 over: what the L2 cache is asked for over the sectors asked for; below 1 "
    "where L1 has them."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the tables")
    parser.add_argument("--quick", action="store_true", help="few tokens")
    parser.add_argument("--launch", action="store_true", help="only launch: what ncu runs")
    arguments = parser.parse_args()
    chosen = cases(arguments.quick)
    if arguments.launch:
        launch(chosen)
        return
    if arguments.out is None:
        parser.error("expected --out DIR")
    arguments.out.mkdir(parents=True, exist_ok=True)
    impossible = []
    if fakegpu_torch is not None:
        rows = counted(chosen)
        impossible = with_least(rows)
        columns = (*CASE, "over_least", *COUNTED)
    else:
        rows = measured(profile(arguments.quick, arguments.out / "ncu.log"), chosen)
        with_emulated(rows, [] if arguments.quick else read(EMULATED))
        columns = (*CASE, *MEASURED, "dram_over", "l2_over", *COUNTED)
    about = ABOUT_GPU if fakegpu_torch is None else ABOUT_EMULATED
    print(*write(arguments.out, rows, columns, about), sep="\n")
    without = {case.label for case in chosen} - {row["case"] for row in rows}
    if problems := impossible + [f"{name}: no kernel was counted" for name in sorted(without)]:
        raise SystemExit("\n".join(problems))
    marked = sum(any(str(v).startswith("**") for v in row.values()) for row in rows)
    print(f"{len(rows)} launches of {len(chosen)} calls; {marked} with more bytes than expected")


if __name__ == "__main__":
    main()
