"""The layer for the kernels package, without that package: the functions that it replaces, and the
calls that it returns to the original function.
"""

import sys
import types
import warnings
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import MethodType

import pytest
import torch
from support import assert_same_bits, naming, random, random_table
from torch import nn

from rope_ext import reference
from rope_ext.integrations.patching.pairs import ALL_PAIRS
from rope_ext.integrations.transformers import kernel_mapping, register_kernels
from rope_ext.integrations.transformers.kernels_hook import (
    HOOK,
    TESTED,
    RotaryPosEmb,
    pairs_of,
    rotation_of,
)

B, S, HQ, HK, D = 2, 7, 4, 2, 16
HALF_SPLIT = ALL_PAIRS[0]


def function_of(pairs):
    """A model's function: the rotation in plain PyTorch."""

    def rotary(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = pairs.rows(cos, sin)
        options = pairs.options(cos, q.shape[-1])
        heads = (1, 1) if unsqueeze_dim == 2 else (1, 2)  # to and from [B, S, H, D]
        rotated = (reference.apply_rotary(x.transpose(*heads), cos, sin, **options) for x in (q, k))
        return tuple(x.transpose(*heads) for x in rotated)

    return rotary


def hook_of(function):
    """A function as a hook of kernels, with the layer bound to it."""

    class Func(nn.Module):
        def forward(self, q, k, cos, sin, unsqueeze_dim=1):
            return function(q, k, cos, sin, unsqueeze_dim)

    hook = Func()
    hook.forward = MethodType(RotaryPosEmb.forward, hook)
    return hook


def inputs(pairs=HALF_SPLIT, unsqueeze_dim=1, dtype=torch.float32, device="cpu", rows=1, dim=D):
    shapes = ((B, H, S, D) if unsqueeze_dim == 1 else (B, S, H, D) for H in (HQ, HK))
    q, k = (random(*shape, dtype=dtype, device=device) for shape in shapes)
    width = dim // 2 if pairs.columns == "a pair" else dim
    return q, k, *random_table(rows, S, width, dtype=dtype, device=device)


def calls_of_the_operator(function):
    with torch.profiler.profile() as profile:
        result = function()
    return result, sum(e.count for e in profile.key_averages() if e.key.startswith("rope::"))


def assert_same(results, expected):
    for got, same in zip(results, expected, strict=True):
        assert_same_bits(got, same)


def test_the_layer_finds_and_computes_the_rotation_that_it_replaces(device):
    for pairs, unsqueeze_dim in product(ALL_PAIRS, (1, 2)):
        function = function_of(pairs)
        hook = hook_of(function)
        with naming((pairs.name, unsqueeze_dim)):
            assert rotation_of(type(hook)).pairs == pairs
            given = inputs(pairs, unsqueeze_dim, device=device, rows=B)
            gradients = []
            for rotate in (hook, function):
                leaves = [x.clone().requires_grad_() for x in given]
                results, calls = calls_of_the_operator(partial(rotate, *leaves, unsqueeze_dim))
                assert (calls > 0) == (rotate is hook)
                assert_same(results, function(*given, unsqueeze_dim))
                sum(x.square().sum() for x in results).backward()
                gradients.append([x.grad for x in leaves])
            torch.testing.assert_close(*gradients)


def test_narrower_tables_rotate_as_many_channels_as_the_function_would():
    # D / 2 numbers a row: half of the channels, or half-width tables for all; the function knows
    for pairs, dim in product(ALL_PAIRS, (D // 2, D - 2, 2)):
        function, arguments = function_of(pairs), inputs(pairs, dim=dim)
        with naming((pairs.name, dim)):
            assert_same(hook_of(function)(*arguments), function(*arguments))


def scaled(q, k, cos, sin, unsqueeze_dim=1):
    return 2 * q, 2 * k


def second_half_of_the_table(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = (t[..., t.shape[-1] // 2 :].repeat(1, 1, 2) for t in (cos, sin))
    return function_of(HALF_SPLIT)(q, k, cos, sin, unsqueeze_dim)


def only_q(q, k, cos, sin, unsqueeze_dim=1):
    return function_of(HALF_SPLIT)(q, k, cos, sin, unsqueeze_dim)[0], k


def test_a_function_that_is_no_rotation_of_ours_goes_on_doing_its_work():
    for function in (scaled, second_half_of_the_table, only_q):
        hook, arguments = hook_of(function), inputs()
        with naming(function.__name__):
            with pytest.warns(UserWarning, match=rf"{function.__name__} is no rotation that rope_"):
                hook(*arguments)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results, calls = calls_of_the_operator(partial(hook, *arguments))
            assert_same(results, function(*arguments))
            assert not calls
    other = type("Func", (nn.Module,), {"forward": lambda self, q, freqs_cis: q})
    with pytest.warns(UserWarning, match="is no rotation that rope_ext knows"):
        assert pairs_of(other) is None


def test_tables_without_a_batch_are_rows_of_every_sequence():
    def broadcast(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        half = q.shape[-1] // 2
        return tuple(x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin for x in (q, k))

    q, k, cos, sin = inputs()
    hook = hook_of(broadcast)
    assert rotation_of(type(hook)).pairs == HALF_SPLIT
    results, calls = calls_of_the_operator(lambda: hook(q, k, cos[0], sin[0], 0))
    assert calls == 1
    assert_same(results, broadcast(q, k, cos, sin))


def test_results_have_the_dtype_of_q_and_the_inputs_keep_their_values():
    given = *inputs(dtype=torch.bfloat16)[:2], *inputs()[2:]
    before = [x.clone() for x in given]
    results = hook_of(function_of(HALF_SPLIT))(*given)
    assert [x.dtype for x in results] == [torch.bfloat16] * 2
    assert_same(given, before)


def test_compiles_to_one_graph_even_when_it_has_never_run_before():
    graphs = []
    for pairs in (HALF_SPLIT, ALL_PAIRS[-1]):
        hook, arguments = hook_of(function_of(pairs)), inputs(pairs)
        torch.compiler.reset()
        rotate = torch.compile(
            lambda *args, hook=hook: hook(*args),
            backend=lambda graph, _: graphs.append(graph) or graph,
            fullgraph=True,
        )
        with naming(pairs.name):
            assert_same(rotate(*arguments), function_of(pairs)(*arguments))
            targets = [node.target for node in graphs.pop().graph.nodes]
            assert torch.ops.rope.apply_rotary_qk in targets
            assert not graphs


def test_exports_even_when_it_has_never_run_before():
    class Attention(nn.Module):
        def forward(self, q, k, cos, sin):
            return hook(q, k, cos, sin)

    hook = hook_of(function_of(HALF_SPLIT))
    program = torch.export.export(Attention(), inputs(), strict=False)
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.rope.apply_rotary_qk.default in targets


def test_is_found_within_transforms_of_functions():
    hook = hook_of(function_of(HALF_SPLIT))
    found = []
    torch.vmap(lambda x: found.append(pairs_of(type(hook))) or x)(random(B, S))
    assert found == [HALF_SPLIT]


def test_the_layer_itself_is_refused():
    with pytest.raises(TypeError, match="expected kernels to bind forward to the hook of a model"):
        RotaryPosEmb()(*inputs())


def test_without_kernels_registering_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="expected the package kernels, got"):
        register_kernels()


@pytest.fixture
def llama():
    return pytest.importorskip("transformers.models.llama.modeling_llama")


@pytest.fixture
def kernels(monkeypatch, llama):  # llama: imported without it
    """The parts of the package that register_kernels uses, and the mappings that it registers."""
    registered = []
    package = types.SimpleNamespace(
        __version__="0.1",
        Mode=types.SimpleNamespace(TRAINING=1, TORCH_COMPILE=2),
        CUDAProperties=lambda **options: tuple(options),
        Device=lambda **options: tuple(options),
        registered=registered,
        register_kernel_mapping=registered.append,
    )
    monkeypatch.setitem(sys.modules, "kernels", package)
    return package


def test_releases_that_do_not_go_together_are_refused_with_those_that_do(
    kernels, llama, monkeypatch
):
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", function_of(HALF_SPLIT))
    monkeypatch.setenv("USE_HUB_KERNELS", "NO")
    for function in (register_kernels, kernel_mapping):
        with pytest.raises(ImportError) as refusal:
            function()
        for part in (
            f"transformers {version('transformers')} with kernels 0.1 and USE_HUB_KERNELS=NO",
            "this transformers asks for kernels<",
            " with ".join(f"{name} {release}" for name, release in TESTED.items()),
            "pip install 'rope_ext[kernels]'",
        ):
            assert part in str(refusal.value)
    assert kernels.registered == []

    hook = hook_of(function_of(HALF_SPLIT))
    type(hook).kernel_layer_name = HOOK
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", hook)
    register_kernels()
    assert [list(mapping) for mapping in kernels.registered] == [[HOOK]]


def test_the_extra_pins_the_releases_that_the_refusal_names():
    text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    pins = ", ".join(f'"{name}=={release}"' for name, release in TESTED.items())
    assert f"\nkernels = [{pins}]\n" in text
