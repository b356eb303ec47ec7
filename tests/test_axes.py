"""Tokens with several positions, one for each axis, and positions that are not integers: cos_sin
with axes and floating position_ids.
"""

import importlib
import math
import re
from itertools import product

import pytest
import torch
from support import (
    DTYPES,
    assert_same_bits,
    name_of,
    naming,
    random,
    random_positions,
)

import rope_ext
from rope_ext import reference

rope = torch.ops.rope
F64, F32, F16, BF16 = DTYPES
INTEGERS = (torch.int32, torch.int64)
B, S, P = 2, 5, 8
HEAD_DIM = 2 * P


def positions_of(*shape, dtype=torch.int64, device="cpu", seed=0):
    if dtype in INTEGERS:
        return random_positions(*shape, rows=1000, dtype=dtype, device=device, seed=seed)
    return (30 * random(*shape, seed=seed)).to(dtype).to(device)


def inv_freq_of(pairs, dtype=F32, device="cpu"):
    return rope_ext.frequencies.default(2 * pairs)[0].to(dtype).to(device)


# ---- the meaning of axes

# name -> axis of each pair
MAPS = {
    "one": [0] * 8,
    "sections": [0, 0, 1, 1, 1, 2, 2, 2],
    "taking turns": [0, 1, 2, 0, 1, 2, 0, 0],
    "an axis without a pair": [2, 2, 0, 0, 0, 0, 2, 2],
    "more than a chunk": [i % 3 for i in range(300)],
    "none": [],
}


@pytest.mark.parametrize("position_dtype", [*INTEGERS, *DTYPES], ids=name_of)
def test_pair_turns_by_the_position_of_its_axis(position_dtype, device):
    axes_dtype = torch.int32 if position_dtype in (torch.int64, F64, BF16) else torch.int64
    shapes = ((B, S), F32), ((S,), BF16), ((), F64), ((2, 1, 3), F16), ((0,), F32)
    for (name, axes), (shape, dtype) in product(MAPS.items(), shapes):
        inv_freq = inv_freq_of(len(axes)) if axes else torch.empty(0)
        ids = positions_of(3, *shape, dtype=position_dtype)
        options = {"attention_scaling": 1.25, "dtype": dtype}
        each = [rope.cos_sin(inv_freq, of_axis, **options) for of_axis in ids]
        on_device = inv_freq.to(device), ids.to(device)
        of_pairs = torch.tensor(axes, dtype=axes_dtype, device=device)
        for a, *by_axis in zip(rope.cos_sin(*on_device, of_pairs, **options), *each, strict=True):
            stacked = torch.stack(by_axis, -1)  # [.., P, 3]
            of_each = of_pairs.cpu().long().expand(*shape, len(axes)).unsqueeze(-1)
            with naming(f"{name}, {shape}, {dtype}"):
                assert a.is_contiguous()
                assert_same_bits(a, stacked.gather(-1, of_each).squeeze(-1))


def test_axes_and_positions_may_be_views(device):
    axes = torch.tensor([0, 9, 1, 9, 1, 9, 0, 9], device=device)[::2]
    ids = positions_of(S, 2, 2, dtype=F64, device=device).permute(1, 2, 0)[:, :, ::2]
    inv_freq = inv_freq_of(4, device=device)
    got = rope.cos_sin(inv_freq, ids, axes=axes)
    plain = [t.cpu().contiguous().to(device) for t in (ids, axes)]
    for a, b in zip(got, rope.cos_sin(inv_freq, plain[0], axes=plain[1]), strict=True):
        assert_same_bits(a, b)


def test_vectors_have_the_bits_of_the_portable_code(vector_code):
    axes = torch.arange(300) % 3
    for dtype in (torch.int64, F64, BF16):
        ids, inv_freq = positions_of(3, 90, dtype=dtype), inv_freq_of(300)
        rows = []
        for name in (vector_code, "portable"):
            rope_ext._C.set_cpu_capability(name)
            cos, sin = rope.cos_sin(inv_freq, ids, axes=axes)
            rows.append((cos, sin, rope.cos_sin_backward(cos, sin, inv_freq, ids, axes=axes)))
        for a, b in zip(*rows, strict=True):
            assert_same_bits(a, b)


