"""rms_norm_rotary_qk: differentiated, compiled, batched, on several ranks, and its errors."""

import re

import pytest
import torch
from functorch.compile import make_boxed_func
from normed_inputs import B, Case, L, S, inputs_of
from ranks import on_every_rank, place
from support import DTYPES, assert_derivatives, assert_same_bits, random, random_table
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.tensor import Shard
from torch.func import grad as func_grad
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

import rope_ext

rope = torch.ops.rope

F64, F32, F16, BF16 = DTYPES

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
    """By q, k, the weights, cos and sin."""
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
    """From bfloat16 q and k to a float32 table: as from the same numbers in float32."""
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


def test_opcheck():
    case = DERIVED[1]
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
    # changed argument, its value, the message
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
    for further in (False, True):  # PyTorch computes a gradient that is differentiated in turn
        grads["grad_q"].requires_grad_(further)
        with pytest.raises(RuntimeError, match=re.escape(message)) as refusal:
            rope.rms_norm_rotary_qk_backward(**grads, **given)
        assert str(refusal.value).startswith("rope::rms_norm_rotary_qk_backward: expected ")


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
