"""q, k and v out of a packed projection: the bits of separate steps, forward and backward; the
gradient in one pass; compilers, transforms and ranks; errors.
"""

import re

import pytest
import torch
from normed_inputs import F64
from ranks import on_every_rank, place
from support import (
    DTYPES,
    ORDERS,
    LargeTensors,
    assert_derivatives,
    assert_same_bits,
    naming,
    pairwise,
    random,
    random_positions,
    random_table,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import Shard
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

import rope_ext
from rope_ext import decompositions, reference

rope = torch.ops.rope

B, S, L = 2, 5, 9
F32, BF16 = torch.float32, torch.bfloat16
HEADS = {"grouped": (6, 2), "multi-head": (3, 3), "multi-query": (4, 1)}
NORMS = {"": (), "norm": ("weights",)}


def packed_tensor(form, heads, tokens, dim, dtype=F32, device="cpu", seed=0):
    """qkv, and kv_heads as the form takes it."""
    q, k = heads
    shape = (k, q // k + 2) if form == "by group" else (q + 2 * k,)
    qkv = random(*tokens, *shape, dim, dtype=dtype, device=device, seed=seed)
    return qkv, None if form == "by group" else k


def split(qkv, kv_heads):
    """Head by head."""
    if kv_heads is None:
        of_groups = [qkv[..., g, :, :] for g in range(qkv.shape[-3])]
        q = torch.cat([group[..., :-2, :] for group in of_groups], -2)
        k, v = (torch.stack([group[..., i, :] for group in of_groups], -2) for i in (-2, -1))
        return q, k, v
    of_q = qkv.shape[-2] - 2 * kv_heads
    parts = (0, of_q), (of_q, of_q + kv_heads), (of_q + kv_heads, None)
    return tuple(qkv[..., slice(*part), :] for part in parts)


def split_and_rotate(qkv, *others, kv_heads, norm, **options):
    """In separate steps."""
    q, k, v = split(qkv, kv_heads)
    rotate = rope_ext.rms_norm_rotary_qk if norm else rope_ext.apply_rotary_qk
    return *rotate(q, k, *others, **options), v


def function_of(norm):
    return rope_ext.rms_norm_rotary_qkv if norm else rope_ext.apply_rotary_qkv


def weights_of(norm, heads, dim, all_heads=False, **how):
    if not norm:
        return []
    return [random(*(count,) * all_heads, dim, **how, seed=3 + i) for i, count in enumerate(heads)]


# ---- results and gradients

CASES = pairwise(
    form=("flat", "by group"),
    layout=("bshd", "sbhd", "thd"),
    heads=HEADS,
    dtype=DTYPES,
    norm=NORMS,
    order=ORDERS,
    part={
        "all 32": {"dim": 32},
        "16 of 40": {"dim": 40, "rotary_offset": 8},
        "one angle a channel": {"dim": 24, "rotary_dim": 24},
        "10 of 13, inverse": {"dim": 13, "rotary_offset": 2, "inverse": True},
    },
    rows=("table", "positions", "a row a token"),
    memory=("dense", "of a wider tensor"),
)


@pytest.mark.parametrize(
    ("form", "layout", "heads", "dtype", "norm", "order", "part", "rows", "memory"), CASES
)
def test_the_bits_are_those_of_separate_steps(
    form, layout, heads, dtype, norm, order, part, rows, memory, device
):
    part = dict(part)
    dim = part.pop("dim")
    tokens = {"bshd": (B, S), "sbhd": (S, B), "thd": (S,)}[layout]
    qkv, kv_heads = packed_tensor(form, heads, tokens, dim, dtype, device)
    if memory == "of a wider tensor":
        wide = torch.full((*qkv.shape[:-2], qkv.shape[-2] + 3, dim + 5), torch.nan, dtype=dtype)
        qkv = wide.to(device)[..., 1:-2, 3 : 3 + dim].copy_(qkv)
    pairs = {32: 16, 40: 8, 24: 24, 13: 5}[dim]
    batch = () if layout == "thd" else (B,)
    table = {"a row a token": (*batch, S)}.get(rows, (L,))
    rows_given = [*random_table(*table, pairs, device=device)]
    if layout == "thd" and rows == "a row a token":
        rows_given = [t[None] for t in rows_given]
    if rows == "positions":
        rows_given.append(random_positions(*batch, S, rows=L, device=device))
    weights = weights_of(norm, heads, dim, dtype=dtype, device=device)
    options = {**order, **part}
    results = []
    for way in ("separate", "packed"):
        leaves = [t.detach().requires_grad_() for t in (qkv, *weights, *rows_given[:2])]
        first = leaves[0]
        if way == "packed":
            given = {**options, "layout": layout, "kv_heads": kv_heads}
            out = function_of(norm)(*leaves, *rows_given[2:], **given)
        else:
            given = {**options, "kv_heads": kv_heads, "norm": norm, "layout": layout}
            out = split_and_rotate(first, *leaves[1:], *rows_given[2:], **given)
        seeds = [random(*y.shape, dtype=dtype, device=device, seed=7 + i)
                 for i, y in enumerate(out)]  # fmt: skip
        results.append([*out, *torch.autograd.grad(out, leaves, seeds)])
    names = ["q", "k", "v", "grad", *["weight"] * len(weights), "cos", "sin"]
    for name, b, a in zip(names, *results, strict=True):
        if norm and device.type == "cuda" and memory != "dense":  # sums in another order
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=2.0**-7, atol=2.0**-7)
        else:
            assert_same_bits(a, b, name)


def test_a_norm_over_all_heads_and_what_it_needs(device):
    heads = HEADS["grouped"]
    cos, sin = random_table(L, 8, device=device)
    weights = weights_of(True, heads, 16, all_heads=True, device=device)
    qkv, kv_heads = packed_tensor("flat", heads, (B, S), 16, device=device)
    got = rope_ext.rms_norm_rotary_qkv(qkv, *weights, cos, sin, kv_heads=kv_heads)
    expected = split_and_rotate(qkv, *weights, cos, sin, kv_heads=kv_heads, norm=True)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
    qkv, _ = packed_tensor("by group", heads, (B, S), 16, device=device)
    with pytest.raises(
        RuntimeError, match=r"expected q_weight to have shape \[16\], as heads that"
    ):
        rope_ext.rms_norm_rotary_qkv(qkv, *weights, cos, sin)


@pytest.mark.parametrize("layout", ["bshd", "sbhd", "thd"])
@pytest.mark.parametrize("form", ["flat", "by group"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_results_and_gradients_are_dense_tensors_of_their_own(form, layout, norm, device):
    tokens = {"bshd": (B, S), "sbhd": (S, B), "thd": (S,)}[layout]
    heads = HEADS["grouped"]
    qkv, kv_heads = packed_tensor(form, heads, tokens, 16, device=device)
    others = [*weights_of(norm, heads, 16, device=device), *random_table(L, 8, device=device)]
    leaf = qkv.clone().requires_grad_()
    parts = function_of(norm)(leaf, *others, kv_heads=kv_heads, layout=layout)
    for part in parts:
        assert part.is_contiguous()
        assert part.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()
    (grad,) = torch.autograd.grad(parts, leaf, [torch.ones_like(part) for part in parts])
    assert grad.is_contiguous()


@pytest.mark.parametrize("form", ["flat", "by group"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_backward_makes_one_tensor_and_zeros_for_what_has_no_gradient(form, norm, device):
    heads, dim = HEADS["grouped"], 16
    qkv, kv_heads = packed_tensor(form, heads, (B, S), dim, device=device)
    others = [*weights_of(norm, heads, dim, device=device), *random_table(L, 8, device=device)]
    leaf = qkv.clone().requires_grad_()
    for missing in ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        parts = function_of(norm)(leaf, *others, kv_heads=kv_heads)
        seeds = [random(*part.shape, device=device, seed=i) for i, part in enumerate(parts)]
        some = [i for i in range(3) if i not in missing]
        with LargeTensors(qkv.numel()) as made:
            (grad,) = torch.autograd.grad([parts[i] for i in some], leaf, [seeds[i] for i in some])
        with naming(missing):
            assert len(made.made_by) == 1, made.made_by
            assert "qkv_backward" in made.made_by[0]
            for i, part in enumerate(split(grad, kv_heads)):
                assert bool(part.cpu().any()) == (i in some), i
            zeros = [torch.zeros_like(s) if i in missing else s for i, s in enumerate(seeds)]
            way = split_and_rotate(leaf, *others, kv_heads=kv_heads, norm=norm)
            (expected,) = torch.autograd.grad(way, leaf, zeros)
            present = zip(split(grad, kv_heads), split(expected, kv_heads), strict=True)
            for i, (a, b) in enumerate(present):
                if i in some:
                    assert_same_bits(a, b)


def test_forward_keeps_no_qkv_unless_the_table_needs_a_gradient():
    qkv, kv_heads = packed_tensor("flat", HEADS["grouped"], (B, S), 16)
    for learned in (False, True):
        kept = []
        cos, sin = (t.requires_grad_(learned) for t in random_table(L, 8))
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(tuple(x.shape)) or x, lambda x: x
        )
        with hooks:
            rope_ext.apply_rotary_qkv(qkv.requires_grad_(), cos, sin, kv_heads=kv_heads)
        assert (tuple(qkv.shape) in kept) == learned


@pytest.mark.parametrize("form", ["flat", "by group"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_gradcheck_and_gradgradcheck(form, norm):
    heads, how = (4, 2), {"interleaved": True, "interleaved_out": False}
    qkv, kv_heads = packed_tensor(form, heads, (1, 2), 6, F64)
    leaves = [qkv, *weights_of(norm, heads, 6, dtype=F64), *random_table(3, 2, dtype=F64)]
    ids = torch.tensor([2, 0])
    assert_derivatives(
        lambda *args: function_of(norm)(
            *args, ids, kv_heads=kv_heads, rotary_offset=1, rotary_dim=4, **how
        ),
        [leaf.requires_grad_() for leaf in leaves],
    )


def test_sizes_of_zero(device):
    for norm in (False, True):
        for tokens in ((0, S), (B, 0)):
            for form in ("flat", "by group"):
                qkv, kv_heads = packed_tensor(form, (4, 2), tokens, 8, device=device)
                others = [*weights_of(norm, (4, 2), 8, device=device)]
                others += random_table(L, 4, device=device)
                leaf = qkv.requires_grad_()
                parts = function_of(norm)(leaf, *others, kv_heads=kv_heads)
                assert [part.shape for part in parts] == [(*tokens, n, 8) for n in (4, 2, 2)]
                sum(part.sum() for part in parts).backward()
                assert leaf.grad.shape == qkv.shape


def test_values_of_v_are_moved_bit_by_bit(device):
    """NaN of any bits, and a table of NaN."""
    for dtype in (BF16, torch.float16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, -1, 4, 16)
        qkv = torch.cat((bits, bits), -2).to(device)
        nan = torch.full((qkv.shape[1], 8), torch.nan, device=device)
        weight = torch.ones(16, dtype=dtype, device=device)
        for v in (
            rope_ext.apply_rotary_qkv(qkv, nan, nan, kv_heads=2)[2],
            rope_ext.rms_norm_rotary_qkv(qkv, weight, weight, nan, nan, kv_heads=2)[2],
        ):
            assert torch.equal(v.cpu().view(torch.int16), qkv.cpu()[:, :, -2:].view(torch.int16))


def test_runs_and_numbers_of_threads_have_the_same_bits(device, threads):
    for norm in (False, True):
        for form in ("flat", "by group"):
            results = []
            for count in (1, 2, 3):
                threads(count)
                qkv, kv_heads = packed_tensor(form, (4, 2), (2, 300), 64, device=device)
                leaves = [qkv, *weights_of(norm, (4, 2), 64, device=device)]
                leaves = [leaf.requires_grad_() for leaf in leaves]
                table = random_table(300, 32, device=device)
                parts = function_of(norm)(*leaves, *table, kv_heads=kv_heads)
                seeds = [part.detach() for part in parts]
                results.append([*parts, *torch.autograd.grad(parts, leaves, seeds)])
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    assert_same_bits(a, b)


def test_vectors_have_the_bits_of_the_portable_code(vector_code):
    for norm in (False, True):
        results = []
        for kernels in (vector_code, "portable"):
            rope_ext._C.set_cpu_capability(kernels)
            qkv, kv_heads = packed_tensor("by group", (4, 2), (B, S), 24, BF16)
            leaves = [qkv, *weights_of(norm, (4, 2), 24, dtype=BF16)]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            parts = function_of(norm)(*leaves, *random_table(L, 9), kv_heads=kv_heads)
            seeds = [part.detach() for part in parts]
            results.append([*parts, *torch.autograd.grad(parts, leaves, seeds)])
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)


# ---- compilers, transforms and ranks


@pytest.mark.parametrize("form", ["flat", "by group"])
@pytest.mark.parametrize("to", ["op", "decompose"])
def test_one_graph_for_all_lengths_and_no_other_copy(form, to):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(rope_ext.apply_rotary_qkv, backend=counter, dynamic=True)
    with rope_ext.lowering(to):
        for batch, seq in ((3, 5), (2, 7)):
            qkv, kv_heads = packed_tensor(form, (4, 2), (batch, seq), 16)
            table, results = random_table(12, 8), []
            for function in (rope_ext.apply_rotary_qkv, compiled):
                leaf = qkv.clone().requires_grad_()
                parts = function(leaf, *table, kv_heads=kv_heads)
                seeds = [random(*part.shape, seed=i) for i, part in enumerate(parts)]
                with LargeTensors(qkv.numel()) as made:
                    grad = torch.autograd.grad(parts, leaf, seeds)
                assert to == "decompose" or len(made.made_by) == 1, made.made_by
                results.append([*parts, *grad])
            for a, b in zip(*results, strict=True):
                assert_same_bits(a, b)
    assert counter.frame_count == 1


def test_decomposition_and_reference_are_the_operator():
    for form in ("flat", "by group"):
        qkv, kv_heads = packed_tensor(form, (4, 2), (B, S), 16)
        table = random_table(L, 8)
        expected = rope.apply_rotary_qkv(qkv, *table, kv_heads=kv_heads)
        for module in (decompositions, reference):
            got = module.apply_rotary_qkv(qkv, *table, kv_heads=kv_heads)
            for a, b in zip(got, expected, strict=True):
                assert_same_bits(a, b)
        with pytest.raises(RuntimeError, match=r"expected qkv of Hq \+ 2 Hk heads"):
            decompositions.apply_rotary_qkv(qkv, *table, kv_heads=3)


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_groups_under_vmap_are_a_loop(norm):
    samples = [packed_tensor("by group", (4, 2), (B, S), 16, seed=i)[0] for i in range(3)]
    others = [*weights_of(norm, (4, 2), 16), *random_table(L, 8)]
    got = vmap(lambda qkv: function_of(norm)(qkv, *others))(torch.stack(samples))
    for i, qkv in enumerate(samples):
        for a, b in zip(got, function_of(norm)(qkv, *others), strict=True):
            assert_same_bits(a[i], b)


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_groups_are_sharded_and_flat_heads_are_not(norm):
    """As in Megatron's tensor parallelism. Sums of gradients to weights are split over ranks."""
    heads = (8, 4)
    qkv, _ = packed_tensor("by group", heads, (B, S), 8, F64)
    others = [*weights_of(norm, heads, 8, dtype=F64), *random_table(L, 4, dtype=F64)]

    def run(qkv, *others):
        leaves = [t.detach().requires_grad_() for t in (qkv, *others[:-2])]
        parts = function_of(norm)(*leaves, *others[-2:])
        torch.autograd.backward(parts, [part.detach() for part in parts])
        return [*(part.detach() for part in parts), *(leaf.grad for leaf in leaves)]

    def on_rank(mesh):
        return run(place(qkv, mesh, Shard(2)), *(place(t, mesh) for t in others))

    for part, whole in zip(on_every_rank(on_rank), run(qkv, *others), strict=True):
        torch.testing.assert_close(part, whole, rtol=2.0**-40, atol=2.0**-40)
    flat, _ = packed_tensor("flat", heads, (B, S), 8, F64)

    def flat_on_rank(mesh):
        options = {"kv_heads": heads[1]}
        rest = [place(t, mesh) for t in others]
        return function_of(norm)(place(flat, mesh, Shard(2)), *rest, **options)

    with pytest.raises(RuntimeError, match="expected qkv to be Replicate"):
        on_every_rank(flat_on_rank)


def test_flops_are_those_of_q_and_k():
    for form in ("flat", "by group"):
        qkv, kv_heads = packed_tensor(form, (4, 2), (B, S), 16)
        with FlopCounterMode(display=False) as counter:
            rope_ext.apply_rotary_qkv(qkv, *random_table(L, 8), kv_heads=kv_heads)
        assert counter.get_total_flops() == 3 * B * S * (4 + 2) * 16


# ---- refusals

REFUSED = [
    ({"kv_heads": 3}, "kv_heads Hk, at least 1, so that qkv has Hq + 2 Hk = 8 heads, with Hq"),
    ({"kv_heads": 4}, "kv_heads Hk, at least 1, so that"),
    ({"kv_heads": 0}, "kv_heads Hk, at least 1, so that"),
    ({"kv_heads": -1}, "kv_heads Hk, at least 1, so that"),
    ({"kv_heads": 2**62}, "kv_heads Hk, at least 1, so that"),
    ({"qkv": random(S, 16)}, "qkv to have shape [B, S, Hq + 2 Hk, D] or [T, Hq + 2 Hk, D], as"),
    ({"kv_heads": None, "qkv": random(S, 8, 16)}, "qkv to have shape [B, S, Hk, Hq / Hk + 2, D]"),
    ({"kv_heads": None, "qkv": random(B, S, 4, 2, 16)}, "qkv to have at least one group of at le"),
    ({"qkv": random(B, S, 8, 16).long()}, "qkv to be float64, float32, float16 or bfloat16"),
    ({"qkv": random(B, S, 16, 8).transpose(-1, -2)}, "qkv to have stride 1 in its last dimension"),
    ({"cos": random(L, 8).to("meta")}, "cos on the device of qkv"),
    ({"position_ids": torch.tensor([0, 1, 2, 3, L])}, "position_ids in [0, 9)"),
    ({"position_ids": torch.tensor([0, 1])}, "position_ids to have shape [S] or [1|B, S]"),
    ({"rotary_dim": 18}, "rotary_dim to be even, at least 2 and at most head_dim 16, got 18"),
]


def test_refusals_name_what_is_wrong():
    cos, sin = random_table(L, 8)
    given = {"qkv": random(B, S, 8, 16), "cos": cos, "sin": sin, "kv_heads": 2}
    weights = {"q_weight": random(16), "k_weight": random(16)}
    for operator, more in ((rope.apply_rotary_qkv, {}), (rope.rms_norm_rotary_qkv, weights)):
        for change, message in REFUSED:
            with naming(message), pytest.raises(RuntimeError) as refusal:
                operator(**{**given, **more, **change})
            text = f"{operator.default._schema.name}: expected {message}"
            assert text in str(refusal.value), refusal.value


def test_backward_refuses_gradients_that_do_not_fit():
    cos, sin = random_table(L, 8)
    grads = {f"grad_{x}": random(B, S, n, 16) for x, n in zip("qkv", (4, 2, 2), strict=True)}
    rows, heads = {"cos": cos, "sin": sin}, {"q_heads": 4, "kv_heads": 2}
    normed = {"qkv": random(B, S, 8, 16), "q_weight": random(16), "k_weight": random(16)}
    for operator, more in (
        (rope.apply_rotary_qkv_backward, heads),
        (rope.rms_norm_rotary_qkv_backward, {**normed, "kv_heads": 2}),
    ):
        name = operator.default._schema.name
        for change, message in (
            (dict.fromkeys(grads), "grad_q, grad_k or grad_v, got none of them"),
            ({"grad_k": random(B, S, 3, 16)}, "grad_k to have shape [2, 5, 2, 16], got [2, 5, 3"),
            ({"grad_v": random(B, S + 1, 2, 16)}, "grad_v to have shape [2, 5, 2, 16]"),
            ({"grad_v": random(B, S, 2, 8)}, "grad_v to have shape [2, 5, 2, 16]"),
            ({"grad_k": grads["grad_k"].double()}, "grad_k of "),
            ({"grad_v": random(B, S, 16, 2).transpose(2, 3)}, "grad_v to have stride 1"),
        ):
            with pytest.raises(RuntimeError, match=f"^{name}: expected {re.escape(message)}"):
                operator(**{**grads, **rows, **more, **change})
    for change in ({"q_heads": 5}, {"kv_heads": 0}, {"kv_heads": 3}, {"q_heads": 2**62}):
        with pytest.raises(RuntimeError, match="expected q_heads to be a multiple of kv_heads"):
            rope.apply_rotary_qkv_backward(**grads, **rows, **{**heads, **change})


def test_backward_has_the_same_zeros_where_a_derivative_of_it_is_recorded():
    cos, sin = random_table(S, 8)
    grads = {"grad_q": None, "grad_k": random(B, S, 2, 16), "grad_v": None}
    heads = {"q_heads": 4, "kv_heads": 2, "by_group": True}
    given = {**grads, "cos": cos, "sin": -sin.abs(), **heads}
    recorded = rope.apply_rotary_qkv_backward(**{**given, "cos": cos.clone().requires_grad_()})
    assert recorded.requires_grad
    assert_same_bits(recorded.detach(), rope.apply_rotary_qkv_backward(**given))


def test_layouts_that_do_not_fit_are_named():
    cos, sin = random_table(L, 8)
    for function, more in (
        (rope_ext.apply_rotary_qkv, ()),
        (rope_ext.rms_norm_rotary_qkv, (random(16), random(16))),
    ):
        flat, groups = random(B, S, 8, 16), random(B, S, 2, 4, 16)
        name = f"rope_ext.{function.__name__}: expected"
        for qkv, options, message in (
            (flat, {"layout": "bhsd", "kv_heads": 2}, "layout to be bshd, sbhd or thd, as a"),
            (flat, {}, r"qkv to have shape [B, S, Hk, Hq / Hk + 2, D] (layout 'bshd'), got [2, 5, "
             "8, 16]: [.., Hq + 2 Hk, D] needs kv_heads=Hk"),
            (groups, {"kv_heads": 2}, "qkv to have shape [B, S, Hq + 2 Hk, D] (layout 'bshd')"),
            (flat, {"layout": "thd", "kv_heads": 2}, "qkv to have shape [T, Hq + 2 Hk, D]"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"^{name} {re.escape(message)}"):
                function(qkv, *more, cos, sin, **options)
        with pytest.raises(TypeError, match=f"^{name} kv_heads to be an int or None"):
            function(flat, *more, cos, sin, kv_heads="2")
