"""The operators on several ranks: DTensors, real processes that train, and a mesh of 1,024.

Calls without communication are checked rank by rank in one process (ranks.py). The scenarios of
distributed_training.py run in separate processes.
"""

import subprocess
import sys
import weakref
from functools import partial
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
from rope_ext._engine import dtensor

rope = torch.ops.rope

B, S, H, KV_HEADS, D, ROWS = 4, 8, 4, 2, 8, 16
DTYPE = torch.float64
# Sums over tokens or heads are split over ranks and added in another order: each of n terms of size
# about 1 is rounded at most n times, and n <= B S H = 128.
SUMS = {"rtol": 128 * torch.finfo(DTYPE).eps, "atol": 128**2 * torch.finfo(DTYPE).eps}
EQUAL = {"rtol": 0, "atol": 0}
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
SHARDS = {"replicated": Replicate(), "batch": Shard(0), "sequence": Shard(1), "heads": Shard(2)}


def on_ranks(function, xs, rest, placement):
    """function(*xs, *rest) of xs placed so, and of the rest, which is whole on every rank."""

    def on_rank(mesh):
        placed = [place(x, mesh, placement) for x in xs]
        return function(*placed, *(place(t, mesh) for t in rest))

    return on_every_rank(on_rank)


def assert_close(got, expected, tolerance=SUMS):
    for part, whole in zip(got, expected, strict=True):
        torch.testing.assert_close(part, whole, **tolerance)


def with_gradients(q, k, grad_q, grad_k, cos, sin, positions=None):
    leaves = [leaf.detach().requires_grad_() for leaf in (q, k, cos, sin)]
    results = rope.apply_rotary_qk(*leaves, positions)
    gradients = torch.autograd.grad(results, leaves, (grad_q, grad_k))
    return [*(result.detach() for result in results), *gradients]


@pytest.mark.parametrize("rows", ROW_KINDS.values(), ids=ROW_KINDS)
def test_every_rank_rotates_its_part_and_gradients_add_up(rows):
    (cos, sin), positions = rows
    xs, rest = (q, k, grad_q, grad_k), (cos, sin, positions)
    expected = with_gradients(*xs, *rest)
    for shard, placement in SHARDS.items():
        with naming(shard):
            got = on_ranks(with_gradients, xs, rest, placement)
            assert_close(got[:4], expected[:4], EQUAL)  # the rotation, and back
            assert_close(got[4:], expected[4:])  # over tokens and heads


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
        assert_close(got, rope.apply_rotary_qk(q, k, *rows, positions), EQUAL)


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
        assert_close(on_every_rank(partial(on_rank, placements=placements)), expected)


