"""Into tensors of the caller: the same numbers, no other writes, autograd, errors."""

import pytest
import torch
from support import (
    DTYPES,
    VIEWS,
    assert_same_bits,
    guarded,
    in_layout,
    name_of,
    random,
    random_positions,
    random_table,
)

import rope_ext

rope = torch.ops.rope

B, S, H, HK, D, P = 2, 5, 4, 2, 20, 8  # four channels stay
L = 9


@pytest.mark.parametrize(
    "options",
    [{}, {"interleaved": True}, {"interleaved": True, "interleaved_out": False}],
    ids=["half-split", "interleaved", "mixed"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("view", VIEWS)
def test_only_the_view_is_written_and_holds_the_rotation(view, dtype, options, backend):
    wholes = []

    def base(*shape):
        inner, whole = guarded(*shape, dtype=dtype, device=backend)
        wholes.append(whole)
        return inner

    out = VIEWS[view](base, B, S, H, D)
    x = random(B, S, H, D, dtype=dtype, device=backend)
    cos, sin = random_table(L, P, device=backend)
    ids = random_positions(B, S, rows=L, device=backend)
    expected = wholes[0].cpu().clone()
    rotated = rope.apply_rotary(x, cos, sin, ids, rotary_offset=2, **options).cpu()
    expected.as_strided(out.shape, out.stride(), out.storage_offset()).copy_(rotated)
    assert rope.apply_rotary.out(x, cos, sin, ids, rotary_offset=2, **options, out=out) is None
    assert_same_bits(wholes[0], expected)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
def test_functions_write_both_results_and_return_them(layout, device):
    cos, sin = random_table(S if layout != "thd" else B * S, P, device=device)
    q, k = (random(B, S, heads, D, device=device) for heads in (H, HK))
    q, k = (x.flatten(0, 1) if layout == "thd" else in_layout(x, layout) for x in (q, k))
    expected = rope_ext.apply_rotary_qk(q, k, cos, sin, layout=layout)
    out = torch.empty_like(q), torch.empty_like(k)
    before = out[0].data_ptr(), out[1].data_ptr()
    got = rope_ext.apply_rotary_qk(q, k, cos, sin, layout=layout, out=out)
    assert got[0] is out[0]
    assert got[1] is out[1]
    assert before == (out[0].data_ptr(), out[1].data_ptr())
    one = torch.empty_like(q)
    assert rope_ext.apply_rotary(q, cos, sin, layout=layout, out=one) is one
    for a, b in zip((*got, one), (*expected, expected[0]), strict=True):
        assert_same_bits(a, b)


def test_the_version_of_what_is_written_counts_up(device):
    x = random(B, S, H, D, device=device)
    cos, sin = random_table(S, P, device=device)
    out_q, out_k = torch.empty_like(x), torch.empty_like(x)
    rope.apply_rotary.out(x, cos, sin, out=out_q)
    rope.apply_rotary_qk.out(x, x, cos, sin, out_q=out_q, out_k=out_k)
    assert (out_q._version, out_k._version, x._version) == (2, 1, 0)


@pytest.mark.parametrize("name", ["q", "k", "cos", "sin", "out_q", "out_k"])
def test_a_tensor_that_requires_grad_is_refused_and_nothing_is_written(name, device):
    q, k = random(B, S, H, D, device=device), random(B, S, HK, D, device=device)
    cos, sin = random_table(S, P, device=device)
    out_q, out_k = torch.full_like(q, 7.0), torch.full_like(k, 7.0)
    tensors = {"q": q, "k": k, "cos": cos, "sin": sin, "out_q": out_q, "out_k": out_k}
    tensors[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"apply_rotary_qk.out: expected {name} to need no"):
        rope.apply_rotary_qk.out(**tensors)
    assert (out_q == 7).all()
    with torch.no_grad():
        rope.apply_rotary_qk.out(**tensors)
    assert (out_q != 7).any()


def refused(**changed):
    """The message for a call with some changed tensors; out does not change."""
    x = random(B, S, H, D)
    cos, sin = random_table(S, P)
    arguments = {"x": x, "cos": cos, "sin": sin, "out": torch.full_like(x, 7.0)}
    arguments |= {name: change(arguments) for name, change in changed.items()}
    before = arguments["out"].clone()
    with pytest.raises(RuntimeError) as error:
        rope.apply_rotary.out(**arguments)
    assert torch.equal(arguments["out"], before)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["x"][:, 1:], r"out of x's shape \[2, 5, 4, 20\], got \[2, 4, 4, 20\]"),
        (lambda a: a["x"].double(), "out of x's dtype float32, got float64"),
        (lambda a: torch.zeros(1).expand(B, S, H, D), "out to have stride 1 in its last dimension"),
        (lambda a: torch.zeros(1, S, H, D).expand(B, -1, -1, -1), "out to have no two elements in"),
        (lambda a: a["x"], "x to share no memory with out, which is written"),
        (lambda a: a["x"].flip(0).flatten()[:0].view(0, S, H, D), r"out of x's shape"),
    ],
)
def test_an_out_that_does_not_fit_is_refused(change, message):
    assert message.replace("\\", "") in refused(out=change).replace("\\", "")


