"""The module with torchtune's signature compared to its documented formula, and to torchtune's own
module if torchtune is installed: the stage "kernels hook" of .ci/run installs it without its
dependencies. The file of the rotary module needs none of them and is imported without the package.
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from support import DTYPES, assert_same_bits, name_of, naming, random, random_positions
from torch import nn

from rope_ext import reference
from rope_ext.integrations.reference_apis.torchtune import RotaryPositionalEmbeddings

PACKAGE = find_spec("torchtune")
B, S, H, D, L = 3, 11, 4, 16, 64


class Restated(nn.Module):
    def __init__(self, dim, max_seq_len, base):
        super().__init__()
        self.frequency = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)

    def forward(self, x, input_pos):
        at = torch.arange(x.shape[1]) if input_pos is None else input_pos
        table = reference.cos_sin(self.frequency, at if at.dim() == 2 else at[None])
        return reference.apply_rotary(x.double(), *table, interleaved=True).to(x.dtype)


@pytest.fixture(params=["restated", "package"] if PACKAGE else ["restated"])
def documented(request):
    if request.param == "restated":
        return Restated
    path = Path(PACKAGE.origin).parent / "modules" / "position_embeddings.py"
    spec = spec_from_file_location("rotary", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RotaryPositionalEmbeddings


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_forward_and_backward_are_torchtunes(dtype, documented):
    theirs, ours = (
        make(dim=D, max_seq_len=L, base=500) for make in (documented, RotaryPositionalEmbeddings)
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, weight = random(B, S, H, D, dtype=dtype), random(B, S, H, D, dtype=dtype, seed=1)
    positions = random_positions(B, S, rows=L)
    for input_pos in (None, positions, positions[0], positions[:1].int()):
        results = []
        for module in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = module(leaf, input_pos=input_pos)
            results.append((y, *torch.autograd.grad((y * weight).sum(), leaf)))
        # Positions of 63 times frequencies, rounded to float32: angles differ by up to 63 x 2^-24.
        # torchtune computes in float32, also for float64, and rounds the gradient's two parts.
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        with naming(input_pos):
            for got, expected in zip(*results, strict=True):
                assert got.dtype == expected.dtype
                torch.testing.assert_close(
                    got, expected, rtol=2 * eps, atol=max(8 * eps, 4 * L * 2.0**-24)
                )


def test_frequencies_survive_casts_and_come_back_from_meta():
    module = RotaryPositionalEmbeddings(D)
    inv_freq = module.inv_freq.clone()
    assert not module.state_dict()
    assert_same_bits(module.bfloat16().inv_freq, inv_freq)
    module.to("meta").to_empty(device="cpu").rope_init()
    assert_same_bits(module.inv_freq, inv_freq)
    assert module(random(1, S, H, D), input_pos=torch.tensor([10**6] * S)).isfinite().all()
