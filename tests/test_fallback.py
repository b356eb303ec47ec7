"""Devices without kernels, where the operators are plain PyTorch.

Here the CPU is one; `pytest --plain` runs the tests of the operators' behaviour that way.
"""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from operator_arguments import arguments_of, results_of
from support import (
    assert_same_bits,
    cpu_without_kernels,
    naming,
    random,
    random_cache,
    random_table,
    ulp,
)
from torch.utils import backend_registration

import rope_ext
from rope_ext import _C, decompositions
from rope_ext._engine import fallback
from rope_ext._operators import OPERATORS
from rope_ext._torch_private import keyset_of

rope = torch.ops.rope
# Sums are in another order: of D = 8 channels (norm), of H = 4 heads of B S = 6 tokens (gradients).
# Each of n terms below 16 is rounded at most n times; n <= 24.
SUMMED = 24**2 * 16
# cos and sin in float64 are within 1 ulp, so 2^-52 apart; rotated values 2^-52 (|x1| + |x2|) and
# roundings, of values below 16.
ANGLES = 4 * 16


def copies(given):
    return {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in given.items()}


def tensors_of(given):
    return {n: x for n, x in given.items() if isinstance(x, torch.Tensor)}


def outcome(operator, given):
    """The results of a call and what it has written, and the versions of its tensors."""
    given = copies(given)
    results = results_of(operator.overload, given, operator.written)
    return results, {name: x._version for name, x in tensors_of(given).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "how", [{}, {"optional": False}, {"float8": False}], ids=["all", "fewest", "no float8"]
)
def test_results_are_those_of_the_kernels(dtype, how):
    """The same shapes, strides, dtypes and versions; the same bits, but for the order of sums."""
    given = {operator: arguments_of(operator, dtype=dtype, **how) for operator in OPERATORS}
    kernel = {operator: outcome(operator, given[operator]) for operator in OPERATORS}
    with cpu_without_kernels():
        plain = {operator: outcome(operator, given[operator]) for operator in OPERATORS}
    for operator in OPERATORS:
        with naming(operator.name):
            assert_near(operator, given[operator], plain[operator], kernel[operator])


