"""In place: version counters, autograd, errors. test_strides.py has the numbers."""

import pytest
import torch
from support import (
    DTYPES,
    assert_derivatives,
    assert_same_bits,
    pairwise,
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


@pytest.fixture
def cos_sin(device):
    return random_table(S, P, device=device)


def test_q_and_k_of_one_packed_tensor_are_rotated_and_v_is_not(cos_sin, device):
    for dtype in DTYPES:
        qkv = random(B, S, H + 2, D, dtype=dtype, device=device)  # H heads of q, one of k, one of v
        expected = qkv.cpu().clone()
        expected[:, :, : H + 1] = rounded_once(qkv, *cos_sin, interleaved=True)[:, :, : H + 1]
        rope.apply_rotary_qk_(*qkv.split((H, 1, 1), 2)[:2], *cos_sin, interleaved=True)
        assert_same_bits(qkv, expected, dtype)


# ---- version counters


class PassThrough(TorchDispatchMode):
    """Sees every operator and does nothing, like profilers, counters and checkpointing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode, PassThrough]
)
def test_versions_of_what_is_written_are_counted(mode, cos_sin, device):
    q, k = random(B, S, H, D, device=device), random(B, S, 1, D, device=device)
    outs = torch.empty_like(q), torch.empty_like(k)
    for rotate, written in (
        (lambda: rope.apply_rotary_(q, *cos_sin), [q]),
        (lambda: rope.apply_rotary_qk_(q, k, *cos_sin), [q, k]),
        (lambda: rope_ext.apply_rotary(q, *cos_sin, inplace=True), [q]),
        (lambda: rope_ext.apply_rotary_qk(q, k, *cos_sin, inplace=True), [q, k]),
        (lambda: rope_ext.apply_rotary(q, *cos_sin, out=outs[0]), [outs[0]]),
        (lambda: rope_ext.apply_rotary_qk(q, k, *cos_sin, out=outs), outs),
        (lambda: rope_ext.apply_rotary_qk(q, k, *cos_sin), []),
    ):
        expected = [x._version + any(x is y for y in written) for x in (q, k, *outs, *cos_sin)]
        with mode():
            rotate()
        assert [x._version for x in (q, k, *outs, *cos_sin)] == expected


def test_writing_a_view_bumps_the_version_of_its_base(cos_sin, device):
    qkv = random(B, S, 3, H, D, device=device)
    rope.apply_rotary_(qkv[:, :, 0], *cos_sin)
    assert qkv._version == 1
    with torch.no_grad():
        rope_ext.apply_rotary(qkv[:, :, 0].transpose(1, 2), *cos_sin, layout="bhsd", inplace=True)
    assert qkv._version == 2


def test_backward_refuses_a_saved_tensor_that_was_rotated_in_place(cos_sin, device):
    """By the operator, on a tensor without gradient; by the functions, on an intermediate."""
    weight = random(B, S, H, D, device=device).requires_grad_()
    for x, save, rotate in (
        (weight.detach() * 2, weight.mul, lambda x: rope.apply_rotary_(x, *cos_sin)),
        (weight * 2, torch.sin, lambda x: rope_ext.apply_rotary(x, *cos_sin, inplace=True)),
        (
            weight * 2,
            torch.sin,
            lambda x: rope_ext.apply_rotary_qk(weight * 3, x, *cos_sin, inplace=True),
        ),
    ):
        y = save(x)
        rotate(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(torch.ones_like(y))


def test_lazy_clone_leaves_the_original_alone(cos_sin, device):
    """A write to a copy-on-write tensor copies it first."""
    original = random(B, S, H, D, device=device)
    kept = original.clone()
    clone = original._lazy_clone()
    rope.apply_rotary_(clone, *cos_sin)
    assert_same_bits(original, kept)
    assert_same_bits(clone, rounded_once(kept, *cos_sin))


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
OPTIONS = [
    {},
    {"interleaved": True, "inverse": True},
    {"rotary_offset": D - 2 * P, "interleaved_out": False},
]


@pytest.mark.parametrize("rotate", IN_PLACE, ids=lambda function: function.__name__)
def test_gradients_in_place_equal_those_out_of_place(rotate, device):
    for options in OPTIONS:
        expected = gradients(out_of_place, device, **options)
        for a, b in zip(gradients(rotate, device, **options), expected, strict=True):
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-12, atol=1e-12)


def test_rotating_again_and_again_in_place(cos_sin, device):
    leaf = random(B, S, H, D, device=device).requires_grad_()
    x, y = leaf * 2, leaf * 2
    for _ in range(3):
        x = rope_ext.apply_rotary(x, *cos_sin, inplace=True)
        y = rope_ext.apply_rotary(y, *cos_sin)
    assert_same_bits(x, y)
    seed = random(B, S, H, D, device=device, seed=4)
    (got,), (expected,) = (torch.autograd.grad(t, leaf, seed) for t in (x, y))
    assert_same_bits(got, expected)


def test_gradcheck_in_place(device):
    leaf = random(2, 2, 2, 6, dtype=F64, device=device).requires_grad_()
    cos, sin = random_table(5, 2, dtype=F64, device=device)
    ids = torch.tensor([[4, 4], [0, 3]], device=device)
    assert_derivatives(
        lambda leaf: rope_ext.apply_rotary(leaf * 2, cos, sin, ids, layout="sbhd", inplace=True),
        leaf,
    )


def test_only_one_of_q_and_k_needs_a_gradient(cos_sin, device):
    for needs in ("q", "k"):
        leaf = random(B, S, H, D, device=device).requires_grad_()
        moving, fixed = leaf * 1, random(B, S, H, D, device=device)
        expected = rounded_once(fixed, *cos_sin)
        pair = (moving, fixed) if needs == "q" else (fixed, moving)
        rope_ext.apply_rotary_qk(*pair, *cos_sin, inplace=True)
        assert_same_bits(fixed, expected)
        assert not fixed.requires_grad
        seed = random(B, S, H, D, device=device, seed=4)
        (grad,) = torch.autograd.grad(moving, leaf, seed)
        assert_same_bits(grad, rounded_once(seed, *cos_sin, inverse=True))


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_no_copy_of_x_is_saved(inplace, cos_sin, device):
    leaf = random(B, S, H, D, device=device).requires_grad_()
    q, k = leaf * 1, leaf * 2
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope_ext.apply_rotary(leaf * 3, *cos_sin, inplace=inplace)
        rope_ext.apply_rotary_qk(q, k, *cos_sin, inplace=inplace)
    assert saved
    assert max(t.untyped_storage().nbytes() for t in saved) <= cos_sin[0].untyped_storage().nbytes()


def test_in_place_under_no_grad_writes_a_leaf(cos_sin, device):
    x = random(B, S, H, D, device=device).requires_grad_()
    expected = rounded_once(x, *cos_sin)
    with torch.no_grad():
        rope_ext.apply_rotary(x, *cos_sin, inplace=True)
    assert_same_bits(x, expected)
    assert x.requires_grad


def test_tensors_of_both_kinds_are_rotated_in_inference_mode(cos_sin, device):
    q = random(B, S, H, D, device=device)
    with torch.inference_mode():
        k = random(B, S, 1, D, device=device)
        for rotate in (
            rope.apply_rotary_qk_,
            lambda *xs: rope_ext.apply_rotary_qk(*xs, inplace=True),
        ):
            expected = rounded_once(q, *cos_sin), rounded_once(k, *cos_sin)
            rotate(q, k, *cos_sin)
            assert_same_bits(q, expected[0])
            assert_same_bits(k, expected[1])
    assert q._version == 2


# ---- errors: if autograd can't record the write, an error is raised before it


# x, of which autograd does not allow a write, and the tensor whose memory it is in; from a leaf
UNWRITABLE = {
    "leaf": lambda leaf: (leaf, leaf),
    "view of a leaf": lambda leaf: (leaf[:, :, :2], leaf),
    "piece of split": lambda leaf: ((x := leaf * 1).split(2, dim=2)[0], x),
    "piece of chunk": lambda leaf: ((x := leaf * 1).chunk(2, dim=2)[1], x),
    "piece of unbind": lambda leaf: ((x := torch.stack((leaf, leaf))).unbind()[0], x),
}


@pytest.mark.parametrize(("make", "argument"), pairwise(make=UNWRITABLE, argument=("x", "q", "k")))
def test_tensor_that_autograd_cannot_write_is_refused_and_unchanged(
    make, argument, cos_sin, device
):
    x, base = make(random(B, S, 4, D, device=device).requires_grad_())
    other = random(*x.shape, device=device)
    kept = base.detach().clone(), other.clone()
    versions = base._version, other._version
    function = rope_ext.apply_rotary if argument == "x" else rope_ext.apply_rotary_qk
    tensors = {"x": [x], "q": [x, other], "k": [other, x]}[argument]
    with pytest.raises(RuntimeError, match=rf"{function.__name__}: expected {argument} to be "):
        function(*tensors, *cos_sin, inplace=True)
    assert_same_bits(base, kept[0])
    assert_same_bits(other, kept[1])
    assert (base._version, other._version) == versions


def test_table_that_requires_grad_is_refused_in_place(cos_sin, device):
    match = "expected cos and sin to need no gradient when inplace=True"
    for needs in (0, 1):
        x, table = random(B, S, H, D, device=device), [t.clone() for t in cos_sin]
        table[needs].requires_grad_()
        kept = x.clone()
        with pytest.raises(RuntimeError, match=match):
            rope_ext.apply_rotary(x, *table, inplace=True)
        with pytest.raises(RuntimeError, match=match):
            rope_ext.apply_rotary_qk(x, kept.clone(), *table, inplace=True)
        with pytest.raises(Exception, match="expected cos and sin to need no gradient"):
            torch.compile(
                lambda x, *table: rope_ext.apply_rotary(x * 1, *table, inplace=True),
                backend="eager",
                fullgraph=True,
            )(x, *table)
        assert_same_bits(x, kept)
        assert x._version == 0


def test_operator_refuses_an_intermediate_that_requires_grad(cos_sin, device):
    """test_every_operator.py has the leaves."""
    intermediate = random(B, S, H, D, device=device).requires_grad_() * 1
    for mode in (torch.enable_grad, PassThrough):
        for x in (intermediate, intermediate[:, :, :2]):
            other = random(*x.shape, device=device)
            kept, other_kept = x.detach().clone(), other.clone()
            with mode():
                with pytest.raises(
                    RuntimeError, match="rope::apply_rotary_: expected x to need no"
                ):
                    rope.apply_rotary_(x, *cos_sin)
                with pytest.raises(RuntimeError, match="apply_rotary_qk_: expected q to need no"):
                    rope.apply_rotary_qk_(x, other, *cos_sin)
                with pytest.raises(RuntimeError, match="apply_rotary_qk_: expected k to need no"):
                    rope.apply_rotary_qk_(other, x, *cos_sin)
            assert_same_bits(x, kept)
            assert_same_bits(other, other_kept)
            assert x._version == other._version == 0


def test_inference_tensor_is_not_written_outside_of_inference_mode(cos_sin, device):
    with torch.inference_mode():
        x = random(B, S, H, D, device=device)
    before = x.clone()
    refusal = r"rope::apply_rotary_: expected no inference tensor to be written"
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(RuntimeError, match=refusal):
            rope.apply_rotary_(x, *cos_sin)
        with mode(), pytest.raises(RuntimeError, match=refusal):
            rope_ext.apply_rotary(x, *cos_sin, inplace=True)
        with mode(), pytest.raises(RuntimeError, match=r"rotary\.out: expected no inference"):
            rope_ext.apply_rotary(before, *cos_sin, out=x)
    assert torch.equal(x, before)
