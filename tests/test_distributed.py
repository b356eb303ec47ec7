"""The operators on several ranks: DTensors, real processes that train, and a mesh of 1,024.

Calls without communication are checked rank by rank in one process (ranks.py). The scenarios of
distributed_training.py run in separate processes.
"""

import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import distributed_training as training
import pytest
import torch
from ranks import RANKS, as_rank, on_every_rank, place
from support import in_layout, naming, random, random_positions, random_table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication

import rope_ext

rope = torch.ops.rope

B, S, H, KV_HEADS, D, ROWS = 4, 8, 4, 2, 8, 16
DTYPE = torch.float64
# Sums over tokens or heads are split over ranks and added in another order: each of n terms of size
# about 1 is rounded at most n times, and n <= B S H = 128.
SUMS = {"rtol": 128 * torch.finfo(DTYPE).eps, "atol": 128**2 * torch.finfo(DTYPE).eps}
# Training: sums of at most n = max(tokens, channels) = 64 terms, in about 20 operations a layer, in
# forward and backward, whose errors add up over the steps (SGD on a loss that falls evenly).
TRAINING = 64 * 20 * training.LAYERS * 2 * training.STEPS * torch.finfo(training.DTYPE).eps


@pytest.fixture
def mesh():
    with as_rank(1):
        yield init_device_mesh("cpu", (RANKS,))


# ---- the rotation

