"""In graphs: the number of compilations, copies, waits for the device, and each lowering.

That compiled functions have the bits of eager ones is also in test_integration.py.
"""

import shutil

import pytest
import torch
from support import (
    assert_same_bits,
    naming,
    random,
    random_positions,
    random_slots,
    random_table,
    rounded_once,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import rope_ext
from rope_ext.decompositions import DECOMPOSITIONS
from rope_ext.lowering import decomposes

rope = torch.ops.rope

B, S, H, K, D, P, L = 2, 5, 4, 2, 16, 8, 9

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="no C++ compiler for Inductor",
)
lowerings = pytest.mark.parametrize("to", ["op", "decompose"])


@pytest.fixture(autouse=True)
def lowered():
    """Every test starts without compiled code and with the default lowering."""
    torch._dynamo.reset()
    yield
    rope_ext.lowering("op")


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


class Graphs(list):
    """A backend that runs graphs as they are, and keeps them and their inputs."""

    def __call__(self, graph, inputs):
        self.append((graph, inputs))
        return graph


# ---- how many graphs


@lowerings
def test_module_has_two_graphs_for_all_shapes_positions_and_tables(to, device):
    """One with position_ids and one without, for every batch, length and positions, also after the
    table has grown. Sizes that are equal at first would be compiled as one.
    """
    module = rope_ext.RotaryEmbedding(D, max_position_embeddings=8, device=device)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    graphs = None
    with rope_ext.lowering(to):
        for batch, seq, first in ((3, 5, 0), (6, 12, 7), (7, 40, 3000), (9, 33, 1)):
            q = random(batch, seq, H, D, device=device)
            k = random(batch, seq, K, D, device=device)
            ids = first + random_positions(batch, seq, rows=50, device=device)
            for args in ((q, k), (q, k, ids)):
                assert_same(run(*args), module(*args))  # module: the table grows
            graphs = graphs or counter.frame_count
            assert counter.frame_count == graphs


# ---- what is copied


def in_packed_qkv(x, cos, sin):
    qkv = (x @ x.T).unflatten(-1, (H + K, -1))[None, ..., :D]
    q, k = qkv.split((H, K), dim=2)
    rope_ext.apply_rotary_qk(q, k, cos, sin, inplace=True)
    return qkv * 1


def in_intermediate(x, cos, sin):
    q = (x @ x.T)[None, :, None, :D]
    return rope.apply_rotary_(q, cos, sin), q * 1


def in_caches_that_are_graph_inputs(x, cos, sin, k_cache, v_cache, slots):
    q, k, v = (x @ x.T).unflatten(-1, (3, -1))[..., :D].split(1, dim=1)
    rope_ext.apply_rotary_qk_append_kv_(q, k, v, k_cache, v_cache, slots, cos, sin, layout="thd")
    rope_ext.shift_cached_k_(k_cache, slots, slots, slots * 2, cos[0])
    return q * 1


@needs_compiler
@pytest.mark.parametrize(
    "function", [in_packed_qkv, in_intermediate, in_caches_that_are_graph_inputs]
)
def test_in_place_is_in_place_in_the_code_of_inductor(function):
    """Functionalization on the way leaves no clone and no copy."""
    given = [random(96, 96), *random_table(96, P)]
    if function is in_caches_that_are_graph_inputs:
        given += random(8, 12, 1, D), random(8, 12, 1, D, seed=1), random_slots(96, capacity=96)
    copies = [t.clone() for t in given]
    expected = function(*copies)
    got, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), *given)
    for a, b in zip(tree_leaves([got, given]), tree_leaves([expected, copies]), strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-16, atol=2.0**-16)  # sums in another order
    assert code.count("torch.ops.rope.apply_rotary") == 1
    moves = function is in_caches_that_are_graph_inputs
    assert code.count("torch.ops.rope.shift_cached_k_.default(") == moves
    assert "_.default(" in code.partition("torch.ops.rope.apply_rotary")[2].partition("(")[0] + "("
    assert "clone" not in code
    assert "copy" not in code.replace("async_compile", "").replace("copy_misaligned", "")


