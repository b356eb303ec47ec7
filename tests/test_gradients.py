"""Derivatives by x, cos, sin and inv_freq, once and twice: exact, deterministic, if required."""

from itertools import product
from typing import NamedTuple

import pytest
import torch
from support import (
    DTYPES,
    assert_derivatives,
    assert_same_bits,
    inverse_of,
    name_of,
    naming,
    on_cpu,
    random,
    random_positions,
    random_table,
    rounded_once,
    ulp,
)

import rope_ext
from rope_ext import reference

rope = torch.ops.rope

B, S, H, K, D, L = 2, 3, 2, 1, 6, 5
F64, F32, F16, BF16 = DTYPES


class Case(NamedTuple):
    name: str
    reason: str
    table: tuple[int, ...]
    ids: list | None
    ids_dtype: torch.dtype
    packed: bool
    options: dict


def case(name, reason, table=(L, 3), ids=None, dtype=torch.int64, packed=False, **options):
    return Case(name, reason, table, ids, dtype, packed, options)


CASES = [
    case("table", "rows shared by the batch, two rows unused"),
    case("ids BS", "rows repeated within and across sequences", ids=[[4, 4, 1], [0, 4, 4]]),
    case("rows for all", "rows of the step, summed over the batch", (1, S, 3)),
    case("rows per token", "rows of the step, nothing to sum but heads", (B, S, 3)),
    case("partial", "channels past rotary_dim", (L, 2)),
    case("interleaved", "neighbours", interleaved=True),
    case("last channels", "none after them", (L, 2), rotary_offset=2),
    case("middle, ids", "channels before and after", (L, 1), [4, 0, 4], rotary_offset=3,
         inverse=True),
    case("packed, ids", "no batch, repeated rows of int32", ids=[3, 3, 0], dtype=torch.int32,
         packed=True),
    # another order in the result
    case("to halves", "grad and x in different orders", interleaved=True, interleaved_out=False),
    case("to neighbours, inverse, ids", "the other way", (L, 2), [[4, 4, 1], [0, 4, 4]],
         interleaved_out=True, inverse=True, rotary_offset=1),
    # one angle a channel
    case("full width", "unequal halves", (L, 6), rotary_dim=6),
    case("full width, inverse", "the transpose", (L, 6), [[1, 1, 1], [1, 2, 0]], rotary_dim=6,
         inverse=True),
    case("full width, rows, interleaved, inverse", "all at once", (1, S, 4), rotary_dim=4,
         interleaved=True, inverse=True),
    case("full width, to halves", "columns in the order of the result", (1, S, 4), rotary_dim=4,
         interleaved=True, interleaved_out=False, rotary_offset=2),
    case("full width, to neighbours, ids", "the same, neighbours", (L, 6), [[1, 1, 1], [1, 2, 0]],
         rotary_dim=6, interleaved_out=True),
    case("full width, to neighbours, inverse", "columns in the order of x", (L, 4), rotary_dim=4,
         interleaved_out=True, inverse=True, rotary_offset=1),
    case("full width, to halves, inverse", "the same, neighbours", (L, 6), rotary_dim=6,
         interleaved=True, interleaved_out=False, inverse=True),
]  # fmt: skip
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def inputs_of(case, device, dtype=F64, table_dtype=F64, heads=H, k_heads=K):
    """q, k, cos, sin, position_ids, options; unlike real tables, cos and sin are independent."""
    tokens = (S,) if case.packed else (B, S)
    q = random(*tokens, heads, D, dtype=dtype, device=device, seed=1)
    k = random(*tokens, k_heads, D, dtype=dtype, device=device, seed=2)
    cos = random(*case.table, dtype=table_dtype, device=device, seed=3)
    sin = random(*case.table, dtype=table_dtype, device=device, seed=4)
    ids = None if case.ids is None else torch.tensor(case.ids, dtype=case.ids_dtype, device=device)
    return q, k, cos, sin, ids, case.options


@cases
def test_gradcheck_and_gradgradcheck_of_q_and_k(case, device):
    q, k, cos, sin, ids, options = inputs_of(case, device)
    inputs = [t.requires_grad_() for t in (q, k, cos, sin)]

    def function(q, k, cos, sin):
        return rope.apply_rotary_qk(q, k, cos, sin, ids, **options)

    assert_derivatives(function, inputs)


