"""The module with torchtune's signature compared to torchtune's own, if torchtune is installed: the
stage "kernels hook" of .ci/run installs it without its dependencies. The file of the rotary module
needs none of them and is imported without the package, which requires an old torchao.
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from support import DTYPES, name_of, random, random_positions

from rope_ext.integrations.reference_apis.torchtune import RotaryPositionalEmbeddings

if find_spec("torchtune") is None:
    pytest.skip("torchtune is not installed", allow_module_level=True)

B, S, H, D, L = 3, 11, 4, 16, 64


def of_torchtune():
    folder = Path(find_spec("torchtune").origin).parent
    spec = spec_from_file_location("rotary", folder / "modules" / "position_embeddings.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RotaryPositionalEmbeddings


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("positions", [None, (B, S), (S,)], ids=["index", "each", "all"])
def test_forward_and_backward_are_torchtunes(positions, dtype):
    arguments = {"dim": D, "max_seq_len": L, "base": 500}
    theirs, ours = of_torchtune()(**arguments), RotaryPositionalEmbeddings(**arguments)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    input_pos = None if positions is None else random_positions(*positions, rows=L)
    x, weight = random(B, S, H, D, dtype=dtype), random(B, S, H, D, dtype=dtype, seed=1)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf, input_pos=input_pos)
        (y * weight).sum().backward()
        results.append((y, leaf.grad))
    # Positions of 63 times frequencies, rounded to float32: angles differ by up to 63 x 2^-24. They
    # compute in float32, also for float64, and round the gradient's two parts separately.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=2 * eps, atol=max(8 * eps, 4 * L * 2.0**-24))
