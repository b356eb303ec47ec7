"""torchtitan's RoPE modules and its trainer, with the override of rope_ext and without."""

import importlib
import multiprocessing
import socket
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("torchtitan")

import spmd_types as spmd
import torchtitan_trainer as trainer
from spmd_types.checker import typecheck
from support import assert_same_bits, error_of, random
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE

from rope_ext.integrations import torchtitan as integration

CONFIGS = {
    "complex": ComplexRoPE.Config(dim=16, max_seq_len=64),
    "complex, llama": ComplexRoPE.Config(dim=16, max_seq_len=64, theta=5e5, scaling="llama"),
    "complex, yarn": ComplexRoPE.Config(dim=16, max_seq_len=64, scaling="yarn", rope_factor=4.0),
    "cos and sin": CosSinRoPE.Config(dim=16, max_seq_len=64),
    "cos and sin, yarn": CosSinRoPE.Config(dim=16, max_seq_len=64, scaling="yarn", rope_factor=4.0),
}
# Flags of torchtitan, after the name of the model family.
FLOAT32 = "--training.mixed-precision-param float32"
ALONE = {
    "neighbouring channels": f"llama3 {FLOAT32}",
    "halves": f"qwen3 {FLOAT32}",
    "latent attention": f"deepseek_v3 {FLOAT32}",
}
# FSDP of torch 2.13 refuses the parameters of torchtitan's third backend, spmd_types.
BACKEND = f"llama3 {FLOAT32} --parallelism.spmd-backend"
TENSOR = "--parallelism.tensor-parallel-degree 2"
CONTEXT = "--parallelism.context-parallel-degree 2"
CONTEXT += " --training.seq-len 256 --training.local-batch-size 1"  # a block of 128 for each rank
TWO_RANKS = {
    "tensor parallel": f"{BACKEND} partial_dtensor {TENSOR}",
    "tensor parallel, all DTensors": f"{BACKEND} full_dtensor {TENSOR}",
    "context parallel": f"{BACKEND} partial_dtensor {CONTEXT}",
    "context parallel, all DTensors": f"{BACKEND} full_dtensor {CONTEXT}",
}
# The others take as long and differ in one thing each: slow tests.
QUICK = ("tensor parallel, all DTensors",)
POSITIONS = {
    "none": None,
    "one row": torch.arange(5, 37)[None],
    "a row for each sequence": torch.stack((torch.arange(32), torch.arange(32) % 9)),
}


