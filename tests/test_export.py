"""Programs of torch.export with dynamic sizes: run, saved and loaded, packaged by AOTInductor.

A C++ program runs such packages without Python: tests/cpp/package, in a stage of .ci/run.
"""

import io

import pytest
import torch
from exported_block import PACKAGED, ROTATIONS, SIZES, Layers, exported, inputs, packaged
from support import assert_same_bits

import rope_ext

# The operators of the graph, one way to rotate after the other.
OPERATORS = {
    "table": ["apply_rotary_qk"],
    "positions": ["apply_rotary_qk"],
    "frequencies": ["cos_sin", "apply_rotary_qk"],
    "length": ["cos_sin_cache", "apply_rotary", "apply_rotary"],
    "in_place": ["apply_rotary_qk"],  # and copies, which autograd understands
    "embedding": ["cos_sin", "apply_rotary_qk"],
}


def operators(program):
    """rope's operators of the graph, in order."""
    targets = [str(node.target) for node in program.graph.nodes]
    return [name.split(".")[1] for name in targets if name.startswith("rope.")]


@pytest.mark.parametrize(
    ("lowering", "rotations", "strict"),
    [("op", ROTATIONS, False), ("decompose", PACKAGED, True)],  # strict takes several times longer
    ids=["op", "decompose"],
)
def test_one_program_for_all_sizes_with_the_bits_of_the_model(lowering, rotations, strict):
    model = Layers(rotations).eval()
    with rope_ext.lowering(lowering):
        program = exported(model, strict=strict)
    expected = [name for rotation in rotations for name in OPERATORS[rotation]]
    if lowering == "decompose":
        expected = [name for name in expected if name.startswith("cos_sin")]
    assert operators(program) == expected

    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert operators(loaded) == expected
    for size in SIZES:
        for run in (program.module(), loaded.module()):
            assert_same_bits(run(*inputs(*size)), model(*inputs(*size)))


def test_program_without_gradients_rotates_in_place():
    model = Layers(["in_place"]).eval()
    with torch.no_grad():
        program = exported(model)
        assert operators(program) == ["apply_rotary_qk_"]
        for size in SIZES:
            assert_same_bits(program.module()(*inputs(*size)), model(*inputs(*size)))


def test_program_is_differentiable():
    model = Layers(["table", "frequencies"])
    model.requires_grad_(False)
    x, position_ids = inputs(*SIZES[0])
    gradients = []
    for run in (model, exported(model).module()):
        x = x.detach().requires_grad_()
        gradients.append(torch.autograd.grad(run(x, position_ids).square().sum(), x)[0])
    assert_same_bits(*gradients)


@pytest.mark.slow  # a C++ compiler works for 20 seconds
@pytest.mark.parametrize("lowering", ["op", "decompose"])
def test_package_of_aotinductor_has_the_numbers_of_the_model(lowering, tmp_path):
    """Sums of products may have another order, so it is near: an error would be 1e-3 or more."""
    run = torch._inductor.aoti_load_package(str(packaged(lowering, tmp_path)))
    model = Layers(PACKAGED).eval()
    with torch.no_grad():
        for size in SIZES:
            torch.testing.assert_close(run(*inputs(*size)), model(*inputs(*size)))
