"""rms_norm_rotary_qk: differentiated, compiled, batched, on several ranks, and its errors."""

import re
from functools import partial

import pytest
import torch
from normed_inputs import B, Case, L, S, inputs_of
from ranks import on_every_rank, place
from support import DTYPES, assert_derivatives, assert_same_bits, random, random_table
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import Replicate, Shard
from torch.utils.flop_counter import FlopCounterMode

import rope_ext

rope = torch.ops.rope

F64, F32, F16, BF16 = DTYPES

# ---- differentiation


DERIVED = [  # what test_every_operator.py does not have
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


def test_only_inputs_that_require_grad_get_one():
    for which in range(6):
        tensors = inputs_of(Case("", ""), "cpu")
        tensors[which].requires_grad_()
        out_q, out_k = rope.rms_norm_rotary_qk(*tensors)
        assert out_q.requires_grad
        (out_q.sum() + out_k.sum()).backward()
        got = [i for i, t in enumerate(tensors) if t is not None and t.grad is not None]
        assert got == [which]


def test_gradient_of_one_result_leaves_the_other_tensor_alone(device):
    for i in (0, 1):
        tensors = inputs_of(Case("", ""), device)
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


def test_one_graph_for_all_lengths():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    function = rope_ext.rms_norm_rotary_qk
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    weights = [random(16, seed=s).requires_grad_() for s in (1, 2)]
    graphs = 0
    for batch, seq in ((3, 5), (2, 7)):
        leaves = [random(batch, seq, heads, 16).requires_grad_() for heads in (6, 4)] + weights
        seeds = [random(*x.shape, seed=3) for x in leaves[:2]]
        results = []
        for each in (function, compiled):
            outputs = each(*leaves, *random_table(12, 8))
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, seeds)])
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)
        graphs = graphs or counter.frame_count  # more than one, as PyTorch checks a float again
        assert counter.frame_count == graphs


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


def test_tokens_of_a_norm_over_all_heads_are_sharded_and_heads_are_not():
    """Sums over tokens are split over ranks: 64 n eps of n <= 128 terms of about 1."""
    case = Case("", "", H=4, K=4, all_heads=True, dtype=F64, table_dtype=F64)
    q, k, *others = inputs_of(case, "cpu")
    q, k = q.repeat(2, 1, 1, 1)[:, :4], k.repeat(2, 1, 1, 1)[:, :4]
    seeds = [random(*x.shape, dtype=F64, seed=9) for x in (q, k)]

    def results_and_gradients(leaves, table, seeds):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        results = rope.rms_norm_rotary_qk(*leaves, *table)
        torch.autograd.backward(results, seeds)
        return [*(r.detach() for r in results), *(leaf.grad for leaf in leaves)]

    def on_rank(mesh, placement):
        leaves = [place(x, mesh, placement) for x in (q, k)]
        leaves += [place(w, mesh) for w in others[:2]]
        table = [place(t, mesh) for t in others[2:4]]
        return results_and_gradients(leaves, table, [place(s, mesh, placement) for s in seeds])

    expected = results_and_gradients([q, k, *others[:2]], others[2:4], seeds)
    for placement in (Replicate(), Shard(0), Shard(1)):
        got = on_every_rank(partial(on_rank, placement=placement))
        for part, whole in zip(got, expected, strict=True):
            torch.testing.assert_close(part, whole, rtol=2.0**-40, atol=2.0**-40)
    with pytest.raises(RuntimeError, match="rms_norm_rotary_qk: expected q to be Replicate"):
        on_every_rank(partial(on_rank, placement=Shard(2)))


# ---- refusals

