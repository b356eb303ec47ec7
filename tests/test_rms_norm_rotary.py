"""RMSNorm of q and k and their rotation in one pass: results, gradients, refusals, transforms."""

import re
from dataclasses import dataclass

import pytest
import torch
from functorch.compile import make_boxed_func
from ranks import on_every_rank, place
from support import (
    DTYPES,
    VIEWS,
    assert_derivatives,
    assert_same_bits,
    in_layout,
    name_of,
    on_cpu,
    random,
    random_positions,
    random_table,
    ulp,
)
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.tensor import Shard
from torch.func import grad as func_grad
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

import rope_ext
from rope_ext import reference

rope = torch.ops.rope

B, S, L = 2, 5, 11
F64, F32, F16, BF16 = DTYPES
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    name: str
    reason: str
    H: int = 4
    K: int = 2
    D: int = 16
    R: int | None = None  # rotary_dim as given
    W: int | None = None  # width of the table; None: half of R or D
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None  # None: dtype
    table_dtype: torch.dtype = F32
    table: str = "table"  # or "one for all" [1, S, W], "per token" [B, S, W]
    ids: str | None = None  # "S", "BS", "T"
    all_heads: bool = False
    unit_offset: bool = False
    eps: float = EPS
    interleaved: bool = False
    interleaved_out: bool | None = None
    inverse: bool = False
    offset: int = 0  # rotary_offset
    packed: bool = False
    batch: int = B

    @property
    def options(self):
        return {
            "eps": self.eps,
            "unit_offset": self.unit_offset,
            "rotary_dim": self.R,
            "rotary_offset": self.offset,
            "interleaved": self.interleaved,
            "interleaved_out": self.interleaved_out,
            "inverse": self.inverse,
        }


CASES = [
    # models
    Case("qwen 3", "a weight [D] of the model's dtype", D=128, dtype=BF16),
    Case("qwen 3, float32 weights", "norms kept in float32", D=128, dtype=BF16, weight_dtype=F32),
    Case("gemma 3", "1 + weight, 256 channels", K=1, D=256, dtype=BF16, unit_offset=True),
    Case("olmo 2", "a row of all heads", K=4, D=128, dtype=BF16, all_heads=True),
    Case("olmo 2, grouped heads", "rows of q and k of two lengths", H=6, K=2, D=64, all_heads=True),
    Case("olmo 2 13B", "a row longer than a block of threads holds", H=40, K=40, D=128,
         dtype=F16, all_heads=True, batch=1),
    Case("float64", "arithmetic in float64", dtype=F64, table_dtype=F64, D=72),
    Case("float64, float32 weights", "widened", dtype=F64, weight_dtype=F32, unit_offset=True),
    Case("float16, float32 weights", "1 + weight", dtype=F16, weight_dtype=F32, unit_offset=True),
    # sizes
    Case("one head", "nothing else to normalise with", H=1, K=1, D=64),
    Case("one head of all", "a row is the head", H=1, K=1, D=64, all_heads=True),
    Case("20 channels", "no whole vectors of 8", D=20, dtype=BF16),
    Case("6 channels", "less than a vector", D=6, dtype=F16),
    Case("29 channels, 18 rotate", "parts of vectors before, in and after the pairs", D=29, R=18,
         offset=3, dtype=BF16, all_heads=True),
    Case("512 channels", "a head of two warps or one", D=512, K=1, dtype=F32),
    Case("2100 channels", "several pieces of a head, and of the table", H=2, K=1, D=2100, batch=1),
    Case("2100 channels, 1100 stay", "several pieces that stay", H=2, K=1, D=2100, R=1000,
         offset=1050, batch=1, interleaved=True),
    # rotations
    Case("partial", "a quarter rotates, all is normalised", D=64, R=16, dtype=BF16),
    Case("last channels", "none after them", D=48, R=16, offset=32),
    Case("interleaved", "neighbours", D=64, interleaved=True, dtype=BF16),
    Case("interleaved, some stay", "neighbours between others", D=40, R=20, offset=7,
         interleaved=True, all_heads=True),
    Case("neighbours to halves", "another order in the result", D=64, R=32, offset=16,
         interleaved=True, interleaved_out=False, dtype=BF16),
    Case("halves to neighbours", "the other way", D=64, interleaved_out=True, dtype=F16,
         all_heads=True),
    Case("halves to neighbours, ragged", "in parts of vectors", D=22, interleaved_out=True),
    Case("inverse", "the way back of a rotation", D=32, inverse=True),
    Case("full width", "one angle a channel", D=32, R=32, W=32),
    Case("full width, inverse, neighbours to halves", "the transpose", D=24, R=20, W=20,
         inverse=True, interleaved=True, interleaved_out=False, dtype=BF16),
    # positions
    Case("ids S", "one row of positions for all", ids="S"),
    Case("ids BS", "positions of each sequence", ids="BS", dtype=BF16, D=64),
    Case("packed, ids", "no batch", ids="T", packed=True, D=64),
    Case("packed, all heads", "no batch", packed=True, all_heads=True),
    Case("rows for all", "rows of the step", table="one for all", D=32),
    Case("rows per token", "of bfloat16", table="per token", table_dtype=BF16, D=32),
    Case("eps", "a large one", eps=0.5),
]  # fmt: skip
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def inputs_of(case, device):
    """q, k, q_weight, k_weight, cos, sin, position_ids."""
    tokens = (S,) if case.packed else (case.batch, S)
    q = 2 * random(*tokens, case.H, case.D, dtype=F64, seed=1)
    k = 0.3 * random(*tokens, case.K, case.D, dtype=F64, seed=2)
    weights = [
        random(*((heads,) if case.all_heads else ()), case.D, dtype=F64, seed=seed)
        for heads, seed in ((case.H, 3), (case.K, 4))
    ]
    width = case.W or (case.R or case.D) // 2
    rows = {"table": (L,), "one for all": (1, S), "per token": (case.batch, S)}[case.table]
    cos, sin = (random(*rows, width, dtype=case.table_dtype, seed=s) for s in (5, 6))
    shape = {None: None, "S": (S,), "BS": (case.batch, S), "T": (S,)}[case.ids]
    ids = None if shape is None else random_positions(*shape, rows=L)
    weight_dtype = case.weight_dtype or case.dtype
    tensors = [q.to(case.dtype), k.to(case.dtype), *(w.to(weight_dtype) for w in weights), cos, sin]
    return [t if t is None else t.to(device) for t in (*tensors, ids)]


