"""Transformer Engine's signature on the operators, compared to its unfused formula, restated here,
and to its own file if the package is installed, as in the stage "kernels hook" of .ci/run.
"""

import inspect
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import assert_derivatives, assert_same_bits, name_of, naming, random

from rope_ext.integrations.reference_apis.transformer_engine import apply_rotary_pos_emb

PACKAGE = find_spec("transformer_engine")
S, B, H, D, R, L = 8, 2, 3, 16, 12, 64
CU_SEQLENS = torch.tensor([0, 8, 16, 40], dtype=torch.int32)  # lengths are multiples of 2 x 4
T = 40
SHAPES = {"sbhd": (S, B, H, D), "bshd": (B, S, H, D)}
START = torch.tensor([5, 20], dtype=torch.int32)
STARTS = torch.tensor([3, 0, 40])


def restated(
    t, freqs, tensor_format="sbhd", start_positions=None, interleaved=False, fused=False,
    cu_seqlens=None, cp_size=1, cp_rank=0,
):  # fmt: skip
    """Token by token: y = t cos + rotate_half(t) sin in t's dtype, sequence by sequence."""

    def sequence(x, start):  # [tokens, H, D]
        half = len(x) // 2
        chunks = [cp_rank * half, (2 * cp_size - 1 - cp_rank) * half]
        whole = range(len(x))
        index = whole if cp_size == 1 else [chunks[i >= half] + i % half for i in whole]
        angle = torch.stack([freqs[start + i, 0, 0] for i in index]).unsqueeze(1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        turned, rest = x[..., : freqs.shape[-1]], x[..., freqs.shape[-1] :]
        if interleaved:
            other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            first, second = turned.chunk(2, -1)
            other = torch.cat((-second, first), -1)
        return torch.cat((turned * cos + other * sin, rest), -1)

    def start_of(b):
        return 0 if start_positions is None else int(start_positions[b])

    if tensor_format == "thd":
        bounds = pairwise((cu_seqlens // cp_size).tolist())
        return torch.cat([sequence(t[slice(*ends)], start_of(b)) for b, ends in enumerate(bounds)])
    axis = 1 if tensor_format == "sbhd" else 0
    return torch.stack([sequence(x, start_of(b)) for b, x in enumerate(t.unbind(axis))], axis)


def of_the_package(monkeypatch):
    """Their file, imported without the package, which requires its compiled part."""
    path = Path(PACKAGE.origin).parent / "pytorch/attention/rope.py"
    parts = ("", ".pytorch", ".pytorch.cpp_extensions", ".pytorch.cpp_extensions.fused_attn")
    for name in ("transformer_engine_torch", *(f"transformer_engine{part}" for part in parts)):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["transformer_engine.pytorch.cpp_extensions.fused_attn"].QKVFormat = {}
    spec = spec_from_file_location("transformer_engine_rope", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.apply_rotary_pos_emb


@pytest.fixture(params=["restated", "package"] if PACKAGE else ["restated"])
def documented(request, monkeypatch):
    return restated if request.param == "restated" else of_the_package(monkeypatch)


def test_signature_is_theirs(documented):
    ours, theirs = (
        [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (apply_rotary_pos_emb, documented)
    )
    assert ours == theirs


# fmt: off
BSHD, THD = {"tensor_format": "bshd"}, {"tensor_format": "thd", "cu_seqlens": CU_SEQLENS}
LONG = CU_SEQLENS.long()
THD_EACH = {**THD, "start_positions": STARTS}
CASES = {
    "sbhd": {},
    "bshd": BSHD,
    "from a position of each sequence": {"start_positions": START},
    "bshd, from positions": {**BSHD, "start_positions": START.long()},
    "first of 2 ranks": {"cp_size": 2, "cp_rank": 0},
    "last of 4 ranks, at": {**BSHD, "cp_size": 4, "cp_rank": 3, "start_positions": START},
    "packed": THD,
    "packed, int64, from positions": {**THD_EACH, "cu_seqlens": LONG},
    "packed, third of 4 ranks, from positions": {**THD_EACH, "cp_size": 4, "cp_rank": 2},
}
# fmt: on


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
def test_forward_and_backward_have_the_bits_of_the_unfused_formula(dtype, documented):
    freqs = 3 * random(L, 1, 1, R)  # all channels differ, so a wrong transpose shows
    for name, interleaved in product(CASES, (False, True)):
        options = {"interleaved": interleaved, **CASES[name]}
        shape = SHAPES.get(options.get("tensor_format", "sbhd"))
        shape = shape or (T // options.get("cp_size", 1), H, D)
        t, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
        # float16 and bfloat16: theirs rounds tables and products; ours rounds the float32 result.
        exact = t if dtype != torch.bfloat16 else t.float()
        results = []
        for function, x in ((apply_rotary_pos_emb, t), (documented, exact)):
            fused = {"fused": interleaved} if function is apply_rotary_pos_emb else {}  # accepted
            leaf = x.clone().requires_grad_()
            y = function(leaf, freqs, **fused, **options)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, weight.to(y.dtype))))
        with naming((name, interleaved)):
            assert results[0][0].stride() == t.stride()
            for got, expected in zip(*results, strict=True):
                assert_same_bits(got, expected.to(dtype))


def test_gradients_to_angles_and_second_ones():
    shapes = (4, 1, 2, 6), (9, 1, 1, 4)
    inputs = [random(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]

    def rotated(t, freqs):
        start = torch.tensor([3])
        return apply_rotary_pos_emb(t, freqs, start_positions=start, interleaved=True)

    assert_derivatives(rotated, inputs)


def test_padding_after_the_last_packed_sequence_takes_the_first_row():
    t, freqs = random(T + 3, H, D), random(L, 1, 1, R)
    got = apply_rotary_pos_emb(t, freqs, **THD_EACH)
    assert_same_bits(got[:T], restated(t[:T], freqs, **THD_EACH))
    assert_same_bits(got[T:], restated(t[T:, None].transpose(0, 1), freqs)[0])


def test_a_position_past_the_angles_is_nan_where_values_are_not_looked_at():
    t, freqs = random(S, B, H, D), random(L, 1, 1, R)
    start = torch.tensor([L - S, L - 2])
    compiled = torch.compile(apply_rotary_pos_emb, backend="eager", fullgraph=True)
    got = compiled(t, freqs, start_positions=start)
    assert got[:, 0].isfinite().all()
    assert got[:2].isfinite().all()
    assert got[2:, 1, :, :R].isnan().all()
    assert_same_bits(got[2:, 1, :, R:], t[2:, 1, :, R:])


X, ANGLES, PACKED = random(S, B, H, D), random(L, 1, 1, R), random(T, H, D)
PAST = torch.tensor([0, L - S + 1])
REFUSED = [
    (X, ANGLES, {"tensor_format": "bhsd"}, "tensor_format to be sbhd, bshd or thd, got 'bhsd'"),
    (PACKED, ANGLES, {}, r"t to have shape \[S, B, H, D\], got shape \[40, 3, 16\]"),
    (X, ANGLES, {"tensor_format": "thd"}, r"t to have shape \[T, H, D\], got shape"),
    (X, ANGLES[:, 0, 0], {}, r"freqs to have shape \[s2, 1, 1, R\], got shape \[64, 12\]"),
    (X, ANGLES[:7], {}, r"freqs to have rows for 8 tokens, got shape \[7, 1, 1, 12\]"),
    (X, ANGLES, {"cp_size": 10}, "freqs to have rows for 80 tokens"),
    (X, ANGLES, {"cp_size": 2, "cp_rank": 2}, r"cp_rank to be in \[0, 2\), of cp_size .*, got 2"),
    (X, ANGLES, {"cp_size": 0}, r"cp_rank to be in \[0, 0\)"),
    (X[:7], ANGLES, {"cp_size": 2}, "t to have an even number of tokens for cp_size > 1"),
    (PACKED, ANGLES, {"tensor_format": "thd"}, r"cu_seqlens to have shape \[B \+ 1\] for thd, got"),
    (X, ANGLES, {"start_positions": STARTS}, r"start_positions to have shape \[2\], got shape \[3"),
    (X, ANGLES, {"start_positions": START.float()}, "start_positions to be int32 or int64, got to"),
    (X, ANGLES, {"start_positions": START.to("meta")}, "start_positions .* of t, cpu, got meta"),
    (X, ANGLES, {"start_positions": PAST}, "freqs to have a row for position 64, got 64 rows"),
    (PACKED[: T // 5], ANGLES, {**THD, "cp_size": 5}, "sequence 0 of cu_seqlens .* multiple of 10"),
]


def test_refusals_name_argument_expected_and_got():
    for t, freqs, options, message in REFUSED:
        with naming(message), pytest.raises(ValueError, match=f"^rope_ext.*: expected {message}"):
            apply_rotary_pos_emb(t, freqs, **options)