OF_Q = "q_weight to have shape [16] or [4, 16], the heads and head_dim of q, got"
OF_K = "k_weight to have shape [16] or [2, 16], the heads and head_dim of k, got"
REFUSED = [
    # changed argument, its value, the message
    ("k", lambda k: k[..., :8], "k to have q's shape"),
    ("k", lambda k: k.double(), "k of q's dtype float32, got float64"),
    ("q", lambda q: q[0, 0], "q to have shape [B, S, H, D] or [T, H, D], got [4, 16]"),
    ("q", lambda q: q.transpose(-1, -2), "q to have stride 1 in its last dimension"),
    ("q_weight", lambda w: w[:8], f"{OF_Q} [8]"),
    ("q_weight", lambda w: w.expand(2, 16), f"{OF_Q} [2, 16]"),
    ("q_weight", lambda w: w[0], f"{OF_Q} []"),
    ("k_weight", lambda w: w.expand(4, 16), f"{OF_K} [4, 16]"),
    ("k_weight", lambda w: w.expand(2, 16), "k_weight to have 1 dimension, as q_weight has, got"),
    ("q_weight", lambda w: w.expand(4, 16), "k_weight to have 2 dimensions, as q_weight has, got"),
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


def assert_refused(operator, message, *given, **named):
    name = operator.default._schema.name
    with pytest.raises(RuntimeError, match=f"^{name}: expected {re.escape(message)}"):
        operator(*given, **named)


def test_refusals_name_what_is_wrong():
    names = ("q", "k", "q_weight", "k_weight", "cos", "sin", "position_ids")
    for name, change, message in REFUSED:
        given = dict(zip(names, inputs_of(Case("", ""), "cpu"), strict=True))
        given[name] = change(given.get(name))
        assert_refused(rope.rms_norm_rotary_qk, message, **given)
        grads = {"grad_q": torch.zeros(B, S, 4, 16), "grad_k": torch.zeros(B, S, 2, 16)}
        for further in (False, True):  # PyTorch computes a gradient that is differentiated in turn
            grads["grad_q"].requires_grad_(further)
            assert_refused(rope.rms_norm_rotary_qk_backward, message, **grads, **given)
    q, k, w, v, *rows = inputs_of(Case("", "", dtype=BF16), "cpu")
    for weights, message in (
        ((w, v.float()), "k_weight of q_weight's dtype bfloat16, got float32"),
        ((w.half(), v.half()), "q_weight of q's dtype bfloat16 or float32, got float16"),
    ):
        assert_refused(rope.rms_norm_rotary_qk, message, q, k, *weights, *rows)


OF_ONE = ("x", "weight", "cos", "sin")
OF_BOTH = ("q", "k", "q_weight", "k_weight", "cos", "sin")


def call_of(names):
    """The function with tensors of these names, and its arguments."""
    q, k, q_weight, k_weight, cos, sin, _ = inputs_of(Case("", ""), "cpu")
    values = (q, q_weight, cos, sin) if "x" in names else (q, k, q_weight, k_weight, cos, sin)
    function = rope_ext.rms_norm_rotary if "x" in names else rope_ext.rms_norm_rotary_qk
    return function, dict(zip(names, values, strict=True))


@pytest.mark.parametrize("names", [OF_ONE, OF_BOTH], ids=["one", "both"])
def test_in_place_nothing_may_need_a_gradient(names):
    """A norm can't be undone: the gradient takes the tensors as they were before."""
    for name in names:
        function, given = call_of(names)
        given[name] = given[name].requires_grad_() * 1
        kept = {n: x.clone() for n, x in given.items()}
        message = rf"^rope_ext.rms_norm_rotary\w*: expected {name} to need no gradient when inplace"
        with pytest.raises(RuntimeError, match=message):
            function(**given, inplace=True)
        for n, x in given.items():
            assert_same_bits(x.detach(), kept[n].detach())
        with torch.no_grad():
            function(**{**given, names[0]: kept[names[0]]}, inplace=True)


@pytest.mark.parametrize("names", [OF_ONE, OF_BOTH], ids=["one", "both"])
def test_in_place_in_forward_mode_and_in_graphs(names):
    function, given = call_of(names)
    x = given.pop(names[0])
    tangent = random(*x.shape, seed=7)

    def results(x, inplace):
        rest = {n: t.clone() for n, t in given.items()}
        return function(x * 2, **rest, inplace=inplace)

    expected = torch.func.jvp(partial(results, inplace=False), (x,), (tangent,))
    got = torch.func.jvp(partial(results, inplace=True), (x,), (tangent,))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(results, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, True), expected[0], rtol=0, atol=0)
    with pytest.raises(Exception, match="to need no gradient when inplace=True"):
        compiled(x.clone().requires_grad_(), True)


def test_what_is_written_shares_no_memory_with_what_is_read():
    for operator, names in ((rope.rms_norm_rotary, OF_ONE), (rope.rms_norm_rotary_qk, OF_BOTH)):
        _, given = call_of(names)
        first, weight = names[0], names[len(names) // 2 - 1]
        name = operator.default._schema.name
        shared = {**given, weight: given[first].view(-1)[:16]}
        in_place = getattr(rope, f"{name.removeprefix('rope::')}_")
        assert_refused(in_place, f"{weight} to share no memory with {first}, which", **shared)
        outs = ("out",) if "x" in names else ("out_q", "out_k")
        into = {o: torch.zeros_like(given[n]) for o, n in zip(outs, names, strict=False)}
        for change, message in (
            ({outs[0]: given[first]}, f"{first} to share no memory with {outs[0]}, which"),
            ({weight: into[outs[0]].view(-1)[:16]}, f"{weight} to share no memory with {outs[0]}"),
            ({outs[0]: into[outs[0]][:1]}, f"{outs[0]} of {first}'s shape"),
            ({weight: given[weight][:8]}, f"{weight} to have shape [16] or"),
        ):
            with pytest.raises(RuntimeError, match=f"^{name}.out: expected {re.escape(message)}"):
                operator.out(**{**given, **into, **change})
        assert not any(x.any() for x in into.values())


def test_backward_refuses_gradients_that_do_not_fit():
    for change, message in (
        (lambda g: None, "grad_q or grad_k, got neither"),
        (lambda g: g[..., :8], "grad_q of q's shape"),
        (lambda g: g.double(), "grad_q of q's dtype"),
        (lambda g: g.transpose(1, 3).contiguous().transpose(1, 3), "grad_q to have stride 1"),
    ):
        grad = change(torch.zeros(B, S, 4, 16))
        given = inputs_of(Case("", ""), "cpu")
        assert_refused(rope.rms_norm_rotary_qk_backward, message, grad, None, *given)
