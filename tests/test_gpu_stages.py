"""The parts of .ci/gpu: time limits, the replacement of ninja, required imports of tests."""

import contextlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

CI = Path(__file__).parents[1] / ".ci"

NINJA = """\
ninja_required_version = 1.3
cflags = -e 's/a/b$$/'
rule copy
  command = sed $cflags $in > $out
  depfile = $out.d
  deps = gcc

build one.o: copy one$ file
build two.o: copy two
"""


sys.path.insert(0, str(CI))
loader = importlib.machinery.SourceFileLoader("gpu", str(CI / "gpu"))
gpu = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu", loader))
sys.modules["gpu"] = gpu  # a dataclass needs its module
loader.exec_module(gpu)
limited = sys.modules["limited"]


def test_a_program_over_its_limit_is_interrupted_and_then_killed_with_its_children(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(limited, "GRACE", 3)
    jobs = {
        "quick": "echo done; exit 3",
        "reports": "trap 'echo so far; exit 0' INT; while true; do sleep 0.05; done",
        "stuck": "trap '' INT; sleep 60 & echo $!; while true; do sleep 0.05; done",
    }
    start = time.monotonic()
    jobs = [limited.Job(name, ["bash", "-c", command]) for name, command in jobs.items()]
    statuses = limited.run_all(
        jobs, cwd=tmp_path, env=dict(os.environ), logs=tmp_path, deadline=start + 6
    )
    assert time.monotonic() - start < 20  # the loops never end
    assert statuses == {"quick": 3, "reports": None, "stuck": None}
    assert (tmp_path / "quick.log").read_text() == "done\n"
    assert (tmp_path / "reports.log").read_text() == "so far\n"
    state = Path("/proc", (tmp_path / "stuck.log").read_text().strip(), "stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # of a process that ended
        while state.read_text().split()[2] != "Z":  # the kernel may take a moment
            assert time.monotonic() - start < 30
            time.sleep(0.01)


def checks_in(folder):
    (folder / "logs").mkdir()
    return gpu.Checks(out=folder, tree=folder, work=folder, emulated=False)


def test_the_device_is_asked_for_its_name_for_as_long_as_the_stage_may_take(tmp_path, monkeypatch):
    monkeypatch.setattr(limited, "GRACE", 1)
    checks = checks_in(tmp_path)
    for program, seconds, found in (
        ("echo a warning; echo device: 9.0 NVIDIA H200; echo more", 60, ("9.0", "nvidia-h200")),
        ("exit 1", 60, (None, "no-device")),
        ("trap '' INT; while true; do sleep 0.05; done", 3, (None, "no-device")),  # as if it hung
    ):
        command = ["bash", "-c", program]
        monkeypatch.setattr(gpu.Checks, "python", lambda *_, command=command: command)
        start = time.monotonic()
        checks.device, checks.deadline = "no-device", start + seconds
        assert (checks.find_device(), checks.device) == found, program
        assert time.monotonic() - start < 20  # the loop never ends


def test_the_limits_on_a_gpu_are_nine_minutes_and_the_longest_is_last():
    seconds = [on_gpu for on_gpu, _ in gpu.LIMITS.values()]
    assert sum(seconds) <= 540
    assert seconds[-1] == max(seconds)


def test_a_stage_that_fails_is_reported_and_the_others_run(tmp_path, monkeypatch, capsys):
    def fails(checks):
        raise gpu.Failed("out of luck\n\nits log")

    passing = dict.fromkeys(gpu.LIMITS, lambda checks: "good")
    checks = checks_in(tmp_path)
    checks.device = "nvidia-h200"
    for failing in gpu.LIMITS:
        monkeypatch.setattr(gpu, "STAGES", {**passing, failing: fails})
        assert gpu.run_stages(checks)
        report = (tmp_path / "nvidia-h200-stages.md").read_text()
        assert f"| {failing} | FAILED | out of luck |" in report
        assert "its log" in report
        assert report.count("| passed | good |") == len(gpu.LIMITS) - 1
        assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("| benchmark | ")
    monkeypatch.setattr(gpu, "STAGES", passing)
    assert not gpu.run_stages(checks)


def test_the_stand_in_for_ninja_runs_every_command(tmp_path):
    (tmp_path / "build.ninja").write_text(NINJA)
    (tmp_path / "two").write_text("a")
    command = [sys.executable, CI / "stand_ins/ninja", "-v", "-C", tmp_path, "-j", "2"]
    for fails in (True, False):  # the first file is missing, then it is there
        done = subprocess.run(command, capture_output=True, text=True)
        assert bool(done.returncode) == fails
        assert (tmp_path / "two.o").read_text() == "b$"
        assert "sed -e 's/a/b$/' two > two.o" in done.stdout
        (tmp_path / "one file").write_text("a")


def test_files_of_tests_without_their_imports_are_named(tmp_path):
    (tmp_path / "helper.py").touch()
    (tmp_path / "room").mkdir()
    (tmp_path / "room/inside.py").touch()
    (tmp_path / "test_here.py").write_text(
        "import os.path\nimport helper\nfrom room import inside\nfrom rope_ext import _C\n"
    )
    (tmp_path / "test_gone.py").write_text("import nowhere.at_all\nfrom elsewhere import x\n")
    assert gpu.missing_imports(tmp_path) == {"test_gone.py": "elsewhere, nowhere"}
