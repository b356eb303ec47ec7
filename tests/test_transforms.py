"""PyTorch's transforms: vmap, grad, jvp and their nestings, selective checkpointing; and its tools:
the profiler, the FLOP counter.

test_every_operator.py has each operator by each transform, test_works_with.py each function. Here
are dimensions and shapes that differ, and nestings. A vmap is compared with a loop.
"""

from functools import partial

import pytest
import torch
from support import assert_same_bits, naming, random, random_positions, random_table
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import rope_ext
from rope_ext import reference

rope = torch.ops.rope

N, B, S, H, K, D, P, L = 3, 2, 5, 4, 2, 8, 4, 7
F64 = torch.float64


# ---- vmap

# name -> shapes of x (without its heads), cos and sin, and position_ids
LAYOUTS = {
    "table": ((B, S), (L, P), None),
    "table, ids 1S": ((B, S), (L, P), (1, S)),
    "table, ids BS": ((B, S), (L, P), (B, S)),
    "rows for all": ((B, S), (1, S, P), None),
    "rows per token": ((B, S), (B, S, P), None),
    "packed, ids": ((S,), (L, P), (S,)),
}
BATCHED = [  # the dimension of the samples in q, k, cos, sin and position_ids
    (0, None, None, None, None),
    (None, None, 0, 0, None),
    (None, None, 0, None, None),
    (1, 2, None, None, 1),
    (-1, -1, -1, -1, None),
    (0, 1, 2, 0, -1),
]


def samples(shape, dim, make):
    """A tensor of the shape, with an additional dimension of N samples if dim is not None."""
    if shape is None:
        return None
    if dim is None:
        return make(*shape)
    return make(N, *shape).movedim(0, dim)


def sample(tensor, dim, i):
    return tensor if tensor is None or dim is None else tensor.select(dim, i).contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_rotates_as_a_loop_does(layout, device):
    tokens, table, ids = LAYOUTS[layout]
    make = partial(random, device=device)
    options = {"interleaved": True, "interleaved_out": False, "inverse": True}
    function = partial(rope.apply_rotary_qk, **options)
    for dims in BATCHED:
        dims = (*dims[:4], dims[4] if ids else None)
        arguments = [
            samples((*tokens, H, D), dims[0], make),
            samples((*tokens, K, D), dims[1], make),
            samples(table, dims[2], partial(make, seed=1)),
            samples(table, dims[3], partial(make, seed=2)),
            samples(ids, dims[4], partial(random_positions, rows=L, device=device)),
        ]
        out_q, out_k = vmap(function, in_dims=dims, out_dims=(1, -1))(*arguments)
        for i in range(N):
            of_one = (sample(t, dim, i) for t, dim in zip(arguments, dims, strict=True))
            got = out_q.select(1, i), out_k.select(-1, i)
            for a, b in zip(got, function(*of_one), strict=True):
                with naming(dims):
                    assert_same_bits(a, b)


def test_nested_vmap(device):
    x = random(N, 2, S, H, D, device=device)
    cos, sin = random_table(2, L, P, device=device)
    inner = vmap(rope.apply_rotary, in_dims=(0, 0, 0))
    got = vmap(inner, in_dims=(0, None, None))(x, cos, sin)
    for i in range(N):
        for j in range(2):
            assert_same_bits(got[i, j], rope.apply_rotary(x[i, j], cos[j], sin[j]))


def test_vmap_in_place_writes_every_sample(device):
    cos, sin = random_table(N, L, P, device=device)
    for operator in (rope.apply_rotary_, partial(rope_ext.apply_rotary, inplace=True)):
        x = random(B, N, S, H, D, device=device)
        expected = torch.stack([rope.apply_rotary(x[:, i], cos[i], sin[i]) for i in range(N)], 1)

        def function(x, cos, sin, operator=operator):
            operator(x, cos, sin)
            return x

        got = vmap(function, in_dims=(1, 0, 0), out_dims=1)(x, cos, sin)
        assert_same_bits(got, expected)
        assert_same_bits(x, expected)


def test_position_past_the_table_of_its_sample_is_refused():
    """The tables of all samples are joined in memory: no position may reach the next sample's."""
    for i, position in ((0, L), (N - 1, -1)):  # beside the rows of another sample
        ids = torch.zeros(N, S, dtype=torch.int64)
        ids[i] = position
        rotate = vmap(rope.apply_rotary, in_dims=(None, 0, 0, 0))
        with pytest.raises(RuntimeError, match="expected position_ids in"):
            rotate(random(B, S, H, D), *random_table(N, L, P), ids)


