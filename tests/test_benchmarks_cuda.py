"""The GPU benchmark: every operator has a case, a wrong result fails the run, and the report shows
the expected times.
"""

import csv
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_cuda
import bench_rope
import measuring_cuda
import operators_cuda
import report_cuda
import verify
from benchmark import OURS
from measuring_cuda import Times
from operator_case import EAGER, FUNCTION

CASES = {case.label: case for case in operators_cuda.cases(quick=False)}
# ---- cases


def test_every_operator_has_a_case_in_the_full_and_in_the_quick_run():
    for quick in (False, True):
        cases = operators_cuda.cases(quick)
        assert operators_cuda.without_case(cases) == []
        assert len({case.label for case in cases}) == len(cases)
        without = [case for case in cases if "mla" not in case.name]
        assert operators_cuda.without_case(without) == ["apply_rotary_mla_append_"]
        assert all(EAGER in case.ways for case in cases)
        assert {case.shape_name for case in cases} == {"prefill", "decode"}


# The fewest bytes of cases, counted by hand.
LEAST = {
    # 40 heads of 128 in and out, a row of 2 x 64 float32
    "apply_rotary_qk bf16, prefill 4096": 4096 * (2 * 40 * 256 + 512),
    # two sectors of each head of 192 bytes
    "apply_rotary_qk_ bf16, 24 of 96 channels, prefill 2048": 2048 * (2 * 128 * 64 + 96),
    # v read, k and v written in a byte a channel; a slot; two scales in a sector
    "apply_rotary_qk_append_kv_ bf16, float8 cache, prefill 4096": (
        4096 * (2 * 40 * 256 + 512 + 8 * 128 * (2 + 2) + 8) + 32
    ),
}


def test_the_fewest_bytes_are_those_counted_by_hand():
    assert {label: CASES[label].least_bytes for label in LEAST} == LEAST


# ---- judging


def test_one_rounding_passes_and_two_do_not():
    exact = torch.randn(1000, dtype=torch.float64)
    rounded = exact.bfloat16()
    verify.check_once_rounded("x", rounded, exact, roundings=4)
    with pytest.raises(verify.WrongResult, match=r"^x is wrong: error"):
        verify.check_once_rounded("x", rounded * (1 + 2**-6), exact, roundings=4)


def test_other_ways_may_round_but_not_be_wrong():
    exact = torch.randn(1000, dtype=torch.float64)
    verify.check_roughly("x", (exact * 1.01).bfloat16(), exact, angle_slack=0)
    for wrong in (-exact, exact.roll(1), exact * float("nan"), exact[1:]):
        with pytest.raises(verify.WrongResult, match=r"^x is "):
            verify.check_roughly("x", wrong.bfloat16(), exact, angle_slack=0)


# ---- measuring


def test_sets_are_four_times_the_cache_but_never_too_many():
    for set_bytes, count in ((1 << 30, 2), (40 << 20, 6), (100, 64)):
        assert measuring_cuda.set_count(set_bytes, l2_bytes=50 << 20) == count


# ---- reporting


PREFILL, DECODE = "apply_rotary_qk bf16, prefill 4096", "apply_rotary_qk_ bf16, decode 64"


def measured(label, ours, graph=True):
    """Microseconds; a large copy moves 4 TB/s."""
    ways = {}
    for way, us in ((OURS, ours), ("copy", 20.0), (EAGER, 10 * ours)):
        rounds = [scale * us * 1e-6 for scale in (0.9, 1.0, 1.1)]
        ways[way] = Times(rounds if graph else [], [2 * t for t in rounds], [5e-6] * 3)
    return report_cuda.Measured(CASES[label], 4e12, ways, {"Liger": "not importable (no)"})


def test_the_time_in_a_graph_is_held_against_that_of_a_copy():
    assert measured(PREFILL, 23.6).verdict == "reached"  # of 21.5 expected
    assert measured(PREFILL, 23.7).verdict == "**missed**"
    assert measured(PREFILL, 10, graph=False).verdict == "no graph"
    assert measured(DECODE, 10).verdict == "a launch takes 2 us"


def test_the_report_has_the_figures_of_every_way_and_what_was_missed_and_left_out(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'rope_ext[test]'")
    results = [measured(PREFILL, 40.0), measured(DECODE, 2.5, graph=False)]
    results[1].ways[FUNCTION] = Times([], [1e-5] * 3, [4e-6, 4e-6, 6e-6])
    text = report_cuda.markdown(results, "a GPU", ["the first: x is wrong"])
    ours = f"| {PREFILL} | rope_ext | 40 (36-44) | 2,150 | 50% | 21.5 | 1.86 | **missed** |"
    assert f"{ours} 80 (72-88) | 5 | 1.00 |" in text
    assert f"|  | {EAGER} | 400 (360-440) | 215 | 5% |  | 18.61 |  |" in text
    for part in (
        f"{PREFILL}: 1.86",
        f"{DECODE}: 0.80 (0.80-1.20)",
        "Liger, 2 cases: not importable (no)",
        "the first: x is wrong",
    ):
        assert f"- {part}\n" in text
    _, table = report_cuda.write_tables(tmp_path, "a-gpu", results, "a GPU", [])
    rows = rows_of(table)
    assert [row["way"] for row in rows] == [*2 * [OURS, "copy", EAGER], FUNCTION]
    assert (rows[0]["copy_share"], rows[3]["graph_median_us"]) == ("0.5000", "")
    (chart,) = bench_cuda.chart_in(tmp_path, "a-gpu", results, "a GPU")
    assert chart.read_bytes().startswith(b"\x89PNG")


# ---- running


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(monkeypatch):
    def run(*arguments):
        given = ["bench_rope", "--device=cuda", "--quick", "--rounds=1", *arguments]
        monkeypatch.setattr(sys, "argv", given)
        bench_rope.main()

    return run


@pytest.mark.cuda
def test_a_quick_run_times_and_writes_every_way(tmp_path, run, capsys):
    run(f"--out={tmp_path}", "--case=append_kv_ bf16, float8 cache, decode")
    (written,) = tmp_path.glob("*.md")
    assert written.stem == bench_cuda.slug(torch.cuda.get_device_name())
    assert written.read_text().split("\n\n", 1)[1].strip() in capsys.readouterr().out
    rows = rows_of(written.with_suffix(".csv"))
    ways = {row["way"] for row in rows}
    assert {OURS, "copy", EAGER, "apply_rotary_qk_, two index_copy_"} <= ways
    assert all(float(row["eager_median_us"]) > 0 for row in rows)


@pytest.mark.cuda
def test_a_wrong_result_and_a_missing_case_fail_the_run_at_its_end(run, monkeypatch, capsys):
    def other_way(case):
        if case.name != "apply_rotary_qk_ bf16":
            return case
        arguments = case.arguments
        return dataclasses.replace(case, arguments=lambda: {**arguments(), "inverse": True}, exact=(
            lambda a: case.exact({**a, "inverse": False})))  # fmt: skip

    cases = [other_way(c) for c in operators_cuda.cases(quick=True) if "mla" not in c.name]
    monkeypatch.setattr(bench_cuda, "cases", lambda quick: cases)
    with pytest.raises(SystemExit) as failed:
        run("--case=_qk_ bf16, decode 2", "--case=cos_sin fp32, decode 2")
    assert failed.value.code.splitlines()[1].strip() == (
        "apply_rotary_mla_append_: no case in operators_cuda.py"
    )
    assert "apply_rotary_qk_ bf16, decode 2: q is wrong: error" in failed.value.code
    assert "| cos_sin fp32, decode 2 | rope_ext |" in capsys.readouterr().out
