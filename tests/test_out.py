"""Into tensors of the caller: autograd, errors, graphs. test_strides.py has the numbers."""

import pytest
import torch
from support import assert_same_bits, in_layout, random, random_table, rounded_once

import rope_ext

rope = torch.ops.rope

B, S, H, K, D, P = 2, 5, 4, 2, 20, 8  # four channels stay


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
def test_functions_return_the_tensors_that_they_wrote(layout, device):
    """Those of out, and in place those that were given."""
    tokens = (S,) if layout == "thd" else (B, S)
    xs = [random(*tokens, heads, D) for heads in (H, K)]
    q, k = (in_layout(x, layout).to(device) for x in xs)
    cos_sin = random_table(S, P, device=device)
    how = {"layout": layout, "inverse": True}
    expected = [in_layout(rounded_once(x, *cos_sin, inverse=True), layout) for x in xs]
    out, one, x = (torch.empty_like(q), torch.empty_like(k)), torch.empty_like(q), q.clone()

    def assert_written(got, given):
        for a, b, want in zip(got, given, expected, strict=False):
            assert a is b
            assert_same_bits(a, want)

    assert_written(rope_ext.apply_rotary_qk(q, k, *cos_sin, **how, out=out), out)
    assert_written([rope_ext.apply_rotary(q, *cos_sin, **how, out=one)], [one])
    assert_written([rope_ext.apply_rotary(x, *cos_sin, **how, inplace=True)], [x])
    assert_written(rope_ext.apply_rotary_qk(q, k, *cos_sin, **how, inplace=True), (q, k))


X, (COS, SIN) = random(B, S, H, D), random_table(S, P)
MEMORY = random(X.numel() + COS.numel())
REFUSED = [
    ({"out": X[:, 1:]}, "out of x's shape [2, 5, 4, 20], got [2, 4, 4, 20]"),
    ({"out": X[:0]}, "out of x's shape [2, 5, 4, 20], got [0, 5, 4, 20]"),
    ({"out": X.double()}, "out of x's dtype float32, got float64"),
    ({"out": X[..., :1].expand_as(X)}, "out to have stride 1 in its last dimension"),
    ({"out": X[:1].clone().expand_as(X)}, "out to have no two elements in one place"),
    ({"out": X}, "x to share no memory with out, which is written"),
    (
        {"out": MEMORY[: X.numel()].view_as(X), "cos": MEMORY[100 : 100 + S * P].view(S, P)},
        "cos to share no memory with out, which is written",
    ),
]


def test_out_that_does_not_fit_is_refused_and_not_written():
    for change, message in REFUSED:
        given = {"x": X, "cos": COS, "sin": SIN, **change}
        before = {name: t.clone() for name, t in given.items()}
        with pytest.raises(RuntimeError) as refusal:
            rope.apply_rotary.out(**given)
        assert f"rope::apply_rotary.out: expected {message}" in str(refusal.value)
        for name, t in given.items():
            assert_same_bits(t, before[name], message)


def test_one_memory_for_both_results_is_refused():
    out = torch.empty_like(X)
    with pytest.raises(RuntimeError, match="expected out_q and out_k to share no memory"):
        rope.apply_rotary_qk.out(X, X, COS, SIN, out_q=out, out_k=out)


def test_out_and_inplace_together_are_refused():
    with pytest.raises(ValueError, match="expected inplace=False with out"):
        rope_ext.apply_rotary(X, COS, SIN, inplace=True, out=torch.empty_like(X))
    with pytest.raises(ValueError, match="expected inplace=False with out"):
        rope_ext.apply_rotary_qk(X, X, COS, SIN, inplace=True, out=(X, X))


def test_functions_refuse_what_requires_grad():
    for name in ("x", "cos", "sin"):
        given = {"x": X, "cos": COS, "sin": SIN}
        given[name] = given[name].clone().requires_grad_()
        out = torch.full_like(X, 7.0)
        with pytest.raises(RuntimeError, match=f"expected {name} to need no gradient"):
            rope_ext.apply_rotary(**given, out=out)
        assert (out == 7).all()


def test_nothing_is_allocated():
    out = torch.empty_like(X)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        rope.apply_rotary.out(X, COS, SIN, out=out)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()) == 0


@pytest.mark.shows("`torch.library.opcheck`", "out=")
def test_opcheck_of_the_rotation_into_out(device):
    q, k, *table = (t.to(device) for t in (X, X[:, :, :K], COS, SIN))
    one, two = torch.empty_like(q), torch.empty_like(k)
    torch.library.opcheck(rope.apply_rotary.out, (q, *table), {"out": one})
    torch.library.opcheck(rope.apply_rotary_qk.out, (q, k, *table), {"out_q": one, "out_k": two})


def test_compiles_into_one_graph_that_writes_it():
    out = torch.empty_like(X)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x, out):
        rope_ext.apply_rotary(2 * x, COS, SIN, out=out)
        return out + 1

    result = step(X, out)
    expected = rope_ext.apply_rotary(2 * X, COS, SIN)
    assert_same_bits(out, expected)
    assert_same_bits(result, expected + 1)
