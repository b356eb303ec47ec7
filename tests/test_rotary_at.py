"""apply_rotary_qk_at, which computes its angles in the kernel, has the bits of rows of cos_sin and
apply_rotary_qk.
"""

import re
from functools import partial
from itertools import product

import pytest
import torch
from support import (
    DTYPES,
    ORDERS,
    VIEWS,
    assert_same_bits,
    guarded,
    in_layout,
    name_of,
    naming,
    on_cpu,
    random,
    random_positions,
)

import rope_ext
from rope_ext import reference

rope = torch.ops.rope
F64, F32, F16, BF16 = DTYPES
B, S, H, K, D, P = 2, 5, 4, 2, 48, 24


def inv_freq_of(pairs, dtype=F32, device="cpu"):
    return rope_ext.frequencies.default(2 * pairs)[0].to(dtype).to(device)


def heads_of(*tokens, dtype=F32, device="cpu"):
    """q and k."""
    return [random(*tokens, h, D, dtype=dtype, device=device) for h in (H, K)]


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


@pytest.mark.parametrize("tokens", TOKENS)
def test_positions(tokens, device):
    tokens, shape, position_dtype = TOKENS[tokens]
    for dtype, with_axes in product(DTYPES, (False, True)):
        if with_axes and shape is None:
            continue
        options = {"axes": (torch.arange(P) % 3).to(device)} if with_axes else {}
        q, k = heads_of(*tokens, dtype=dtype, device=device)
        ids = positions_of(shape, position_dtype, device, (3,) if with_axes else ())
        with naming(f"{dtype}, axes: {with_axes}"):
            assert_as_by_rows(q, k, inv_freq_of(P, device=device), ids, **options)


# Pairs below, at and above whole vectors, channels before and after them, and more pairs than the
# kernels hold at a time (128 angles, 1,024 pairs).
PARTS = [(24, 0, 0), (8, 16, 16), (3, 0, 2), (13, 5, 0), (20, 4, 8), (130, 0, 0), (1030, 0, 3)]


def parts_of_a_head(dtype, device):
    """(q, k, inv_freq, position_ids, options)."""
    for pairs, offset, after in PARTS:
        dim, ids = offset + 2 * pairs + after, positions_of((3,), torch.int64, device)
        q = random(1, 3, 2, dim, dtype=dtype, device=device)
        k = random(1, 3, 1, dim, dtype=dtype, device=device, seed=1)
        options = {"rotary_offset": offset, "attention_scaling": 1.25}
        yield q, k, inv_freq_of(pairs, device=device), ids, options


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_orders_and_parts_of_a_head(dtype, order, device):
    for inverse in (False, True):
        for *arguments, options in parts_of_a_head(dtype, device):
            options |= {"inverse": inverse, **ORDERS[order]}
            with naming(f"{list(arguments[2].shape)} frequencies, {options}"):
                assert_as_by_rows(*arguments, **options)


def test_vectors_have_the_bits_of_the_portable_code(vector_code):
    for dtype, order in product(DTYPES, ORDERS.values()):
        for *arguments, options in parts_of_a_head(dtype, "cpu"):
            results = []
            for capability in (vector_code, "portable"):
                rope_ext._C.set_cpu_capability(capability)
                results.append(rope.apply_rotary_qk_at(*arguments, **options, **order))
            for a, b in zip(*results, strict=True):
                with naming(f"{dtype}, {list(a.shape)}, {order}"):
                    assert_same_bits(a, b)


