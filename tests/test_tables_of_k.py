"""apply_rotary_qk with tables of their own for q and k: xPos."""

import pytest
import torch
from support import assert_derivatives, assert_same_bits, in_layout, random, random_positions
from torch._subclasses import FakeTensorMode

import rope_ext
from rope_ext import frequencies

B, S, H, HK, D, P = 2, 5, 3, 2, 20, 8  # four channels stay
L = 9
WAYS = ("new", "in place", "out")


def tables(*shape, device="cpu", dtype=torch.float32):
    """cos, sin, cos_k, sin_k: of no rotation in particular."""
    return tuple(random(*shape, device=device, dtype=dtype, seed=seed) for seed in range(4))


def inputs(layout, device="cpu", dtype=torch.float32):
    q, k = (random(B, S, heads, D, dtype=dtype, device=device, seed=heads) for heads in (H, HK))
    if layout == "thd":
        return q.flatten(0, 1), k.flatten(0, 1)
    return in_layout(q, layout), in_layout(k, layout)


def rotated(way, q, k, cos, sin, position_ids=None, **options):
    if way == "out":
        options["out"] = torch.empty_like(q), torch.empty_like(k)
    got = rope_ext.apply_rotary_qk(
        q, k, cos, sin, position_ids, inplace=way == "in place", **options
    )
    if way == "in place":
        assert got[0] is q
        assert got[1] is k
    if way == "out":
        assert got[0] is options["out"][0]
        assert got[1] is options["out"][1]
    return got


# ---- the numbers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
@pytest.mark.parametrize(
    "options",
    [{}, {"interleaved": True, "rotary_offset": 3}, {"rotary_dim": P, "inverse": True}],
    ids=["pairs", "neighbours", "channels"],
)
def test_each_is_rotated_by_its_own_tables(options, layout, way, device):
    q, k = inputs(layout, device)
    cos, sin, cos_k, sin_k = tables(L, P, device=device)
    tokens = (B * S,) if layout == "thd" else (B, S)
    ids = random_positions(*tokens, rows=L, device=device)
    expected_q = rope_ext.apply_rotary(q, cos, sin, ids, layout=layout, **options)
    expected_k = rope_ext.apply_rotary(k, cos_k, sin_k, ids, layout=layout, **options)
    own = {"cos_k": cos_k, "sin_k": sin_k}
    got_q, got_k = rotated(way, q, k, cos, sin, ids, layout=layout, **own, **options)
    assert_same_bits(got_q, expected_q)
    assert_same_bits(got_k, expected_k)


@pytest.mark.parametrize("way", WAYS)
def test_score_of_xpos_depends_on_the_distance_alone(way):
    """One query and one key at every position: score(m, n) is that of the paper, for m - n."""
    middle, head_dim = 8, 16
    inv_freq, log_scale = (t.double() for t in frequencies.xpos(head_dim, scale_base=8.0))
    position_ids = torch.arange(17)[None] - middle
    cos, sin = rope_ext.cos_sin(inv_freq, position_ids)
    scale = torch.exp(position_ids.unsqueeze(-1) * log_scale)
    q = random(1, 1, 1, head_dim, dtype=torch.float64).repeat(1, 17, 1, 1)
    k = random(1, 1, 1, head_dim, dtype=torch.float64, seed=1).repeat(1, 17, 1, 1)
    (q1, q2), (k1, k2) = q[0, 0, 0].chunk(2), k[0, 0, 0].chunk(2)
    own = {"cos_k": cos / scale, "sin_k": sin / scale}
    got_q, got_k = rotated(way, q, k, cos * scale, sin * scale, **own)
    scores = got_q[0, :, 0] @ got_k[0, :, 0].T  # [m, n]
    for m in range(17):
        for n in range(17):
            angle, decay = (m - n) * inv_freq, torch.exp((m - n) * log_scale)
            # the real part of (q1 + i q2) (k1 - i k2) exp(i angle), a pair
            pairs = (q1 * k1 + q2 * k2) * angle.cos() - (q2 * k1 - q1 * k2) * angle.sin()
            torch.testing.assert_close(scores[m, n], (pairs * decay).sum(), rtol=1e-12, atol=1e-12)


# ---- gradients and graphs


