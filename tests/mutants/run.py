"""What the tests can find: bugs are put into a copy of the product, one at a time, and the tests
that are most likely to find each of them are run.

    python tests/mutants/run.py                       # every room but cuda
    python tests/mutants/run.py --device cuda         # cuda and formulas, by the tests marked cuda
    python tests/mutants/run.py --only engines sliding-windows-pass --suite

CUDA needs a GPU, or the emulator of the CUDA runtime whose folder FAKEGPU names. OUT gets the copy,
the log of the last command and the table, results.csv and results.md. What is in results.csv is not
run again: an interrupted run goes on, and another state of the product needs another OUT. Tests
that fail without any mutant are left out.
"""

import argparse
import contextlib
import csv
import filecmp
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rooms import ROOMS
from rooms.mutant import Mutant
from tqdm import tqdm

REPOSITORY = Path(__file__).parents[2]
COPIED = ("csrc", "rope_ext", "tests", "benchmarks", "docs", ".ci")  # and the files beside them
NOT_COPIED = ("__pycache__", "*.so", "*.o", ".pytest_cache", ".hypothesis")
OF_DEVICE = {"cpu": set(ROOMS), "cuda": {"cuda", "formulas"}}
SUITE = "tests"
SUITE_LIMIT = 4  # times that of a mutant's own tests

ALL_PASSED, SOME_FAILED, NO_TESTS = 0, 1, 5  # exit statuses of pytest
FOUND, MISSED, PASSED = "found", "MISSED", "passed its tests"  # PASSED: the suite has not been run
BUILD_FAILED, SKIPPED = "BUILD FAILED", "skipped"


class Row(NamedTuple):
    """A line of the table."""

    mutant: str
    room: str
    result: str
    by: str  # the test that found it
    seconds: str


class Results:
    """The table: each row is written as soon as it is known."""

    def __init__(self, out: Path) -> None:
        self.csv, self.markdown = out / "results.csv", out / "results.md"
        self.rows: dict[str, Row] = {}
        if self.csv.exists():
            with self.csv.open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))[1:]
            self.rows = {row[0]: Row(*row) for row in rows}

    def is_finished(self, mutant: Mutant, suite: bool) -> bool:
        row = self.rows.get(mutant.name)
        return row is not None and row.result != SKIPPED and not (suite and row.result == PASSED)

    def add(self, row: Row) -> None:
        self.rows[row.mutant] = row
        with self.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([Row._fields, *self.rows.values()])
        self.markdown.write_text(self._as_markdown(), encoding="utf-8")

    def _as_markdown(self) -> str:
        rows = self.rows.values()
        results = [r for r in (FOUND, PASSED, MISSED, BUILD_FAILED, SKIPPED)
                   if any(row.result == r for row in rows)]  # fmt: skip
        counts = Counter((row.room, row.result) for row in rows)
        rooms = [room for room in ROOMS if any(row.room == room for row in rows)]
        lines = [_line("room", *results), _line(*["---"] * (len(results) + 1))]
        lines += [_line(room, *(counts[room, result] for result in results)) for room in rooms]
        lines += [_line("all", *(sum(counts[x, r] for x in rooms) for r in results)), ""]
        lines += [_line(*Row._fields), _line(*["---"] * len(Row._fields))]
        lines += [_line(*row) for row in sorted(rows, key=lambda row: row.result == FOUND)]
        return "\n".join(lines) + "\n"


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


