"""flash-attention's signatures on the operators, compared to its documented formula, restated here,
and to its own functions if flash-attention, triton and einops are installed, as in the stage
"kernels hook" of .ci/run. Triton's interpreter runs their kernel on the CPU.
"""

import contextlib
import inspect
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import DTYPES, LargeTensors, assert_same_bits, name_of, naming, random, random_table

from rope_ext import reference
from rope_ext.integrations.reference_apis import flash_attention

PACKAGE = find_spec("flash_attn") if find_spec("triton") and find_spec("einops") else None
B, S, H, KH, D, L = 3, 11, 4, 2, 16, 40
SLOW = 3  # of the cases Triton's interpreter runs each third
CU_SEQLENS = torch.tensor([0, 5, 5, 26, 33], dtype=torch.int32)  # one empty, all of the 33 tokens
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def rotated(x, cos, sin, **options):
    """Plain PyTorch in the operators' arithmetic, with gradients."""
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_, cos, sin = (t.to(arithmetic) for t in (x, cos, sin))
    return reference.apply_rotary(x_, cos, sin, **options).to(x.dtype)


class Restated:
    """The documented formulas, not in place."""

    @staticmethod
    def apply_rotary_emb(
        x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,
        max_seqlen=None,
    ):  # fmt: skip
        """Sequence by sequence."""
        if cu_seqlens is None:
            sequences = [(b, slice(0, x.shape[1])) for b in range(x.shape[0])]
        else:
            sequences = [(slice(*ends),) for ends in pairwise(cu_seqlens.tolist())]
        out = x.clone()
        for number, where in enumerate(sequences):
            is_tensor = isinstance(seqlen_offsets, torch.Tensor)
            start = int(seqlen_offsets[number]) if is_tensor else seqlen_offsets
            rows = slice(start, start + where[-1].stop - where[-1].start)
            out[where] = rotated(x[where], cos[rows], sin[rows], interleaved=interleaved)
        return out

    @classmethod
    def apply_rotary_emb_qkv_(
        cls, qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0,
        num_heads_q=None,
    ):  # fmt: skip
        """q and k separately, v unchanged."""
        of_k = qkv.shape[2] - (num_heads_q or 0)
        parts = qkv.unbind(2) if qkv.dim() == 5 else qkv.split((num_heads_q, *[of_k // 2] * 2), 2)
        k_tables = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
        options = {"interleaved": interleaved, "seqlen_offsets": seqlen_offsets}
        q = cls.apply_rotary_emb(parts[0], cos, sin, **options)
        k = cls.apply_rotary_emb(parts[1], *k_tables, **options)
        join = torch.stack if qkv.dim() == 5 else torch.cat
        return join((q, k, parts[2]), 2)

    @classmethod
    def apply_rotary_emb_kv_(cls, kv, cos, sin, interleaved=False, seqlen_offsets=0):
        k = cls.apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, False, seqlen_offsets)
        return torch.stack((k, kv[:, :, 1]), 2)


def file_of(name):
    """A file of the package, imported without the package, which requires a GPU."""
    path = Path(PACKAGE.origin).parent.joinpath(*name.split(".")[1:])
    spec = spec_from_file_location(name, path.with_suffix(".py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["restated", "package"] if PACKAGE else ["restated"])
def documented(request, monkeypatch):
    if request.param == "restated":
        return Restated
    kernel = "flash_attn.ops.triton.rotary"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    for package in ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, kernel, file_of(kernel))
    return file_of("flash_attn.layers.rotary")


def assert_as_documented(got, expected, documented):
    """The bits of the formula. Gradients of packed tensors are sums of two that are rounded, and
    Triton's interpreter rounds towards zero.
    """
    assert got.dtype == expected.dtype
    if documented is Restated and got.dtype in (torch.float64, torch.float32):
        assert_same_bits(got, expected)
    else:
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, expected, rtol=2 * eps, atol=8 * eps)


def test_signatures_are_those_of_flash_attention(documented):
    for name in ("apply_rotary_emb", "apply_rotary_emb_qkv_", "apply_rotary_emb_kv_"):
        ours, theirs = (
            [(p.name, p.default) for p in inspect.signature(getattr(of, name)).parameters.values()]
            for of in (flash_attention, documented)
        )
        assert ours == theirs, name


# ---- the rotation of one tensor

DENSE, PACKED = (B, S, H, D), (3 * S, H, D)
VARLEN = {"cu_seqlens": CU_SEQLENS, "max_seqlen": 21}
OFFSETS = torch.tensor([0, 29, 7])
EACH = torch.tensor([35, 50, 0, 2])  # 50 is past the table, of no token
CASES = {
    "from 0": (DENSE, {}),
    "from 9": (DENSE, {"seqlen_offsets": 9}),
    "up to the last row": (DENSE, {"seqlen_offsets": L - S}),
    "each from its own, int64": (DENSE, {"seqlen_offsets": OFFSETS}),
    "each, int32": (DENSE, {"seqlen_offsets": torch.tensor([3, 0, 12], dtype=torch.int32)}),
    "packed": (PACKED, VARLEN),
    "packed, int64, no max_seqlen": (PACKED, {"cu_seqlens": CU_SEQLENS.long()}),
    "packed from 19": (PACKED, {**VARLEN, "seqlen_offsets": 19}),
    "packed, each from its own": (PACKED, {**VARLEN, "seqlen_offsets": EACH}),
}


@BY_DTYPE
def test_forward_and_backward_are_those_of_flash_attention(dtype, documented):
    by_formula = documented is Restated
    if dtype == torch.float64 and not by_formula:
        pytest.skip("flash-attention has no float64")
    every = [*product(CASES, (D, 6), (False, True))]
    for name, rotary_dim, interleaved in every if by_formula else every[::SLOW]:
        shape, options = CASES[name]
        if not by_formula and "no max_seqlen" in name:
            continue  # flash-attention requires it
        options = {"interleaved": interleaved, **options}
        x, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
        table = random_table(L, rotary_dim // 2, dtype=dtype)
        with naming((name, rotary_dim, interleaved)):
            results = []
            for function in (flash_attention.apply_rotary_emb, documented.apply_rotary_emb):
                # flash-attention has no gradients to tables; low precision sums them otherwise
                learned = by_formula and dtype == torch.float64
                leaves = [t.clone().requires_grad_() for t in (x, *(table if learned else ()))]
                y = function(*leaves, *(() if learned else table), **options)
                results.append((y.detach(), torch.autograd.grad(y, leaves, weight)))
            (got, gradients), (expected, of_formula) = results
            assert_as_documented(got, expected, documented)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(gradients, of_formula, rtol=8 * eps, atol=8 * eps)
            written = flash_attention.apply_rotary_emb(x, *table, inplace=True, **options)
            assert written is x
            assert_same_bits(x, got)


def test_tokens_after_the_last_sequence_take_one_row():
    x, table = random(70, H, D), random_table(L, D // 2)
    for offsets, row in ((4, 4), (torch.tensor([4, 9]), 0)):
        options = {"cu_seqlens": torch.tensor([0, 3, 20]), "seqlen_offsets": offsets}
        got = flash_attention.apply_rotary_emb(x, *table, max_seqlen=17, **options)
        rows = (t[row].expand(50, -1) for t in table)
        assert_same_bits(got[20:], reference.apply_rotary(x[20:], *rows))
    none = torch.zeros(1, dtype=torch.int32)  # no sequence at all
    assert flash_attention.apply_rotary_emb(x[:0], *table, cu_seqlens=none).shape == (0, H, D)


# ---- packed tensors in place

QKV, GROUPED = (B, S, 3, H, D), (B, S, H + 2 * KH, D)
IN_PLACE = {  # function, shape, tables, options
    "q, k and v of as many heads": ("qkv_", QKV, 2, {}),
    "from 9": ("qkv_", QKV, 2, {"seqlen_offsets": 9}),
    "k has tables of its own": ("qkv_", QKV, 4, {"seqlen_offsets": OFFSETS}),
    "grouped": ("qkv_", GROUPED, 2, {"num_heads_q": H, "seqlen_offsets": OFFSETS}),
    "grouped, tables of k": ("qkv_", GROUPED, 4, {"num_heads_q": H, "seqlen_offsets": OFFSETS}),
    "no heads of k": ("qkv_", (B, S, H, D), 2, {"num_heads_q": H}),
    "kv": ("kv_", (B, S, 2, H, D), 2, {}),
    "kv from 9": ("kv_", (B, S, 2, H, D), 2, {"seqlen_offsets": 9}),
    "kv, each from its own": ("kv_", (B, S, 2, H, D), 2, {"seqlen_offsets": OFFSETS}),
}


@BY_DTYPE
def test_packed_tensors_are_rotated_in_place(dtype, documented):
    """Forward in their memory; backward with one tensor of their size."""
    if dtype == torch.float64 and documented is not Restated:
        pytest.skip("flash-attention has no float64")
    every = [*product(IN_PLACE, (False, True))]
    for name, interleaved in every if documented is Restated else every[::SLOW]:
        function, shape, tables, options = IN_PLACE[name]
        if documented is not Restated and name == "no heads of k":
            continue  # its kernel is not made for that
        width = D // 2 - 2
        tables = [*random_table(L, width), *random_table(L, width, seed=5)][:tables]
        tables = [table.to(dtype) for table in tables]
        options = {"interleaved": interleaved, **options}
        rotate_, theirs = (
            getattr(of, f"apply_rotary_emb_{function}") for of in (flash_attention, documented)
        )
        leaf = random(*shape, dtype=dtype).requires_grad_()
        weight = random(*shape, dtype=dtype, seed=4)
        with naming((name, interleaved)):
            x = leaf.clone()
            y = rotate_(x, *tables, **options)
            assert y is x
            expected = theirs(leaf.clone(), *tables, **options)
            assert_as_documented(y.detach(), expected.detach(), documented)
            kept = weight.clone()
            with LargeTensors(leaf.numel()) as large:
                (gradient,) = torch.autograd.grad(y, leaf, weight, retain_graph=True)
            assert large.made_by == ["aten.clone.default"]
            assert_same_bits(weight, kept)
            (of_formula,) = torch.autograd.grad(expected, leaf, weight)
            assert_as_documented(gradient, of_formula, documented)
            (of_a_sum,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)  # of stride 0
            assert_same_bits(of_a_sum, torch.autograd.grad(y, leaf, torch.ones_like(leaf))[0])


def test_in_place_is_twice_differentiable_on_views_too():
    table, of_k = random_table(L, 2, dtype=torch.float64), random_table(L, 2, dtype=torch.float64)
    leaf = random(2, 3, 4, 2 * 4, dtype=torch.float64).requires_grad_()

    def function(leaf):
        qkv = (leaf * 1).unflatten(-1, (2, 4))[:, :, :3]  # a view, not dense
        y = flash_attention.apply_rotary_emb_qkv_(qkv, *table, *of_k)
        return flash_attention.apply_rotary_emb_kv_(y[:, :, 1:], *table)

    torch.autograd.gradcheck(function, leaf)
    torch.autograd.gradgradcheck(function, leaf)


def test_in_place_refuses_before_it_writes():
    for leaf, learned, offset, message in (
        (True, False, 0, "qkv_: expected qkv to be no leaf that requires grad"),
        (False, True, 0, "qkv_: expected cos and sin to need no gradient"),
        (False, False, L - S + 1, r"position_ids in \[0, 40\).*got 40"),
    ):
        qkv = random(1, S, 3, H, D).requires_grad_(leaf)
        table = [t.requires_grad_(learned) for t in random_table(L, D // 2)]
        before, offsets = qkv.detach().clone(), torch.tensor([offset])
        with naming(message), pytest.raises(RuntimeError, match=message):
            flash_attention.apply_rotary_emb_qkv_(qkv, *table, *table, seqlen_offsets=offsets)
        assert_same_bits(qkv.detach(), before)
