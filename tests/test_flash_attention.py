"""Our functions compared to flash-attention's own, if flash-attention and triton are installed, as
in the stage "kernels hook" of .ci/run. Triton's interpreter runs its kernel on the CPU. Its files
are imported without the package, which requires a GPU.
"""

import contextlib
import inspect
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import random, random_table

from rope_ext.integrations.reference_apis import flash_attention
from rope_ext.integrations.reference_apis.flash_attention import apply_rotary_emb

if any(find_spec(name) is None for name in ("flash_attn", "triton", "einops")):
    pytest.skip("flash-attn, triton and einops are not all installed", allow_module_level=True)

FOLDER = Path(find_spec("flash_attn").origin).parent
B, S, H, D, L = 3, 11, 3, 16, 40
DENSE, PACKED = (B, S, H, D), (3 * S, H, D)
CU_SEQLENS = torch.tensor([0, 5, 5, 26, 33], dtype=torch.int32)  # one empty, all of the 33 tokens
VARLEN = {"cu_seqlens": CU_SEQLENS, "max_seqlen": 21}

CASES = {
    "from 0": (DENSE, {}),
    "up to the last row": (DENSE, {"seqlen_offsets": L - S}),
    "each from its own": (DENSE, {"seqlen_offsets": torch.tensor([0, 29, 7])}),
    "packed": (PACKED, VARLEN),
    "packed from 19": (PACKED, {**VARLEN, "seqlen_offsets": 19}),
    "packed, each from its own": (
        PACKED,
        {**VARLEN, "seqlen_offsets": torch.tensor([35, 39, 0, 2], dtype=torch.int32)},
    ),
}


def file_of(name):
    path = FOLDER.joinpath(*name.split(".")[1:]).with_suffix(".py")
    spec = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def theirs(monkeypatch):
    """flash_attn.layers.rotary, with an interpreted kernel."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    for package in ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    kernel = "flash_attn.ops.triton.rotary"
    monkeypatch.setitem(sys.modules, kernel, file_of(kernel))
    return file_of("flash_attn.layers.rotary")


@pytest.mark.parametrize(
    ("dtype", "rotary_dim", "inplace"),
    [(torch.float32, D, False), (torch.float16, D, True), (torch.bfloat16, 8, False)],
    ids=["float32", "float16, in place", "bfloat16, half of the channels"],
)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_those_of_flash_attention(
    case, rotary_dim, interleaved, dtype, inplace, theirs
):
    shape, options = CASES[case]
    table = random_table(L, rotary_dim // 2, dtype=dtype)
    x, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    results = []
    for function in (apply_rotary_emb, theirs.apply_rotary_emb):
        leaf = x.clone().requires_grad_()
        y = function(leaf.clone(), *table, interleaved=interleaved, inplace=inplace, **options)
        (gradient,) = torch.autograd.grad(y, leaf, weight.clone())
        results.append((y.detach(), gradient))
    assert_near(*results)


@pytest.mark.parametrize("name", ["", "_qkv_", "_kv_"])
def test_signatures_are_those_of_flash_attention(name, theirs):
    ours, expected = (
        inspect.signature(getattr(module, f"apply_rotary_emb{name}")).parameters.values()
        for module in (flash_attention, theirs)
    )
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in expected]


OFFSETS = torch.tensor([0, 29, 7])
IN_PLACE = {
    "qkv": ("_qkv_", (B, S, 3, H, D), 2, {"seqlen_offsets": 9}),
    "grouped qkv": ("_qkv_", (B, S, H + 4, D), 2, {"seqlen_offsets": OFFSETS, "num_heads_q": H}),
    "qkv, tables of k": ("_qkv_", (B, S, 3, H, D), 4, {"seqlen_offsets": OFFSETS}),
    "kv": ("_kv_", (B, S, 2, H, D), 2, {"seqlen_offsets": OFFSETS}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("case", IN_PLACE)
def test_packed_in_place_forward_and_backward_are_those_of_flash_attention(
    case, interleaved, dtype, theirs
):
    name, shape, tables, options = IN_PLACE[case]
    tables = [*random_table(L, 6, dtype=dtype), *random_table(L, 6, dtype=dtype, seed=3)][:tables]
    x, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    results = []
    for module in (flash_attention, theirs):
        leaf = x.clone().requires_grad_()
        packed = leaf.clone()
        rotate_ = getattr(module, f"apply_rotary_emb{name}")
        y = rotate_(packed, *tables, interleaved=interleaved, **options)
        assert y.data_ptr() == packed.data_ptr()
        (gradient,) = torch.autograd.grad(y, leaf, weight.clone())
        results.append((y.detach(), gradient))
    assert_near(*results)


def assert_near(ours, theirs):
    """Both compute in float32 and round once; Triton's interpreter rounds towards zero."""
    for got, expected in zip(ours, theirs, strict=True):
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, expected, rtol=eps, atol=eps)
