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
from operator_case import EAGER, operator_name

CASES = operators_cuda.cases(quick=False)
US = 1e-6
on_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def case_of(label):
    (case,) = (case for case in CASES if case.label == label)
    return case


# ---- cases


def test_every_operator_has_a_case_in_the_full_and_in_the_quick_run():
    for quick in (False, True):
        cases = operators_cuda.cases(quick)
        assert operators_cuda.without_case(cases) == []
        assert len({case.label for case in cases}) == len(cases)
        assert all(EAGER in case.ways for case in cases)
        assert {case.shape_name for case in cases} == {"prefill", "decode"}


def test_an_operator_without_a_case_is_named():
    without = [case for case in CASES if "mla" not in case.name and ".out" not in case.name]
    assert operators_cuda.without_case(without) == [
        "apply_rotary.out",
        "apply_rotary_mla_append_",
        "apply_rotary_qk.out",
    ]


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
    assert {label: case_of(label).least_bytes for label in LEAST} == LEAST


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


def measured(label, ours, copy=20.0, graph=True):
    """Microseconds; a large copy moves 4 TB/s."""

    def times(us):
        rounds = [0.9 * us * US, us * US, 1.1 * us * US]
        return Times(rounds if graph else [], [2 * t for t in rounds], [5 * US] * 3)

    ways = {OURS: times(ours), "copy": times(copy), EAGER: times(10 * ours)}
    return report_cuda.Measured(case_of(label), 4e12, ways, {"Liger": "not importable (no)"})


PREFILL, DECODE = "apply_rotary_qk bf16, prefill 4096", "apply_rotary_qk_ bf16, decode 64"


def test_the_time_in_a_graph_is_held_against_that_of_a_copy():
    assert measured(PREFILL, 23.6).verdict == "reached"  # of 21.5 expected
    assert measured(PREFILL, 23.7).verdict == "**missed**"
    assert measured(PREFILL, 10, graph=False).verdict == "no graph"
    assert measured(DECODE, 10).verdict == "a launch takes 2 us"


def test_the_report_says_what_was_measured_expected_missed_and_left_out():
    results = [measured(PREFILL, 40.0), measured(DECODE, 2.5)]
    failed = report_cuda.Measured(CASES[0], 4e12, failure="x is wrong")
    text = report_cuda.markdown([*results, failed], "a GPU", ["the first: x is wrong"])
    ours = f"| {PREFILL} | rope_ext | 40 (36-44) | 2,150 | 50% | 21.5 | 1.86 | **missed** |"
    assert f"{ours} 80 (72-88) | 5 | 1.00 |" in text
    assert f"|  | {EAGER} | 400 (360-440) | 215 | 5% |  | 18.61 |  |" in text
    assert "Missed:\n\n- " + PREFILL + ": 1.86\n" in text
    assert "- Liger, 2 cases: not importable (no)" in text
    assert "**Failed:**\n\n- the first: x is wrong\n" in text
    assert f"| {CASES[0].label} |" not in text


def test_the_csv_file_and_the_chart_hold_every_way(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'rope_ext[test]'")
    results = [measured(PREFILL, 40.0), measured(DECODE, 2.5, graph=False)]
    _, table = report_cuda.write_tables(tmp_path, "a-gpu", results, "a GPU", [])
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == 2 * [OURS, "copy", EAGER]
    assert rows[0]["verdict"] == "missed"
    assert rows[0]["copy_share"] == "0.5000"
    assert rows[3]["graph_median_us"] == ""
    assert rows[3]["eager_median_us"] == "5.0000"
    (chart,) = bench_cuda.chart_in(tmp_path, "a-gpu", results, "a GPU")
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_files_are_named_by_the_device():
    assert bench_cuda.slug("NVIDIA H200") == "nvidia-h200"
    assert bench_cuda.slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"


# ---- running


def run(monkeypatch, *arguments):
    given = ["bench_rope", "--device=cuda", "--quick", "--rounds=1", *arguments]
    monkeypatch.setattr(sys, "argv", given)
    bench_rope.main()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_cuda)])
def test_a_quick_run_times_and_writes_every_way(device, tmp_path, monkeypatch, capsys):
    run(monkeypatch, f"--out={tmp_path}", "--case=append_kv_ bf16, float8 cache, decode")
    (written,) = tmp_path.glob("*.md")
    assert written.stem == bench_cuda.slug(torch.cuda.get_device_name())
    assert written.read_text().split("\n\n", 1)[1].strip() in capsys.readouterr().out
    with written.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ways = {row["way"] for row in rows}
    assert {OURS, "copy", EAGER, "apply_rotary_qk_, two index_copy_"} <= ways
    assert all(float(row["eager_median_us"]) > 0 for row in rows)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_cuda)])
def test_a_wrong_result_and_a_missing_case_fail_the_run_at_its_end(device, monkeypatch, capsys):
    def other_way(case):
        if case.name != "apply_rotary_qk_ bf16":
            return case
        arguments = case.arguments
        return dataclasses.replace(case, arguments=lambda: {**arguments(), "inverse": True}, exact=(
            lambda a: case.exact({**a, "inverse": False})))  # fmt: skip

    cases = [other_way(c) for c in operators_cuda.cases(quick=True) if "mla" not in c.name]
    monkeypatch.setattr(bench_cuda, "cases", lambda quick: cases)
    with pytest.raises(SystemExit) as failed:
        run(monkeypatch, "--case=_qk_ bf16, decode 2", "--case=cos_sin fp32, decode 2")
    assert failed.value.code.splitlines()[1].strip() == (
        "apply_rotary_mla_append_: no case in operators_cuda.py"
    )
    assert "apply_rotary_qk_ bf16, decode 2: q is wrong: error" in failed.value.code
    assert "| cos_sin fp32, decode 2 | rope_ext |" in capsys.readouterr().out
    assert all("mla" not in operator_name(case.operator) for case in cases)
