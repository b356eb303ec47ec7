"""Every function with every feature of PyTorch, once: "What works with what" of the docs.

One small case each. Other tests cover all cases.
"""

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ranks import on_every_rank, place
from support import assert_same_bits, naming, random, random_positions
from torch._dynamo import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Replicate, Shard
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint
from works_with import OPERATOR, PLAIN

import rope_ext
from rope_ext import reference

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "compatibility.md"

B, S, H, D, P, L = 8, 12, 4, 6, 3, 2000  # all different: a graph treats equal sizes as one
SIZES = {"B": B, "H": H, "D": D, "P": P, "L": L}
LENGTHS = (S, 33)
F64 = torch.float64

# ---- the functions, and the same in plain PyTorch
#
# None writes its arguments: a tensor that is rotated in place or written is made in the function.

module = rope_ext.RotaryEmbedding(D, max_position_embeddings=L)


class Function(NamedTuple):
    axes: tuple[str, ...]  # for each tensor; "S" alone is the length, a number
    call: object
    plain: object
    varies: tuple[str, ...] = ("BSHD", "LP", "P")  # inputs that are differentiated and mapped


def plain(*xs_and_table):
    *xs, cos, sin = xs_and_table
    return tuple(reference.apply_rotary(x, cos, sin) for x in xs)


FUNCTIONS = {
    "apply_rotary": Function(
        ("BSHD", "LP", "LP"), lambda x, cos, sin: (rope_ext.apply_rotary(x, cos, sin),), plain
    ),
    "apply_rotary_qk": Function(("BSHD", "BSHD", "LP", "LP"), rope_ext.apply_rotary_qk, plain),
    "inplace=True": Function(
        ("BSHD", "LP", "LP"),
        lambda x, cos, sin: (rope_ext.apply_rotary(x * 1, cos, sin, inplace=True),),
        plain,
        varies=("BSHD",),  # in place, tables that require grad raise
    ),
    "out=": Function(
        ("BSHD", "LP", "LP"),
        lambda x, cos, sin: (rope_ext.apply_rotary(x, cos, sin, out=torch.empty_like(x)),),
        plain,
    ),
    "cos_sin": Function(("P", "BS"), rope_ext.cos_sin, reference.cos_sin),
    "cos_sin_cache": Function(
        ("P", "S"),
        rope_ext.cos_sin_cache,
        lambda inv_freq, length: reference.cos_sin(inv_freq, torch.arange(length)),
    ),
    "RotaryEmbedding": Function(
        ("BSHD", "BSHD"),
        lambda q, k: module(q, k),
        lambda q, k: plain(q, k, *(t.to(q.dtype) for t in module.table(q.shape[1]))),
    ),
}


def arguments(function, dtype=torch.float32, length=S):
    def make(i, axes):
        if axes == "S":
            return length
        shape = [SIZES.get(axis, length) for axis in axes]
        if axes == "BS":
            return random_positions(*shape, rows=50)
        return random(*shape, dtype=dtype, seed=i)

    return [make(i, axes) for i, axes in enumerate(function.axes)]


def varying(function, inputs):
    """The function of the varying tensors alone, and these tensors."""
    varies = [axes in function.varies for axes in function.axes]

    def call(*tensors, of=function.call):
        rest = iter(tensors)
        return of(*(next(rest) if v else i for v, i in zip(varies, inputs, strict=True)))

    return call, [i for v, i in zip(varies, inputs, strict=True) if v]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