@needs_compiler
def test_out_of_place_is_one_allocation_each_in_the_code_of_inductor():
    q, k = random(B, S, H, D), random(B, S, K, D)
    compiled = torch.compile(lambda *given: rope_ext.apply_rotary_qk(*given), fullgraph=True)
    _, (code,) = run_and_get_code(compiled, q, k, *random_table(L, P))
    code = code[code.index("def call(self, args)") : code.index("runner = Runner")]
    assert code.count("torch.ops.rope.apply_rotary_qk.default(") == 1
    assert "empty_strided" not in code  # the operator allocates
    assert "cpp_fused" not in code


# ---- waits for the device


@lowerings
def test_nothing_in_a_graph_waits_for_the_device(to):
    """No operator of forward or backward reads a value on the host, or has a shape that depends on
    values. Run with meta tensors, which have no values, and raise if they are read or copied.
    """
    module = rope_ext.RotaryEmbedding(D, max_position_embeddings=8, learned=True)
    graphs = Graphs()

    def step(q, k, ids):
        q, k = module(q, k, ids)
        q, k = module(q, k)
        return q.sum() + k.sum()

    q, k = random(B, S, H, D), random(B, S, K, D)
    with rope_ext.lowering(to):
        compiled = torch.compile(step, backend=graphs, fullgraph=True, dynamic=False)
        compiled(q, k, random_positions(B, S, rows=50))
    ((graph, inputs),) = graphs
    inputs = [t.detach().to("meta").requires_grad_(t.is_floating_point()) for t in inputs]
    leaves = [t for t in inputs if t.requires_grad]
    assert len(leaves) == 3  # q, k and inv_freq
    (out,) = graph(*inputs)
    grads = torch.autograd.grad(out, leaves)
    assert all(g.is_meta for g in grads)
    with pytest.raises(RuntimeError, match="meta"):
        out.item()


@pytest.mark.cuda
@lowerings
def test_reduce_overhead_replays_with_new_positions_and_no_sync(to):
    inv_freq = rope_ext.frequencies.default(D, device="cuda")[0]

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def step(q, ids):
        return rope_ext.apply_rotary(q, *rope_ext.cos_sin(inv_freq, ids))

    q = random(B, S, H, D, device="cuda")
    with rope_ext.lowering(to):
        for seed in range(5):
            ids = random_positions(B, S, rows=100, device="cuda", seed=seed)
            expected = rope_ext.apply_rotary(q, *rope_ext.cos_sin(inv_freq, ids))
            torch.cuda.set_sync_debug_mode("error" if seed > 2 else "default")
            try:
                torch.compiler.cudagraph_mark_step_begin()
                got = step(q, ids)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.testing.assert_close(got, expected)


# ---- lowering

# name -> table, shape of position_ids, options; of x [B, S, H, D] or, packed, [S, H, D]
ROTATIONS = {
    "table": ((L, P), None, {}),
    "ids S": ((L, P), (S,), {}),
    "ids BS, inverse": ((L, P), (B, S), {"inverse": True}),
    "rows for all, interleaved": ((1, S, P), None, {"interleaved": True}),
    "rows per token": ((B, S, P), None, {}),
    "partial": ((L, 3), None, {}),
    "last channels": ((L, 3), (1, S), {"rotary_offset": D - 6, "interleaved_out": True}),
    "full width": ((L, D), None, {"rotary_dim": D}),
    "full width, inverse, neighbours to halves": (
        (L, 6), (B, S), {"rotary_dim": 6, "inverse": True, "interleaved": True,
                         "interleaved_out": False, "rotary_offset": 3}),
    "full width, rows, interleaved": ((B, S, D), None, {"rotary_dim": D, "interleaved": True}),
    "packed": ((L, P), None, {"interleaved": True, "interleaved_out": False}),
    "packed, ids": ((L, 5), (S,), {"rotary_offset": 2}),
    "packed, rows": ((1, S, P), None, {"inverse": True}),
}  # fmt: skip


