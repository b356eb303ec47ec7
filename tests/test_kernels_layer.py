"""The layer for the kernels package without that package: which function it stands in for, and what
it hands back to that function.
"""

import itertools
import sys
from types import MethodType

import pytest
import torch
from support import assert_same_bits, random, random_table
from torch import nn

from rope_ext import reference
from rope_ext.integrations import kernels_hub
from rope_ext.integrations.kernels_hub import RotaryPosEmb, Rotation, rotation_of

B, S, HQ, HK, D = 2, 7, 4, 2, 16

ROTATIONS = [
    Rotation(*flags, partial=False) for flags in itertools.product((True, False), repeat=3)
]


def function_of(rotation, partial=False):
    """A model's own function: the rotation in plain PyTorch; if not partial, of whole heads."""

    def rotary(q, k, cos, sin, unsqueeze_dim=1):
        width = cos.shape[-1] if rotation.per_channel else 2 * cos.shape[-1]
        if not partial and width != q.shape[-1]:
            raise RuntimeError("sizes do not match")
        sin = -sin if rotation.negated else sin
        options = {"rotary_dim": width, "interleaved": rotation.interleaved}
        rows = (x.transpose(1, 2) if unsqueeze_dim == 1 else x for x in (q, k))
        rotated = (reference.apply_rotary(x, cos, sin, **options) for x in rows)
        return tuple(x.transpose(1, 2) if unsqueeze_dim == 1 else x for x in rotated)

    return rotary


def hook_of(function):
    """A function as kernels makes a hook of it, and with the layer bound to it."""

    class Func(nn.Module):
        def forward(self, *args):
            return function(*args)

    hook = Func()
    hook.forward = MethodType(RotaryPosEmb.forward, hook)
    return hook


def inputs(rotation, unsqueeze_dim=1, dtype=torch.float32, device="cpu", rows=1, dim=D):
    heads_first = unsqueeze_dim == 1
    q, k = (
        random(*((B, H, S, D) if heads_first else (B, S, H, D)), dtype=dtype, device=device)
        for H in (HQ, HK)
    )
    width = dim if rotation.per_channel else dim // 2
    return q, k, *random_table(rows, S, width, dtype=dtype, device=device)