@pytest.mark.parametrize("layout", ["table", "table, ids BS", "rows per token", "packed, ids"])
def test_gradients_of_each_sample(layout, device):
    """vmap of grad: the gradients to x, cos and sin of each sample alone. The rows of a table may
    be summed in another order: each order is within n 2^-53 of the sum of n products' sizes, n <= 2
    B S H.
    """
    tokens, table, ids = LAYOUTS[layout]
    make = partial(random, dtype=F64, device=device)
    q, k = make(N, *tokens, H, D), make(N, *tokens, K, D, seed=1)
    weight = make(*tokens, H, D, seed=2), make(*tokens, K, D, seed=3)
    cos, sin = make(*table, seed=4), make(*table, seed=5)
    ids = None if ids is None else random_positions(*ids, rows=L, device=device)

    def loss(q, k, cos, sin, weigh=lambda x: x):
        outs = rope.apply_rotary_qk(q, k, cos, sin, ids)
        return sum((weigh(w) * out).sum() for w, out in zip(weight, outs, strict=True))

    got = vmap(grad(loss, argnums=(0, 1, 2, 3)), in_dims=(0, 0, None, None))(q, k, cos, sin)
    for i in range(N):
        leaves = [t.clone().requires_grad_() for t in (q[i], k[i], cos, sin)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for a, b in zip(got[:2], expected[:2], strict=True):
            assert_same_bits(a[i], b)
        size = 4 * max(t.abs().max().item() for t in (*weight, q, k)) ** 2 * B * S * H
        for a, b in zip(got[2:], expected[2:], strict=True):
            assert ((a[i] - b).abs() <= 2 * 2 * B * S * H * 2.0**-53 * size).all()


# ---- grad, jvp and their nestings


def turned(inv_freq, x, ids):
    """A number from frequencies, through every differentiable operator."""
    cos, sin = rope_ext.cos_sin(inv_freq, ids)
    table = rope_ext.cos_sin_cache(inv_freq, S)
    return (rope_ext.apply_rotary(x, cos, sin) * rope_ext.apply_rotary(x, *table).sin()).sum()


def turned_plainly(inv_freq, x, ids):
    """The same, in plain PyTorch."""
    rows = reference.cos_sin(inv_freq, ids)
    table = reference.cos_sin(inv_freq, torch.arange(S, device=x.device))
    return (reference.apply_rotary(x, *rows) * reference.apply_rotary(x, *table).sin()).sum()


@pytest.mark.parametrize("argnums", [0, 1], ids=["inv_freq", "x"])
def test_nested_derivatives_are_those_of_plain_torch(argnums, device):
    """Forward, backward and each over each. An entry is a sum of at most 2 S D products in float64:
    1e-12 of the largest exceeds their rounding errors, and is less than any missing term.
    """
    inv_freq = rope_ext.frequencies.default(D, device=device)[0].double()
    x = random(1, S, 1, D, dtype=F64, device=device)
    ids = random_positions(1, S, rows=9, device=device)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())

    once = torch.func.grad(turned_plainly, argnums)(inv_freq, x, ids)
    twice = hessian(turned_plainly, argnums)(inv_freq, x, ids)
    for transform in (jacfwd, jacrev):
        close(transform(turned, argnums)(inv_freq, x, ids), once)
        for other in (jacfwd, jacrev):
            close(transform(other(turned, argnums), argnums)(inv_freq, x, ids), twice)