def test_derivatives_of_every_tensor(device):
    q, k = (
        x[:1, :2, :1, :3].contiguous().requires_grad_()
        for x in inputs("bshd", device, torch.float64)
    )
    rows = [t.requires_grad_() for t in tables(1, 2, 1, device=device, dtype=torch.float64)]

    def function(q, k, cos, sin, cos_k, sin_k):
        return rope_ext.apply_rotary_qk(q, k, cos, sin, cos_k=cos_k, sin_k=sin_k)

    assert_derivatives(function, (q, k, *rows))


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "views of one tensor"])
def test_gradients_in_place_are_those_of_new_results(packed):
    cos, sin, cos_k, sin_k = tables(S, P)
    qkv = random(B, S, H + HK, D).requires_grad_()
    weight = random(B, S, H + HK, D, seed=1)
    grads = []
    for inplace in (False, True):
        x = 1 * qkv
        q, k = (x[:, :, :H], x[:, :, H:]) if packed else (1 * x[:, :, :H], 1 * x[:, :, H:])
        q, k = rope_ext.apply_rotary_qk(q, k, cos, sin, cos_k=cos_k, sin_k=sin_k, inplace=inplace)
        out = torch.cat((q, k), 2)
        grads.append(torch.autograd.grad((out * weight).sum(), qkv)[0])
    assert_same_bits(grads[1], grads[0])


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
def test_samples_of_a_vmap_are_rotated_each_as_alone(inplace):
    q, k = random(4, B, S, H, D), random(4, B, S, HK, D)
    cos, sin, cos_k, sin_k = tables(S, P)

    def function(q, k):
        own = {"cos_k": cos_k, "sin_k": sin_k, "inplace": inplace}
        return rope_ext.apply_rotary_qk(1 * q, 1 * k, cos, sin, **own)

    alone = [torch.stack(samples) for samples in zip(*map(function, q, k), strict=True)]
    for got, expected in zip(torch.func.vmap(function)(q, k), alone, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
def test_one_graph_serves_all_lengths(inplace):
    def function(q, k, cos, sin, cos_k, sin_k):
        own = {"cos_k": cos_k, "sin_k": sin_k, "inplace": inplace}
        return rope_ext.apply_rotary_qk(2 * q, 2 * k, cos, sin, **own)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, seq in enumerate((6, 7, 11)):
        arguments = random(B, seq, H, D), random(B, seq, HK, D), *tables(seq, P)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            got = compiled(*arguments)
        for a, b in zip(got, function(*arguments), strict=True):
            assert_same_bits(a, b)


# ---- refusals


def arguments(**changed):
    q, k = inputs("bshd")
    cos, sin, cos_k, sin_k = tables(L, P)
    ids = random_positions(B, S, rows=L)
    given = {"q": q, "k": k, "cos": cos, "sin": sin, "cos_k": cos_k, "sin_k": sin_k}
    given = {**given, "position_ids": ids}
    return {**given, **{name: change(given) for name, change in changed.items()}}


REFUSALS = {
    "k of another length": ({"k": lambda a: a["k"][:, 1:]}, r"k to have q's shape \[2, 5, 3, 20\]"),
    "k of another rank": ({"k": lambda a: a["k"][0]}, r"k to have shape \[B, S, H, D\]"),
    "k of another dtype": ({"k": lambda a: a["k"].double()}, "k of q's dtype torch.float32"),
    "k elsewhere": ({"k": lambda a: a["k"].to("meta")}, "k on the device of q, cpu, got meta"),
    "k strided": (
        {"k": lambda a: torch.zeros(B, S, HK, 2 * D)[..., ::2]},
        "k to have stride 1 in its last dimension",
    ),
    "fewer rows": ({"cos_k": lambda a: a["cos_k"][1:]}, r"cos_k of cos's shape \[9, 8\], got"),
    "another width": ({"sin_k": lambda a: a["sin_k"][:, 1:]}, r"sin_k of cos's shape \[9, 8\]"),
    "tables of two dtypes": (
        {"sin_k": lambda a: a["sin_k"].half()},
        "sin_k of cos's dtype torch.float32, got torch.float16",
    ),
    "table elsewhere": ({"cos_k": lambda a: a["cos_k"].to("meta")}, "cos_k on the device of cos"),
    "table strided": (
        {"cos_k": lambda a: a["cos_k"].t().contiguous().t()},
        "cos_k to have stride 1 in its last dimension",
    ),
    "q, by its operator": ({"q": lambda a: a["q"].int()}, "k of q's dtype torch.int32"),
    "positions": ({"position_ids": lambda a: a["position_ids"] + L}, r"position_ids in \[0, 9\)"),
}
REFUSED_IN_PLACE = {
    "k twice in one place": (
        {"k": lambda a: torch.zeros(B, S, 1, D).expand(B, S, HK, D)},
        "k to have no two elements in one place, as it is written",
    ),
    "q and k the same": ({"k": lambda a: a["q"]}, "k to share no memory with q, which is written"),
    "k in q": ({"k": lambda a: a["q"][:, :, 1:]}, "k to share no memory with q, which is written"),
    "a table in k": (
        {"cos_k": lambda a: a["k"].view(-1)[:72].view(L, P)},
        "cos_k to share no memory with k, which is written",
    ),
    "a table of k in q": (
        {"sin_k": lambda a: a["q"].view(-1)[:72].view(L, P)},
        "sin_k to share no memory with q, which is written",
    ),
    "a table that learns": (
        {"sin_k": lambda a: a["sin_k"].requires_grad_()},
        "expected cos and sin to need no gradient",
    ),
    "a leaf": ({"k": lambda a: a["k"].requires_grad_()}, "expected k to be no leaf"),
}


@pytest.mark.parametrize(
    ("changed", "message", "way"),
    [
        *((*case, way) for case in REFUSALS.values() for way in WAYS),
        *((*case, "in place") for case in REFUSED_IN_PLACE.values()),
    ],
    ids=[
        *(f"{name}, {way}" for name in REFUSALS for way in WAYS),
        *REFUSED_IN_PLACE,
    ],
)
def test_a_refusal_comes_before_anything_is_written(changed, message, way):
    given = arguments(**changed)
    before = {name: t.detach().clone() for name, t in given.items() if t.device.type == "cpu"}
    with pytest.raises((RuntimeError, ValueError), match=message):
        rotated(way, **given)
    for name, t in before.items():
        assert_same_bits(given[name].detach().double(), t.double())


@pytest.mark.parametrize("way", ["in place", "out"])
@pytest.mark.parametrize("name", ["k", "cos_k", "sin_k"])
def test_fake_tensor_beside_real_ones_is_refused_before_q_is_written(name, way):
    """What PyTorch itself refuses, of the second of the two operators."""
    given = arguments(**{name: lambda a: FakeTensorMode().from_tensor(a[name])})
    out = torch.full_like(given["q"], 7), torch.full(given["k"].shape, 7.0)
    before = given["q"].clone()
    how = {"inplace": True} if way == "in place" else {"out": out}
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors first"):
        rope_ext.apply_rotary_qk(**given, **how)
    assert_same_bits(given["q"], before)
    assert (out[0] == 7).all()


OUT_REFUSALS = {
    "another shape": (lambda a: (a["q"].clone(), a["k"][:1].clone()), r"out\[1\] of k's shape"),
    "another dtype": (lambda a: (a["q"].clone(), a["k"].half()), r"out\[1\] of k's dtype"),
    "over k": (lambda a: (a["q"].clone(), a["k"]), r"k to share no memory with out\[1\]"),
    "one over the other": (
        lambda a: (lambda x: (x[:, :, :H], x[:, :, H - 1 :]))(torch.empty(B, S, H + HK - 1, D)),
        r"out\[1\] to share no memory with out\[0\], which is written",
    ),
    "k's needs a gradient": (
        lambda a: (a["q"].clone(), a["k"].clone().requires_grad_()),
        r"expected out\[1\] to need no gradient with out",
    ),
}


@pytest.mark.parametrize(("make", "message"), OUT_REFUSALS.values(), ids=OUT_REFUSALS)
def test_out_is_looked_at_before_anything_is_written(make, message):
    given = arguments()
    out = make(given)
    with torch.no_grad():
        for x in out:
            if x is not given["k"]:
                x.fill_(7)
    before = given["k"].clone()
    with pytest.raises(RuntimeError, match=message):
        rope_ext.apply_rotary_qk(**given, out=out)
    assert (out[0] == 7).all()
    assert torch.equal(given["k"], before)


@pytest.mark.parametrize("way", ["in place", "out"])
def test_views_of_one_tensor_may_be_written(way):
    given = arguments()
    expected = rope_ext.apply_rotary_qk(**given)
    packed = torch.cat((given["q"], given["k"]), 2)
    views = packed[:, :, :H], packed[:, :, H:]
    if way == "out":
        rope_ext.apply_rotary_qk(**given, out=views)
    else:
        given["q"], given["k"] = views
        rope_ext.apply_rotary_qk(**given, inplace=True)
    for x, y in zip(views, expected, strict=True):
        assert_same_bits(x, y)


def test_half_a_pair_of_tables_is_refused():
    given = arguments()
    for missing, named in (("sin_k", "cos_k"), ("cos_k", "sin_k")):
        rest = {name: t for name, t in given.items() if name != missing}
        with pytest.raises(ValueError, match=f"expected {missing} with {named}, got None"):
            rope_ext.apply_rotary_qk(**rest)
    both = {"inplace": True, "out": (given["q"], given["k"])}
    with pytest.raises(ValueError, match="expected inplace=False with out"):
        rope_ext.apply_rotary_qk(**given, **both)
    with pytest.raises(RuntimeError, match="expected interleaved_out to be None or interleaved"):
        rope_ext.apply_rotary_qk(**given, inplace=True, interleaved_out=True)