@pytest.mark.parametrize("view", VIEWS)
def test_memory_layouts(view, device):
    for dtype in (F32, BF16):
        base = partial(random, dtype=dtype, device=device)
        q = VIEWS[view](base, B, S, H, D)
        k = VIEWS[view](partial(base, seed=1), B, S, K, D)
        inv_freq, ids = inv_freq_of(P, device=device), positions_of((B, S), torch.int64, device)
        got = assert_as_by_rows(q, k, inv_freq, ids)
        assert got[0].stride() == by_rows(q, k, inv_freq, ids)[0].stride()
        expected = [x.cpu() for x in got]
        rope.apply_rotary_qk_at_(q, k, inv_freq, ids)
        for a, b in zip((q, k), expected, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("inv_freq_dtype", DTYPES, ids=name_of)
def test_frequencies_of_any_dtype_and_positions_and_frequencies_in_views(inv_freq_dtype, device):
    q, k = heads_of(B, S, device=device)
    inv_freq = inv_freq_of(2 * P, inv_freq_dtype, device)[::2]
    ids = positions_of((S, B), torch.int64, device).t()
    assert_as_by_rows(q, k, inv_freq, ids)
    ids = positions_of((S, 3, B), F64, device).permute(1, 2, 0)
    axes = (torch.arange(2 * P, device=device) % 3)[::2]
    assert_as_by_rows(q, k, inv_freq, ids, axes=axes)
    assert_as_by_rows(q, k, inv_freq, ids[:, :1].expand(3, B, S), axes=axes)


@pytest.mark.parametrize("dtype", [F64, F16], ids=name_of)
def test_long_sequences_with_heads_outermost_on_many_threads(dtype, device):
    """Blocks of 16 tokens, split anywhere among their heads."""
    base = partial(random, dtype=dtype, device=device)
    q, k = (VIEWS["bhsd"](base, B, 70, heads, 64) for heads in (40, 3))
    for ids in (None, positions_of((B, 70), torch.int64, device)):
        assert_as_by_rows(q, k, inv_freq_of(32, device=device), ids)


def test_angle_that_is_out_of_reach_is_nan(device):
    """For every dtype, also bfloat16, whose rounding has to keep NaN."""
    ids = torch.tensor([float("inf"), float("nan"), 2.0**60, 1.0], device=device)
    for dtype in DTYPES:
        q, k = heads_of(1, 4, dtype=dtype, device=device)
        for x in assert_as_by_rows(q, k, inv_freq_of(P, device=device), ids):
            assert x[0].cpu().isnan().flatten(1).all(-1).tolist() == [True, True, True, False]


def test_nothing_to_rotate(device):
    for shape, k_heads in product([(0, S, H), (B, 0, H), (B, S, 0)], (0, K)):
        q = random(*shape, D, device=device)
        k = random(*shape[:2], k_heads, D, device=device)
        assert_as_by_rows(q, k, inv_freq_of(P, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_no_byte_outside_is_written(dtype, device):
    tensors = [guarded(B, S, h, D, dtype=dtype, device=device) for h in (H, K)]
    before = [whole.cpu() for _, whole in tensors]
    inv_freq = inv_freq_of(7, device=device)
    rope.apply_rotary_qk_at_(tensors[0][0], tensors[1][0], inv_freq, rotary_offset=11)
    views = [
        old[16 : 16 + x.numel()].view(x.shape) for (x, _), old in zip(tensors, before, strict=True)
    ]
    rotated = by_rows(*views, inv_freq.cpu(), rotary_offset=11)
    for (_, whole), old, view, y in zip(tensors, before, views, rotated, strict=True):
        view.copy_(y)
        assert_same_bits(whole, old)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
def test_layouts_of_the_function(layout, device):
    shape = (S,) if layout == "thd" else (B, S)
    inv_freq, ids = inv_freq_of(P, device=device), positions_of((S,), torch.int64, device)
    for inplace in (False, True):
        xs = [in_layout(x, layout) for x in heads_of(*shape, device=device)]
        rows = rope.cos_sin(inv_freq, ids, attention_scaling=0.5)
        expected = rope_ext.apply_rotary_qk(*xs, *rows, layout=layout)
        options = {"attention_scaling": 0.5, "layout": layout, "inplace": inplace}
        got = rope_ext.apply_rotary_qk_at(*xs, inv_freq, ids, **options)
        for a, b, x in zip(got, expected, xs, strict=True):
            assert_same_bits(a, b)
            assert (a is x) == inplace


def test_reference_has_it(device):
    q, k = heads_of(B, S, dtype=F64)
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

# name -> dtype, positions as in TOKENS, whether with axes, options
GRADIENTS = {
    "half-split": (F64, "of each", True, {"rotary_offset": 4, "attention_scaling": 2.0}),
    "interleaved": (F32, "in order", False, {"interleaved": True}),
    "inverse, to halves": (
        BF16, "fractions", False, {"interleaved": True, "interleaved_out": False, "inverse": True},
    ),
    "to neighbours": (F16, "fractions, packed", True, {"interleaved_out": True, "inverse": True}),
    "float64": (F64, "bfloat16", False, {"interleaved_out": True, "rotary_offset": 3}),
    "float32": (F32, "float16", True, {"attention_scaling": 1.25, "inverse": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_have_the_bits_of_rows(case, device):
    """Of both results, and of each alone."""
    dtype, tokens, with_axes, options = GRADIENTS[case]
    tokens, shape, position_dtype = TOKENS[tokens]
    xs = heads_of(*tokens, dtype=dtype, device=device)
    ids = positions_of(shape, position_dtype, device, (2,) if with_axes else ())
    if with_axes:
        options = {**options, "axes": torch.arange(8, device=device) % 2}
    leaves = [t for t in (*xs, inv_freq_of(8, device=device), ids) if t is not None]
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in leaves]
    of = [t for t in leaves if t.requires_grad]
    grads = []
    for function in (rope.apply_rotary_qk_at, by_rows):
        outputs = function(*leaves, **options)
        for used in (outputs, outputs[:1], outputs[1:]):
            seeds = [random(*y.shape, dtype=dtype, device=device, seed=9) for y in used]
            unused = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
            grads += torch.autograd.grad(used, of, seeds, **unused)
    for a, b in zip(grads[: len(grads) // 2], grads[len(grads) // 2 :], strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_in_place_is_differentiable(layout, device):
    inv_freq, ids = inv_freq_of(P, device=device), positions_of((S,), torch.int64, device)
    grads = []
    for inplace in (True, False):
        leaves = [in_layout(x, layout).requires_grad_() for x in heads_of(B, S, device=device)]
        xs = [leaf * 2 for leaf in leaves]
        outputs = rope_ext.apply_rotary_qk_at(*xs, inv_freq, ids, layout=layout, inplace=inplace)
        assert (outputs[0] is xs[0]) == inplace
        grads.append(torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_in_place_refuses_gradients_to_what_it_does_not_keep(device):
    q, k = heads_of(B, S, device=device)
    inv_freq, ids = inv_freq_of(P, device=device), positions_of((S,), F32, device)
    for arguments in ((inv_freq.clone().requires_grad_(),), (inv_freq, ids.requires_grad_())):
        with pytest.raises(RuntimeError, match="expected inv_freq and position_ids to need no"):
            rope_ext.apply_rotary_qk_at(q, k, *arguments, inplace=True)
    with pytest.raises(RuntimeError, match="expected q to be no leaf that requires grad"):
        rope_ext.apply_rotary_qk_at(q.requires_grad_(), k, inv_freq, inplace=True)


# ---- refusals


BAD = {
    "q of rank 2": ({"q": torch.zeros(S, D)}, "q to have shape [B, S, H, D] or [T, H, D]"),
    "more frequencies than pairs": (
        {"inv_freq": torch.zeros(P + 1)},
        "rotary_dim, twice the length of inv_freq, to be even, at least 2 and at most head_dim "
        f"{D}, got {D + 2}",
    ),
    "too many positions": (
        {"position_ids": torch.arange(S + 1)},
        f"position_ids to have shape [S] or [1|B, S] with B = {B}, S = {S}, got [{S + 1}]",
    ),
    "packed positions with a batch": (
        {"q": torch.zeros(S, H, D), "k": torch.zeros(S, K, D), "position_ids": torch.zeros(1, S)},
        f"position_ids to have shape [T] with T = {S}, got [1, {S}]",
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
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused_and_nothing_is_written(bad):
    change, expected = BAD[bad]
    q, k = heads_of(B, S)
    good = {"q": q, "k": k, "inv_freq": inv_freq_of(P), "position_ids": torch.arange(S)}
    arguments = {**good, **change}
    before = arguments["k"].clone()
    for name in ("apply_rotary_qk_at", "apply_rotary_qk_at_"):
        with pytest.raises(RuntimeError, match=re.escape(f"rope::{name}: expected {expected}")):
            getattr(rope, name)(**arguments)
    assert_same_bits(arguments["k"], before)


def test_in_place_refuses_what_overlaps_and_another_order():
    whole = random(B * S * H * D + 64)
    q, k = whole[: B * S * H * D].view(B, S, H, D), random(B, S, K, D)
    refused = {
        "q and k to share no memory": (q, q[:, :, :K], inv_freq_of(P)),
        "inv_freq to share no memory with q": (q, k, whole[:P]),
        "position_ids to share no memory with q": (q, k, inv_freq_of(P), whole[D : D + S]),
    }
    for message, arguments in refused.items():
        with pytest.raises(RuntimeError, match=f"rope::apply_rotary_qk_at_: expected {message}"):
            rope.apply_rotary_qk_at_(*arguments)
    for operator in (rope.apply_rotary_qk_at_, partial(rope_ext.apply_rotary_qk_at, inplace=True)):
        with pytest.raises(RuntimeError, match="expected interleaved_out to be None or interleav"):
            operator(q, k, inv_freq_of(P), interleaved_out=True)


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