def test_tangent_of_x_is_its_rotation(device):
    cos, sin = random_table(L, P // 2, device=device)
    function = partial(rope.apply_rotary, cos=cos, sin=sin, rotary_offset=1)
    for dtype in (torch.float32, torch.bfloat16):
        x, tangent = (random(B, S, H, D, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
        out, got = jvp(function, (x,), (tangent,))
        assert_same_bits(out, function(x))
        assert_same_bits(got, function(tangent))
        (back,) = vjp(function, x)[1](got)
        assert_same_bits(back, function(got, inverse=True))


def test_tangent_of_the_table_leaves_other_channels_alone(device):
    x, table = random(B, S, H, D, device=device), random_table(L, P // 2, device=device)
    rotate = partial(rope.apply_rotary, x, rotary_offset=1)
    tangents = random_table(L, P // 2, device=device, seed=5)
    _, got = jvp(rotate, table, tangents)
    expected = rotate(*tangents)
    expected[..., :1] = expected[..., 1 + P :] = 0
    assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_functions_in_place_are_transformed(layout, device):
    """The operators in place would not report the tangent; the functions do."""
    x, tangent = (random(B, S, S, D, device=device, seed=seed) for seed in (1, 2))
    cos, sin = random_table(L, P, device=device)
    rotate = partial(rope_ext.apply_rotary, cos=cos, sin=sin, layout=layout)
    pair = partial(rope_ext.apply_rotary_qk, cos=cos, sin=sin, layout=layout)

    def in_place(x):
        a, b = x * 1, x * 1
        rotate(a, inplace=True)
        pair(a, b, inplace=True)
        return a

    def out_of_place(x):
        return rotate(rotate(x))

    for a, b in zip(jvp(in_place, (x,), (tangent,)), jvp(out_of_place, (x,), (tangent,)),
                    strict=True):  # fmt: skip
        assert_same_bits(a, b)
    (got,), (expected,) = (vjp(f, x)[1](tangent) for f in (in_place, out_of_place))
    assert_same_bits(got, expected)


def test_table_that_is_first_needed_in_a_transform_is_not_kept_from_it(device):
    module = rope_ext.RotaryEmbedding(D, max_position_embeddings=L, device=device)
    q = random(B, S, H, D, device=device)

    def loss(q):
        return module(q, q)[0].sin().sum()

    first = jvp(grad(loss), (q,), (q.cos(),))
    module(q, q)  # makes the table that is kept
    for a, b in zip(first, jvp(grad(loss), (q,), (q.cos(),)), strict=True):
        assert_same_bits(a, b)


# ---- activation checkpointing


class Calls(TorchDispatchMode):
    """Counts an operator's calls that reach a device."""

    def __init__(self, overload):
        super().__init__()
        self.overload, self.count = overload, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is self.overload
        return function(*args, **(kwargs or {}))


def block(module, q, k):
    q, k = module(q * 2, k + 1)
    return (q.sin().sum(-2) + k.sin().sum(-2)).exp()


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "recomputed"])
def test_selective_checkpointing_decides_for_the_operator(saved, device):
    overload = rope.apply_rotary_qk.default
    wanted = CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.MUST_RECOMPUTE

    def policy(ctx, function, *args, **kwargs):
        return wanted if function is overload else CheckpointPolicy.MUST_RECOMPUTE

    module = rope_ext.RotaryEmbedding(D, max_position_embeddings=L, device=device)
    q = random(B, S, H, D, device=device).requires_grad_()
    k = random(B, S, K, D, device=device).requires_grad_()
    expected = torch.autograd.grad(block(module, q, k).sum(), (q, k))
    with Calls(overload) as calls:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        y = checkpoint(block, module, q, k, use_reentrant=False, context_fn=contexts)
        assert calls.count == 1
        got = torch.autograd.grad(y.sum(), (q, k))
    assert calls.count == (2 if saved else 3)  # one of them is the backward
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


# ---- tools


def flops_of(function, *args, **options):
    with FlopCounterMode(display=False) as counter:
        function(*args, **options)
    return counter.get_total_flops()


def test_flops_are_counted(device):
    """6 a pair that rotates, forward and backward; 8 a pair for the gradient to the table."""
    q, k = random(B, S, H, D, device=device), random(B, S, K, D, device=device)
    cos, sin = random_table(L, P // 2, device=device)  # half of the channels
    pairs = B * S * (H + K) * P // 2
    assert flops_of(rope.apply_rotary_qk_, q.clone(), k.clone(), cos, sin) == 6 * pairs
    wide = (torch.cat((t, t), -1) for t in (cos, sin))
    assert flops_of(rope.apply_rotary, q, *wide, rotary_dim=P) == 6 * B * S * H * P // 2
    leaves = [t.requires_grad_() for t in (q, k, cos, sin)]
    total = sum(out.sum() for out in rope.apply_rotary_qk(*leaves))
    assert flops_of(torch.autograd.grad, total, leaves) == (6 + 8) * pairs


def test_profiler_shows_operators_by_their_names():
    q = random(B, S, H, D).requires_grad_()
    inv_freq = rope_ext.frequencies.default(D)[0].requires_grad_()
    with torch.profiler.profile() as profile:
        cos, sin = rope_ext.cos_sin_cache(inv_freq, S)
        rope_ext.apply_rotary(q, cos, sin).sum().backward()
    names = {event.key for event in profile.key_averages()}
    for name in ("rope::cos_sin_cache", "rope::apply_rotary", "ApplyRotaryBackward",
                 "rope::apply_rotary_table_backward", "CosSinCacheBackward"):  # fmt: skip
        assert name in names, f"no {name} among {sorted(names)}"