@pytest.fixture
def operator_calls(monkeypatch):
    """Counts the calls that go to the operator."""
    calls = []

    def counted(*args, **options):
        calls.append(options)
        return apply_rotary_qk(*args, **options)

    apply_rotary_qk = kernels_hub.apply_rotary_qk
    monkeypatch.setattr(kernels_hub, "apply_rotary_qk", counted)
    return calls


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_the_layer_finds_and_computes_the_rotation_that_it_replaces(
    rotation, unsqueeze_dim, device, operator_calls
):
    function = function_of(rotation)
    hook = hook_of(function)
    assert rotation_of(type(hook)) == rotation
    q, k, cos, sin = inputs(rotation, unsqueeze_dim, device=device, rows=B)
    leaves = [x.clone().requires_grad_() for x in (q, k, cos, sin)]
    results = hook(*leaves, unsqueeze_dim)
    for got, expected in zip(results, function(q, k, cos, sin, unsqueeze_dim), strict=True):
        assert_same_bits(got, expected)
    assert len(operator_calls) == 1
    own = [x.clone().requires_grad_() for x in (q, k, cos, sin)]
    sum(x.square().sum() for x in results).backward()
    sum(x.square().sum() for x in function(*own, unsqueeze_dim)).backward()
    for ours, theirs in zip(leaves, own, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dim", [D // 2, D - 2, 2])
@pytest.mark.parametrize("per_channel", [True, False], ids=["a channel", "a pair"])
def test_narrower_tables_rotate_as_many_channels_as_the_function_would(
    per_channel, dim, operator_calls
):
    # D / 2 numbers a row: half of the channels, or half-width tables for all; the function knows
    rotation = Rotation(per_channel, interleaved=False, negated=False, partial=True)
    function = function_of(rotation, partial=True)
    hook = hook_of(function)
    assert rotation_of(type(hook)) == rotation
    arguments = inputs(rotation, dim=dim)
    for got, expected in zip(hook(*arguments), function(*arguments), strict=True):
        assert_same_bits(got, expected)
    assert operator_calls[0]["rotary_dim"] == dim


def test_a_function_that_takes_whole_heads_only_refuses_others_itself(operator_calls):
    rotation = ROTATIONS[0]
    with pytest.raises(RuntimeError, match="sizes do not match"):
        hook_of(function_of(rotation))(*inputs(rotation, dim=D // 2))
    assert not operator_calls


def scaled(q, k, cos, sin, unsqueeze_dim=1):
    return 2 * q, 2 * k


def first_half_of_the_table(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = (t[..., : t.shape[-1] // 2].repeat(1, 1, 2) for t in (cos, sin))
    return function_of(Rotation(True, False, False, False))(q, k, cos, sin, unsqueeze_dim)


def only_q(q, k, cos, sin, unsqueeze_dim=1):
    return function_of(Rotation(True, False, False, False))(q, k, cos, sin, unsqueeze_dim)[0], k


def other_arguments(q, freqs_cis):
    raise AssertionError("not called with tables")


@pytest.mark.parametrize("function", [scaled, first_half_of_the_table, only_q])
def test_a_function_that_is_no_rotation_of_ours_goes_on_doing_its_work(function, operator_calls):
    hook = hook_of(function)
    arguments = inputs(ROTATIONS[0])
    with pytest.warns(UserWarning, match=rf"{function.__name__} is none of the rotations"):
        results = hook(*arguments)
    for got, expected in zip(results, function(*arguments), strict=True):
        assert_same_bits(got, expected)
    assert not operator_calls


def test_a_function_of_other_arguments_is_no_rotation_of_ours():
    with pytest.warns(UserWarning, match="other_arguments is none of the rotations"):
        assert rotation_of(type(hook_of(other_arguments))) is None


def test_tables_without_a_batch_go_to_the_function(operator_calls):
    def broadcast(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        half = q.shape[-1] // 2
        return tuple(x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin for x in (q, k))

    hook = hook_of(broadcast)
    q, k, cos, sin = inputs(ROTATIONS[0])
    expected = hook(q, k, cos, sin)
    assert len(operator_calls) == 1
    for got, same in zip(hook(q, k, cos[0], sin[0], 0), expected, strict=True):
        torch.testing.assert_close(got, same)
    assert len(operator_calls) == 1


def test_results_have_the_dtype_of_q_and_the_inputs_keep_their_values():
    rotation = ROTATIONS[0]
    q, k, _, _ = inputs(rotation, dtype=torch.bfloat16)
    _, _, cos, sin = inputs(rotation)
    before = [x.clone() for x in (q, k, cos, sin)]
    results = hook_of(function_of(rotation))(q, k, cos, sin)
    assert [x.dtype for x in results] == [torch.bfloat16] * 2
    for x, same in zip((q, k, cos, sin), before, strict=True):
        assert_same_bits(x, same)


@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_compiles_to_one_graph_even_when_it_has_never_run_before(rotation):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    hook = hook_of(function_of(rotation))
    arguments = inputs(rotation)
    torch.compiler.reset()
    results = torch.compile(lambda *args: hook(*args), backend=backend, fullgraph=True)(*arguments)
    for got, expected in zip(results, function_of(rotation)(*arguments), strict=True):
        assert_same_bits(got, expected)
    (graph,) = graphs
    assert torch.ops.rope.apply_rotary_qk in [node.target for node in graph.graph.nodes]


def test_exports_even_when_it_has_never_run_before():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.rotary = hook_of(function_of(ROTATIONS[0]))

        def forward(self, q, k, cos, sin):
            return self.rotary(q, k, cos, sin)

    program = torch.export.export(Attention(), inputs(ROTATIONS[0]), strict=False)
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.rope.apply_rotary_qk.default in targets


def test_is_found_within_transforms_of_functions():
    hook = hook_of(function_of(ROTATIONS[0]))
    found = []
    torch.vmap(lambda x: found.append(rotation_of(type(hook))) or x)(random(B, S))
    assert found == [ROTATIONS[0]]


def test_the_layer_itself_is_refused():
    with pytest.raises(TypeError, match="expected kernels to bind forward to the hook of a model"):
        RotaryPosEmb()(*inputs(ROTATIONS[0]))


def test_without_kernels_registering_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="expected the package kernels, got"):
        kernels_hub.register_kernels()