def in_float64(tensors, dtype):
    """As the arithmetic sees them: a float64 table counts as rounded to float32 below float64."""
    cos, sin = (t if dtype == F64 else t.float() for t in tensors[4:6])
    return on_cpu([*tensors[:4], cos, sin, tensors[6]], F64)


def sizes_of(x, weight, rows, case):
    """|x1 c| + |x2 s| of a rotation of |x|: bounds on the terms of each channel."""
    cos, sin, ids = rows
    options = {k: v for k, v in case.options.items() if k not in ("eps", "unit_offset")}
    both = [
        reference.apply_rotary(x.abs(), cos.abs(), sign * sin.abs(), ids, **options)
        for sign in (1, -1)
    ]
    return torch.maximum(*(t.abs() for t in both))


def normalised(x, weight, case):
    """n = x / rms(x), 1 / rms(x), and the factor on n."""
    row = (-1,) if weight.dim() == 1 else (-2, -1)
    rms = (x.square().mean(row, keepdim=True) + case.eps).sqrt()
    return x / rms, 1 / rms, 1 + weight if case.unit_offset else weight


def roundings(case, x):
    """A sum of N squares in any order is off by at most N units (2^-24, or 2^-53) of itself, its
    root by half of that; mean, eps, root, reciprocal, two products, 1 + weight and the rotation
    round at most 8 times more. In float64 the reference does too.
    """
    row = x.shape[-1] * (x.shape[-2] if case.all_heads else 1)
    return (row / 2 + 8) * (2.0**-24 if case.dtype != F64 else 2 * 2.0**-53)


def assert_close(got, exact, size, allowed, what):
    error = (got.detach().cpu().double() - exact).abs()
    half_ulp = 0.5 * ulp(exact, got.dtype)
    excess = error - (half_ulp + allowed * size)
    assert (excess <= 0).all(), f"{what}: {excess.max()} too far, error {error.max()}"


@cases
def test_one_rounding_from_the_exact_result(case, backend):
    tensors = inputs_of(case, backend)
    got = rope.rms_norm_rotary_qk(*tensors, **case.options)
    q, k, q_weight, k_weight, *rows = in_float64(tensors, case.dtype)
    exact = reference.rms_norm_rotary_qk(q, k, q_weight, k_weight, *rows, **case.options)
    for name, y, z, x, weight in zip("qk", got, exact, (q, k), (q_weight, k_weight), strict=True):
        assert y.shape == x.shape
        assert y.dtype == case.dtype
        n, _, factor = normalised(x, weight, case)
        size = sizes_of(n * factor, weight, rows, case)
        assert_close(y, z, size, roundings(case, x), name)


def gradients(case, tensors, seeds):
    leaves = [t.detach().requires_grad_() for t in tensors[:4]]
    outputs = rope.rms_norm_rotary_qk(*leaves, *tensors[4:], **case.options)
    return torch.autograd.grad(outputs, leaves, seeds)


@cases
def test_gradients_are_near_the_exact_ones(case, backend):
    """To x: g w / rms and n mean(n g w) / rms, each term within the roundings of its factors, of
    the sum over the row (N) and of 8 more. To the weights: a sum of n g of as many terms as there
    are tokens, and heads where these share the weight.
    """
    tensors = inputs_of(case, backend)
    seeds = [random(*x.shape, dtype=case.dtype, device=backend, seed=9) for x in tensors[:2]]
    got = gradients(case, tensors, seeds)
    *leaves, cos, sin, ids = in_float64(tensors, case.dtype)
    leaves = [t.requires_grad_() for t in leaves]
    outputs = reference.rms_norm_rotary_qk(*leaves, cos, sin, ids, **case.options)
    seeds = on_cpu(seeds, F64)
    exact = torch.autograd.grad(outputs, leaves, seeds)
    leaves = [t.detach() for t in leaves]
    options = {"rotary_dim": case.R, "rotary_offset": case.offset, "inverse": not case.inverse}
    order = case.interleaved if case.interleaved_out is None else case.interleaved_out
    options.update(interleaved=order, interleaved_out=case.interleaved)
    for i, name in enumerate("qk"):
        x, weight, seed = leaves[i], leaves[2 + i], seeds[i].abs()
        n, inverse_rms, factor = (t.abs() for t in normalised(x, weight, case))
        g = torch.maximum(*(
            reference.apply_rotary(seed, cos.abs(), sign * sin.abs(), ids, **options).abs()
            for sign in (1, -1)
        ))  # fmt: skip
        row = (-1,) if weight.dim() == 1 else (-2, -1)
        size = inverse_rms * (g * factor + n * (n * g * factor).mean(row, keepdim=True))
        rounding = 2 * roundings(case, x) + 8 * 2.0**-24 * (case.dtype != F64)
        assert got[i].shape == x.shape
        assert_close(got[i], exact[i], size, 2 * rounding, name)
        summed = tuple(range(x.dim() - weight.dim()))
        terms = x.numel() // weight.numel()
        unit = 2.0**-24 if case.dtype != F64 else 2.0**-52
        allowed = rounding + terms * unit
        assert got[2 + i].dtype == tensors[2 + i].dtype
        assert_close(got[2 + i], exact[2 + i], (n * g).sum(summed), allowed, f"{name}_weight")


# ---- memory


@pytest.mark.parametrize("all_heads", [False, True], ids=["[D]", "[H, D]"])
@pytest.mark.parametrize("view", VIEWS, ids=VIEWS)
def test_strides_change_no_bit(view, all_heads, backend):
    """Of q, k, the gradients that come in, and the weights; k has a layout of its own. On CUDA
    addresses that are not aligned are added up in another order of lanes: there, nearly none.
    """
    case = Case("", "", D=32, dtype=BF16, all_heads=all_heads)
    tensors = inputs_of(case, backend)
    seeds = [random(*x.shape, dtype=BF16, device=backend, seed=9) for x in tensors[:2]]
    expected = rope.rms_norm_rotary_qk(*tensors), gradients(case, tensors, seeds)

    def strided(x):
        def base(*shape):
            return torch.full(shape, torch.nan, dtype=x.dtype).to(backend)

        out = VIEWS[view](base, *x.shape)
        out.copy_(x)
        return out

    def in_columns(weight):
        wide = torch.full((*weight.shape[:-1], 40), torch.nan, dtype=weight.dtype).to(backend)
        wide[..., 3:35].copy_(weight)
        return wide[..., 3:35]

    q, k = (strided(x) for x in tensors[:2])
    moved = [q, k, *(in_columns(w) for w in tensors[2:4]), *tensors[4:]]
    got = rope.rms_norm_rotary_qk(*moved), gradients(case, moved, [strided(s) for s in seeds])
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        if backend.type == "cpu":
            assert_same_bits(a, b)
        else:
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
def test_function_takes_every_layout(layout, device):
    q, k, *others = inputs_of(Case("", "", packed=layout == "thd"), device)
    expected = rope.rms_norm_rotary_qk(q, k, *others, unit_offset=True, eps=0.1)
    if layout != "thd":
        q, k = in_layout(q, layout), in_layout(k, layout)
    got = rope_ext.rms_norm_rotary_qk(q, k, *others, unit_offset=True, eps=0.1, layout=layout)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b if layout == "thd" else in_layout(b, layout))


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)], ids=["B", "S", "H"])
@pytest.mark.parametrize("all_heads", [False, True], ids=["[D]", "[H, D]"])
def test_sizes_of_zero(shape, all_heads, device):
    """Weights that nothing used have a gradient of zero."""
    q = random(*shape, 16, device=device)
    k = random(*shape[:2], 2, 16, device=device)
    q_weight, k_weight = (
        random(*((x.shape[2],) if all_heads else ()), 16, device=device) for x in (q, k)
    )
    tensors = [q, k, q_weight, k_weight, *random_table(L, 8, device=device), None]
    for x, y in zip((q, k), rope.rms_norm_rotary_qk(*tensors), strict=True):
        assert y.shape == x.shape
    got = gradients(Case("", ""), tensors, [random(*x.shape, device=device) for x in (q, k)])
    for grad, of in zip(got, tensors, strict=False):
        assert grad.shape == of.shape
    assert not got[2].cpu().any()
    assert bool(got[3].cpu().any()) == (shape[2] == 0)


# ---- special values


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_row_of_zeros(dtype, backend):
    q, k, *others = inputs_of(Case("", "", dtype=dtype), backend)
    q[0, 1, 2] = 0
    out, _ = rope.rms_norm_rotary_qk(q, k, *others)
    assert not out[0, 1, 2].cpu().any()
    out, _ = rope.rms_norm_rotary_qk(q, k, *others, eps=0.0)  # 0 / 0, as in PyTorch
    nan = out.cpu().isnan()
    assert nan[0, 1, 2].all()
    assert nan.sum() == q.shape[-1]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("all_heads", [False, True], ids=["[D]", "[H, D]"])
def test_infinity_and_nan_stay_in_their_row(value, all_heads, backend):
    q, k, *others = inputs_of(Case("", "", all_heads=all_heads), backend)
    expected = rope.rms_norm_rotary_qk(q, k, *others)[0].cpu()
    q[1, 2, 3, 4] = value
    got = rope.rms_norm_rotary_qk(q, k, *others)[0].cpu()
    row = (1, 2) if all_heads else (1, 2, 3)
    assert got[row].isnan().any()
    got[row] = expected[row] = 0
    assert_same_bits(got, expected)


def test_position_outside_of_the_table(device):
    q, k, *others = inputs_of(Case("", ""), device)
    others[-1] = torch.tensor([0, 1, L, 3, 4]).to(device)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="rms_norm_rotary_qk: expected position_ids in"):
            rope.rms_norm_rotary_qk(q, k, *others)
        return
    for out in rope.rms_norm_rotary_qk(q, k, *others):
        nan = out.cpu().isnan()
        assert nan[:, 2].all()
        assert nan.sum() == nan[:, 2].numel()


# ---- the same bits every time


def many_tokens(device, all_heads):
    case = Case("", "", H=6, D=64, all_heads=all_heads)
    q, k = (random(2, 300, heads, 64, device=device) for heads in (6, 2))
    weights = inputs_of(case, device)[2:4]
    tensors = [q, k, *weights, *random_table(300, 32, device=device), None]
    seeds = [random(*x.shape, device=device, seed=5) for x in (q, k)]
    return *rope.rms_norm_rotary_qk(*tensors), *gradients(case, tensors, seeds)


