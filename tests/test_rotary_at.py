"""apply_rotary_qk_at, which computes its angles in the kernel, has the bits of rows of cos_sin and
apply_rotary_qk.
"""

import re
from functools import partial

import pytest
import torch
from support import (
    DTYPES,
    ORDERS,
    VIEWS,
    assert_derivatives,
    assert_same_bits,
    guarded,
    in_layout,
    name_of,
    on_cpu,
    random,
    random_positions,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

import rope_ext
from rope_ext import reference

rope = torch.ops.rope
F64, F32, F16, BF16 = DTYPES
B, S, H, K, D, P = 2, 5, 4, 2, 48, 24


def inv_freq_of(pairs, dtype=F32, device="cpu"):
    return rope_ext.frequencies.default(2 * pairs)[0].to(dtype).to(device)


def by_rows(q, k, inv_freq, position_ids=None, *, axes=None, attention_scaling=1.0, **options):
    """The same by rows of cos and sin."""
    if position_ids is None:
        position_ids = torch.arange(q.shape[-3], device=q.device)
    dtype = F64 if q.dtype == F64 else F32
    rows = rope.cos_sin(
        inv_freq, position_ids, axes=axes, attention_scaling=attention_scaling, dtype=dtype
    )
    return rope.apply_rotary_qk(q, k, *rows, **options)


def assert_as_by_rows(q, k, *args, **options):
    named = {name: on.cpu() if name == "axes" else on for name, on in options.items()}
    expected = by_rows(*on_cpu([q, k, *args]), **named)
    got = rope.apply_rotary_qk_at(q, k, *args, **options)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
    return got


# ---- the bits of rows

# name -> shape of the tokens, of the positions, and their dtype
TOKENS = {
    "in order": ((B, S), None, None),
    "of one sequence": ((B, S), (S,), torch.int32),
    "of all sequences": ((B, S), (1, S), torch.int64),
    "of each": ((B, S), (B, S), torch.int64),
    "decoding": ((7, 1), (7, 1), torch.int64),
    "decoding, in order": ((7, 1), None, None),
    "packed, in order": ((9,), None, None),
    "packed": ((9,), (9,), torch.int32),
    "fractions": ((B, S), (B, S), F64),
    "fractions, packed": ((9,), (9,), F32),
    "float16": ((B, S), (S,), F16),
    "bfloat16": ((B, S), (1, S), BF16),
}


def positions_of(shape, dtype, device, lead=()):
    """Positions, also negative ones."""
    if shape is None:
        return None
    if dtype.is_floating_point:
        return (50 * random(*lead, *shape)).to(dtype).to(device)
    ids = random_positions(*lead, *shape, rows=200_000, dtype=dtype)
    return (ids - 100_000).to(device)


@pytest.mark.parametrize(
    ("tokens", "axes"),
    [(tokens, False) for tokens in TOKENS]
    + [(tokens, True) for tokens, (_, shape, _) in TOKENS.items() if shape is not None],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_positions(dtype, tokens, axes, backend):
    tokens, shape, position_dtype = TOKENS[tokens]
    options = {"axes": (torch.arange(P) % 3).to(backend)} if axes else {}
    q = random(*tokens, H, D, dtype=dtype, device=backend)
    k = random(*tokens, K, D, dtype=dtype, device=backend, seed=1)
    ids = positions_of(shape, position_dtype, backend, (3,) if axes else ())
    assert_as_by_rows(q, k, inv_freq_of(P, device=backend), ids, **options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_orders_and_parts_of_a_head(dtype, inverse, order, backend):
    """Numbers of pairs below, at and above whole vectors, channels before and after them, and more
    pairs than the kernels hold at a time (128 angles, 1024 pairs).
    """
    for pairs, offset, after in (
        (24, 0, 0),
        (8, 16, 16),
        (3, 0, 2),
        (13, 5, 0),
        (20, 4, 8),
        (130, 0, 0),
        (1030, 0, 3),
    ):
        dim = offset + 2 * pairs + after
        q = random(1, 3, 2, dim, dtype=dtype, device=backend)
        k = random(1, 3, 1, dim, dtype=dtype, device=backend, seed=1)
        ids = positions_of((3,), torch.int64, backend)
        assert_as_by_rows(
            q, k, inv_freq_of(pairs, device=backend), ids, rotary_offset=offset, inverse=inverse,
            attention_scaling=1.25, **ORDERS[order],
        )  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=name_of)
def test_memory_layouts(dtype, view, backend):
    base = partial(random, dtype=dtype, device=backend)
    q = VIEWS[view](base, B, S, H, D)
    k = VIEWS[view](partial(base, seed=1), B, S, K, D)
    inv_freq, ids = inv_freq_of(P, device=backend), positions_of((B, S), torch.int64, backend)
    got = assert_as_by_rows(q, k, inv_freq, ids)
    assert got[0].stride() == rope.apply_rotary_qk(q, k, *rows_of(q, inv_freq, ids))[0].stride()
    expected = [x.cpu() for x in got]
    rope.apply_rotary_qk_at_(q, k, inv_freq, ids)
    for a, b in zip((q, k), expected, strict=True):
        assert_same_bits(a, b)


def rows_of(x, inv_freq, ids):
    return rope.cos_sin(inv_freq, ids, dtype=F64 if x.dtype == F64 else F32)


@pytest.mark.parametrize("inv_freq_dtype", DTYPES, ids=name_of)
def test_frequencies_of_any_dtype_and_positions_and_frequencies_in_views(inv_freq_dtype, device):
    q, k = (random(B, S, h, D, device=device) for h in (H, K))
    inv_freq = inv_freq_of(2 * P, inv_freq_dtype, device)[::2]
    ids = positions_of((S, B), torch.int64, device).t()
    assert_as_by_rows(q, k, inv_freq, ids)
    ids = positions_of((S, 3, B), F64, device).permute(1, 2, 0)
    axes = (torch.arange(2 * P, device=device) % 3)[::2]
    assert_as_by_rows(q, k, inv_freq, ids, axes=axes)
    assert_as_by_rows(q, k, inv_freq, ids[:, :1].expand(3, B, S), axes=axes)


@pytest.mark.parametrize("dtype", [F64, F16], ids=name_of)
def test_long_sequences_with_heads_outermost_on_many_threads(dtype, backend):
    """Blocks of 16 tokens, split anywhere among their heads."""
    q = random(B, 70, 40, 64, dtype=dtype, device=backend).transpose(1, 2).contiguous()
    k = random(B, 70, 3, 64, dtype=dtype, device=backend, seed=1).transpose(1, 2).contiguous()
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    assert_as_by_rows(q, k, inv_freq_of(32, device=backend), None)
    ids = positions_of((B, 70), torch.int64, backend)
    assert_as_by_rows(q, k, inv_freq_of(32, device=backend), ids)


def test_angle_that_is_out_of_reach_is_nan(backend):
    """For every dtype, also bfloat16, whose rounding has to keep NaN."""
    ids = torch.tensor([float("inf"), float("nan"), 2.0**60, 1.0], device=backend)
    for dtype in DTYPES:
        q, k = (random(1, 4, 2, D, dtype=dtype, device=backend, seed=s) for s in (1, 2))
        for x in assert_as_by_rows(q, k, inv_freq_of(P, device=backend), ids):
            assert x[0].cpu().isnan().flatten(1).all(-1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("shape", [(0, S, H), (B, 0, H), (B, S, 0)], ids=str)
def test_nothing_to_rotate(shape, device):
    for k_heads in (0, K):
        q = random(*shape, D, device=device)
        k = random(*shape[:2], k_heads, D, device=device)
        assert_as_by_rows(q, k, inv_freq_of(P, device=device))


def test_no_byte_outside_is_written(backend):
    for dtype in DTYPES:
        tensors = [guarded(B, S, h, D, dtype=dtype, device=backend) for h in (H, K)]
        before = [whole.clone() for _, whole in tensors]
        inv_freq = inv_freq_of(7, device=backend)
        rope.apply_rotary_qk_at_(tensors[0][0], tensors[1][0], inv_freq, rotary_offset=11)
        for (x, whole), old in zip(tensors, before, strict=True):
            old = old.cpu()
            view = old[16 : 16 + x.numel()].view(x.shape)
            cos, sin = rope.cos_sin(inv_freq.cpu(), torch.arange(S), dtype=rows_dtype(dtype))
            rope.apply_rotary_(view, cos, sin, rotary_offset=11)
            assert_same_bits(whole, old)


def rows_dtype(dtype):
    return F64 if dtype == F64 else F32


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_layouts_of_the_function(inplace, layout, device):
    shape = (S,) if layout == "thd" else (B, S)
    xs = [in_layout(random(*shape, h, D, device=device), layout) for h in (H, K)]
    inv_freq, ids = inv_freq_of(P, device=device), positions_of((S,), torch.int64, device)
    expected = rope_ext.apply_rotary_qk(*xs, *rows_of(xs[0], inv_freq, ids), layout=layout)
    got = rope_ext.apply_rotary_qk_at(*xs, inv_freq, ids, layout=layout, inplace=inplace)
    for a, b, x in zip(got, expected, xs, strict=True):
        assert_same_bits(a, b)
        assert (a is x) == inplace


def test_reference_has_it(device):
    q, k = random(B, S, H, D, dtype=F64), random(B, S, K, D, dtype=F64)
    options = {"interleaved": True, "rotary_offset": 4, "attention_scaling": 1.25}
    ids, axes = positions_of((B, S), F64, "cpu", (2,)), torch.arange(8) % 2
    for args, named in (((), {}), ((ids,), {"axes": axes})):
        expected = reference.apply_rotary_qk_at(q, k, inv_freq_of(8), *args, **named, **options)
        on_device = [t.to(device) for t in (q, k, inv_freq_of(8), *args)]
        named = {name: t.to(device) for name, t in named.items()}
        got = rope.apply_rotary_qk_at(*on_device, **named, **options)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b)


# ---- derivatives

# name -> shape of the tokens, position_ids, axes, options
GRADIENTS = {
    "in order": ((1, 2), None, None, {}),
    "positions": ((2, 1), [[0.5], [2.0]], None, {"interleaved": True}),
    "of one sequence, partial": ((2, 2), [0.5, 3.0], None, {"rotary_offset": 1, "inverse": True}),
    "axes": ((2, 1), [[[0.5]], [[2.0]]], [1, 0], {"interleaved_out": True}),
    "packed": ((3,), [1.5, 0.5, 0.5], None, {"attention_scaling": 1.25}),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradcheck_of_q_k_frequencies_and_positions(case, device):
    tokens, ids, axes, options = GRADIENTS[case]
    q, k = (random(*tokens, h, 5, dtype=F64, device=device, seed=h) for h in (1, 2))
    inv_freq = torch.tensor([1.0, 0.3], dtype=F64, device=device)
    if axes is not None:
        options = {**options, "axes": torch.tensor(axes, device=device)}
    inputs = [t.requires_grad_() for t in (q, k, inv_freq)]
    if ids is not None:
        inputs.append(torch.tensor(ids, dtype=F64, device=device).requires_grad_())

    def function(*inputs):
        return rope.apply_rotary_qk_at(*inputs, **options)

    assert_derivatives(function, tuple(inputs))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gradients_to_q_and_k_have_the_bits_of_rows(dtype, order, device):
    inv_freq, ids = inv_freq_of(8, device=device), positions_of((B, S), torch.int64, device)
    seeds = [random(B, S, h, D, dtype=dtype, device=device, seed=9) for h in (H, K)]
    grads = []
    for function in (rope.apply_rotary_qk_at, by_rows):
        xs = [random(B, S, h, D, dtype=dtype, device=device).requires_grad_() for h in (H, K)]
        outputs = function(*xs, inv_freq, ids, rotary_offset=4, **ORDERS[order])
        grads.append(torch.autograd.grad(outputs, xs, seeds))
    for a, b in zip(*grads, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [F64, BF16], ids=name_of)
def test_gradients_to_frequencies_and_positions_have_the_bits_of_rows(dtype, device):
    seeds = [random(B, S, h, D, dtype=dtype, device=device, seed=9) for h in (H, K)]
    q, k = (random(B, S, h, D, dtype=dtype, device=device) for h in (H, K))
    axes = torch.arange(8, device=device) % 2
    grads = []
    for function in (rope.apply_rotary_qk_at, by_rows):
        inv_freq = inv_freq_of(8, device=device).requires_grad_()
        ids = positions_of((B, S), F32, device, (2,)).requires_grad_()
        outputs = function(q, k, inv_freq, ids, axes=axes, rotary_offset=4, attention_scaling=2.0)
        grads.append(torch.autograd.grad(outputs, (inv_freq, ids), seeds))
    for a, b in zip(*grads, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("used", [0, 1], ids=["q", "k"])
def test_gradient_of_one_of_two_results(used, device):
    leaves = [random(B, S, h, D, device=device).requires_grad_() for h in (H, K)]
    inv_freq = inv_freq_of(P, device=device).requires_grad_()
    grads = []
    for function in (rope.apply_rotary_qk_at, by_rows):
        out = function(*leaves, inv_freq)[used]
        seed = random(*out.shape, device=device, seed=9)
        grads.append(torch.autograd.grad(out, (leaves[used], inv_freq), seed))
    for a, b in zip(*grads, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_in_place_is_differentiable_and_saves_nothing(layout, device):
    inv_freq, ids = inv_freq_of(P, device=device), positions_of((B, S), torch.int64, device)
    seeds = [random(B, S, h, D, device=device, seed=9) for h in (H, K)]
    if layout == "bhsd":
        seeds = [seed.transpose(1, 2) for seed in seeds]
    grads = []
    for inplace in (True, False):
        leaves = [torch.ones_like(seed).requires_grad_() for seed in seeds]
        xs = [leaf * 2 for leaf in leaves]
        outputs = rope_ext.apply_rotary_qk_at(*xs, inv_freq, ids, layout=layout, inplace=inplace)
        assert (outputs[0] is xs[0]) == inplace
        grads.append(torch.autograd.grad(outputs, leaves, seeds))
    for a, b in zip(*grads, strict=True):
        assert_same_bits(a, b)


def test_in_place_counts_versions_and_refuses_gradients(device):
    q, k = (random(B, S, h, D, device=device) for h in (H, K))
    inv_freq = inv_freq_of(P, device=device)
    for operator in (rope.apply_rotary_qk_at_, partial(rope_ext.apply_rotary_qk_at, inplace=True)):
        versions = q._version, k._version
        operator(q, k, inv_freq)
        assert (q._version, k._version) == (versions[0] + 1, versions[1] + 1)
    ids = positions_of((S,), F32, device)
    for name, arguments in (
        ("q", (q.clone().requires_grad_() * 1, k, inv_freq)),
        ("inv_freq", (q, k, inv_freq.clone().requires_grad_())),
        ("position_ids", (q, k, inv_freq, ids.clone().requires_grad_())),
    ):
        with pytest.raises(RuntimeError, match=f"expected {name} to need no gradient"):
            rope.apply_rotary_qk_at_(*arguments)
    for arguments in ((inv_freq.clone().requires_grad_(),), (inv_freq, ids.requires_grad_())):
        with pytest.raises(RuntimeError, match="expected inv_freq and position_ids to need no"):
            rope_ext.apply_rotary_qk_at(q, k, *arguments, inplace=True)
    with pytest.raises(RuntimeError, match="expected q to be no leaf that requires grad"):
        rope_ext.apply_rotary_qk_at(q.requires_grad_(), k, inv_freq, inplace=True)


# ---- transforms and compilers

# the dimension of the samples in q, k, inv_freq and position_ids
BATCHED = {
    "q and k": (0, 0, None, None),
    "q": (1, None, None, None),
    "positions": (None, None, None, 1),
    "frequencies": (None, None, 0, None),
    "all": (0, 2, 0, 0),
}


@pytest.mark.parametrize("axes", [False, True], ids=["one axis", "axes"])
@pytest.mark.parametrize("batched", BATCHED)
def test_vmap_rotates_as_a_loop_does(batched, axes, device):
    dims, lead = BATCHED[batched], (2,) if axes else ()
    shapes = (B, S, H, D), (B, S, K, D), (P,), (*lead, B, S)
    arguments = [
        random(*shape, device=device) if dim is None
        else random(3, *shape, device=device).movedim(0, dim)
        for shape, dim in zip(shapes, dims, strict=True)
    ]  # fmt: skip
    named = {"axes": torch.arange(P, device=device) % 2} if axes else {}
    function = partial(rope.apply_rotary_qk_at, interleaved=True, attention_scaling=2.0, **named)
    got = vmap(function, in_dims=dims)(*arguments)
    for i in range(3):
        one = [a if dim is None else a.select(dim, i).contiguous()
               for a, dim in zip(arguments, dims, strict=True)]  # fmt: skip
        for a, b in zip(got, function(*one), strict=True):
            assert_same_bits(a[i], b)


def test_vmap_in_place_and_without_positions(device):
    xs = [random(3, B, S, h, D, device=device) for h in (H, K)]
    inv_freq = random(3, P, device=device)
    expected = [rope.apply_rotary_qk_at(q, k, f) for q, k, f in zip(*xs, inv_freq, strict=True)]
    for a, b in zip(vmap(rope.apply_rotary_qk_at)(*xs, inv_freq), zip(*expected, strict=True),
                    strict=True):  # fmt: skip
        assert_same_bits(a, torch.stack(b))
    vmap(rope.apply_rotary_qk_at_, out_dims=None)(*xs, inv_freq)
    for a, b in zip(xs, zip(*expected, strict=True), strict=True):
        assert_same_bits(a, torch.stack(b))
    with pytest.raises(RuntimeError, match="qk_at_: expected what is written to be batched"):
        vmap(rope.apply_rotary_qk_at_, in_dims=(None, 0, 0))(xs[0][0], xs[1], inv_freq)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("axes", [False, True], ids=["in order", "axes"])
def test_opcheck(axes, grad, device):
    q, k = (random(B, S, h, D, device=device).requires_grad_(grad) for h in (H, K))
    inv_freq = inv_freq_of(8, device=device).requires_grad_(grad)
    arguments, options = (q, k, inv_freq), {"rotary_offset": 3}
    if axes:
        arguments = *arguments, positions_of((B, S), F32, device, (2,)).requires_grad_(grad)
        options["axes"] = torch.arange(8, device=device) % 2
    torch.library.opcheck(rope.apply_rotary_qk_at.default, arguments, options)
    if not grad:
        torch.library.opcheck(rope.apply_rotary_qk_at_.default, arguments, options)


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_compiles_to_one_graph_for_all_lengths(inplace, device):
    torch._dynamo.reset()

    def function(q, k, inv_freq, ids):
        return rope_ext.apply_rotary_qk_at(q * 2, k * 2, inv_freq, ids, inplace=inplace)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    graphs = None
    for length in (5, 7, 9):  # sizes equal at first would be compiled as one
        xs = [random(B, length, h, D, device=device).requires_grad_() for h in (H, K)]
        inv_freq = inv_freq_of(P, device=device).requires_grad_(not inplace)
        ids = positions_of((B, length), F32, device).requires_grad_(not inplace)
        leaves = xs if inplace else [*xs, inv_freq, ids]
        seeds = [random(*x.shape, device=device, seed=9) for x in xs]
        results = []
        for rotate in (compiled, function):
            outputs = rotate(*xs, inv_freq, ids)
            results.append((*outputs, *torch.autograd.grad(outputs, leaves, seeds)))
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs


def test_flops_are_those_of_the_rotation(device):
    q, k = (random(B, S, h, D, device=device) for h in (H, K))
    with FlopCounterMode(display=False) as counter:
        rope.apply_rotary_qk_at(q, k, inv_freq_of(8, device=device))
    assert counter.get_total_flops() == 6 * 8 * B * S * (H + K)


# ---- refusals


def good():
    return {
        "q": random(B, S, H, D),
        "k": random(B, S, K, D),
        "inv_freq": inv_freq_of(P),
        "position_ids": torch.arange(S),
    }


BAD = {
    "q of rank 2": ({"q": torch.zeros(S, D)}, "q to have shape [B, S, H, D] or [T, H, D]"),
    "q of integers": ({"q": torch.zeros(B, S, H, D, dtype=torch.int32)}, "q to be float64, "),
    "k of another length": ({"k": torch.zeros(B, S + 1, K, D)}, "k to have q's shape"),
    "k of another dtype": ({"k": torch.zeros(B, S, K, D, dtype=F64)}, "k of q's dtype float32"),
    "inv_freq of rank 2": ({"inv_freq": torch.zeros(1, P)}, "inv_freq to have shape [P]"),
    "inv_freq of integers": ({"inv_freq": torch.zeros(P).int()}, "inv_freq to be float64, "),
    "inv_freq elsewhere": ({"inv_freq": torch.zeros(P, device="meta")}, "inv_freq on the device"),
    "more frequencies than pairs": (
        {"inv_freq": torch.zeros(P + 1)},
        "rotary_dim, twice the length of inv_freq, to be even, at least 2 and at most head_dim "
        f"{D}, got {D + 2}",
    ),
    "no frequency": ({"inv_freq": torch.zeros(0)}, "rotary_dim, twice the length of inv_freq"),
    "an offset too large": ({"rotary_offset": 1}, "rotary_offset to be at least 0 and at most"),
    "positions of booleans": (
        {"position_ids": torch.zeros(S, dtype=torch.bool)},
        "position_ids to be int32, int64, float64, float32, float16 or bfloat16, got bool",
    ),
    "too many positions": (
        {"position_ids": torch.arange(S + 1)},
        f"position_ids to have shape [S] or [1|B, S] with B = {B}, S = {S}, got [{S + 1}]",
    ),
    "positions of another batch": (
        {"position_ids": torch.zeros(B + 1, S)},
        "position_ids to have shape [S] or [1|B, S]",
    ),
    "axes, and positions without": (
        {"axes": torch.zeros(P, dtype=torch.int64), "position_ids": torch.zeros(S)},
        f"position_ids to have shape [A, S] or [A, 1|B, S] with B = {B}, S = {S}, got [{S}]",
    ),
    "positions of axes, without axes": (
        {"position_ids": torch.zeros(3, B, S)},
        "position_ids to have shape [S] or [1|B, S]",
    ),
    "axes without positions": (
        {"axes": torch.zeros(P, dtype=torch.int64), "position_ids": None},
        "position_ids with axes, got None",
    ),
    "an axis that is not there": (
        {"axes": torch.full((P,), 2), "position_ids": torch.zeros(2, S)},
        "axes in [0, 2), the first dimension of position_ids, got 2 at index [0]",
    ),
}


@pytest.mark.parametrize("name", ["apply_rotary_qk_at", "apply_rotary_qk_at_"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused_and_nothing_is_written(bad, name):
    change, expected = BAD[bad]
    arguments = {**good(), **change}
    before = arguments["k"].clone()
    with pytest.raises(RuntimeError, match=re.escape(f"rope::{name}: expected {expected}")):
        getattr(rope, name)(**arguments)
    assert_same_bits(arguments["k"], before)


def test_packed_positions_are_refused_where_their_number_is_wrong():
    q, k = torch.zeros(S, H, D), torch.zeros(S, K, D)
    message = re.escape(f"position_ids to have shape [T] with T = {S}, got [1, {S}]")
    with pytest.raises(RuntimeError, match=message):
        rope.apply_rotary_qk_at(q, k, inv_freq_of(P), torch.zeros(1, S))


def test_in_place_refuses_what_overlaps_and_another_order():
    whole = random(B * S * H * D + 64)
    q = whole[: B * S * H * D].view(B, S, H, D)
    refused = {
        "q and k to share no memory": (q, q[:, :, :K], inv_freq_of(P), None),
        "inv_freq to share no memory with q": (q, random(B, S, K, D), whole[:P], None),
        "position_ids to share no memory with q": (
            q, random(B, S, K, D), inv_freq_of(P), whole[D : D + S],
        ),
        "q to have no two elements in one place": (
            q[:, :1].expand(B, S, H, D), random(B, S, K, D), inv_freq_of(P), None,
        ),
    }  # fmt: skip
    for message, arguments in refused.items():
        with pytest.raises(RuntimeError, match=f"rope::apply_rotary_qk_at_: expected {message}"):
            rope.apply_rotary_qk_at_(*arguments)
    for operator in (rope.apply_rotary_qk_at_, partial(rope_ext.apply_rotary_qk_at, inplace=True)):
        with pytest.raises(RuntimeError, match="expected interleaved_out to be None or interleav"):
            operator(q, random(B, S, K, D), inv_freq_of(P), interleaved_out=True)


@pytest.mark.cuda
def test_axis_that_is_not_there_gives_nan_on_cuda_and_raises_on_demand(monkeypatch):
    axes = torch.tensor([0, 2, 1, -1, 2**40, 0, 0, 0])
    outside = ((axes < 0) | (axes > 1)).repeat(2)
    q, k = (random(B, S, h, 16, device="cuda") for h in (H, K))
    arguments = q, k, inv_freq_of(8, device="cuda"), torch.zeros(2, S, device="cuda")
    monkeypatch.setenv("ROPE_EXT_CHECK", "0")
    for x in rope.apply_rotary_qk_at(*arguments, axes=axes.cuda()):
        assert torch.equal(x.cpu().isnan(), outside.expand(x.shape))
    monkeypatch.setenv("ROPE_EXT_CHECK", "1")
    with pytest.raises(RuntimeError, match=re.escape("axes in [0, 2), the first dimension")):
        rope.apply_rotary_qk_at(*arguments, axes=axes.cuda())
