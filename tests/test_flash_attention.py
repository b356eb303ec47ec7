"""The function of our signature beside flash-attention's own, where flash-attention and triton are
unpacked: the stage "kernels" of .ci/run does it. Its Triton kernel is run by Triton's interpreter,
on the CPU. Its files are imported by themselves: the package asks for a GPU.
"""

import contextlib
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import random, random_table

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
    """flash_attn.layers.rotary, with the kernel interpreted."""
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
    # Both compute in float32 and round once, which Triton's interpreter does towards zero.
    eps = torch.finfo(dtype).eps
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=eps, atol=eps)
