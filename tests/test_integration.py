"""With other parts of PyTorch: opcheck, fakes, torch.compile, inference mode."""

import shutil

import pytest
import torch
from support import (
    VIEWS,
    assert_same_bits,
    naming,
    pairwise,
    random,
    random_positions,
    random_table,
    rounded_once,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import rope_ext

pytestmark = pytest.mark.usefixtures("one_thread")
rope = torch.ops.rope

B, S, H, K, D, P, L = 2, 5, 4, 2, 16, 8, 9


def rotary_arguments(device, *, ids, grad, pair):
    xs = [random(B, S, heads, D, device=device) for heads in ((H, K) if pair else (H,))]
    table = random_table(L, P, device=device)
    for t in {"none": (), "x": xs, "all": (*xs, *table)}[grad]:
        t.requires_grad_()
    return *xs, *table, random_positions(B, S, rows=L, device=device) if ids else None


PAIR = {"apply_rotary": False, "apply_rotary_qk": True}
IDS = {"table order": False, "position_ids": True}


@pytest.mark.shows("`torch.library.opcheck`", "apply_rotary", "apply_rotary_qk")
@pytest.mark.parametrize(
    ("pair", "ids", "grad"), pairwise(pair=PAIR, ids=IDS, grad=["none", "x", "all"])
)
def test_opcheck_of_the_rotation(pair, ids, grad, device):
    operator = rope.apply_rotary_qk.default if pair else rope.apply_rotary.default
    arguments = rotary_arguments(device, ids=ids, grad=grad, pair=pair)
    torch.library.opcheck(operator, arguments)
    options = {"interleaved": True, "interleaved_out": False, "inverse": True}
    torch.library.opcheck(operator, arguments, options)


def test_opcheck_of_other_layouts_and_tables(device):
    x = random(B, H, S, D, device=device).transpose(1, 2)
    rows = random_table(B, S, 12, device=device)
    torch.library.opcheck(rope.apply_rotary.default, (x, *rows), {"rotary_dim": 12})
    options = {"rotary_dim": 12, "rotary_offset": 3, "interleaved_out": True}
    torch.library.opcheck(rope.apply_rotary.default, (x.requires_grad_(), *rows), options)
    packed = random(S, H, D, dtype=torch.bfloat16, device=device)
    tables = random_table(L, 4, dtype=torch.bfloat16, device=device)
    torch.library.opcheck(rope.apply_rotary.default, (packed, *tables))


@pytest.mark.shows("`torch.library.opcheck`", "inplace=True")
@pytest.mark.parametrize("pair", [False, True], ids=["apply_rotary_", "apply_rotary_qk_"])
def test_opcheck_of_the_rotation_in_place(pair, device):
    operator = rope.apply_rotary_qk_.default if pair else rope.apply_rotary_.default
    arguments = rotary_arguments(device, ids=not pair, grad="none", pair=pair)
    torch.library.opcheck(operator, arguments)
    *xs, cos, sin, position_ids = arguments
    options = {"rotary_offset": 5, "interleaved": True, "interleaved_out": True}
    torch.library.opcheck(operator, (*xs, cos[:, :4], sin[:, :4], position_ids), options)


@pytest.mark.shows("`torch.library.opcheck`", "cos_sin", "cos_sin_cache")
@pytest.mark.parametrize(
    ("dtype", "grad"),
    [(torch.bfloat16, False), (torch.float64, True)],
    ids=["bfloat16-no grad", "float64-grad"],
)
def test_opcheck_of_the_tables(dtype, grad, device):
    inv_freq = rope_ext.frequencies.default(D, device=device)[0].requires_grad_(grad)
    options = {"attention_scaling": 1.25, "dtype": dtype}
    torch.library.opcheck(rope.cos_sin_cache.default, (inv_freq, 7), {"start": 3, **options})
    ids = random_positions(B, S, rows=100, device=device)
    torch.library.opcheck(rope.cos_sin.default, (inv_freq, ids), options)


# ---- fakes


def test_fake_output_has_the_strides_of_the_real_one():
    xs = {name: view(random, B, S, H, D) for name, view in VIEWS.items()}
    xs["expanded"] = random(1, 1, 1, D).expand(B, S, H, D)
    # one pair, so that the last stride but one is arbitrary
    xs["channels first"] = random(B, 2, S, H).permute(0, 2, 3, 1)[..., :2].contiguous()
    for name, x in xs.items():
        cos, sin = random_table(S, x.shape[-1] // 2)
        real = rope.apply_rotary_qk(x, x, cos, sin)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = rope.apply_rotary_qk(*(mode.from_tensor(t) for t in (x, x, cos, sin)))
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name


def test_meta_tensors_give_meta_tensors():
    x = torch.empty(B, S, H, D, device="meta", dtype=torch.bfloat16)
    inv_freq = torch.empty(P, device="meta")
    cos, sin = rope_ext.cos_sin_cache(inv_freq, S)
    y = rope_ext.apply_rotary(x, cos, sin, layout="bshd")
    for got, shape, dtype in ((cos, (S, P), torch.float32), (y, x.shape, x.dtype)):
        assert (got.is_meta, got.shape, got.dtype) == (True, shape, dtype)


# ---- torch.compile


def compiled(function, backend="aot_eager", dynamic=True):
    """function compiled to one graph, and the counter of its compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic), counter


def rotate_rows(q, k, inv_freq, ids):
    return rope_ext.apply_rotary_qk(q, k, *rope_ext.cos_sin(inv_freq, ids))


def rotate_table(q, k, inv_freq, ids):
    cos, sin = rope_ext.cos_sin_cache(inv_freq, 64)
    return rope_ext.apply_rotary_qk(q, k, cos, sin, ids)


def rotate_no_ids(q, k, inv_freq, ids):
    cos, sin = rope_ext.cos_sin_cache(inv_freq, q.shape[1])
    return rope_ext.apply_rotary(q, cos, sin), rope_ext.apply_rotary(k, cos, sin, inverse=True)


def rotate_in_place(q, k, inv_freq, ids):
    q, k = q * 1, k * 1
    cos, sin = rope_ext.cos_sin(inv_freq.detach(), ids)
    return rope_ext.apply_rotary_qk(q, k, cos, sin, inplace=True)


def rotate_last_channels(q, k, inv_freq, ids):
    cos, sin = rope_ext.cos_sin(inv_freq[:5], ids)
    options = {"rotary_offset": D - 10, "interleaved": True, "interleaved_out": False}
    return rope_ext.apply_rotary_qk(q, k, cos, sin, **options)


COMPILED = [rotate_rows, rotate_table, rotate_no_ids, rotate_in_place, rotate_last_channels]


def compile_inputs(device, seq, grad):
    q = random(B, seq, H, D, device=device).requires_grad_(grad)
    k = random(B, seq, K, D, device=device, seed=1).requires_grad_(grad)
    ids = random_positions(B, seq, rows=50, device=device)
    return q, k, rope_ext.frequencies.default(D, device=device)[0].requires_grad_(grad), ids


def results_and_gradients(function, inputs, wanted):
    """Of q, k and inv_freq, the gradients of the first `wanted`."""
    results = function(*inputs)
    seeds = [random(*y.shape, device=y.device, seed=9) for y in results]
    return [*results, *(torch.autograd.grad(results, inputs[:wanted], seeds) if wanted else ())]


@pytest.mark.parametrize(  # in place takes another way where nothing is differentiated
    ("function", "grad"),
    [*((function, True) for function in COMPILED), (rotate_in_place, False)],
    ids=lambda x: getattr(x, "__name__", "grad" if x else "no grad"),
)
def test_one_graph_serves_all_sequence_lengths(function, grad, device):
    run, counter = compiled(function)
    wanted = (2 if function is rotate_in_place else 3) if grad else 0
    graphs = None
    for seq in (5, 12, 33):
        inputs = compile_inputs(device, seq, grad)
        expected = results_and_gradients(function, inputs, wanted)
        for a, b in zip(results_and_gradients(run, inputs, wanted), expected, strict=True):
            assert_same_bits(a, b)
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs, f"recompiled for a sequence of {seq}"


def test_no_more_than_one_recompilation_without_asking_for_dynamic_shapes(device):
    """The first length is compiled as a constant, the second for all lengths."""
    run, counter = compiled(rotate_rows, dynamic=None)
    for seq in (5, 12, 33, 6):
        inputs = compile_inputs(device, seq, grad=False)
        for a, b in zip(run(*inputs), rotate_rows(*inputs), strict=True):
            assert_same_bits(a, b)
    assert counter.frame_count == 2


def test_in_place_on_a_graph_input_writes_it(device):
    def by_function(x, cos, sin):
        rope_ext.apply_rotary(x, cos, sin, inplace=True)
        return x + 1

    def by_operator_on_views(x, cos, sin):
        rope.apply_rotary_qk_(x[:, :, :1], x[:, :, 1:], cos, sin)
        return x + 1

    cos, sin = random_table(S, P, device=device)
    for function in (by_function, by_operator_on_views):
        x = random(B, S, H, D, device=device)
        expected = rounded_once(x, cos, sin)
        out = compiled(function)[0](x, cos, sin)
        with naming(function.__name__):
            assert_same_bits(x, expected)
            assert_same_bits(out, expected + 1)


def test_reading_before_and_after_an_in_place_rotation_stays_in_order(device):
    def function(x, cos, sin):
        x = x.clone()
        before = x * 2
        rope.apply_rotary_(x[:, 1:3], cos, sin)
        return before, x * 2

    x, table = random(B, S, H, D, device=device), random_table(2, P, device=device)
    before, after = compiled(function)[0](x, *table)
    assert_same_bits(before, x * 2)
    assert_same_bits(after[:, 1:3], 2 * rounded_once(x[:, 1:3], *table))
    assert_same_bits(after[:, 3:], x[:, 3:] * 2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None,
                    reason="no C++ compiler for Inductor")  # fmt: skip
def test_inductor_compiles_forward_and_backward():
    def function(q, k, inv_freq, ids):
        out_q, out_k = rotate_rows(q * 2, k + 1, inv_freq, ids)
        return out_q.sin() * 3, out_k

    run, counter = compiled(function, backend="inductor")
    graphs = None
    for seq in (6, 11):
        inputs = compile_inputs("cpu", seq, grad=True)
        expected = results_and_gradients(function, inputs, 3)
        for a, b in zip(results_and_gradients(run, inputs, 3), expected, strict=True):
            torch.testing.assert_close(a, b)
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs
