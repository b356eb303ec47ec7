"""In place: the same numbers, no other writes, version counters, autograd, errors."""

import pytest
import torch
from support import (
    DTYPES,
    VIEWS,
    assert_derivatives,
    assert_same_bits,
    guarded,
    in_layout,
    name_of,
    random,
    random_positions,
    random_table,
    rounded_once,
)
from torch.utils._python_dispatch import TorchDispatchMode

import rope_ext

rope = torch.ops.rope

B, S, H, D, P = 2, 5, 3, 20, 8  # four channels stay
L = 9
F64 = torch.float64


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("view", VIEWS)
def test_only_the_view_is_written_and_holds_the_rotation(view, dtype, offset, backend):
    wholes = []

    def base(*shape):
        inner, whole = guarded(*shape, dtype=dtype, device=backend)
        wholes.append(whole)
        return inner

    x = VIEWS[view](base, B, S, H, D)
    expected_whole = wholes[0].cpu().clone()
    cos, sin = random_table(L, P, device=backend)
    ids = random_positions(B, S, rows=L, device=backend)
    expected = rounded_once(x, cos, sin, ids, rotary_offset=offset)
    # the same view of a copy of everything, with the expected values in it
    expected_whole.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(expected)
    assert rope.apply_rotary_(x, cos, sin, ids, rotary_offset=offset) is None
    assert_same_bits(wholes[0], expected_whole)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_q_and_k_of_one_packed_tensor_are_rotated_and_v_is_not(dtype, interleaved, backend):
    qkv = random(B, S, H + 2, D, dtype=dtype, device=backend)  # H heads of q, one of k, one of v
    cos, sin = random_table(S, P, device=backend)
    expected = qkv.cpu().clone()
    rotated = rounded_once(qkv, cos, sin, interleaved=interleaved)
    expected[:, :, : H + 1] = rotated[:, :, : H + 1]
    q, k = qkv[:, :, :H], qkv[:, :, H : H + 1]
    rope.apply_rotary_qk_(q, k, cos, sin, interleaved=interleaved)
    assert_same_bits(qkv, expected)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
def test_function_returns_the_tensors_it_wrote(layout, device):
    tokens = (S,) if layout == "thd" else (B, S)
    q = in_layout(random(*tokens, H, D), layout).to(device)
    k = in_layout(random(*tokens, 1, D, seed=1), layout).to(device)
    cos, sin = random_table(S, P, device=device)
    expected = rope_ext.apply_rotary_qk(q, k, cos, sin, layout=layout, inverse=True)
    x = q.clone()
    assert rope_ext.apply_rotary(x, cos, sin, layout=layout, inverse=True, inplace=True) is x
    assert_same_bits(x, expected[0])
    out = rope_ext.apply_rotary_qk(q, k, cos, sin, layout=layout, inverse=True, inplace=True)
    assert out[0] is q
    assert out[1] is k
    assert_same_bits(q, expected[0])
    assert_same_bits(k, expected[1])


# ---- version counters


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_version_counters_are_bumped(grad_mode, device):
    q, k = random(B, S, H, D, device=device), random(B, S, 1, D, device=device)
    cos, sin = random_table(S, P, device=device)
    with torch.set_grad_enabled(grad_mode):
        versions = q._version, k._version
        rope.apply_rotary_(q, cos, sin)
        assert q._version > versions[0]
        assert k._version == versions[1]
        versions = q._version, k._version
        rope.apply_rotary_qk_(q, k, cos, sin)
        assert q._version > versions[0]
        assert k._version > versions[1]
        assert cos._version == 0


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_functions_bump_the_versions_of_what_they_write(mode, device):
    q, k = random(B, S, H, D, device=device), random(B, S, 1, D, device=device)
    outs = torch.empty_like(q), torch.empty_like(k)
    cos, sin = random_table(S, P, device=device)
    for rotate in (
        lambda: rope_ext.apply_rotary(q, cos, sin, inplace=True),
        lambda: rope_ext.apply_rotary_qk(q, k, cos, sin, inplace=True),
        lambda: rope_ext.apply_rotary(q, cos, sin, out=outs[0]),
        lambda: rope_ext.apply_rotary_qk(q, k, cos, sin, out=outs),
    ):
        before = [x._version for x in (q, k, *outs)]
        with mode():
            written = rotate()
        for x, version in zip((q, k, *outs), before, strict=True):
            one = written is x or (isinstance(written, tuple) and any(y is x for y in written))
            assert x._version == version + one
    assert cos._version == sin._version == 0


def test_writing_a_view_bumps_the_version_of_its_base(device):
    qkv = random(B, S, 3, H, D, device=device)
    cos, sin = random_table(S, P, device=device)
    before = qkv._version
    rope.apply_rotary_(qkv[:, :, 0], cos, sin)
    assert qkv._version > before
    with torch.no_grad():
        before = qkv._version
        rope_ext.apply_rotary(qkv[:, :, 0].transpose(1, 2), cos, sin, layout="bhsd", inplace=True)
        assert qkv._version > before


class PassThrough(TorchDispatchMode):
    """Sees every operator and does nothing, like profilers, counters and checkpointing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_version_counters_are_bumped_under_a_dispatch_mode(device):
    q, k = random(B, S, H, D, device=device), random(B, S, 1, D, device=device)
    cos, sin = random_table(S, P, device=device)
    with PassThrough():
        rope.apply_rotary_(q, cos, sin)
        assert q._version > 0
        version = q._version
        rope.apply_rotary_qk_(q, k, cos, sin)
    assert q._version > version
    assert k._version > 0


def test_tensor_that_requires_grad_is_refused_under_a_dispatch_mode(device):
    x = random(B, S, H, D, device=device).requires_grad_() * 1
    kept = x.detach().clone()
    cos, sin = random_table(S, P, device=device)
    with PassThrough(), pytest.raises(RuntimeError, match="expected x to need no gradient"):
        rope.apply_rotary_(x, cos, sin)
    assert_same_bits(x, kept)


def test_out_of_place_bumps_no_version(device):
    x = random(B, S, H, D, device=device)
    rope.apply_rotary(x, *random_table(S, P, device=device))
    assert x._version == 0


def test_backward_refuses_a_saved_tensor_that_was_rotated_in_place(device):
    """By the operator in place, on a tensor without gradient that another operator saved."""
    x = random(B, S, H, D, device=device)
    weight = random(B, S, H, D, device=device).requires_grad_()
    cos, sin = random_table(S, P, device=device)
    y = weight * x  # saves x
    rope.apply_rotary_(x, cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.ones_like(y))


@pytest.mark.parametrize("together", [False, True], ids=["x", "q and k"])
def test_backward_refuses_a_saved_intermediate_that_was_rotated_in_place(together, device):
    leaf = random(B, S, H, D, device=device).requires_grad_()
    cos, sin = random_table(S, P, device=device)
    x = leaf * 2
    other = leaf * 3
    y = x.sin()  # saves x
    if together:
        rope_ext.apply_rotary_qk(other, x, cos, sin, inplace=True)
    else:
        rope_ext.apply_rotary(x, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.ones_like(y))


def test_lazy_clone_leaves_the_original_alone(device):
    """A write to a copy-on-write tensor copies it first."""
    original = random(B, S, H, D, device=device)
    kept = original.clone()
    cos, sin = random_table(S, P, device=device)
    clone = original._lazy_clone()
    rope.apply_rotary_(clone, cos, sin)
    assert_same_bits(original, kept)
    assert_same_bits(clone, rounded_once(kept, cos, sin))


# ---- gradients


def gradients(rotate, device, **options):
    """Gradients to leaf and weight of a loss that contains the rotation, and the loss."""
    leaf = random(B, S, 3, H, D, dtype=F64, device=device).requires_grad_()
    weight = random(B, S, 3, H, D, dtype=F64, device=device, seed=1).requires_grad_()
    cos, sin = random_table(L, P, dtype=F64, device=device)
    ids = random_positions(B, S, rows=L, device=device)
    qkv = leaf * weight  # saves both, not itself
    before = qkv + 1  # reads qkv as it was
    q, k, v = rotate(qkv, cos, sin, ids, **options)
    loss = (q * k.sin() * v).sum() + before.square().sum()
    return (loss, *torch.autograd.grad(loss, (leaf, weight)))


def views_in_place(qkv, cos, sin, ids, **options):
    q, k = qkv[:, :, 0], qkv[:, :, 1]
    rope_ext.apply_rotary_qk(q, k, cos, sin, ids, inplace=True, **options)
    return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # by the base


def narrow_in_place(qkv, cos, sin, ids, **options):
    q, k = qkv.narrow(2, 0, 1).squeeze(2), qkv.narrow(2, 1, 1).squeeze(2)
    q = rope_ext.apply_rotary(q, cos, sin, ids, inplace=True, **options)
    k = rope_ext.apply_rotary(k, cos, sin, ids, inplace=True, **options)
    return q, k, qkv[:, :, 2]  # by the returned tensors


def copies_in_place(qkv, cos, sin, ids, **options):
    q, k, v = (x.clone() for x in qkv.unbind(2))
    rope_ext.apply_rotary_qk(q, k, cos, sin, ids, inplace=True, **options)
    return q, k, v


def layout_in_place(qkv, cos, sin, ids, **options):
    q, k = (qkv[:, :, i].transpose(1, 2) for i in (0, 1))
    q, k = rope_ext.apply_rotary_qk(q, k, cos, sin, ids, inplace=True, layout="bhsd", **options)
    return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2]


def out_of_place(qkv, cos, sin, ids, **options):
    q, k, v = qkv.unbind(2)
    return *rope_ext.apply_rotary_qk(q, k, cos, sin, ids, **options), v


IN_PLACE = [views_in_place, narrow_in_place, copies_in_place, layout_in_place]
OPTIONS = {
    "default": {},
    "interleaved, inverse": {"interleaved": True, "inverse": True},
    "last channels": {"rotary_offset": D - 2 * P, "interleaved_out": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rotate", IN_PLACE, ids=lambda function: function.__name__)
def test_gradients_in_place_equal_those_out_of_place(rotate, options, device):
    expected = gradients(out_of_place, device, **options)
    got = gradients(rotate, device, **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-12, atol=1e-12)


def test_rotating_again_and_again_in_place(device):
    leaf = random(B, S, H, D, dtype=F64, device=device).requires_grad_()
    cos, sin = random_table(S, P, dtype=F64, device=device)
    x, y = leaf * 2, leaf * 2
    for _ in range(3):
        x = rope_ext.apply_rotary(x, cos, sin, inplace=True)
        y = rope_ext.apply_rotary(y, cos, sin)
    assert_same_bits(x, y)
    seed = random(B, S, H, D, dtype=F64, device=device, seed=4)
    (got,), (expected,) = (torch.autograd.grad(t, leaf, seed) for t in (x, y))
    assert_same_bits(got, expected)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd"])
def test_gradcheck_in_place(layout, device):
    leaf = random(2, 2, 2, 6, dtype=F64, device=device).requires_grad_()
    cos, sin = random_table(5, 2, dtype=F64, device=device)
    ids = torch.tensor([[4, 4], [0, 3]], device=device)

    def function(leaf):
        x = leaf * 2
        return rope_ext.apply_rotary(x, cos, sin, ids, layout=layout, inplace=True)

    assert_derivatives(function, leaf)


def test_only_one_of_q_and_k_needs_a_gradient(device):
    cos, sin = random_table(S, P, dtype=F64, device=device)
    for needs in ("q", "k"):
        leaf = random(B, S, H, D, dtype=F64, device=device).requires_grad_()
        moving, fixed = leaf * 1, random(B, S, H, D, dtype=F64, device=device)
        expected = rounded_once(fixed, cos, sin)
        pair = (moving, fixed) if needs == "q" else (fixed, moving)
        rope_ext.apply_rotary_qk(*pair, cos, sin, inplace=True)
        assert_same_bits(fixed, expected)
        assert not fixed.requires_grad
        seed = random(B, S, H, D, dtype=F64, device=device, seed=4)
        (grad,) = torch.autograd.grad(moving, leaf, seed)
        assert_same_bits(grad, rounded_once(seed, cos, sin, inverse=True))


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_no_copy_of_x_is_saved(inplace, device):
    leaf = random(B, S, H, D, device=device).requires_grad_()
    q, k = leaf * 1, leaf * 2
    cos, sin = random_table(S, P, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope_ext.apply_rotary(leaf * 3, cos, sin, inplace=inplace)
        rope_ext.apply_rotary_qk(q, k, cos, sin, inplace=inplace)
    assert saved
    assert max(t.untyped_storage().nbytes() for t in saved) <= cos.untyped_storage().nbytes()


def test_in_place_under_no_grad_writes_a_leaf(device):
    x = random(B, S, H, D, device=device).requires_grad_()
    cos, sin = random_table(S, P, device=device)
    expected = rounded_once(x, cos, sin)
    with torch.no_grad():
        rope_ext.apply_rotary(x, cos, sin, inplace=True)
    assert_same_bits(x, expected)
    assert x.requires_grad


def test_inference_tensors_are_rotated_in_place(device):
    with torch.inference_mode():
        x = random(B, S, H, D, device=device)
        cos, sin = random_table(S, P, device=device)
        expected = rounded_once(x, cos, sin)
        rope_ext.apply_rotary(x, cos, sin, inplace=True)
        assert_same_bits(x, expected)
        expected = rounded_once(x, cos, sin)
        rope.apply_rotary_qk_(x, random(B, S, 1, D, device=device), cos, sin)
        assert_same_bits(x, expected)


def test_tensors_of_both_kinds_are_rotated_in_inference_mode(device):
    q = random(B, S, H, D, device=device)
    cos, sin = random_table(S, P, device=device)
    with torch.inference_mode():
        k = random(B, S, 1, D, device=device)
        expected = rounded_once(q, cos, sin), rounded_once(k, cos, sin)
        version = q._version
        rope_ext.apply_rotary_qk(q, k, cos, sin, inplace=True)
        assert q._version == version + 1
        assert_same_bits(q, expected[0])
        assert_same_bits(k, expected[1])


# ---- errors: if autograd can't record the write, an error is raised before it


def leaf(device):
    x = random(B, S, 2, D, device=device).requires_grad_()
    return x, x


def view_of_a_leaf(device):
    x = random(B, S, 4, D, device=device).requires_grad_()
    return x[:, :, :2], x


def piece_of_split(device):
    x = random(B, S, 4, D, device=device).requires_grad_() * 1
    return x.split(2, dim=2)[0], x


def piece_of_chunk(device):
    x = random(B, S, 4, D, device=device).requires_grad_() * 1
    return x.chunk(2, dim=2)[1], x


def piece_of_unbind(device):
    x = random(B, S, 3, 2, D, device=device).requires_grad_() * 1
    return x.unbind(2)[0], x


REFUSED = [leaf, view_of_a_leaf, piece_of_split, piece_of_chunk, piece_of_unbind]


@pytest.mark.parametrize("argument", ["x", "q", "k"])
@pytest.mark.parametrize("make", REFUSED, ids=lambda function: function.__name__)
def test_tensor_that_autograd_cannot_write_is_refused_and_unchanged(make, argument, device):
    x, base = make(device)
    other = random(B, S, 2, D, device=device)
    kept = base.detach().clone(), other.clone()
    cos, sin = random_table(S, P, device=device)
    versions = base._version, other._version
    function = rope_ext.apply_rotary if argument == "x" else rope_ext.apply_rotary_qk
    tensors = {"x": [x], "q": [x, other], "k": [other, x]}[argument]
    with pytest.raises(RuntimeError, match=rf"{function.__name__}: expected {argument} to be "):
        function(*tensors, cos, sin, inplace=True)
    assert_same_bits(base, kept[0])
    assert_same_bits(other, kept[1])
    assert (base._version, other._version) == versions


@pytest.mark.parametrize("table", ["cos", "sin"])
def test_table_that_requires_grad_is_refused_in_place(table, device):
    x = random(B, S, H, D, device=device)
    kept = x.clone()
    tables = dict(zip(("cos", "sin"), random_table(S, P, device=device), strict=True))
    tables[table].requires_grad_()
    match = "expected cos and sin to need no gradient when inplace=True"
    with pytest.raises(RuntimeError, match=match):
        rope_ext.apply_rotary(x, **tables, inplace=True)
    with pytest.raises(RuntimeError, match=match):
        rope_ext.apply_rotary_qk(x, kept.clone(), **tables, inplace=True)
    with pytest.raises(RuntimeError, match=f"rope::apply_rotary_: expected {table} to need no"):
        rope.apply_rotary_(x, **tables)
    assert_same_bits(x, kept)
    assert x._version == 0


@pytest.mark.parametrize("kind", ["leaf", "intermediate", "view"])
def test_direct_operator_refuses_a_tensor_that_requires_grad(kind, device):
    leaf = random(B, S, H, D, device=device).requires_grad_()
    x = {"leaf": leaf, "intermediate": leaf * 1, "view": (leaf * 1)[:, :, :2]}[kind]
    other = random(*x.shape, device=device)
    kept, other_kept = x.detach().clone(), other.clone()
    version = x._version
    cos, sin = random_table(S, P, device=device)
    with pytest.raises(RuntimeError, match="rope::apply_rotary_: expected x to need no gradient"):
        rope.apply_rotary_(x, cos, sin)
    with pytest.raises(RuntimeError, match="rope::apply_rotary_qk_: expected q to need no"):
        rope.apply_rotary_qk_(x, other, cos, sin)
    with pytest.raises(RuntimeError, match="rope::apply_rotary_qk_: expected k to need no"):
        rope.apply_rotary_qk_(other, x, cos, sin)
    assert_same_bits(x, kept)
    assert_same_bits(other, other_kept)
    assert (x._version, other._version) == (version, 0)


def test_inference_tensor_is_not_written_outside_of_inference_mode(device):
    with torch.inference_mode():
        x = random(2, 5, 3, 8).to(device)
    before = x.clone()
    cos, sin = (t.to(device) for t in random_table(5, 4))
    refusal = r"rope::apply_rotary_: expected no inference tensor to be written"
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(RuntimeError, match=refusal):
            torch.ops.rope.apply_rotary_(x, cos, sin)
        with mode(), pytest.raises(RuntimeError, match=refusal):
            rope_ext.apply_rotary(x, cos, sin, inplace=True)
        with mode(), pytest.raises(RuntimeError, match=r"rotary\.out: expected no inference"):
            rope_ext.apply_rotary(before, cos, sin, out=x)
    assert torch.equal(x, before)


def test_tables_that_require_grad_are_refused_in_place_under_compile():
    x = random(2, 5, 3, 8).requires_grad_()
    cos, sin = random_table(5, 4)
    cos.requires_grad_()

    @torch.compile(backend="eager", fullgraph=True)
    def rotate(x):
        return rope_ext.apply_rotary(x * 1, cos, sin, inplace=True)

    with pytest.raises(Exception, match="expected cos and sin to need no gradient"):
        rotate(x)