def test_packed_tokens_shard_as_a_sequence():
    xs = [x.flatten(0, 1) for x in (q, k, grad_q, grad_k)]
    tokens = random_table(B * S + 3, D // 2, dtype=DTYPE)
    for rest, dim in (
        (tokens, 0),
        ((*table, position_ids.flatten()), 0),
        ([t[: B * S] for t in tokens], 1),
    ):
        got = on_ranks(with_gradients, xs, rest, Shard(dim))
        assert_close(got, with_gradients(*xs, *rest))


def test_sizes_that_the_ranks_do_not_divide_and_orders_in_memory():
    x = random(3, 7, 3, D, dtype=DTYPE)
    cases = [("bshd", x, placement) for placement in SHARDS.values()]
    cases += [(to, in_layout(q, to), Shard(dim)) for to in ("bhsd", "sbhd") for dim in range(3)]
    for layout, x, placement in cases:
        rotate = partial(rope_ext.apply_rotary, layout=layout)
        (got,) = on_ranks(lambda *args: (rotate(*args),), [x], table, placement)  # noqa: B023
        assert torch.equal(got, rotate(x, *table)), (layout, placement)


def test_what_is_kept_of_a_call_decides_the_next_one_and_holds_no_tensor(mesh, monkeypatch):
    dtensor._decided.cache_clear()
    given = [place(q.clone(), mesh, Shard(1)), *(place(t, mesh) for t in table)]
    first = rope.apply_rotary(*given)
    monkeypatch.setattr(dtensor, "plan_for", None)
    second = rope.apply_rotary(*given)
    assert second.device_mesh is mesh
    for name in ("placements", "shape", "dtype", "requires_grad"):
        assert getattr(second, name) == getattr(first, name)
    assert second.stride() == first.stride() == q.stride()
    torch.testing.assert_close(second.to_local(), first.to_local(), **EQUAL)
    held = [weakref.ref(x) for x in (*given, *(x.to_local() for x in (*given, first, second)))]
    del given, first, second
    assert not any(x() is not None for x in held)


def test_in_place_differentiates():
    def in_place(x, grad, cos, sin):
        x = x.detach().requires_grad_()
        y = rope_ext.apply_rotary(x * 1, cos, sin, inplace=True)
        return y.detach(), *torch.autograd.grad(y, x, grad)

    y, grad = on_ranks(in_place, (q, grad_q), table, Shard(1))
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
        return [t.to_local() for t in (*results, *torch.autograd.grad(results, leaves, grads))]

    assert_close(run(torch.compile(loss, fullgraph=True, backend="aot_eager")), run(loss), EQUAL)


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
        of = [t for t in leaves if t.requires_grad]
        return cos.detach(), sin.detach(), *torch.autograd.grad((cos, sin), of, grads)

    def on_rank(mesh, at):
        inv_freq_at, positions_at, tables_at = at
        of_grads = (place(grad, mesh, tables_at) for grad in grads)
        placed = place(inv_freq, mesh, inv_freq_at), place(positions, mesh, positions_at)
        return tables(*placed, place(axes, mesh, inv_freq_at), *of_grads)

    expected = tables(inv_freq, positions, axes, *grads)
    for at in (
        (Replicate(), Replicate(), Replicate()),
        (Replicate(), Shard(first), Shard(0)),
        (Replicate(), Shard(first + 1), Shard(1)),
        (Shard(0), Replicate(), Shard(2)),  # the pairs, and their axes with them
    ):
        got = on_every_rank(partial(on_rank, at=at))
        assert_close(got[:2], expected[:2], EQUAL)
        assert_close(got[2:], expected[2:], {**SUMS, "atol": ROWS * SUMS["atol"]})


@pytest.mark.parametrize("positions", [None, "S", "1S", "BS", "3BS"])
def test_rotation_by_angles(positions):
    """In place and not, and backward, for any shard; angles are sharded if tokens are. The gradient
    to frequencies is pending: each rank has a term of the sum over tokens.
    """
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

    def to_frequencies(q, k, grad_q, grad_k, inv_freq):
        leaf = inv_freq.detach().requires_grad_()
        return torch.autograd.grad(rope_ext.apply_rotary_qk_at(q, k, leaf), leaf, (grad_q, grad_k))

    xs, rest = (q, k, grad_q, grad_k), (inv_freq, ids, axes)
    expected = rotated(*xs, *rest)
    for shard, placement in SHARDS.items():
        with naming(shard):
            assert_close(on_ranks(rotated, xs, rest, placement), expected, EQUAL)
    if positions is None:
        got = on_ranks(to_frequencies, xs, (inv_freq,), Shard(1))
        assert_close(got, to_frequencies(*xs, inv_freq), {**SUMS, "atol": S * SUMS["atol"]})


def test_dtype_of_a_table_is_that_which_was_asked_for(mesh):
    inv_freq, positions = place(table[0][0], mesh), place(position_ids, mesh)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        cos, sin = rope_ext.cos_sin(inv_freq, positions, dtype=dtype)
        assert cos.dtype == sin.dtype == cos.to_local().dtype == dtype


# ---- errors


def refusals(mesh):
    """Message, operator, arguments."""

    def at(x, *placements):
        return place(x, mesh, *placements)

    one, two, out, tables = (
        rope.apply_rotary,
        rope.apply_rotary_qk,
        rope.apply_rotary.out,
        rope.cos_sin,
    )
    x, y, cos, sin, ids = (at(t) for t in (q, k, *table, position_ids))
    of_tokens, inv_freq, empty = at(q, Shard(1)), torch.ones(D // 2), torch.empty_like(x)
    rows = [t[position_ids] for t in table]
    axes, by_axis = at(torch.zeros(D // 2).long()), at(torch.zeros(4, B, S), Shard(0))
    whole, beside = r"to be Replicate\(\)", "to be .* sharded along sequence, beside"
    return [
        # a channel alone can't rotate, a maximum does not pass through
        (f"x {whole}, as it is needed whole, on dimension 0", one, at(q, Shard(3)), cos, sin),
        (f"x {whole}, as it is needed whole", one, at(q, Partial("max")), cos, sin),
        # any position may be asked of a table
        (f"cos {whole}", one, x, at(table[0], Shard(0)), sin, ids),
        # rows and tables of other tokens or lengths
        ("cos to have at least 8 rows, .* of the whole sequence, got 7",
         one, of_tokens, *(at(t[: S - 1]) for t in table)),
        ("cos to have sequence 8, as x has, got 7", one, of_tokens, *(at(t[:, 1:]) for t in rows)),
        (f"cos {beside} x as", one, of_tokens, *(at(t, Shard(0)) for t in rows)),
        (f"k {beside} q as", two, of_tokens, at(k, Shard(0)), cos, sin),
        # a part of k would be written, and lost
        ("k to be .*, beside q as .*no collective is inserted",
         rope.apply_rotary_qk_, of_tokens, y, cos, sin),
        ("out to be .*, beside x as", partial(out, out=empty), at(q, Shard(2)), cos, sin),
        # out has no pending sum
        ("out to be placed as the result", partial(out, out=empty), at(q, Partial()), cos, sin),
        # cos is not linear in a frequency; positions and pairs on one dimension
        (f"inv_freq {whole}", tables, at(inv_freq, Partial()), ids),
        ("position_ids to be .* sharded along pairs",
         tables, at(inv_freq, Shard(0)), at(position_ids, Shard(0))),
        (f"position_ids {whole}", tables, at(inv_freq), by_axis, axes),
        (f"inv_freq {whole}", rope.apply_rotary_qk_at, x, y, at(inv_freq, Shard(0))),
        (r"cos to be a DTensor, .*distribute_tensor\(cos", one, x, table[0], sin),
        ("cos on the mesh of the others",
         one, x, *(place(t, init_device_mesh("cpu", (2, 2))) for t in table)),
    ]  # fmt: skip


def test_a_placement_that_needs_a_collective_is_refused(mesh):
    for message, operator, *arguments in refusals(mesh):
        with CommDebugMode() as communication, naming(message):
            name = str(getattr(operator, "func", operator)).removeprefix("rope.")
            with pytest.raises(RuntimeError, match=rf"{name}: expected {message}"):
                operator(*arguments)
        assert communication.get_total_counts() == 0


def test_plain_tables_where_pytorch_is_told_that_they_are_equal(mesh):
    x = place(q, mesh, Shard(1))
    with implicit_replication():
        got = rope.apply_rotary(x, *table).to_local()
    assert torch.equal(got, rope.apply_rotary(x, *(place(t, mesh) for t in table)).to_local())


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
        of_ranks = length, MESH["context"], number
        mine = rope_ext.positions.context_parallel(*of_ranks, load_balanced=load_balanced)
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
    assert (y.shape, y.placements) == (x.shape, x.placements)
    expected = rope_ext.apply_rotary(local, cos, sin, mine[None])
    assert torch.equal(y.to_local(), expected)
    assert torch.equal(local.grad, *torch.autograd.grad(expected.sum(), local))


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


@pytest.mark.parametrize(
    "trained", [2, pytest.param(4, marks=pytest.mark.slow)], indirect=True, ids="{} ranks".format
)
@pytest.mark.shows("FSDP2", "apply_rotary_qk", "cos_sin")  # the model's frequencies are learned
def test_training_on_several_ranks_is_that_on_one(trained, alone):
    assert alone[0][-1] < 0.8 * alone[0][0]  # it learns
    for scenario, result in trained.items():
        with naming(scenario):
            assert not isinstance(result, str), result
            (losses, grads), (expected_losses, expected_grads) = result, alone
            torch.testing.assert_close(losses, expected_losses, rtol=TRAINING, atol=0)
            assert grads.keys() == expected_grads.keys()
            for name, expected in expected_grads.items():
                largest = expected.abs().max().item()
                assert largest > 0, name
                torch.testing.assert_close(grads[name], expected, rtol=0, atol=TRAINING * largest)


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
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
