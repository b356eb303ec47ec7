"""The table of bytes that kernels move: Nsight Compute's output is parsed right, and the emulator's
counts cover all cases.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bytes_moved
import operators_cuda

CASES = operators_cuda.cases(quick=False)

# Output of `ncu --csv --page raw --print-units base`: names, units, and one line a launch.
NCU = """==PROF== Connected to process 731 (/usr/bin/python3.12)
==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 4 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","dram__bytes_read.sum","dram__bytes_write.sum",\
"dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",\
"launch__registers_per_thread","lts__t_sectors_srcunit_tex_op_read.sum",\
"lts__t_sectors_srcunit_tex_op_write.sum","sm__warps_active.avg.pct_of_peak_sustained_active"
"","","","","","","","","","","","byte","byte","%","{time_unit}","register/thread","sector",\
"sector","%"
{launches}==PROF== Disconnected from process 731
"""
LAUNCH = (
    '"0","731","python3.12","127.0.0.1","{kernel}","1","7","(256, 1, 1)","(40, 1, 1)","0","9.0",'
    '"{read}","1,024","71.5","{time}","32","10","20","n/a"\n'
)
MARKER = "at::cuda::<unnamed>::spin_kernel(long)"
APPEND = (
    "void rope::cuda::<unnamed>::append_kernel<__nv_bfloat16, 8, false, rope::Paged<unsigned int>>"
    "(rope::AppendArgs, rope::cuda::Plan)"
)


@pytest.mark.parametrize(("time", "time_unit"), [("12,288", "ns"), ("12.288", "us")])
def test_launches_belong_to_the_case_before_which_the_marker_was(time, time_unit):
    lines = [
        LAUNCH.format(kernel=kernel, read=read, time=time)
        for kernel, read in (
            (MARKER, "0"),
            (APPEND, "33,554,432"),
            (MARKER, "0"),
            ("void rope::cuda::(anonymous namespace)::a_kernel<float>(int)", "1"),
            ("b_kernel(int)", "2"),
        )
    ]
    text = NCU.format(launches="".join(lines), time_unit=time_unit)
    rows = bytes_moved.measured(text, CASES[:2])
    names = [(row["case"], row["kernel"]) for row in rows]
    first, second = (case.label for case in CASES[:2])
    assert names == [(first, "append_kernel"), (second, "a_kernel"), (second, "b_kernel")]
    figures = {"dram_read": 33554432, "dram_write": 1024, "l2_read": 320, "l2_write": 640}
    figures |= {"microseconds": pytest.approx(12.288), "dram_percent": 71.5, "registers": 32}
    figures |= {"least": CASES[0].least_bytes, "occupancy_percent": ""}  # n/a
    assert rows[0] == {"case": first, "kernel": "append_kernel", **figures}


def test_counts_of_the_emulator_are_held_against_the_least():
    counts = ("exact", 1e6, 1e6), ("more", 1e6, 1e6), ("more", 1, 3e5), ("few", 1e6, 9e5)
    columns = "case", "distinct_read", "distinct_write"
    rows = [dict(zip(columns, row, strict=True), least=2e6) for row in counts]
    wrong = bytes_moved.with_least(rows)
    assert [r.get("over_least") for r in rows] == ["1.00", "**1.15**", None, "0.95"]
    assert wrong == ["few: 1,900,000.0 bytes are fewer than the least, 2,000,000.0"]


def test_counts_of_a_gpu_are_held_against_the_emulator():
    (known, new) = ({"case": "a", "kernel": k} for k in ("known", "new"))
    for size, dram_over in ((1 << 21, "**1.20**"), (1 << 11, "1.20")):
        counts = dict.fromkeys(bytes_moved.COUNTED, size)
        got = {"dram_read": 1.2 * size, "l2_read": size, "l2_write": 0.8 * size}
        rows = [known | got, new | got]
        bytes_moved.with_emulated(rows, [known | counts])
        over = {"dram_over": dram_over, "l2_over": "0.90"}
        assert rows == [known | got | counts | over, new | got]


def test_the_emulator_has_counted_every_case():
    """If cases change, run bytes_moved.py under the emulator to write the file again."""
    rows = bytes_moved.read(bytes_moved.EMULATED)
    assert {(r["case"], int(r["least"])) for r in rows} == {(c.label, c.least_bytes) for c in CASES}