def rotated(rope, q, k, positions):
    """The results of a module, and the gradients of q and k for given ones of the results."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    results = rope(q, k, positions)
    towards = [random(*y.shape, dtype=y.dtype, seed=7) for y in results]
    return [*results, *torch.autograd.grad(results, (q, k), towards)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_modules_compute_what_those_of_torchtitan_compute(name, dtype):
    """|ours - theirs| <= 2^-23 (|x1 c| + |x2 s|) in float32: two products and a sum, each rounded,
    where a complex product may fuse two of the three. Both round that to bfloat16 once.
    """
    config = CONFIGS[name]
    theirs, ours = config.build(), integration.rope(config).build()
    q, k = random(2, 32, 4, 16, dtype=dtype, seed=1), random(2, 32, 1, 16, dtype=dtype, seed=2)
    most = 2.0**-23 * 2 * max(x.abs().max().item() for x in (q, k)) * 2
    for positions in POSITIONS.values():
        expected = rotated(theirs, q, k, positions)
        for got, want in zip(rotated(ours, q, k, positions), expected, strict=True):
            assert got.dtype == want.dtype == dtype
            assert got.shape == want.shape
            rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
            torch.testing.assert_close(got, want, atol=most, rtol=rounding)
            if isinstance(theirs, CosSinRoPE):
                assert_same_bits(got, want, name)


def test_modules_compile_into_one_graph():
    rope = integration.rope(CONFIGS["complex"]).build()
    q, k, positions = random(2, 32, 4, 16), random(2, 32, 1, 16), POSITIONS["one row"]
    compiled = torch.compile(rope, backend="aot_eager", fullgraph=True)
    expected = rotated(rope, q, k, positions)
    for got, want in zip(rotated(compiled, q, k, positions), expected, strict=True):
        assert_same_bits(got, want)


def test_only_known_rotations_shapes_and_releases_are_taken(monkeypatch):
    class Other(CosSinRoPE):
        @dataclass(kw_only=True, slots=True)
        class Config(CosSinRoPE.Config):
            pass

    message = error_of(integration.rope, Other.Config(dim=16, max_seq_len=64))
    assert "expected config to be of ComplexRoPE or CosSinRoPE, got " in message
    assert "Other.Config" in message
    rope = integration.rope(CONFIGS["complex"]).build()
    q = random(2, 32, 4, 16)
    for wrong in (random(2, 32, 4, 32), random(2, 32, 16)):
        for name, arguments in ("query", (wrong, q)), ("key", (q, wrong)):
            message = error_of(rope, *arguments)
            assert f"expected {name} to have shape [B, S, H, 16], got shape" in message
    with pytest.raises(RuntimeError, match="position"):
        rope(q, q, torch.full((1, 32), 64))

    monkeypatch.setattr("torchtitan.__version__", "0.9.1")
    with pytest.raises(ImportError, match=r"expected torchtitan 0\.3.*got torchtitan 0\.9\.1"):
        importlib.reload(integration)


def test_tables_are_made_anew_after_to_empty_and_are_no_part_of_checkpoints():
    for config in CONFIGS.values():
        with torch.device("meta"):
            rope = integration.rope(config).build()
        rope.to_empty(device="cpu").init_states()
        assert_same_bits(rope.cache, integration.rope(config).build().cache)
        assert not rope.state_dict()


def test_results_have_the_types_that_torchtitan_checks():
    """With --debug.spmd_typechecking: sharded by batch, sequence and heads, as q and k are."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "cp", "tp"))
        table = dict.fromkeys(("dp", "cp", "tp"), spmd.R)
        heads = {"dp": spmd.S(0), "cp": spmd.S(1), "tp": spmd.S(2)}
        q, k, positions = random(2, 8, 4, 16), random(2, 8, 2, 16), torch.arange(16).view(2, 8)
        for name in ("complex", "cos and sin"):
            rope = integration.rope(CONFIGS[name]).build()
            with spmd.set_current_mesh(mesh), typecheck():
                for x, types in (q, heads), (k, heads), (positions, heads | {"tp": spmd.R}):
                    spmd.assert_type(x, types)
                spmd.assert_type(rope.cache, table)
                for y in rope(q, k, positions):
                    assert len(spmd.get_partition_spec(y)) == 4
                    spmd.assert_type(y, heads)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def trained(case, tmp_path):
    """Of each rank the runs without rope_ext and with it, each run in a new process."""
    trainer.write_assets(tmp_path)
    ranks, flags = (1, ALONE[case]) if case in ALONE else (2, TWO_RANKS[case])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchtitan_trainer"])
    with context.Pool(ranks, maxtasksperchild=1) as pool:
        runs = []
        for ours in (False, True):
            with socket.create_server(("localhost", 0)) as server:
                port = server.getsockname()[1]  # free again when the trainings start
            rest = ranks, port, tmp_path, flags, ours
            runs.append(pool.starmap(trainer.train_as_rank, [(r, *rest) for r in range(ranks)], 1))
    return zip(*runs, strict=True)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in (*ALONE, *TWO_RANKS)
    ],
)
def test_trainer_has_the_losses_and_gradients_of_torchtitan(case, trained):
    for own, ours in trained:
        assert len(own.losses) == 10
        assert own.calls == 0
        assert ours.calls >= 10 * 6  # steps and layers
        plain = case in ALONE or case == "context parallel"
        assert ours.distributed_calls == (0 if plain else ours.calls)
        assert ours.losses == own.losses
        assert ours.gradient_norms == own.gradient_norms
