"""Rows [1, T, W] of packed tokens are rows [T, W], in every operator: the same bits."""

import pytest
import torch
from ranks import RANKS, on_every_rank, place
from support import assert_same_bits, random, random_cache, random_slots, random_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Replicate, Shard
from torch.func import vmap

import rope_ext
from rope_ext import reference

rope = torch.ops.rope

T, H, K, D, P, RANK = 6, 4, 2, 16, 8, 8


def heads(device, count=H, dim=D, seed=0):
    return random(T, count, dim, device=device, seed=seed)


def in_place(operator):
    """The operator on copies of the tensors that it writes; returns the copies."""

    def call(*args, **options):
        names = operator.default._schema.arguments
        args = [a.clone() if n.is_write else a for a, n in zip(args, names, strict=False)]
        operator(*args, **options)
        return [a for a, n in zip(args, names, strict=False) if n.is_write]

    return call


def into_out(q, k, *rows):
    outs = {"out_q": torch.zeros_like(q), "out_k": torch.zeros_like(k)}
    rope.apply_rotary_qk.out(q, k, *rows, **outs)
    return list(outs.values())


def appending(device):
    slots = random_slots(T, capacity=12, device=device)
    caches = [random_cache(3, 4, K, D, dtype=torch.float32, device=device, seed=i) for i in (1, 2)]
    return (heads(device), heads(device, K), heads(device, K, seed=1), *caches, slots)


def latent(device):
    slots = random_slots(T, capacity=12, device=device)
    cache = random_cache(3, 4, RANK + 2 * P, dtype=torch.float32, device=device)
    k_pe, kv_c = random(T, 2 * P, device=device), random(T, RANK, device=device)
    return heads(device, dim=24), k_pe, kv_c, cache, slots


def two(device):
    return heads(device), heads(device, K)


def normed(device):
    return *two(device), random(D, device=device), random(D, device=device, seed=1)


# (function, the arguments before cos and sin)
CALLS = {
    "apply_rotary": (rope.apply_rotary, lambda device: two(device)[:1]),
    "apply_rotary_": (in_place(rope.apply_rotary_), lambda device: two(device)[:1]),
    "apply_rotary_qk": (rope.apply_rotary_qk, two),
    "apply_rotary_qk_": (in_place(rope.apply_rotary_qk_), two),
    "apply_rotary_qk.out": (into_out, two),
    "append_kv": (in_place(rope.apply_rotary_qk_append_kv_), appending),
    "mla_append": (in_place(rope.apply_rotary_mla_append_), latent),
    "rms_norm_rotary_qk": (rope.rms_norm_rotary_qk, normed),
}
DIFFERENTIABLE = ["apply_rotary", "apply_rotary_qk", "rms_norm_rotary_qk"]


def as_list(results):
    return [results] if isinstance(results, torch.Tensor) else list(results)


@pytest.mark.parametrize("name", CALLS)
def test_the_bits_are_those_of_rows_without_a_batch(name, backend):
    call, arguments = CALLS[name]
    rows = random_table(T, P, device=backend)
    expected = as_list(call(*arguments(backend), *rows))
    got = as_list(call(*arguments(backend), *(t[None] for t in rows)))
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_too_in_the_shape_of_the_rows(name, device):
    """First and second derivatives, of the rows themselves too."""
    call, arguments = CALLS[name]
    args, rows = arguments(device), random_table(T, P, device=device)

    def derivatives(*rows):
        inputs = [t.clone().requires_grad_() for t in (*args, *rows)]
        loss = sum((r * (i + 1)).sin().sum() for i, r in enumerate(as_list(call(*inputs))))
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for expected, got in zip(
        derivatives(*rows), derivatives(*(t[None] for t in rows)), strict=True
    ):
        for a, b in zip(got[:-2], expected[:-2], strict=True):
            assert_same_bits(a, b)
        for a, b in zip(got[-2:], expected[-2:], strict=True):
            assert_same_bits(a, b[None])


@pytest.mark.parametrize("each", ["x", "rows", "both"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap(name, each):
    call, arguments = CALLS[name]
    args, rows = arguments("cpu"), random_table(T, P)
    samples = 3

    def batched(tensors, is_batched):
        return [torch.stack([t * (i + 1) for i in range(samples)]) if is_batched else t
                for t in tensors]  # fmt: skip

    def gradients(*inputs):
        def loss(*inputs):
            return sum(r.sin().sum() for r in as_list(call(*inputs)))

        return torch.func.grad(loss, argnums=tuple(range(len(inputs))))(*inputs)

    dims = [0 if each != "rows" else None] * len(args) + [0 if each != "x" else None] * 2
    inputs = batched(args, each != "rows")
    for shape in ((T, P), (1, T, P)):
        of_rows = batched((t.view(shape) for t in rows), each != "x")
        got = vmap(gradients, tuple(dims))(*inputs, *of_rows)
        if shape == (T, P):
            expected = got
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.view_as(b), b, rtol=0, atol=0)


@pytest.mark.parametrize("sharded", ["x", "rows", "both"])
def test_tokens_are_sharded_with_their_rows(sharded):
    count = 3 * RANKS
    q, k = random(count, H, D), random(count, K, D)
    rows = [t[None] for t in random_table(count, P)]
    expected = rope.apply_rotary_qk(q, k, *rows)

    def on_rank(mesh):
        of_x = Shard(0) if sharded != "rows" else Replicate()
        of_rows = Shard(1) if sharded != "x" else Replicate()
        xs = (place(t, mesh, of_x) for t in (q, k))
        return rope.apply_rotary_qk(*xs, *(place(t, mesh, of_rows) for t in rows))

    for got, whole in zip(on_every_rank(on_rank), expected, strict=True):
        assert_same_bits(got, whole)


@pytest.mark.parametrize("name", CALLS)
def test_fakes_take_them(name):
    call, arguments = CALLS[name]
    rows = [t[None] for t in random_table(T, P)]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (*arguments("cpu"), *rows)]
        for fake in as_list(call(*fakes)):
            assert fake.device.type == "cpu"


@pytest.mark.parametrize("options", [{}, {"rotary_dim": P, "interleaved": True, "inverse": True}])
def test_the_same_in_plain_pytorch_and_decomposed(options):
    q, k = two("cpu")
    rows = [t[None] for t in random_table(T, P)]
    expected = rope.apply_rotary_qk(q, k, *rows, **options)

    @torch.compile(backend="eager", fullgraph=True)
    def decomposed(q, k, *rows):
        return rope_ext.apply_rotary_qk(q, k, *rows, **options, layout="thd")

    with rope_ext.lowering("decompose"):
        got = decomposed(q, k, *rows)
    for a, b, x in zip(got, expected, (q, k), strict=True):
        assert_same_bits(a, b)
        assert_same_bits(reference.apply_rotary(x, *rows, **options), b)