@pytest.mark.parametrize("all_heads", [False, True], ids=["[D]", "[H, D]"])
def test_number_of_threads_and_instruction_set_change_no_bit(all_heads, threads, avx2):
    threads(1)
    expected = many_tokens("cpu", all_heads)
    for count, kernels in ((2, "avx2"), (3, "avx2"), (2, "portable")):
        threads(count)
        rope_ext._C.set_cpu_capability(kernels)
        for a, b in zip(expected, many_tokens("cpu", all_heads), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("all_heads", [False, True], ids=["[D]", "[H, D]"])
def test_gradients_have_the_same_bits_in_every_run(all_heads, device):
    first, second = many_tokens(device, all_heads), many_tokens(device, all_heads)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


# ---- differentiation


DERIVED = [
    Case("a weight for all heads", "sums over heads", H=2, K=1, D=6, dtype=F64, table_dtype=F64),
    Case("all heads, ids, another order, some stay", "all at once", H=2, K=1, D=6, R=4, offset=1,
         ids="BS", all_heads=True, unit_offset=True, interleaved=True, interleaved_out=False,
         dtype=F64, table_dtype=F64),
    Case("packed, full width, inverse", "the transpose", H=1, K=2, D=4, R=4, W=4, inverse=True,
         packed=True, dtype=F64, table_dtype=F64),
]  # fmt: skip


@pytest.mark.parametrize("case", DERIVED, ids=lambda case: case.name)
def test_gradcheck_and_gradgradcheck(case):
    """To q, k, the weights, cos and sin."""
    *tensors, ids = (t if t is None else t[:3] if t.dim() == 1 and not t.is_floating_point() else t
                     for t in inputs_of(case, "cpu"))  # fmt: skip
    if not case.packed:
        tensors[:2] = (t[:, :2] for t in tensors[:2])
        ids = None if ids is None else ids[:, :2]
    leaves = [t.contiguous().requires_grad_() for t in tensors]
    assert_derivatives(lambda *args: rope.rms_norm_rotary_qk(*args, ids, **case.options), leaves)


@pytest.mark.parametrize("which", range(6))
def test_only_inputs_that_require_grad_get_one(which):
    tensors = inputs_of(Case("", ""), "cpu")
    tensors[which].requires_grad_()
    out_q, out_k = rope.rms_norm_rotary_qk(*tensors)
    assert out_q.requires_grad
    (out_q.sum() + out_k.sum()).backward()
    assert [t is not None and t.grad is not None for t in tensors] == [i == which for i in range(7)]


@pytest.mark.parametrize("given", ["q", "k"])
def test_gradient_of_one_result_leaves_the_other_tensor_alone(given, device):
    tensors = inputs_of(Case("", ""), device)
    i = "qk".index(given)
    seeds = [random(*x.shape, device=device, seed=9) for x in tensors[:2]]
    both = rope.rms_norm_rotary_qk_backward(*seeds, *tensors)
    seeds[1 - i] = None
    one = rope.rms_norm_rotary_qk_backward(*seeds, *tensors)
    for index in (i, 2 + i):
        assert_same_bits(one[index], both[index])
    for index in (1 - i, 3 - i):
        assert one[index].shape == both[index].shape
        assert not one[index].cpu().any()


def test_gradients_to_the_table_are_not_rounded_on_the_way():
    """Of bfloat16 q and k to a float32 table: as of the same numbers in float32."""
    tensors = inputs_of(Case("", "", dtype=BF16, weight_dtype=F32), "cpu")
    wide = [t if t is None else t.float() for t in tensors]
    seeds = [random(*x.shape, dtype=BF16, seed=9) for x in tensors[:2]]

    def grads(tensors, seeds):
        table = [t.detach().requires_grad_() for t in tensors[4:6]]
        outputs = rope.rms_norm_rotary_qk(*tensors[:4], *table)
        return torch.autograd.grad(outputs, table, seeds)

    for a, b in zip(grads(tensors, seeds), grads(wide, [s.float() for s in seeds]), strict=True):
        assert_same_bits(a, b)


# ---- compilers and transforms


@pytest.mark.parametrize("case", [DERIVED[0], DERIVED[1]], ids=lambda case: case.name)
def test_opcheck(case):
    tensors = inputs_of(case, "cpu")
    seeds = [random(*x.shape, dtype=F64, seed=9) for x in tensors[:2]]
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    torch.library.opcheck(rope.rms_norm_rotary_qk.default, leaves, case.options)
    backward = rope.rms_norm_rotary_qk_backward.default
    torch.library.opcheck(backward, (*seeds, *leaves), case.options)
    detached = [t if t is None else t.detach() for t in tensors]
    torch.library.opcheck(backward, (None, seeds[1], *detached), case.options)


def test_one_graph_for_all_lengths_with_the_operators_in_it():
    """Forward and backward each are one call of an operator."""
    calls = {"forward": [], "backward": []}

    def compiler(direction):
        def compile_graph(graph, inputs):
            nodes = (node.target for node in graph.graph.nodes if node.op == "call_function")
            calls[direction].append([str(t) for t in nodes if "getitem" not in str(t)])
            return make_boxed_func(graph.forward)

        return compile_graph

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    torch._dynamo.reset()
    function = rope_ext.rms_norm_rotary_qk
    run = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    weights = [random(16, seed=s).requires_grad_() for s in (1, 2)]
    table = random_table(12, 8)
    for batch, seq in ((3, 5), (2, 7), (4, 9)):
        leaves = [random(batch, seq, heads, 16).requires_grad_() for heads in (6, 4)] + weights
        seeds = [random(*x.shape, seed=3) for x in leaves[:2]]
        results = []
        for each in (function, run):
            outputs = each(*leaves, *table)
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, seeds)])
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)
    assert calls == {
        "forward": [["rope.rms_norm_rotary_qk.default"]],
        "backward": [["rope.rms_norm_rotary_qk_backward.default"]],
    }