def test_reference_has_the_axes(device):
    axes = torch.tensor(MAPS["taking turns"])
    ids, inv_freq = positions_of(3, B, S, dtype=F64), inv_freq_of(P, F64)
    got = rope.cos_sin(inv_freq.to(device), ids.to(device), axes=axes.to(device))
    expected = reference.cos_sin(inv_freq, ids, axes=axes)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)


# ---- models of transformers


def assert_near_theirs(got, theirs, ids, inv_freq, axes):
    """They round the angle to float32, so the rotation is off by at most 2^-24 of the angle. Their
    cos and sin are within an ulp, 2^-24, ours within half of one: together less than 2^-23.
    """
    angle = ids.double()[axes].movedim(0, -1) * inv_freq.double()
    allowed = 2.0**-24 * torch.cat((angle, angle), -1).abs() + 2.0**-23
    for a, b in zip(got, theirs, strict=True):
        assert a.shape == b.shape
        assert ((a.double() - b.double()).abs() <= allowed).all()


def interleaved(sections):
    """Qwen3-VL: height and width take turns with time while they have pairs left."""
    axes = torch.zeros(sum(sections), dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def chunked(sections):
    """Qwen2-VL: the pairs of time, of height, of width."""
    return torch.arange(len(sections)).repeat_interleave(torch.tensor(sections))


@pytest.mark.parametrize(
    ("family", "module", "sections", "axes"),
    [
        ("qwen2_vl", "Qwen2VLRotaryEmbedding", [16, 24, 24], chunked),
        ("qwen3_vl", "Qwen3VLTextRotaryEmbedding", [24, 20, 20], interleaved),
    ],
)
def test_text_of_a_model_with_images(family, module, sections, axes):
    transformers = pytest.importorskip("transformers")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = transformers.PretrainedConfig(
        head_dim=128, max_position_embeddings=512, rope_parameters=parameters
    )
    theirs = getattr(modeling, module)(config)
    ids = positions_of(3, B, S)
    expected = theirs(torch.zeros(()), ids)  # [B, S, D], both halves alike
    axes = axes(sections)
    got = rope.cos_sin(theirs.inv_freq, ids, axes=axes)
    assert_near_theirs([torch.cat((t, t), -1) for t in got], expected, ids, theirs.inv_freq, axes)


def test_centres_of_patches_of_dinov3():
    """Positions from -1 to 1, and 2 pi in the frequencies."""
    modeling = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    config = modeling.DINOv3ViTConfig(hidden_size=128, num_attention_heads=2, image_size=64)
    theirs = modeling.DINOv3ViTRopePositionEmbedding(config).eval()
    expected = theirs(torch.zeros(1, 3, 48, 80))
    ids = modeling.get_patches_center_coordinates(3, 5, dtype=F32, device="cpu").t()  # [2, 15]
    inv_freq = (2 * math.pi * theirs.inv_freq.double()).repeat(2)
    axes = torch.arange(2).repeat_interleave(len(theirs.inv_freq))
    got = rope.cos_sin(inv_freq, ids, axes=axes, dtype=F32)
    half = [t[..., : t.shape[-1] // 2] for t in expected]
    # 2 pi, its product with a position, and that with a frequency: three roundings of the angle
    for a, b in zip(got, half, strict=True):
        assert (a - b).abs().max() <= 3 * 2.0**-24 * 2 * math.pi + 2.0**-23


def test_module_takes_fractional_positions():
    module = rope_ext.RotaryEmbedding(HEAD_DIM, max_position_embeddings=64)
    ids = positions_of(B, S, dtype=F32)
    expected = rope.cos_sin(module.inv_freq, ids)
    for a, b in zip(module.cos_sin(ids), expected, strict=True):
        assert_same_bits(a, b)
    q, k = random(B, S, 4, HEAD_DIM), random(B, S, 2, HEAD_DIM)
    for a, b in zip(module(q, k, ids), rope.apply_rotary_qk(q, k, *expected), strict=True):
        assert_same_bits(a, b)


# ---- derivatives


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gradients_have_the_dtypes_of_what_they_are_of(dtype, device):
    inv_freq = inv_freq_of(P, BF16, device).requires_grad_()
    ids = positions_of(3, S, dtype=dtype, device=device).requires_grad_()
    axes = torch.tensor(MAPS["sections"], device=device)
    cos, sin = rope.cos_sin(inv_freq, ids, axes=axes)
    seeds = [random(*cos.shape, device=device, seed=s) for s in (1, 2)]
    got = torch.autograd.grad((cos, sin), (inv_freq, ids), seeds)
    assert [g.dtype for g in got] == [BF16, dtype]
    wide = [t.detach().cpu().double().requires_grad_() for t in (inv_freq, ids)]
    exact = torch.autograd.grad(
        reference.cos_sin(*wide, axes=axes.cpu()), wide, [s.cpu().double() for s in seeds]
    )
    for a, b, of in zip(got, exact, (BF16, dtype), strict=True):
        # rounded once from float64; the sums cancel, so one unit is added to their size
        unit = torch.finfo(of).eps
        torch.testing.assert_close(a.cpu().double(), b, rtol=unit, atol=2.0**-40)


def test_axes_written_before_backward_are_refused(device):
    inv_freq = inv_freq_of(P, F64, device).requires_grad_()
    axes = torch.zeros(P, dtype=torch.int64, device=device)
    cos, sin = rope.cos_sin(inv_freq, positions_of(3, S, device=device), axes=axes)
    axes.fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (cos + sin).backward(torch.ones_like(cos))


# ---- refusals

BAD = {
    "floating axes": ({"axes": torch.zeros(P)}, "axes to be int32 or int64", "float32"),
    "too few axes": (
        {"axes": torch.zeros(P - 1, dtype=torch.int64)},
        f"axes to have shape [P] = [{P}], as inv_freq",
        f"[{P - 1}]",
    ),
    "an axis that is not there": (
        {"axes": torch.tensor([0, 1, 2, 3, 0, 0, 0, 0])},
        "axes in [0, 3), the first dimension of position_ids",
        "3 at index [3]",
    ),
    "a negative axis": (
        {"axes": torch.tensor([0, 1, 2, 2, 0, 0, 0, -1], dtype=torch.int32)},
        "axes in [0, 3), the first dimension of position_ids",
        "-1 at index [7]",
    ),
    "no axis": (
        {"position_ids": torch.empty(0, S)},
        "position_ids to have shape [A, ...] with axes, A at least 1",
        f"[0, {S}]",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_axes_are_refused(bad):
    change, expected, got = BAD[bad]
    good = {"position_ids": positions_of(3, S), "axes": torch.zeros(P, dtype=torch.int64)}
    arguments = {**good, **change}
    for function in (rope.cos_sin, rope_ext.cos_sin):
        with pytest.raises(
            RuntimeError, match=re.escape(f"rope::cos_sin: expected {expected}, got {got}")
        ):
            function(inv_freq_of(P), **arguments)


def test_axes_without_positions_and_on_another_device_are_refused():
    axes, rows, f = torch.zeros(P, dtype=torch.int64), torch.zeros(S, P), inv_freq_of(P)
    with pytest.raises(RuntimeError, match="expected position_ids with axes, got None"):
        rope.cos_sin_backward(rows, rows, f, axes=axes)
    with pytest.raises(RuntimeError, match="expected axes on the device of inv_freq, cpu"):
        rope.cos_sin(f, positions_of(3, S), axes=axes.to("meta"))
    shape = re.escape(f"expected grad_cos to have shape [*[3, {S}][1:], {P}], got [3, {S}, {P}]")
    with pytest.raises(RuntimeError, match=shape):
        rope.cos_sin_backward(*[torch.zeros(3, S, P)] * 2, f, positions_of(3, S), axes=axes)


@pytest.mark.cuda
def test_axis_that_is_not_there_gives_nan_on_cuda_and_raises_on_demand(monkeypatch):
    axes = torch.tensor([0, 3, 1, -1, 2, 2**40, 0, 0])
    outside = (axes < 0) | (axes > 2)
    arguments = [t.cuda() for t in (inv_freq_of(P), positions_of(3, S), axes)]
    monkeypatch.setenv("ROPE_EXT_CHECK", "0")
    for table in rope.cos_sin(*arguments[:2], axes=arguments[2]):
        assert torch.equal(table.cpu().isnan(), outside.expand(S, P))
    monkeypatch.setenv("ROPE_EXT_CHECK", "1")
    with pytest.raises(RuntimeError, match=re.escape("axes in [0, 3), the first dimension")):
        rope.cos_sin(*arguments[:2], axes=arguments[2])