@pytest.mark.parametrize(("start", "scaling"), [(0, 1.0), (7, 1.25), (-3, 1.25)])
def test_gradcheck_of_cos_sin_cache(start, scaling, device):
    def function(inv_freq):
        return rope.cos_sin_cache(inv_freq, 4, start=start, attention_scaling=scaling)

    assert_derivatives(function, inv_freq_on(device))


ANGLES = {  # shape and dtype of position_ids, axes, attention_scaling
    "tokens": ((4,), torch.int64, None, 1.25),
    "batch": ((2, 3), torch.int32, None, 1.0),
    "three dimensions": ((3, 2, 2), torch.int64, None, 1.25),
    "axes": ((2, 5), torch.int32, [1, 0, 1], 1.0),
    "fractions": ((2, 2), F64, None, 1.25),
    "one fraction": ((), F64, None, 1.0),
    "axes of fractions": ((2, 2, 2), F64, [1, 0, 1], 1.25),
    "axes of one fraction": ((2,), F64, [0, 1, 1], 1.25),
}


@pytest.mark.parametrize("angles", ANGLES)
def test_gradcheck_of_cos_sin_by_frequencies_and_positions(angles, device):
    shape, dtype, axes, scaling = ANGLES[angles]
    axes = None if axes is None else torch.tensor(axes, device=device)
    inputs = [inv_freq_on(device)]
    if dtype == F64:
        inputs.append(random(*shape, dtype=dtype, device=device).requires_grad_())
    else:
        ids = random_positions(*shape, rows=9, dtype=dtype, device=device)

    def function(inv_freq, position_ids=None):
        position_ids = ids if position_ids is None else position_ids
        return rope.cos_sin(inv_freq, position_ids, axes, attention_scaling=scaling)

    assert_derivatives(function, tuple(inputs))


def inv_freq_on(device):
    return torch.tensor([1.0, 0.3, 0.01], dtype=F64, device=device).requires_grad_()


def test_gradcheck_from_inv_freq_to_the_rotated_tensor(device):
    q = random(B, S, H, D, dtype=F64, device=device).requires_grad_()
    k = random(B, S, K, D, dtype=F64, device=device, seed=1).requires_grad_()
    ids = torch.tensor([[0, 5, 5], [9, 1, 0]], device=device)

    def with_rows(inv_freq, q, k):
        return rope_ext.apply_rotary_qk(q, k, *rope_ext.cos_sin(inv_freq, ids))

    def with_a_table(inv_freq, q, k):
        return rope_ext.apply_rotary_qk(q, k, *rope_ext.cos_sin_cache(inv_freq, 10), ids)

    for function in (with_rows, with_a_table):
        assert_derivatives(function, (inv_freq_on(device), q, k))


# ---- in the dtypes of models

# of x and of the table
DTYPES_OF_MODELS = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F32, BF16)]


def gradients_of(case, device, dtype, table_dtype):
    """The inputs, the incoming gradients, and the gradients to q, k, cos and sin."""
    *leaves, ids, options = inputs_of(case, device, dtype, table_dtype, heads=5, k_heads=2)
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = rope.apply_rotary_qk(*leaves, ids, **options)
    seeds = [random(*x.shape, dtype=dtype, device=device, seed=9) for x in leaves[:2]]
    return leaves, ids, options, seeds, torch.autograd.grad(outputs, leaves, seeds)


@cases
def test_gradient_to_x_is_the_rotation_back(case, device):
    for dtype in DTYPES:
        (_, _, cos, sin), ids, options, seeds, grads = gradients_of(case, device, dtype, F32)
        for grad, seed in zip(grads[:2], seeds, strict=True):
            with naming(dtype):
                assert_same_bits(grad, rounded_once(seed, cos, sin, ids, **inverse_of(options)))