@pytest.mark.parametrize("batched", ["q", "weights", "positions", "all"])
def test_vmap_is_a_loop(batched):
    case = Case("", "", ids="S")
    samples = [inputs_of(case, "cpu") for _ in range(3)]
    for i, tensors in enumerate(samples):
        of = {"q": (0, 1), "weights": (2, 3), "positions": (6,), "all": range(7)}[batched]
        for index in of:
            x = tensors[index]
            tensors[index] = x.roll(i, -1) if x.is_floating_point() else (x + i) % L
    dims = [0 if any(not torch.equal(s[i], samples[0][i]) for s in samples[1:]) else None
            for i in range(7)]  # fmt: skip
    stacked = [torch.stack([s[i] for s in samples]) if dim == 0 else samples[0][i]
               for i, dim in enumerate(dims)]  # fmt: skip

    def loss(*tensors):
        return sum(y.sin().sum() for y in rope.rms_norm_rotary_qk(*tensors))

    for function in (rope.rms_norm_rotary_qk, func_grad(loss, argnums=(0, 2))):
        got = vmap(function, in_dims=tuple(dims))(*stacked)
        expected = zip(*(function(*s) for s in samples), strict=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, torch.stack(b))


def test_vmap_of_gradients():
    tensors = inputs_of(Case("", ""), "cpu")
    leaves = [t.requires_grad_() for t in tensors[:4]]
    outputs = rope.rms_norm_rotary_qk(*leaves, *tensors[4:])
    seeds = [random(3, *x.shape, seed=9) for x in tensors[:2]]
    got = torch.autograd.grad(outputs, leaves, seeds, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        each = [s[i] for s in seeds]
        expected = torch.autograd.grad(outputs, leaves, each, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a[i], b)


def test_flops_are_counted():
    """4 a channel, and 3 a channel that rotates; 12 and 3 backward."""
    tensors = inputs_of(Case("", "", D=64, R=16), "cpu")
    leaves = [t.requires_grad_() for t in tensors[:4]]
    channels = B * S * (4 + 2) * 64
    with FlopCounterMode(display=False) as counter:
        outputs = rope.rms_norm_rotary_qk(*leaves, *tensors[4:], rotary_dim=16)
    assert counter.get_total_flops() == channels * 4 + channels // 4 * 3
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    assert counter.get_total_flops() == channels * 12 + channels // 4 * 3


# ---- on several ranks


@pytest.mark.parametrize("dim", [None, 0, 1, 2], ids=["replicated", "batch", "sequence", "heads"])
@pytest.mark.parametrize("all_heads", [False, True], ids=["[D]", "[H, D]"])
def test_every_rank_does_its_part_and_weight_gradients_add_up(dim, all_heads):
    """Sums over tokens and heads are split over ranks: 64 n eps of n <= 128 terms of about 1."""
    case = Case("", "", H=4, K=4, all_heads=all_heads, dtype=F64, table_dtype=F64)
    q, k, *others = inputs_of(case, "cpu")
    q, k = q.repeat(2, 1, 1, 1)[:, :4], k.repeat(2, 1, 1, 1)[:, :4]
    seeds = [random(*x.shape, dtype=F64, seed=9) for x in (q, k)]

    def results_and_gradients(leaves, seeds):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        results = rope.rms_norm_rotary_qk(*leaves[:4], *others_of(leaves))
        torch.autograd.backward(results, seeds)
        return [*(r.detach() for r in results), *(leaf.grad for leaf in leaves[:4])]

    def others_of(leaves):
        return [leaf.detach() for leaf in leaves[4:]]

    def on_rank(mesh):
        placements = [] if dim is None else [Shard(dim)]
        leaves = [place(x, mesh, *placements) for x in (q, k)]
        leaves += [place(t, mesh) for t in others[:4]]
        return results_and_gradients(leaves, [place(s, mesh, *placements) for s in seeds])

    if all_heads and dim == 2:
        with pytest.raises(RuntimeError, match="rms_norm_rotary_qk: expected q to be Replicate"):
            on_every_rank(on_rank)
        return
    expected = results_and_gradients([q, k, *others[:4]], seeds)
    for part, whole in zip(on_every_rank(on_rank), expected, strict=True):
        torch.testing.assert_close(part, whole, rtol=2.0**-40, atol=2.0**-40)


# ---- refusals

REFUSED = [
    # what is changed, to what, what the message says
    ("k", lambda k: k[..., :8], "k to have q's shape"),
    ("k", lambda k: k.double(), "k of q's dtype float32, got float64"),
    ("q", lambda q: q[0, 0], "q to have shape [B, S, H, D] or [T, H, D], got [4, 16]"),
    ("q", lambda q: q.transpose(-1, -2), "q to have stride 1 in its last dimension"),
    ("q_weight", lambda w: w[:8], "q_weight to have shape [16] or [4, 16], the heads and head_dim "
     "of q, got [8]"),
    ("q_weight", lambda w: w.expand(2, 16), "q_weight to have shape [16] or [4, 16], the heads "
     "and head_dim of q, got [2, 16]"),
    ("q_weight", lambda w: w[0], "q_weight to have shape [16] or [4, 16], the heads and head_dim "
     "of q, got []"),
    ("k_weight", lambda w: w.expand(4, 16), "k_weight to have shape [16] or [2, 16], the heads "
     "and head_dim of k, got [4, 16]"),
    ("k_weight", lambda w: w.expand(2, 16), "k_weight to have 1 dimension, as q_weight has, got "
     "[2, 16]"),
    ("q_weight", lambda w: w.expand(4, 16), "k_weight to have 2 dimensions, as q_weight has, got "
     "[16]"),
    ("q_weight", lambda w: w.bfloat16(), "q_weight of q's dtype float32, got bfloat16"),
    ("k_weight", lambda w: w.double(), "k_weight of k's dtype float32, got float64"),
    ("q_weight", lambda w: w.repeat_interleave(2)[::2], "q_weight to have stride 1 in its last "
     "dimension, got strides [2]"),
    ("q_weight", lambda w: w.to("meta"), "q_weight on the device of q, cpu, got meta"),
    ("cos", lambda t: t[0], "sin of cos's shape [8], got [11, 8]"),
    ("position_ids", lambda _: torch.tensor([0, 1, 2, 3, L]), "position_ids in [0, 11), the rows "
     "of cos and sin, got 11 at index [4]"),
    ("sin", lambda t: t[:, :4], "sin of cos's shape"),
    ("eps", lambda _: -1e-6, "eps to be at least 0, got -0.000001"),
    ("eps", lambda _: float("nan"), "eps to be at least 0, got nan"),
    ("rotary_offset", lambda _: 2, "rotary_offset to be at least 0 and at most"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[r[2][:50] for r in REFUSED])
def test_refusals_name_what_is_wrong(name, change, message):
    names = ("q", "k", "q_weight", "k_weight", "cos", "sin", "position_ids")
    given = dict(zip(names, inputs_of(Case("", ""), "cpu"), strict=True))
    given[name] = change(given.get(name))
    with pytest.raises(RuntimeError, match=re.escape(message)) as refusal:
        rope.rms_norm_rotary_qk(**given)
    assert str(refusal.value).startswith("rope::rms_norm_rotary_qk: expected ")
    grads = {"grad_q": torch.zeros(B, S, 4, 16), "grad_k": torch.zeros(B, S, 2, 16)}
    if message.startswith("q_weight on"):  # of the fake, which the forward alone has
        return
    with pytest.raises(RuntimeError, match=re.escape(message)):
        rope.rms_norm_rotary_qk_backward(**grads, **given)


def test_weights_of_two_dtypes_are_refused():
    q, k, q_weight, k_weight, *rows = inputs_of(Case("", "", dtype=BF16), "cpu")
    with pytest.raises(RuntimeError, match="k_weight of q_weight's dtype bfloat16, got float32"):
        rope.rms_norm_rotary_qk(q, k, q_weight, k_weight.float(), *rows)
    with pytest.raises(RuntimeError, match="of q's dtype bfloat16 or float32, got float16"):
        rope.rms_norm_rotary_qk(q, k, q_weight.half(), k_weight.half(), *rows)


@pytest.mark.parametrize(("change", "message"), [
    (lambda g: None, "expected grad_q or grad_k, got neither"),
    (lambda g: g[..., :8], "expected grad_q of q's shape"),
    (lambda g: g.double(), "expected grad_q of q's dtype"),
    (lambda g: g.transpose(1, 3).contiguous().transpose(1, 3), "expected grad_q to have stride 1"),
], ids=["neither", "shape", "dtype", "strides"])  # fmt: skip
def test_backward_refuses_gradients_that_do_not_fit(change, message):
    tensors = inputs_of(Case("", ""), "cpu")
    grad = change(torch.zeros(B, S, 4, 16))
    with pytest.raises(RuntimeError, match=re.escape(f"rms_norm_rotary_qk_backward: {message}")):
        rope.rms_norm_rotary_qk_backward(grad, None, *tensors)


# ---- models


def attention_of(family):
    """A layer's q_norm, k_norm, whether a row is all heads, and the rotation of its model."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rms_norm_eps": 1e-5, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "Qwen3":
        from transformers.models.qwen3 import modeling_qwen3 as module

        attention = module.Qwen3Attention(transformers.Qwen3Config(**sizes), 0)
    elif family == "Gemma3":
        from transformers.models.gemma3 import modeling_gemma3 as module

        attention = module.Gemma3Attention(transformers.Gemma3TextConfig(**sizes), 0)
    else:
        from transformers.models.olmo2 import modeling_olmo2 as module

        attention = module.Olmo2Attention(transformers.Olmo2Config(**sizes), 0)
    for norm in (attention.q_norm, attention.k_norm):
        torch.nn.init.normal_(norm.weight)
    return attention, module.apply_rotary_pos_emb


@pytest.mark.parametrize("dtype", [F32, BF16], ids=name_of)
@pytest.mark.parametrize("family", ["Qwen3", "Gemma3", "Olmo2"])
@torch.no_grad()
def test_norms_and_rotation_of_models(family, dtype):
    """In float32 the model's own are as near to the exact numbers as rounding once and these
    roundings allow; in bfloat16 they round more often, and are further away on average.
    """
    attention, apply_rotary_pos_emb = attention_of(family)
    attention = attention.to(dtype)
    all_heads = family == "Olmo2"
    case = Case("", "", all_heads=all_heads, unit_offset=family == "Gemma3", eps=1e-5, dtype=dtype)
    hidden = random(B, S, 64, dtype=dtype)
    cos, sin = random_table(S, 8)
    full = [torch.cat((t, t), -1)[None].to(dtype) for t in (cos, sin)]
    q, k = attention.q_proj(hidden), attention.k_proj(hidden)
    if all_heads:
        own_q, own_k = attention.q_norm(q), attention.k_norm(k)
        own_q, own_k = (t.view(B, S, -1, 16) for t in (own_q, own_k))
    q, k = q.view(B, S, -1, 16), k.view(B, S, -1, 16)
    weights = [norm.weight.detach() for norm in (attention.q_norm, attention.k_norm)]
    if all_heads:
        weights = [w.view(-1, 16) for w in weights]
    else:
        own_q, own_k = attention.q_norm(q), attention.k_norm(k)
    own = apply_rotary_pos_emb(own_q.transpose(1, 2), own_k.transpose(1, 2), *full)
    own = [t.transpose(1, 2) for t in own]

    got = rope_ext.rms_norm_rotary_qk(
        q, k, *weights, *full, eps=case.eps, unit_offset=case.unit_offset, rotary_dim=16
    )
    q, k, *rest = on_cpu([q, k, *weights, *(t[..., :8] for t in full)], F64)
    options = {"eps": case.eps, "unit_offset": case.unit_offset}
    exact = reference.rms_norm_rotary_qk(q, k, *rest, **options)
    for name, x, w, ours, theirs, truth in zip(
        "qk", (q, k), rest[:2], got, own, exact, strict=True
    ):
        n, _, factor = normalised(x, w, case)
        size = sizes_of(n * factor, w, (*rest[2:], None), case)
        assert_close(ours, truth, size, roundings(case, x), name)
        if dtype == F32:
            assert_close(theirs, truth, size, roundings(case, x), f"{name} of {family}")
        else:
            assert (ours - truth).abs().mean() < (theirs - truth).abs().mean()
