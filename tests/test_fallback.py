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
from support import assert_same_bits, cpu_without_kernels, random, random_cache, random_table, ulp
from torch.utils import backend_registration

import rope_ext
from rope_ext import _C, decompositions
from rope_ext._engine import fallback
from rope_ext._operators import OPERATORS
from rope_ext._torch_private import keyset_of

rope = torch.ops.rope
EVERY = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
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


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "how", [{}, {"optional": False}, {"float8": False}], ids=["all", "fewest", "no float8"]
)
def test_results_are_those_of_the_kernels(operator, dtype, how):
    """The same shapes, strides, dtypes and versions; the same bits, but for the order of sums."""
    given = arguments_of(operator, dtype=dtype, **how)
    kernel, versions = outcome(operator, given)
    with cpu_without_kernels():
        plain, plain_versions = outcome(operator, given)
    assert plain_versions == versions
    for a, b in zip(plain, kernel, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        units = 0
        if "rms_norm" in operator.name or "backward" in operator.name:
            units = SUMMED
        elif "inv_freq" in given and dtype == torch.float64:
            units = ANGLES
        if units == 0 or not b.is_floating_point():
            assert_same_bits(a, b)
            continue
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
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
@EVERY
def test_no_value_is_waited_for(operator):
    results = on_a_cuda_device(operator, arguments_of(operator))
    results = results if isinstance(results, tuple) else (results,)
    assert all(x is None or x.is_meta for x in results)


@without_cuda
def test_a_device_is_announced_once_with_the_reason():
    fallback.announced.discard("meta")
    operator = OPERATORS[0]
    with pytest.warns(UserWarning, match="no kernels for tensors on meta.*plain PyTorch"):
        on_a_cuda_device(operator, arguments_of(operator))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_a_cuda_device(operator, arguments_of(operator))
    assert fallback.reason("cuda").startswith("built without CUDA: ")


@EVERY
def test_error_instead_of_the_fallback(operator, no_kernels, monkeypatch):
    monkeypatch.setenv("ROPE_EXT_FALLBACK", "error")
    given = arguments_of(operator)
    kept = copies(given)
    message = f"{operator.op}: no kernels for tensors on cpu (ROPE_EXT_FALLBACK=error)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        operator.overload(**given)
    for name, x in tensors_of(given).items():
        assert_same_bits(x, kept[name])


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_unknown_value_of_the_variable_is_refused_at_import():
    error = run("import rope_ext", ROPE_EXT_FALLBACK="errors").stderr
    assert (
        "ImportError: rope_ext: expected ROPE_EXT_FALLBACK to be 'error' or not set, got " in error
    )


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
    done = run(Path(__file__).with_name("host_device.py").read_text())
    assert done.stdout == "as on the CPU\n", done.stderr


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