def rotation(name, dtype):
    """q, k, cos, sin, position_ids, options."""
    table, ids, options = ROTATIONS[name]
    tokens = (S,) if name.startswith("packed") else (B, S)
    q, k = random(*tokens, H, D, dtype=dtype), random(*tokens, K, D, dtype=dtype, seed=1)
    cos, sin = random(*table, seed=2), random(*table, seed=3)
    ids = None if ids is None else random_positions(*ids, rows=L)
    return q, k, cos, sin, ids, options


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("ids BS, inverse", torch.float32), ("rows for all, interleaved", torch.bfloat16)],
    ids=str,
)
def test_decomposed_rotation_has_the_bits_of_the_operator(name, dtype):
    """In Inductor's code, which contracts nothing on the CPU: forward, and backward to x.
    test_decompositions_are_the_operators covers all options. The gradient to the table is summed
    in another order: each is within n 2^-24 of the sum of the sizes of n <= 2 B S (H + K) products.
    """
    *leaves, ids, options = rotation(name, dtype)
    leaves = [t.requires_grad_() for t in leaves]
    seeds = [random(*x.shape, dtype=dtype, seed=9) for x in leaves[:2]]

    def rotate(q, k, cos, sin):
        return rope_ext.apply_rotary_qk(q * 2, k, cos, sin, ids, **options)

    def step(rotate):
        out = rotate(*leaves)
        return *out, *torch.autograd.grad(out, leaves, seeds)

    expected = step(rotate)
    with rope_ext.lowering("decompose"):
        got, codes = run_and_get_code(step, torch.compile(rotate, fullgraph=True))
    assert not any("torch.ops.rope" in code for code in codes)
    assert_same(got[:4], expected[:4])
    terms = 2 * B * S * (H + K)
    size = 5.0**2 * terms  # no number of random() is larger than 5
    for a, b in zip(got[4:], expected[4:], strict=True):
        assert ((a - b).abs() <= terms * 2.0**-23 * size).all()


def test_decompositions_are_the_operators():
    """Used by run_decompositions in place of operators: forward, and backward to x."""
    for name in ROTATIONS:
        with naming(name):
            assert_decomposes(*rotation(name, torch.bfloat16))


def assert_decomposes(q, k, cos, sin, ids, options):
    def function(q, k):
        q, k = q.requires_grad_(), k.requires_grad_()
        outs = rope.apply_rotary_qk(q, k, cos, sin, ids, **options)
        only_q = rope.apply_rotary(q, cos, sin, ids, **options)
        return *outs, only_q, *torch.autograd.grad([*outs, only_q], [q, k], [*outs, only_q])

    traced = make_fx(function, decomposition_table=DECOMPOSITIONS)(q, k)
    assert "rope" not in traced.code
    assert_same(traced(q, k), function(q, k))
    assert_same_bits(function(q, k)[0], rounded_once(q, cos, sin, ids, **options))


def operators(function, *args):
    """The rope operators in the graph, and the results."""
    graphs = Graphs()
    results = torch.compile(function, backend=graphs, fullgraph=True)(*args)
    names = [str(node.target) for graph, _ in graphs for node in graph.graph.nodes]
    return [name for name in names if "rope" in name], results


def test_lowering_holds_until_the_end_of_its_block_or_from_now_on():
    def decomposed():
        args = random(B, S, H, D), *random_table(L, P)
        return operators(lambda *args: rope_ext.apply_rotary(*args), *args)[0] == []

    assert not decomposed()
    with rope_ext.lowering("decompose"):
        assert decomposed()  # compiled again, not the old graph
        with rope_ext.lowering("op"):
            assert not decomposed()
        assert decomposed()
    assert not decomposed()
    rope_ext.lowering("decompose")
    assert decomposed()
    with pytest.raises(ValueError, match="expected 'op' or 'decompose', got 'fused'"):
        rope_ext.lowering("fused")
    assert decomposes() is False  # eager