q = random(B, S, H, D, dtype=DTYPE)
k = random(B, S, KV_HEADS, D, dtype=DTYPE, seed=1)
grad_q, grad_k = random(B, S, H, D, dtype=DTYPE, seed=2), random(B, S, KV_HEADS, D, dtype=DTYPE)
table = random_table(ROWS, D // 2, dtype=DTYPE)
position_ids = random_positions(B, S, rows=ROWS)

# How a token finds its row: cos and sin, position_ids.
ROW_KINDS = {
    "table": (table, None),
    "table of the sequence's length": ([t[:S] for t in table], None),
    "position_ids [S]": (table, position_ids[0]),
    "position_ids [1, S]": (table, position_ids[:1]),
    "position_ids [B, S]": (table, position_ids),
    "rows [1, S, W]": ([t[position_ids[:1]] for t in table], None),
    "rows [B, S, W]": ([t[position_ids] for t in table], None),
}
SHARDS = {
    "replicated": Replicate(),
    "batch": Shard(0),
    "sequence": Shard(1),
    "heads": Shard(2),
}


@pytest.mark.parametrize("rows", ROW_KINDS.values(), ids=ROW_KINDS)
def test_every_rank_rotates_its_part_and_gradients_add_up(rows):
    (cos, sin), positions = rows

    def results_and_gradients(leaves, positions, grads):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        results = rope.apply_rotary_qk(*leaves, positions)
        torch.autograd.backward(results, grads)
        return [*(result.detach() for result in results), *(leaf.grad for leaf in leaves)]

    def on_rank(mesh, placement):
        leaves = [place(x, mesh, placement) for x in (q, k)] + [place(t, mesh) for t in (cos, sin)]
        grads = [place(grad, mesh, placement) for grad in (grad_q, grad_k)]
        return results_and_gradients(leaves, place(positions, mesh), grads)

    expected = results_and_gradients((q, k, cos, sin), positions, (grad_q, grad_k))
    for shard, placement in SHARDS.items():
        got = on_every_rank(partial(on_rank, placement=placement))
        with naming(shard):
            for part, whole in zip(got[:4], expected[:4], strict=True):  # the rotation, and back
                assert torch.equal(part, whole)
            for part, whole in zip(got[4:], expected[4:], strict=True):  # over tokens and heads
                torch.testing.assert_close(part, whole, **SUMS)


def test_x_follows_rows_and_positions_that_are_sharded():
    def rotated(mesh, placement, kind):
        (cos, sin), positions = ROW_KINDS[kind]
        rows = [place(t, mesh, *([placement] if positions is None else [])) for t in (cos, sin)]
        given = place(positions, mesh, placement)
        y, z = rope.apply_rotary_qk(place(q, mesh), place(k, mesh), *rows, given)
        assert y.placements == z.placements == (placement,)
        return y, z

    for kind, dim in (("position_ids [B, S]", 0), ("rows [B, S, W]", 1)):
        rows, positions = ROW_KINDS[kind]
        got = on_every_rank(partial(rotated, placement=Shard(dim), kind=kind))
        for part, whole in zip(got, rope.apply_rotary_qk(q, k, *rows, positions), strict=True):
            assert torch.equal(part, whole)


def test_heads_of_q_and_k_shard_by_themselves(monkeypatch):
    def gradients(x, y, cos, sin):
        leaves = [t.requires_grad_() for t in (x, y, cos, sin)]
        y, z = rope.apply_rotary_qk(*leaves)
        (y**2).sum().backward()  # k is not used: its gradient is None, not zeros
        return [y.detach(), z.detach(), leaves[0].grad, leaves[2].grad, leaves[3].grad]

    def on_rank(mesh, placements):
        xs = (place(x, mesh, p) for x, p in zip((q, k), placements, strict=True))
        got = gradients(*xs, *(place(t, mesh) for t in table))
        assert got[1].placements == (placements[1],)
        return got

    expected = gradients(*(t.clone() for t in (q, k, *table)))
    # PyTorch sums the gradient over all ranks' heads; the operator must not do it.
    monkeypatch.setattr(CommDebugMode, "get_total_counts", lambda self: 0)
    for placements in ((Shard(2), Replicate()), (Replicate(), Shard(2))):
        got = on_every_rank(partial(on_rank, placements=placements))
        for part, whole in zip(got, expected, strict=True):
            torch.testing.assert_close(part, whole, **SUMS)


def test_packed_tokens_shard_as_a_sequence():
    x, grad = q.flatten(0, 1), grad_q.flatten(0, 1)
    tokens = random_table(B * S + 3, D // 2, dtype=DTYPE)

    def gradients(x, cos, sin, positions, grad):
        leaves = [t.detach().requires_grad_() for t in (x, cos, sin)]
        y = rope_ext.apply_rotary(*leaves, positions, layout="thd")
        y.backward(grad)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    def on_rank(mesh, rows, dim):
        whole = (place(t, mesh) for t in rows)
        return gradients(place(x, mesh, Shard(dim)), *whole, place(grad, mesh, Shard(dim)))

    for rows, dim in (
        ((*tokens, None), 0),
        ((*table, position_ids.flatten()), 0),
        ((*(t[: B * S] for t in tokens), None), 1),
    ):
        got = on_every_rank(partial(on_rank, rows=rows, dim=dim))
        for part, whole in zip(got, gradients(x, *rows, grad), strict=True):
            torch.testing.assert_close(part, whole, **SUMS)


def test_sizes_that_the_ranks_do_not_divide():
    x = random(3, 7, 3, D, dtype=DTYPE)

    def rotated(mesh, placement):
        return (rope.apply_rotary(place(x, mesh, placement), *(place(t, mesh) for t in table)),)

    for placement in SHARDS.values():
        (got,) = on_every_rank(partial(rotated, placement=placement))
        assert torch.equal(got, rope.apply_rotary(x, *table)), placement


def test_layouts_keep_their_order_in_memory():
    def rotated(mesh, x, dim, layout):
        rows = (place(t, mesh) for t in table)
        return (rope_ext.apply_rotary(place(x, mesh, Shard(dim)), *rows, layout=layout),)

    for layout, dim in product(("bhsd", "sbhd"), range(3)):
        x = in_layout(q, layout)
        (got,) = on_every_rank(partial(rotated, x=x, dim=dim, layout=layout))
        assert torch.equal(got, rope_ext.apply_rotary(x, *table, layout=layout)), (layout, dim)


def test_in_place_differentiates():
    def on_rank(mesh):
        x = place(q, mesh, Shard(1)).requires_grad_()
        rows = [place(t, mesh) for t in table]
        y = rope_ext.apply_rotary(x * 1, *rows, inplace=True)
        y.backward(place(grad_q, mesh, Shard(1)))
        return y.detach(), x.grad

    y, grad = on_every_rank(on_rank)
    assert torch.equal(y, rope.apply_rotary(q, *table))
    assert torch.equal(grad, rope.apply_rotary(grad_q, *table, inverse=True))


def test_compiles_forward_and_backward(mesh):
    def loss(x, y, cos, sin):
        y, z = rope_ext.apply_rotary_qk(x, y, cos, sin)
        return y * 2, z

    def run(function):
        leaves = [place(x, mesh, Shard(1)).requires_grad_() for x in (q, k)]
        results = function(*leaves, *(place(t, mesh) for t in table))
        grads = [place(grad, mesh, Shard(1)) for grad in (grad_q, grad_k)]
        torch.autograd.backward(results, grads)
        return [t.to_local() for t in (*results, *(leaf.grad for leaf in leaves))]

    compiled = run(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for got, expected in zip(compiled, run(loss), strict=True):
        assert torch.equal(got, expected)


# ---- tables


@pytest.mark.parametrize("axes", [None, torch.arange(D // 2) % 3], ids=["one axis", "axes"])
def test_rows_are_sharded_as_their_positions_and_gradients_add_up(axes):
    inv_freq = random(D // 2, dtype=DTYPE).abs()
    grads = random(B, S, D // 2, dtype=DTYPE), random(B, S, D // 2, dtype=DTYPE, seed=1)
    positions = position_ids if axes is None else random(3, B, S, dtype=DTYPE)
    first = positions.dim() - 2  # the dimension of the batch

    def tables(inv_freq, positions, axes, *grads):
        leaves = [t.detach() for t in (inv_freq, positions)]
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in leaves]
        cos, sin = rope_ext.cos_sin(*leaves, axes=axes)
        torch.autograd.backward((cos, sin), grads)
        return cos.detach(), sin.detach(), *(t.grad for t in leaves if t.requires_grad)

    def on_rank(mesh, positions_at, inv_freq_at, tables_at):
        return tables(
            place(inv_freq, mesh, inv_freq_at),
            place(positions, mesh, positions_at),
            place(axes, mesh, inv_freq_at),
            *(place(grad, mesh, tables_at) for grad in grads),
        )

    expected = tables(inv_freq, positions, axes, *grads)
    for positions_at, inv_freq_at, tables_at in (
        (Replicate(), Replicate(), Replicate()),
        (Shard(first), Replicate(), Shard(0)),
        (Shard(first + 1), Replicate(), Shard(1)),
        (Replicate(), Shard(0), Shard(2)),  # the pairs, and their axes with them
    ):
        at = {"positions_at": positions_at, "inv_freq_at": inv_freq_at, "tables_at": tables_at}
        got = on_every_rank(partial(on_rank, **at))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        for a, b in zip(got[2:], expected[2:], strict=True):
            torch.testing.assert_close(a, b, rtol=SUMS["rtol"], atol=ROWS * SUMS["atol"])


@pytest.mark.parametrize("positions", [None, "S", "1S", "BS", "3BS"])
def test_rotation_by_angles(positions):
    """In place and not, and backward, for any shard; angles are sharded if tokens are."""
    inv_freq, axes = random(D // 2, dtype=DTYPE).abs(), torch.arange(D // 2) % 3
    sizes = {"3": 3, "1": 1, "B": B, "S": S}
    ids = None if positions is None else random(*map(sizes.get, positions), dtype=DTYPE)
    axes = axes if positions == "3BS" else None

    def rotated(q, k, grad_q, grad_k, inv_freq, ids, axes):
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        y = rope_ext.apply_rotary_qk_at(*leaves, inv_freq, ids, axes=axes, interleaved=True)
        grads = torch.autograd.grad(y, leaves, (grad_q, grad_k))
        written = q.clone(), k.clone()
        rope.apply_rotary_qk_at_(*written, inv_freq, ids, axes, interleaved=True)
        return *(x.detach() for x in y), *grads, *written

    def on_rank(mesh, placement):
        xs = (place(x, mesh, placement) for x in (q, k, grad_q, grad_k))
        return rotated(*xs, *(place(t, mesh) for t in (inv_freq, ids, axes)))

    expected = rotated(q, k, grad_q, grad_k, inv_freq, ids, axes)
    for shard, placement in SHARDS.items():
        got = on_every_rank(partial(on_rank, placement=placement))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), shard


def test_gradient_to_frequencies_of_the_rotation_by_angles_is_pending():
    """With sequence shards, each rank has a term of the sum over tokens."""
    inv_freq = random(D // 2, dtype=DTYPE).abs()

    def gradient(q, k, grad_q, grad_k, inv_freq):
        leaf = inv_freq.detach().requires_grad_()
        y = rope_ext.apply_rotary_qk_at(q, k, leaf)
        return torch.autograd.grad(y, leaf, (grad_q, grad_k))

    def on_rank(mesh):
        xs = (place(x, mesh, Shard(1)) for x in (q, k, grad_q, grad_k))
        return gradient(*xs, place(inv_freq, mesh))

    (expected,) = gradient(q, k, grad_q, grad_k, inv_freq)
    (got,) = on_every_rank(on_rank)
    torch.testing.assert_close(got, expected, rtol=SUMS["rtol"], atol=S * SUMS["atol"])


def test_axes_and_frequencies_in_parts_are_refused_by_name(mesh):
    inv_freq, axes, ids = torch.ones(D // 2), torch.zeros(D // 2).long(), torch.zeros(4, B, S)
    whole = [place(t, mesh) for t in (inv_freq, ids, axes)]
    with pytest.raises(RuntimeError, match=r"cos_sin: expected position_ids to be Replicate\(\)"):
        rope_ext.cos_sin(whole[0], place(ids, mesh, Shard(0)), axes=whole[2])
    xs = place(q, mesh), place(k, mesh)
    with pytest.raises(RuntimeError, match=r"qk_at: expected inv_freq to be Replicate\(\)"):
        rope_ext.apply_rotary_qk_at(*xs, place(inv_freq, mesh, Shard(0)))


def test_dtype_of_a_table_is_that_which_was_asked_for(mesh):
    inv_freq, positions = place(table[0][0], mesh), place(position_ids, mesh)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        cos, sin = rope_ext.cos_sin(inv_freq, positions, dtype=dtype)
        assert cos.dtype == sin.dtype == cos.to_local().dtype == dtype


# ---- errors


def refusals(mesh):
    x, y, cos, sin = (place(t, mesh) for t in (q, k, *table))
    at = {name: place(q, mesh, placement) for name, placement in SHARDS.items()}
    positions, inv_freq = place(position_ids, mesh), table[0][0]
    table_in_parts, pending = place(table[0], mesh, Shard(0)), place(q, mesh, Partial())
    too_few_rows = [place(t[position_ids][:, 1:], mesh) for t in table]
    short = [place(t[: S - 1], mesh) for t in table]
    rows = [place(t[position_ids], mesh, Shard(0)) for t in table]
    return {
        "a channel alone can't rotate": (
            lambda: rope.apply_rotary(place(q, mesh, Shard(3)), cos, sin),
            r"apply_rotary: expected x to be Replicate\(\), as it is needed whole, on dimension 0",
        ),
        "any position may be asked of a table": (
            lambda: rope.apply_rotary(x, table_in_parts, sin, positions),
            r"apply_rotary: expected cos to be Replicate\(\)",
        ),
        "a table that ends before the sequence": (
            lambda: rope.apply_rotary(at["sequence"], *short),
            "apply_rotary: expected cos to have at least 8 rows, .* of the whole sequence, got 7",
        ),
        "rows of another length": (
            lambda: rope.apply_rotary(at["sequence"], *too_few_rows),
            "apply_rotary: expected cos to have sequence 8, as x has, got 7",
        ),
        "rows of other tokens": (
            lambda: rope.apply_rotary(at["sequence"], *rows),
            r"apply_rotary: expected cos to be .* sharded along sequence, beside x as",
        ),
        "q and k of other tokens": (
            lambda: rope.apply_rotary_qk(at["sequence"], place(k, mesh, Shard(0)), cos, sin),
            "apply_rotary_qk: expected k to be .* sharded along sequence, beside q as",
        ),
        "a part of k would be written, and lost": (
            lambda: rope.apply_rotary_qk_(at["sequence"], y, cos, sin),
            "apply_rotary_qk_: expected k to be .*, beside q as .*no collective is inserted",
        ),
        "out is placed otherwise": (
            lambda: rope.apply_rotary.out(at["heads"], cos, sin, out=torch.empty_like(x)),
            r"apply_rotary\.out: expected out to be .*, beside x as",
        ),
        "out has no pending sum": (
            lambda: rope.apply_rotary.out(pending, cos, sin, out=torch.empty_like(x)),
            r"apply_rotary\.out: expected out to be placed as the result",
        ),
        "a maximum does not pass through": (
            lambda: rope.apply_rotary(place(q, mesh, Partial("max")), cos, sin),
            r"apply_rotary: expected x to be Replicate\(\), as it is needed whole",
        ),
        "cos is not linear in a frequency": (
            lambda: rope.cos_sin(place(inv_freq, mesh, Partial()), positions),
            r"cos_sin: expected inv_freq to be Replicate\(\)",
        ),
        "positions and pairs on one dimension": (
            lambda: rope.cos_sin(
                place(inv_freq, mesh, Shard(0)), place(position_ids, mesh, Shard(0))
            ),
            "cos_sin: expected position_ids to be .* sharded along pairs",
        ),
        "a plain tensor": (
            lambda: rope.apply_rotary(x, table[0], sin),
            r"apply_rotary: expected cos to be a DTensor, .*distribute_tensor\(cos",
        ),
    }


def test_a_placement_that_needs_a_collective_is_refused(mesh):
    for case, (call, message) in refusals(mesh).items():
        with CommDebugMode() as communication, pytest.raises(RuntimeError) as refused:
            call()
        assert re.search(message, str(refused.value)), case
        assert communication.get_total_counts() == 0


def test_another_mesh_is_refused(mesh):
    other = init_device_mesh("cpu", (2, 2))
    message = "apply_rotary: expected cos on the mesh of the others"
    with pytest.raises(RuntimeError, match=message):
        rope.apply_rotary(place(q, mesh), *(place(t, other) for t in table))


def test_plain_tables_where_pytorch_is_told_that_they_are_equal(mesh):
    x = place(q, mesh, Shard(1))
    with implicit_replication():
        got = rope.apply_rotary(x, *table)
    assert torch.equal(
        got.to_local(), rope.apply_rotary(x, *(place(t, mesh) for t in table)).to_local()
    )


# ---- a large mesh

MESH = {"data": 8, "context": 16, "tensor": 8}


@pytest.mark.parametrize(("rank", "load_balanced"), [(0, True), (517, False), (1023, True)])
def test_1024_ranks(rank, load_balanced):
    """Batch, sequence and heads are each sharded along a dimension of the mesh."""
    local_batch, length, local_heads = 2, 4096, 2
    part = length // MESH["context"]
    inv_freq, _ = rope_ext.frequencies.default(D)
    with as_rank(rank, 1024), CommDebugMode() as communication:
        mesh = init_device_mesh("cpu", tuple(MESH.values()), mesh_dim_names=tuple(MESH))
        local = random(local_batch, part, local_heads, D).requires_grad_()
        x = DTensor.from_local(local, mesh, [Shard(0), Shard(1), Shard(2)])
        assert x.shape == (16, length, 16, D)
        number = mesh.get_local_rank("context")
        mine = rope_ext.positions.context_parallel(
            length, MESH["context"], number, load_balanced=load_balanced
        )
        everywhere = [Replicate()] * 3
        positions = DTensor.from_local(mine[None], mesh, [Replicate(), Shard(1), Replicate()])
        rows = rope_ext.cos_sin(DTensor.from_local(inv_freq, mesh, everywhere), positions)
        assert rows[0].shape == (1, length, D // 2)
        y = rope_ext.apply_rotary(x, *rows)
        cos, sin = rope_ext.cos_sin_cache(inv_freq, length + 7)
        if not load_balanced:  # the table alone gives the same on every rank
            tables = (DTensor.from_local(t, mesh, everywhere) for t in (cos, sin))
            assert torch.equal(rope_ext.apply_rotary(x, *tables).to_local(), y.to_local())
            assert mine[0] == number * part
        y.to_local().sum().backward()
    assert communication.get_total_counts() == 0
    assert y.shape == x.shape
    assert y.placements == x.placements
    expected = rope_ext.apply_rotary(local, cos, sin, mine[None])
    assert torch.equal(y.to_local(), expected)
    (expected_grad,) = torch.autograd.grad(expected.sum(), local)
    assert torch.equal(local.grad, expected_grad)


# ---- real processes


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """The results of rank 0: name -> (losses, gradients), or a traceback."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    # Processes of a server that has imported what takes seconds.
    torch.multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "torch._dynamo"])
    torch.multiprocessing.start_processes(
        training.run, (world, str(folder)), nprocs=world, start_method="forkserver"
    )
    return torch.load(folder / "results")


@pytest.fixture(scope="module")
def alone():
    return training.one_process()


def assert_same_training(result, expected):
    assert not isinstance(result, str), result
    (losses, grads), (expected_losses, expected_grads) = result, expected
    torch.testing.assert_close(losses, expected_losses, rtol=TRAINING, atol=0)
    assert grads.keys() == expected_grads.keys()
    for name, expected_grad in expected_grads.items():
        largest = expected_grad.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(grads[name], expected_grad, rtol=0, atol=TRAINING * largest)


@pytest.mark.parametrize(
    "trained", [2, pytest.param(4, marks=pytest.mark.slow)], indirect=True, ids="{} ranks".format
)
@pytest.mark.shows("FSDP2", "apply_rotary_qk", "cos_sin")  # the model's frequencies are learned
def test_training_on_several_ranks_is_that_on_one(trained, alone):
    assert alone[0][-1] < 0.8 * alone[0][0]  # it learns
    for scenario, result in trained.items():
        with naming(scenario):
            assert_same_training(result, alone)


# ---- the import


def test_rules_are_registered_if_dtensor_is_imported_first():
    """All other tests import rope_ext first."""
    code = """
import sys
import torch
from torch.distributed.tensor import DTensor, Shard, Replicate
import rope_ext
from torch.testing._internal.distributed.fake_pg import FakeStore
assert not any(getattr(finder, "module", None) == DTensor.__module__ for finder in sys.meta_path)
torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
x = DTensor.from_local(torch.randn(1, 3, 2, 4), mesh, [Shard(1)])
rows = (DTensor.from_local(torch.randn(6, 2), mesh, [Replicate()]) for _ in range(2))
assert torch.ops.rope.apply_rotary(x, *rows).placements == (Shard(1),)
"""
    root = Path(rope_ext.__file__).parents[1]
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