class Tree:
    """A copy of the repository, which is built and tested in its place."""

    def __init__(self, out: Path, device: str, processes: int) -> None:
        self.root, self.log, self.processes = out / "tree", out / "log.txt", processes
        self.is_built = False  # of sources without a mutant
        self.known = out / "baseline.json"
        self.failing: dict[str, list[str]] = {}  # without any mutant, of each file and of the suite
        if self.known.exists():
            self.failing = json.loads(self.known.read_text(encoding="utf-8"))
        self.graphs = out / "inductor"
        self.env = os.environ | {
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",  # two mutants of one second and size are told apart
            "TORCHINDUCTOR_CACHE_DIR": str(self.graphs),
        }
        self.python, self.options = [sys.executable], []
        defaults = {"ROPE_EXT_CUDA": "off"}
        if device == "cuda":
            defaults = {"ROPE_EXT_CUDA": "on"}
            self.options = ["-m", "cuda"]
            if emulator := os.environ.get("FAKEGPU"):
                self.python = [f"{emulator}/fakegpu-run", sys.executable]
                self.options += ["-p", "fakegpu_torch"]
                defaults |= {
                    "ROPE_EXT_CUDART": "shared",
                    "TORCH_CUDA_ARCH_LIST": "9.0+PTX",
                    "NVCC_APPEND_FLAGS": "--no-compress -lineinfo",
                    "FAKEGPU_FOOTPRINT": "1",
                }
        self.env = defaults | self.env

    def copy(self) -> None:
        """Copies what differs, which undoes a mutant that an interrupted run has left."""

        def copied(source: str, to: str) -> None:
            if not (os.path.exists(to) and filecmp.cmp(source, to, shallow=False)):
                shutil.copy(source, to)  # of now, so that it is compiled again

        self.root.mkdir(parents=True, exist_ok=True)
        for file in REPOSITORY.iterdir():
            if file.is_file() and file.name != ".git":
                copied(str(file), str(self.root / file.name))
        for folder in filter(lambda name: (REPOSITORY / name).is_dir(), COPIED):
            ignored = shutil.ignore_patterns(*NOT_COPIED)
            shutil.copytree(
                REPOSITORY / folder, self.root / folder, ignore=ignored,
                copy_function=copied, dirs_exist_ok=True,
            )  # fmt: skip
            for file in (self.root / folder).rglob("*"):
                there = (REPOSITORY / file.relative_to(self.root)).exists()
                if file.is_file() and file.suffix != ".so" and not there:
                    file.unlink()

    @contextlib.contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        file = self.root / mutant.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutant.before) != 1:
            raise SystemExit(f"{mutant.name}: {mutant.file} does not have its text once")
        file.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
        try:
            yield
        finally:
            file.write_text(text, encoding="utf-8")

    def build(self, limit: float) -> bool:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        return self._run(command, limit) == 0

    def test(self, paths: Sequence[str], limit: float) -> str | None:
        """The test that fails first, if one does."""
        shutil.rmtree(self.graphs, ignore_errors=True)  # those of another mutant
        known = dict.fromkeys(test for tests in self.failing.values() for test in tests)
        code = self._pytest(["-x", *(f"--deselect={test}" for test in known), *paths], limit)
        if code == ALL_PASSED:
            return None
        if code is None:
            return f"time-out after {limit:.0f} s"
        if code == NO_TESTS:
            raise SystemExit(f"no tests in {' '.join(paths)}: see {self.log}")
        output = self._output()
        if failed := _failed(output):
            return failed[0]
        crashed = re.search(r'File ".*/(tests/[\w/]+\.py)", line \d+ in (test_\w+)', output)
        where = "::".join(crashed.groups()) if crashed else "import of rope_ext"
        return f"{where} (exit status {code})"

    def find_failing(self, paths: Sequence[str]) -> None:
        """Runs tests without a mutant, those that have not been run so before."""
        if not (paths := [path for path in paths if path not in self.failing]):
            return
        code = self._pytest(paths, None)
        if code not in (ALL_PASSED, SOME_FAILED):
            raise SystemExit(f"tests end with status {code} without a mutant: see {self.log}")
        failed = _failed(self._output())
        if uncollected := [test for test in failed if "::" not in test]:
            raise SystemExit(f"not collected without a mutant: {uncollected}: see {self.log}")
        for path in paths:
            of_path = [test for test in failed if path == SUITE or test.startswith(f"{path}::")]
            self.failing[path] = of_path
        self.known.write_text(json.dumps(self.failing, indent=1), encoding="utf-8")
        if failed:
            print(f"left out, as they fail without a mutant: {len(failed)} tests ({failed[0]}, ..)")

    def _pytest(self, arguments: Sequence[str], limit: float | None) -> int | None:
        command = [*self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *self.options]
        if self.processes > 1:
            command += ["-n", str(self.processes), "--dist", "loadfile"]
        return self._run([*command, "--ignore=tests/mutants", *arguments], limit)

    def _run(self, command: Sequence[str], limit: float | None) -> int | None:
        """The exit status; None if it took too long. What it has started ends with it."""
        with self.log.open("w") as log:
            process = subprocess.Popen(
                command, cwd=self.root, env=self.env, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def _failed(output: str) -> list[str]:
    """The tests that pytest's summary names."""
    return re.findall(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", output, re.MULTILINE)


def tried(tree: Tree, mutant: Mutant, options: argparse.Namespace, passed: bool) -> tuple[str, str]:
    """The result of a mutant, and what found it. passed: its own tests, in an earlier run."""
    compiled = mutant.file.startswith("csrc/")
    with tree.mutated(mutant):
        if compiled or not tree.is_built:
            tree.is_built = False
            if not tree.build(options.limit):
                return BUILD_FAILED, ""
            tree.is_built = not compiled
        if not passed and (test := tree.test(mutant.tests, options.limit)):
            return FOUND, test
        if not options.suite:
            return PASSED, ""
        test = tree.test([SUITE], SUITE_LIMIT * options.limit)
    return (FOUND, test) if test else (MISSED, "")


def chosen(only: Sequence[str], device: str) -> list[tuple[str, Mutant]]:
    """(room, mutant) of the rooms and names that are asked for, in the order of the list."""
    every = [(room, m) for room, mutants in ROOMS.items() for m in mutants]
    if unknown := {*only} - {*ROOMS} - {m.name for _, m in every}:
        raise SystemExit(f"no room or mutant of the name {', '.join(sorted(unknown))}")
    return [
        (room, mutant)
        for room, mutant in every
        if room in OF_DEVICE[device] and (not only or room in only or mutant.name in only)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME|ROOM")
    parser.add_argument("--device", choices=OF_DEVICE, default="cpu")
    parser.add_argument("--out", type=Path, help="default: build/mutants-DEVICE")
    parser.add_argument("--suite", action="store_true", help="the whole suite after passed tests")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a build or its tests")
    parser.add_argument("-n", "--processes", type=int, default=1, help="of pytest-xdist")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # as Ctrl-C: nothing goes on
    out = (options.out or REPOSITORY / "build" / f"mutants-{options.device}").absolute()
    out.mkdir(parents=True, exist_ok=True)

    results = Results(out)
    unfinished = [
        (room, mutant)
        for room, mutant in chosen(options.only, options.device)
        if not results.is_finished(mutant, options.suite)
    ]
    has_device = options.device == "cuda" and ("FAKEGPU" in os.environ or torch.cuda.is_available())
    todo = [(room, m) for room, m in unfinished if has_device or room != "cuda"]
    for room, mutant in unfinished:
        if (room, mutant) not in todo:
            results.add(Row(mutant.name, room, SKIPPED, "", ""))

    tree = Tree(out, options.device, options.processes)
    if todo:
        tree.copy()
        print(f"building {tree.root}", flush=True)
        if not tree.build(None):
            raise SystemExit(f"the build fails without a mutant: see {tree.log}")
        tree.is_built = True
        paths = dict.fromkeys(test for _, mutant in todo for test in mutant.tests)
        print("tests without a mutant", flush=True)
        tree.find_failing([SUITE] if options.suite else [*paths])
    progress = tqdm(todo, unit="mutant")
    for room, mutant in progress:
        progress.set_postfix_str(mutant.name)
        begin = time.monotonic()
        before = results.rows.get(mutant.name)
        passed = before is not None and before.result == PASSED
        result, by = tried(tree, mutant, options, passed)
        results.add(Row(mutant.name, room, result, by, f"{time.monotonic() - begin:.0f}"))
        if result != FOUND:
            tqdm.write(f"{mutant.name}: {result}")
    print(results.markdown.read_text(encoding="utf-8").partition("\n\n")[0])
    if any(row.result == BUILD_FAILED for row in results.rows.values()):
        raise SystemExit("a mutant of the list does not compile")


if __name__ == "__main__":
    main()