@pytest.mark.parametrize(
    ("needs_grad", "layout"), [(False, "bshd"), (True, "bhsd")], ids=["no grad", "grad"]
)
def test_decomposed_in_place_writes_its_argument(needs_grad, layout):
    def function(q, k, cos, sin):
        q, k = q * 1, k * 1
        rope_ext.apply_rotary(q, cos, sin, inplace=True, layout=layout)
        rope_ext.apply_rotary_qk(q, k, cos, sin, inplace=True, layout=layout)
        return q, k

    q, k = (random(B, S, S, D, seed=seed).requires_grad_(needs_grad) for seed in (1, 2))
    args = q, k, *random_table(L, P)
    with rope_ext.lowering("decompose"):
        names, got = operators(function, *args)
    assert names == []
    assert_same(got, function(*args))


def test_decomposed_position_past_the_table_is_nan():
    x, (cos, sin) = random(B, S, H, D), random_table(L, P // 2)
    ids = random_positions(S, rows=L)
    ids[1], ids[3] = -1, L
    with rope_ext.lowering("decompose"):
        _, got = operators(rope_ext.apply_rotary, x, cos, sin, ids)
    expected = rounded_once(x, cos, sin, ids.clamp(0, L - 1))
    expected[:, 1::2, :, :P] = torch.nan
    assert_same_bits(got, expected)


REFUSED = {
    "too few rows": ((B, S, H, D), (S - 1, P), None, {}),
    "rows of another length": ((B, S, H, D), (1, 1, P), None, {}),
    "rows of another batch": ((B, S, H, D), (B + 1, S, P), None, {}),
    "rows of two packed batches": ((S, H, D), (2, S, P), None, {}),
    "another width": ((B, S, H, D), (L, P), None, {"rotary_dim": 6}),
    "odd": ((B, S, H, D), (L, P), None, {"rotary_dim": 7}),
    "wider than a head": ((B, S, H, D), (L, D), None, {}),
    "offset past the head": ((B, S, H, D), (L, 4), None, {"rotary_offset": 9}),
    "one position for all": ((B, S, H, D), (L, P), (1,), {}),
    "positions of another batch": ((B, S, H, D), (L, P), (B + 1, S), {}),
    "rows and positions": ((B, S, H, D), (1, S, P), (S,), {}),
}


def test_decomposition_refuses_what_the_operator_refuses():
    """Plain PyTorch alone would broadcast some of these arguments."""
    of_one, of_two = rope.apply_rotary, rope.apply_rotary_qk
    for case, (shape, table, ids, options) in REFUSED.items():
        x, cos, sin = random(*shape), random(*table), random(*table)
        ids = None if ids is None else random_positions(*ids, rows=S)
        for operator in (of_one, DECOMPOSITIONS[of_one.default]):
            with naming(case), pytest.raises(RuntimeError, match=r"rope::apply.*expected .*, got"):
                operator(x, cos, sin, ids, **options)
    q, (cos, sin) = random(B, S, H, D), random_table(L, P)
    for k, s in ((random(B, S, K, D).half(), sin), (random(1, S, K, D), sin), (q, sin[:, :1])):
        for operator in (of_two, DECOMPOSITIONS[of_two.default]):
            with pytest.raises(RuntimeError, match=r"expected (k|sin) .*, got"):
                operator(q, k, cos, s)


# ---- transforms in graphs


@lowerings
def test_transforms_are_compiled(to, device):
    cos, sin = random_table(L, P, device=device)
    x = random(3, B, S, H, D, device=device)

    def rotate(x):
        return rope_ext.apply_rotary(x, cos, sin).sin()

    def function(x, primal, tangent):
        return vmap(grad(lambda x: rotate(x).sum()))(x), *jvp(rotate, (primal,), (tangent,))

    args = x, x[0].clone(), x[1].clone()
    expected = function(*args)
    with rope_ext.lowering(to):
        names, _ = operators(function, *args)
        got = torch.compile(function, backend="aot_eager", fullgraph=True)(*args)
    assert bool(names) == (to == "op")
    assert_same(got, expected)