def close(got, expected):
    """Sums in another order, in float64, of at most B H 33 = 1056 terms below 500."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1056 * 500 * 2.0**-53)


# ---- the features. Each takes a function, and raises unless the feature works with it.


def differentiates(function, **checks):
    call, tensors = varying(function, arguments(function, F64))
    close(call(*tensors), call(*tensors, of=function.plain))
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, **checks)
    return call, leaves


def differentiates_twice(function):
    call, leaves = differentiates(function)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def has_tangents(function):
    differentiates(function, check_forward_ad=True, check_backward_ad=False)


def is_mapped(function):
    call, first = varying(function, arguments(function))
    second = [t.sin() for t in first]
    got = vmap(call)(*(torch.stack(pair) for pair in zip(first, second, strict=True)))
    for i, sample in enumerate((first, second)):
        assert_same([t[i] for t in got], call(*sample))


def nests(function):
    call, tensors = varying(function, arguments(function, F64))

    def energy(*tensors, of):
        return sum(t.sin().sum() for t in call(*tensors, of=of))

    def tangent(of):
        slope = grad(partial(energy, of=of), argnums=tuple(range(len(tensors))))
        return jvp(slope, tuple(tensors), tuple(t.cos() for t in tensors))[1]

    close(tangent(function.call), tangent(function.plain))


def compiles(function, to, expected):
    """One graph for all lengths, with the expected operators, and gradients if there are any."""
    torch._dynamo.reset()
    graphs, operators = [], set()

    def backend(graph, inputs):
        graphs.append(length)  # twice for the first, as PyTorch checks a float again
        operators.update(str(n.target) for n in graph.graph.nodes if "rope" in str(n.target))
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(function.call, backend=backend, fullgraph=True, dynamic=True)
    with rope_ext.lowering(to):
        for length in LENGTHS:
            inputs = arguments(function, F64, length)
            call, tensors = varying(function, inputs)
            leaves = [t.requires_grad_(function is not FUNCTIONS["out="]) for t in tensors]
            results = [call(*leaves, of=of) for of in (compiled, function.call)]
            assert_same(*results)
            if results[0][0].requires_grad:
                sums = [sum(t.sin().sum() for t in outs) for outs in results]
                close(*(torch.autograd.grad(s, leaves, allow_unused=True) for s in sums))
    assert {*graphs} == {LENGTHS[0]}
    assert operators == expected if to == "decompose" else operators


def is_exported(function):
    class Exported(torch.nn.Module):
        def forward(self, *inputs):
            return function.call(*inputs)

    inputs = tuple(arguments(function))
    program = torch.export.export(Exported(), inputs)
    assert "torch.ops.rope" in program.graph_module.code
    assert_same(program.module()(*inputs), function.call(*inputs))


def is_faked(function):
    inputs = arguments(function)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(i) if isinstance(i, torch.Tensor) else i for i in inputs]
        got = function.call(*fakes)
    for fake, real in zip(got, function.call(*inputs), strict=True):
        assert type(fake) is not torch.Tensor
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def works_in_inference_mode(function):
    with torch.inference_mode():
        inputs = arguments(function)
        got = function.call(*inputs)
    assert all(t.is_inference() for t in got)
    assert_same(got, function.call(*arguments(function)))


def keeps_its_dtypes_under_autocast(function):
    inputs = arguments(function)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function.call(*inputs)
    assert_same(got, function.call(*inputs))


def is_checkpointed(function):
    call, tensors = varying(function, arguments(function))
    leaves = [t.requires_grad_() for t in tensors]

    def block(*leaves):
        return sum(t.sin().sum() for t in call(*leaves))

    def gradients(loss):
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        return [torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves]

    expected = gradients(block(*leaves))
    for reentrant in (False, True):
        assert_same(gradients(checkpoint(block, *leaves, use_reentrant=reentrant)), expected)


def with_gradients(function):
    """The results and, if there are any, their gradients."""
    call, tensors = varying(function, arguments(function, length=40))
    if function is FUNCTIONS["out="]:
        return call(*tensors)
    leaves = [t.requires_grad_() for t in tensors]
    outs = call(*leaves)
    grads = torch.autograd.grad(sum(t.sin().sum() for t in outs), leaves, allow_unused=True)
    return [*outs, *(g for g in grads if g is not None)]


def is_deterministic(function):
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with_gradients(function)
    finally:
        torch.use_deterministic_algorithms(False)


def is_sharded(function, axis):
    """Tensors with the axis are sharded along it; the others are whole on each rank."""

    def on_rank(mesh):
        call = function.call
        if function is FUNCTIONS["RotaryEmbedding"]:
            call = rope_ext.RotaryEmbedding(D, max_position_embeddings=L)
            call.inv_freq = place(call.inv_freq, mesh)
        placed = []
        for axes, argument in zip(function.axes, arguments(function), strict=True):
            at = Shard(axes.index(axis)) if axis in axes else Replicate()
            placed.append(place(argument, mesh, at) if axes != "S" else argument)
        outs = call(*placed)
        assert all(out.placements[0].is_shard() for out in outs)
        return outs

    assert_same(on_every_rank(on_rank), function.call(*arguments(function)))


def runs_in_threads(function):
    expected = with_gradients(function)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: with_gradients(function), range(16)):
            assert_same(got, expected)


class Calls(torch.utils.data.Dataset):
    def __init__(self, function):
        self.function = function

    def __len__(self):
        return 2

    @torch.no_grad()  # once PyTorch has started threads for a backward, none works in a fork
    def __getitem__(self, index):
        return self.function.call(*arguments(self.function, length=L))  # several threads


def runs_in_forked_workers(function):
    """After the parent has started its threads."""
    calls = Calls(function)
    expected = calls[0]
    workers = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
    results = list(torch.utils.data.DataLoader(calls, batch_size=None, **workers))
    assert len(results) == 2
    for got in (*results, calls[0]):  # and the parent goes on
        assert_same(got, expected)


CHECKS = {
    "autograd, twice differentiable": differentiates_twice,
    "forward-mode differentiation": has_tangents,
    "`torch.func.vmap`": is_mapped,
    "`torch.func`: `jvp` of `grad`": nests,
    OPERATOR: partial(compiles, to="op", expected=None),
    PLAIN: partial(compiles, to="decompose", expected=set()),
    "`torch.export`": is_exported,
    "fake tensors": is_faked,
    "inference mode": works_in_inference_mode,
    "autocast": keeps_its_dtypes_under_autocast,
    "activation checkpointing": is_checkpointed,
    "deterministic algorithms": is_deterministic,
    "DTensor: batch (data parallel)": partial(is_sharded, axis="B"),
    "DTensor: sequence (context parallel)": partial(is_sharded, axis="S"),
    "DTensor: heads (tensor parallel)": partial(is_sharded, axis="H"),
    "several threads at once": runs_in_threads,
    "forked workers of a `DataLoader`": runs_in_forked_workers,
}
REFUSED = {
    ("autograd, twice differentiable", "out="),
    ("forward-mode differentiation", "out="),
    ("`torch.func.vmap`", "out="),
    ("`torch.func`: `jvp` of `grad`", "out="),
    ("activation checkpointing", "out="),
}
STAY_OPERATORS = {
    (PLAIN, "out="): "rope.apply_rotary.out",
    (PLAIN, "cos_sin"): "rope.cos_sin",
    (PLAIN, "cos_sin_cache"): "rope.cos_sin_cache",
    (PLAIN, "RotaryEmbedding"): "rope.cos_sin_cache",  # for the table; the rotation is plain
}


def result_of(feature, name):
    """None: the feature has no meaning for the function."""
    if feature.startswith("DTensor"):
        axis = CHECKS[feature].keywords["axis"]
        if not any(axis in axes and len(axes) > 1 for axes in FUNCTIONS[name].axes):
            return None
    cell = (feature, name)
    return "refused" if cell in REFUSED else "operator" if cell in STAY_OPERATORS else "yes"


RESULTS = {feature: {n: r for n in FUNCTIONS if (r := result_of(feature, n))} for feature in CHECKS}


@pytest.mark.parametrize(
    "feature",
    [
        pytest.param(f, marks=[pytest.mark.shows(f, n, result=r) for n, r in of.items()])
        for f, of in RESULTS.items()
    ],
)
def test_functions_with_feature(feature):
    check = CHECKS[feature]
    for name, result in RESULTS[feature].items():
        function = FUNCTIONS[name]
        with naming(name):
            if result == "refused":
                with pytest.raises(RuntimeError, match=r"rope::apply_rotary\.out|vmap"):
                    check(function)
            elif result == "operator":
                check(function, expected={STAY_OPERATORS[feature, name]})
            else:
                check(function)


@pytest.mark.slow
def test_page_says_what_tests_show(tmp_path):
    """Collects the marked tests of all files."""
    files = [str(f) for f in sorted(TESTS.glob("test_*.py")) if "mark.shows(" in f.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "shows"]
    command += ["--collect-only", "--works=print", *files]
    collected = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    written = PAGE.read_text(encoding="utf-8").partition("<!-- works -->")[2]
    table = written.partition("<!-- /works -->")[0].strip()
    assert table.count("yes") > 90
    assert table in collected