def test_memory_that_is_read_is_not_written():
    whole = random(B * S * H * D + S * P)
    assert "cos to share no memory with out" in refused(
        out=lambda a: whole[: B * S * H * D].view(B, S, H, D),
        cos=lambda a: whole[100 : 100 + S * P].view(S, P),
    )


def test_one_memory_for_both_results_is_refused():
    q = random(B, S, H, D)
    cos, sin = random_table(S, P)
    out = torch.empty_like(q)
    with pytest.raises(RuntimeError, match="expected out_q and out_k to share no memory"):
        rope.apply_rotary_qk.out(q, q, cos, sin, out_q=out, out_k=out)


def test_out_and_inplace_together_are_refused():
    x = random(B, S, H, D)
    cos, sin = random_table(S, P)
    with pytest.raises(ValueError, match="expected inplace=False with out"):
        rope_ext.apply_rotary(x, cos, sin, inplace=True, out=torch.empty_like(x))
    with pytest.raises(ValueError, match="expected inplace=False with out"):
        rope_ext.apply_rotary_qk(x, x, cos, sin, inplace=True, out=(x, x))


def test_nothing_is_allocated():
    x = random(B, S, H, D)
    cos, sin = random_table(S, P)
    out = torch.empty_like(x)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        rope.apply_rotary.out(x, cos, sin, out=out)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()) == 0


@pytest.mark.shows("`torch.library.opcheck`", "out=")
@pytest.mark.parametrize("operator", ["apply_rotary", "apply_rotary_qk"])
def test_opcheck_of_the_rotation_into_out(operator, device):
    q, k = random(B, S, H, D, device=device), random(B, S, HK, D, device=device)
    table = random_table(S, P, device=device)
    if operator == "apply_rotary":
        arguments, outs = (q, *table), {"out": torch.empty_like(q)}
    else:
        arguments = (q, k, *table)
        outs = {"out_q": torch.empty_like(q), "out_k": torch.empty_like(k)}
    torch.library.opcheck(getattr(rope, operator).out, arguments, outs)


def test_compiles_into_one_graph_that_writes_it():
    x = random(B, S, H, D)
    cos, sin = random_table(S, P)
    out = torch.empty_like(x)

    @torch.compile(fullgraph=True)
    def step(x, out):
        rope_ext.apply_rotary(2 * x, cos, sin, out=out)
        return out + 1

    result = step(x, out)
    expected = rope_ext.apply_rotary(2 * x, cos, sin)
    assert_same_bits(out, expected)
    assert_same_bits(result, expected + 1)