def assert_near(operator, given, plain, kernel):
    """Two outcomes: of plain PyTorch and of the kernel."""
    assert plain[1] == kernel[1], "versions"
    of_sums = "rms_norm" in operator.name or "backward" in operator.name
    units = SUMMED if of_sums else ANGLES if "inv_freq" in given else 0
    for a, b in zip(plain[0], kernel[0], strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        double = torch.float64 in (t.dtype for t in tensors_of(given).values())
        if units == 0 or (units == ANGLES and not double):
            assert_same_bits(a, b)
            continue
        eps = torch.finfo(torch.float64 if double else torch.float32).eps
        allowed = units * eps + ulp(b.double(), b.dtype)
        error = (a.double() - b.double()).abs()
        assert (error <= allowed).all(), error.max()


def on_a_cuda_device(operator, given):
    """The kernel for CUDA tensors, with meta tensors in their place: reading a value raises."""
    given = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    positional = [given.pop(name, None) for name in operator.positional]
    return operator.overload.redispatch(keyset_of("CUDA"), *positional, **given)


without_cuda = pytest.mark.skipif(_C.build_info()["cuda"], reason="built with CUDA")


@without_cuda
@pytest.mark.filterwarnings("ignore:rope_ext")
def test_no_value_is_waited_for():
    for operator in OPERATORS:
        with naming(operator.name):
            results = on_a_cuda_device(operator, arguments_of(operator))
            results = results if isinstance(results, tuple) else (results,)
            assert all(x is None or x.is_meta for x in results)


@without_cuda
def test_a_device_is_announced_once_with_the_reason():
    fallback.announced.discard("cuda")
    operator = OPERATORS[0]
    with pytest.warns(UserWarning, match="rope_ext: built without CUDA: .*as plain PyTorch"):
        on_a_cuda_device(operator, arguments_of(operator))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_a_cuda_device(operator, arguments_of(operator))


def test_error_instead_of_the_fallback(no_kernels, monkeypatch):
    monkeypatch.setenv("ROPE_EXT_FALLBACK", "error")
    for operator in OPERATORS:
        given = arguments_of(operator)
        kept = copies(given)
        message = f"{operator.op}: no kernels for tensors on cpu (ROPE_EXT_FALLBACK=error)"
        with pytest.raises(RuntimeError, match=re.escape(message)):
            operator.overload(**given)
        for name, x in tensors_of(given).items():
            assert_same_bits(x, kept[name])


def test_unknown_value_of_the_variable_is_refused_at_import(monkeypatch):
    monkeypatch.setenv("ROPE_EXT_FALLBACK", "errors")
    expected = "expected ROPE_EXT_FALLBACK to be 'error' or not set, got 'errors'"
    with pytest.raises(ImportError, match=f"^rope_ext: {expected}$"):
        fallback.register_fallback(OPERATORS)


def test_info_lists_devices_without_kernels(capsys):
    from rope_ext.__main__ import main

    assert main(["info"]) == 0
    listed = next(line for line in capsys.readouterr().out.splitlines() if "plain PyTorch" in line)
    assert "mps (no kernels for tensors on mps)" in listed
    if not _C.build_info()["cuda"]:
        assert "cuda (built without CUDA: " in listed


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices in Python",
)
def test_on_a_device_of_its_own():
    """In a process of its own, as PyTorch keeps the device."""
    program = Path(__file__).with_name("host_device.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "as on the CPU\n", done.stderr


def test_angles_are_those_of_the_kernels_at_any_position():
    """Float64: each is within 1 ulp. NaN where the kernels' reduction ends."""
    inv_freq = random(64).abs()
    positions = torch.tensor([0, -1, 12345, -(2**20) - 1, 2**31 - 1, 2**45 + 3, 2**53 - 1, 2**53])
    for got, kernel in zip(
        decompositions.cos_sin(inv_freq, positions), rope.cos_sin(inv_freq, positions), strict=True
    ):
        assert_same_bits(got, kernel)
    double = inv_freq.double() / 3
    for got, kernel in zip(
        decompositions.cos_sin(double, positions), rope.cos_sin(double, positions), strict=True
    ):
        assert torch.equal(got.isnan(), kernel.isnan())
        error = (got - kernel).abs().nan_to_num()
        assert (error <= 2 * ulp(kernel.nan_to_num(), torch.float64)).all()


# ---- indices of a device, whose values nobody checks


S, H, D, L, BLOCKS, BLOCK = 5, 2, 8, 4, 2, 3


def test_positions_outside_of_the_table_give_nan():
    x, (cos, sin) = random(1, S, H, D), random_table(L, D // 2)
    ids = torch.tensor([0, 3, 4, -1, 2])
    expected = rope_ext.reference.apply_rotary(x, cos, sin, ids.clamp(0, L - 1))
    expected[:, 2:4] = torch.nan
    assert_same_bits(decompositions.apply_rotary(x, cos, sin, ids), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "slots", [[4, -1, 0, 6, -7], [-1, 5, 100, 1], [-1, 9, -3, 6, 7], [0, 1, 2, 3, 4], []]
)
def test_slots_outside_of_the_cache_are_skipped(slots, dtype):
    """As if only the tokens with a slot were there; the cache may be any view."""
    k, v = random(S, H, D), random(S, H, D, seed=1)
    cache = random_cache(BLOCKS, H, BLOCK, 2 * D, dtype=dtype)[..., :D].transpose(1, 2)
    caches = [cache, random_cache(BLOCKS, BLOCK, H, D, dtype=dtype)]
    expected = [cache.clone() for cache in caches]
    rows = random_table(S, D // 2)
    rotated = decompositions.apply_rotary(k, *rows)
    for token, slot in enumerate(slots):
        if 0 <= slot < BLOCKS * BLOCK:
            for cache, x in zip(expected, (rotated, v), strict=True):
                cache[slot // BLOCK, slot % BLOCK] = x[token].to(dtype)
    decompositions.apply_rotary_qk_append_kv(
        random(S, H, D), k, v, *caches, torch.tensor(slots, dtype=torch.int64), *rows
    )
    for got, want in zip(caches, expected, strict=True):
        assert_same_bits(got, want)


# ---- graphs


def step(q, k, v, weight, cos, sin, k_cache, v_cache, slots):
    """A norm, a rotation, a rotation in place, one into out, and an append."""
    q = rope_ext.rms_norm_rotary(q, weight, cos, sin)
    q, k = rope_ext.apply_rotary_qk(q, k, cos, sin, interleaved=True)
    out = rope_ext.apply_rotary(q, cos, sin, layout="bhsd", out=torch.empty_like(q))
    q = q * 2
    rope_ext.apply_rotary_qk_append_kv_(q, k, v, k_cache, v_cache, slots, cos, sin)
    return out, q, k


def test_graphs_are_traced_as_plain_pytorch(no_kernels):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    q, k, v = (random(1, S, S, D, seed=i) for i in range(3))
    caches = [random_cache(BLOCKS, BLOCK, S, D, dtype=torch.float32) for _ in range(2)]
    slots = torch.tensor([[4, -1, 0, 3, -7]])
    rest = random(D, seed=9), *random_table(S, D // 2)
    eager, written = [x.clone() for x in (q, k, v)], [x.clone() for x in caches]
    expected = step(*eager, *rest, *written, slots)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for a, b in zip(compiled(q, k, v, *rest, *caches, slots), expected, strict=True):
        assert_same_bits(a, b)
    for a, b in zip(caches, written, strict=True):
        assert_same_bits(a, b)
    assert "rope" not in str([node.target for graph in graphs for node in graph.graph.nodes])


def test_gradients_in_a_graph(no_kernels):
    x, (cos, sin), weight = random(2, S, H, D), random_table(S, D // 2), random(D, seed=9)

    def loss(x, weight):
        return rope_ext.rms_norm_rotary(x, weight, cos, sin).square().sum()

    inputs = x.requires_grad_(), weight.requires_grad_()
    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), eager, strict=True):
        torch.testing.assert_close(a, b)