def exact_table_grads(xs, seeds, cos, sin, ids, options):
    """Gradients to cos and sin in float64, and the sums of the absolute values of their terms."""

    def grads(xs, seeds):
        tables = [t.clone().requires_grad_() for t in (cos, sin)]
        outputs = [reference.apply_rotary(x, *tables, ids, **options) for x in xs]
        return torch.autograd.grad(outputs, tables, seeds)

    # With x, cos has the terms g1 x1 and g2 x2. With its channels swapped, g1 x2 and g2 x1: the
    # terms of sin or, for the transpose at full width, of the other half of sin.
    sizes = [x.abs() for x in xs], [g.abs() for g in seeds]
    cos_size = grads(*sizes)[0]
    dim, first = options.get("rotary_dim") or 2 * cos.shape[-1], options.get("rotary_offset", 0)
    swap = swapped(torch.arange(dim), options.get("interleaved", False))
    swapped_xs = [x.clone() for x in sizes[0]]
    for x, of in zip(swapped_xs, sizes[0], strict=True):
        x[..., first : first + dim] = of[..., first + swap]
    sin_size = grads(swapped_xs, sizes[1])[0]
    if options.get("inverse") and cos.shape[-1] == dim:
        sin_size = sin_size[..., swap]
    return grads(xs, seeds), (cos_size, sin_size)


def swapped(channels, interleaved):
    if interleaved:
        return channels.view(-1, 2).flip(-1).flatten()
    return channels.view(2, -1).flip(0).flatten()


@cases
def test_gradient_to_the_table_is_a_float32_sum_rounded_once(case, device):
    """|got - exact| <= 0.5 ulp(exact) + n 2^-24 sum |g x|: n terms, each product rounded once and
    at most n - 1 sums, in any order.
    """
    for dtype, table_dtype in DTYPES_OF_MODELS:
        inputs, ids, options, seeds, grads = gradients_of(case, device, dtype, table_dtype)
        q, k, cos, sin, ids, *seeds = on_cpu([*inputs, ids, *seeds], F64)
        exact, sizes = exact_table_grads([q, k], seeds, cos, sin, ids, options)
        terms = 2 * B * S * (5 + 2)  # at most: both channels of every token and head
        for name, a, b, size in zip(("cos", "sin"), grads[2:], exact, sizes, strict=True):
            assert a.dtype == table_dtype
            allowed = 0.5 * ulp(b, a.dtype) + terms * 2.0**-24 * size
            excess = ((a.cpu().double() - b).abs() - allowed).max()
            assert excess <= 0, f"{name}, x {dtype}, table {table_dtype}: {excess} too far"


@pytest.mark.parametrize("with_axes", [False, True], ids=["one position", "axes"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=name_of)
def test_gradient_to_inv_freq_at_long_context(dtype, with_axes, device):
    """Sums of p (cos g_s - sin g_c) over several chunks of tokens, in float64, rounded once."""
    inv_freq = rope_ext.frequencies.default(64)[0].to(dtype).to(device).requires_grad_()
    ids = random_positions(3, 2, 100, rows=100_000, device=device)
    axes = torch.arange(32, device=device) % 3 if with_axes else None
    cos, sin = rope_ext.cos_sin(inv_freq, ids if with_axes else ids[0], axes=axes)
    seeds = [random(*cos.shape, dtype=cos.dtype, device=device, seed=s) for s in (1, 2)]
    (got,) = torch.autograd.grad((cos, sin), inv_freq, seeds)
    assert got.dtype == dtype
    inv_freq, ids, axes, *seeds = on_cpu([inv_freq, ids, axes, *seeds], F64)
    cos, sin = reference.cos_sin(inv_freq, ids if with_axes else ids[0], axes=axes)
    positions = ids.double()[axes].movedim(0, -1) if with_axes else ids[0].double().unsqueeze(-1)
    terms = positions * torch.stack((cos * seeds[1], -sin * seeds[0]))
    exact, size = terms.sum((0, 1, 2)), terms.abs().sum((0, 1, 2))
    allowed = 0.5 * ulp(exact, dtype) + 2.0**-40 * size
    assert ((got.cpu().double() - exact).abs() <= allowed).all()


# ---- incoming gradients


STRIDES = {  # of a gradient, of ones
    "expanded, as from sum()": lambda *shape: torch.ones(()).expand(shape),
    "channels first": lambda B, S, H, D: torch.ones(D, B, S, H).permute(1, 2, 3, 0),
    "heads first": lambda B, S, H, D: torch.ones(H, B, S, D).permute(1, 2, 0, 3),
    "with gaps": lambda B, S, H, D: torch.ones(B, S, H, 2 * D)[..., ::2],
}


@pytest.mark.parametrize("strides", STRIDES)
def test_gradients_of_any_strides_are_accepted_once_and_twice(strides, device):
    *leaves, ids, _ = inputs_of(CASES[1], device)
    inputs = [t.requires_grad_() for t in leaves]

    def grads(ones):
        outputs = rope.apply_rotary_qk(*leaves, ids)
        seeds = [ones(*y.shape).to(y).requires_grad_() for y in outputs]
        once = torch.autograd.grad(outputs, leaves, seeds, create_graph=True)
        dense = [torch.ones_like(g) for g in once[2:]]
        twice = torch.autograd.grad(once, [*inputs, *seeds], [*seeds, *dense])
        return *once, *twice

    for a, b in zip(grads(STRIDES[strides]), grads(torch.ones), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("used", [0, 1], ids=["q", "k"])
def test_gradient_of_one_of_two_results(used, device):
    """The other one's gradient is zeros."""
    *leaves, ids, _ = inputs_of(CASES[1], device)
    for leaf in leaves:
        leaf.requires_grad_()
    y = rope.apply_rotary_qk(*leaves, ids)[used]
    seed = random(*y.shape, dtype=F64, device=device)
    got = torch.autograd.grad(y, leaves, seed, allow_unused=True)
    alone = leaves[used], *leaves[2:]
    expected = torch.autograd.grad(rope.apply_rotary(*alone, ids), alone, seed)
    assert_same_bits(got[used], expected[0])
    assert got[1 - used] is None or not got[1 - used].cpu().any()
    for a, b in zip(got[2:], expected[1:], strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_backward_refuses_a_table_that_was_written_since(inplace, device):
    x = random(B, S, H, D, device=device).requires_grad_()
    cos, sin = random_table(S, 3, device=device)
    y = rope_ext.apply_rotary(x * 1, cos, sin, inplace=inplace)
    cos.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.ones_like(y))


# ---- only if required


@pytest.mark.parametrize("which", ["x", "cos", "sin", "none"])
def test_only_inputs_that_require_grad_get_one(which, device):
    q, _, cos, sin, _, _ = inputs_of(CASES[0], device)
    tensors = {"x": q, "cos": cos, "sin": sin}
    if which != "none":
        tensors[which].requires_grad_()
    y = rope.apply_rotary(**tensors)
    assert y.requires_grad == (which != "none")
    if which != "none":
        y.sum().backward()
    for name, t in tensors.items():
        assert (t.grad is not None) == (name == which)


# ---- the same bits in every run


def many_tokens_grads(device):
    """Gradients to inv_freq, and to rows of cos and sin that many tokens share."""
    q = random(2, 300, 6, 32, device=device)
    k = random(2, 300, 2, 32, device=device)
    inv_freq = rope_ext.frequencies.default(32, device=device)[0].requires_grad_()
    cos, sin = rope_ext.cos_sin_cache(inv_freq, 40)
    ids = random_positions(2, 300, rows=40, device=device)
    outputs = rope_ext.apply_rotary_qk(q, k, cos, sin, ids)
    seeds = [random(*x.shape, device=device, seed=5) for x in (q, k)]
    with_ids = torch.autograd.grad(outputs, (cos, sin, inv_freq), seeds, retain_graph=True)
    cos, sin = rope_ext.cos_sin_cache(inv_freq, 300)
    outputs = rope_ext.apply_rotary_qk(q, k, cos, sin)
    return *with_ids, *torch.autograd.grad(outputs, (cos, sin, inv_freq), seeds)


def test_gradients_to_shared_rows_have_the_same_bits_in_every_run(device):
    for a, b in zip(many_tokens_grads(device), many_tokens_grads(device), strict=True):
        assert_same_bits(a, b)


def test_number_of_threads_does_not_change_a_bit_of_a_gradient(threads):
    threads(1)
    one = many_tokens_grads("cpu")
    for count in (2, 3):
        threads(count)
        for a, b in zip(one, many_tokens_grads("cpu"), strict=True):
            assert_same_bits(a, b)


def test_vectors_have_the_bits_of_the_portable_code(vector_code):
    def gradients():
        yield "many tokens", many_tokens_grads("cpu")
        for case, dtypes in product(CASES, DTYPES_OF_MODELS):
            yield f"{case.name}, {dtypes}", gradients_of(case, "cpu", *dtypes)[-1]

    fast = list(gradients())
    rope_ext._C.set_cpu_capability("portable")
    for (name, expected), (_, got) in zip(fast, gradients(), strict=True):
        for a, b in zip(got, expected, strict=True):
            with naming(name):
                assert_same_bits(a, b)
