"""apply_rotary_quantize: the rotation, rounded to float8 by a scale of each group of channels."""

import math

import pytest
import torch
from appending import Appending, changed
from ranks import RANKS, on_every_rank, place
from support import (
    DTYPES,
    FLOAT8,
    VIEWS,
    assert_same_bits,
    guarded,
    in_layout,
    naming,
    pairwise,
    random,
    random_cache,
    random_positions,
    random_table,
)
from torch.distributed.tensor import Replicate, Shard

import rope_ext
from rope_ext import reference

F64, F32, F16, BF16 = DTYPES
E4M3, E5M2 = FLOAT8
B, S, H, D, L = 2, 5, 4, 32, 9
DEEPSEEK = {"rotary_offset": 448, "interleaved": True, "inverse": True}  # V4: 64 of 512 channels


def some_heads(
    device, dtype=F32, out_dtype=E4M3, *, tokens=(B, S), heads=H, dim=D, width=None, group_size=16
):
    """Of sizes that differ from group to group."""
    cos, sin = random_table(L, width or dim // 2, device=device)
    x = random(*tokens, heads, dim, dtype=F64).unflatten(-1, (-1, group_size))
    sizes = torch.exp2(random(*x.shape[:-1], seed=1, dtype=F64) * 4)
    return {
        "x": (x * sizes[..., None]).flatten(-2).to(dtype).to(device),
        "cos": cos,
        "sin": sin,
        "position_ids": random_positions(*tokens, rows=L, device=device),
        "x_out": random_cache(*tokens, heads, dim, dtype=out_dtype, device=device),
        "scale_out": torch.full((*tokens, heads, dim // group_size), math.nan).to(device),
        "group_size": group_size,
    }


QUANTIZE = Appending(
    torch.ops.rope.apply_rotary_quantize,
    rope_ext.apply_rotary_quantize,
    reference.apply_rotary_quantize,
    some_heads,
    ("x_out", "scale_out"),
)


def assert_quantises(given, **options):
    """The bits are those of the steps in plain PyTorch, and other tensors do not change."""
    kept = {n: t.clone() for n, t in given.items() if isinstance(t, torch.Tensor)}
    expected = QUANTIZE.expected_of({**given, **options})
    QUANTIZE.append({**given, **options})
    for name, t in {**kept, **expected}.items():
        assert_same_bits(given[name], t, name)


# ---- the numbers

ROTATIONS = {
    "all channels": ({}, {}),
    "the last channels, backwards": (
        {"dim": 48, "width": 8},
        {"rotary_offset": 32, "interleaved": True, "inverse": True},
    ),
    "a part, of odd pairs": ({"dim": 33, "width": 3, "group_size": 11}, {"rotary_offset": 5}),
    "another order": ({"width": 4}, {"rotary_offset": 8, "interleaved_out": True}),
    "the other way": ({"width": 8}, {"interleaved": True, "interleaved_out": False}),
    "one angle a channel": ({"width": 24}, {"rotary_dim": 24, "inverse": True}),
}


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "rotation", "power_of_two"),
    pairwise(dtype=DTYPES, out_dtype=FLOAT8, rotation=ROTATIONS, power_of_two=(False, True)),
)
def test_bits_are_those_of_the_separate_steps(dtype, out_dtype, rotation, power_of_two, backend):
    sizes, options = rotation
    given = some_heads(backend, dtype, out_dtype, **sizes)
    assert_quantises(given, power_of_two_scales=power_of_two, **options)


SIZES = {
    "DeepSeek-V4": ({"heads": 16, "dim": 512, "width": 32, "group_size": 128}, DEEPSEEK),
    "a scale a head": ({"dim": 64, "group_size": 64}, {}),
    "a scale a channel": ({"dim": 8, "group_size": 1}, {}),
    "groups of an odd length": ({"dim": 42, "group_size": 21}, {}),
    "long heads, in several pieces or steps": (
        {"heads": 2, "dim": 9216, "width": 1030, "group_size": 128},
        {"rotary_offset": 7000},
    ),
    "the smallest": ({"heads": 1, "dim": 2, "group_size": 2}, {}),
    "no tokens": ({"tokens": (2, 0)}, {}),
    "no heads": ({"heads": 0}, {}),
}


@pytest.mark.parametrize(("sizes", "options"), SIZES.values(), ids=SIZES)
def test_sizes(sizes, options, device):
    for power_of_two in (False, True):
        with naming(f"power_of_two_scales={power_of_two}"):
            given = some_heads(device, BF16, **sizes)
            assert_quantises(given, power_of_two_scales=power_of_two, **options)


def test_special_values(backend):
    """Zeros, less than eps, NaN and infinity: each group for itself."""
    for dtype, power_of_two in ((F32, False), (F32, True), (F64, False), (BF16, True)):
        given = some_heads(backend, dtype, width=8)
        x = given["x"].cpu()
        x[0, 0, 0, :16] = 0
        x[0, 0, 1, 16:] *= 1e-30
        x[0, 0, 2, 20] = math.nan
        x[0, 1, 0, 31] = -math.inf
        x[0, 1, 1, 16:] = torch.finfo(dtype).max
        x[0, 1, 2, 16:] = 448 * 2.0**-3  # a scale that is a power of two, and the next float above
        x[0, 1, 3, 16:] = torch.nextafter(torch.tensor(448 * 2.0**-3), torch.tensor(1e9)).to(dtype)
        given["x"] = x.to(backend)
        with naming((dtype, power_of_two)):
            for eps in (1e-10, 3.0):
                assert_quantises(given, power_of_two_scales=power_of_two, eps=eps)
            if power_of_two:
                assert given["scale_out"].cpu()[0, 0, 0, 0] == 2.0**-7  # 3 / 448, rounded up


def test_scales_are_exact_powers_of_two(device):
    given = some_heads(device, BF16)
    QUANTIZE.append({**given, "power_of_two_scales": True})
    scale = given["scale_out"].cpu()
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)


def test_rotated_values_come_back(device):
    """Within half a step of float8 at the top of a group."""
    given = some_heads(device, F32, dim=512, width=32, group_size=128)
    out, scale = rope_ext.apply_rotary_quantize(**given, **DEEPSEEK)
    rows = given["cos"], given["sin"], given["position_ids"]
    exact = rope_ext.apply_rotary(given["x"], *rows, **DEEPSEEK).unflatten(-1, (-1, 128))
    back = out.float().unflatten(-1, (-1, 128)) * scale[..., None]
    assert ((back - exact).abs() <= exact.abs().amax(-1, keepdim=True) * 2**-4).all()


# ---- where it is written


def test_groups_of_heads_side_by_side(device):
    """[G, T, heads of a group * D], as the output projection of DeepSeek-V4 takes it: the groups
    are sequences.
    """
    tokens, groups, heads, dim = 7, 4, 2, 512
    sizes = {"heads": groups * heads, "dim": dim, "width": 32, "group_size": 128}
    plain = some_heads(device, BF16, tokens=(tokens,), **sizes)
    expected = QUANTIZE.expected_of({**plain, **DEEPSEEK})
    out = torch.zeros(groups, tokens, heads * dim, dtype=torch.uint8, device=device).view(E4M3)
    # scales with tokens side by side, as DeepGEMM wants them
    scales = torch.zeros(groups, heads * 4, tokens, device=device).transpose(1, 2)
    given = {
        **plain,
        "x": plain["x"].unflatten(1, (groups, heads)),  # [T, G, heads, D]
        "x_out": out.view(groups, tokens, heads, dim).transpose(0, 1),
        "scale_out": scales.unflatten(2, (heads, 4)).transpose(0, 1),
    }
    rope_ext.apply_rotary_quantize(**given, **DEEPSEEK, layout="sbhd")
    for got, name in ((out, "x_out"), (scales, "scale_out")):
        wanted = expected[name].flatten(1).unflatten(1, (groups, -1)).transpose(0, 1)
        assert_same_bits(got, wanted, name)


@pytest.mark.parametrize("view", VIEWS)
def test_only_the_elements_of_a_view_are_written(view, device):
    given = some_heads(device, BF16)
    wholes = []

    def base(*shape):
        inner, whole = guarded(*shape, dtype=E4M3, device=device)
        wholes.append(whole)
        return inner

    given["x_out"] = VIEWS[view](base, B, S, H, D)
    given["scale_out"] = (
        torch.full((2, H, S, B, 2), math.nan).to(device)[..., 1].permute(3, 2, 1, 0)
    )
    expected = QUANTIZE.expected_of(given)
    whole = wholes[0].cpu().clone()
    part = given["x_out"]
    whole.view(torch.uint8).as_strided(part.shape, part.stride(), part.storage_offset()).copy_(
        expected["x_out"].view(torch.uint8)
    )
    QUANTIZE.append(given)
    assert_same_bits(wholes[0], whole)
    assert_same_bits(given["scale_out"], expected["scale_out"])


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
def test_function_takes_every_layout(layout, device):
    given = some_heads(device, tokens=(B * S,) if layout == "thd" else (B, S))
    expected = QUANTIZE.expected_of(given)
    call = {n: in_layout(t.cpu(), layout).contiguous().to(device)
            if n in ("x", "x_out", "scale_out") else t for n, t in given.items()}  # fmt: skip
    results = rope_ext.apply_rotary_quantize(**call, layout=layout)
    for name, result in zip(("x_out", "scale_out"), results, strict=True):
        assert result is call[name]
        assert_same_bits(result, in_layout(expected[name], layout))


def test_in_a_graph():
    given = some_heads("cpu", BF16)
    expected = QUANTIZE.expected_of(given)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def step(given):
        return rope_ext.apply_rotary_quantize(**given)[1] * 1

    assert_same_bits(step(given), expected["scale_out"])
    assert_same_bits(given["x_out"], expected["x_out"])
    assert len(graphs) == 1


def test_heads_are_sharded_together():
    given = some_heads("cpu", BF16, heads=2 * RANKS)
    expected = QUANTIZE.expected_of(given)
    group_size = given.pop("group_size")

    def on_rank(mesh):
        shards = {n: place(t.clone(), mesh, Shard(2) if n in ("x", *expected) else Replicate())
                  for n, t in given.items()}  # fmt: skip
        QUANTIZE.append({**shards, "group_size": group_size})
        return [shards[name] for name in expected]

    for got, whole in zip(on_every_rank(on_rank), expected.values(), strict=True):
        assert_same_bits(got, whole)


# ---- refusals

REFUSALS = [
    (changed("x_out", lambda t: t.half()), "x_out of float8_e4m3fn or float8_e5m2, got float16"),
    (changed("x_out", lambda t: t[:, 1:]), "x_out of x's shape [2, 5, 4, 32], got [2, 4, 4, 32]"),
    (changed("x_out", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)), "x_out to have "
     "stride 1 in its last dimension, got strides"),
    (changed("x_out", lambda t: t[:1].expand(B, -1, -1, -1)), "x_out to have no two elements in "
     "one place, as it is written, got strides"),
    (lambda g: {"x_out": g["x"].view(E4M3)[..., :D]}, "x to share no memory with x_out, which is "
     "written, got overlapping tensors"),
    (changed("scale_out", lambda t: t.double()), "scale_out to be float32, got float64"),
    (changed("scale_out", lambda t: t[..., :1]), "scale_out to have shape [2, 5, 4, 2], one for "
     "each group of x's channels, got [2, 5, 4, 1]"),
    (changed("scale_out", lambda t: t[..., :1].expand(-1, -1, -1, 2)), "scale_out to have no two "
     "elements in one place, as it is written, got strides"),
    (lambda g: {"scale_out": g["x_out"].view(F32)[..., :2]}, "x_out and scale_out to share no "
     "memory, as both are written, got overlapping tensors"),
    *((lambda g, n=n: {"group_size": n}, "group_size to divide x's channels, 32, into at most 8192 "
       f"groups, got {n}") for n in (0, -16, 12, 64)),
    *((lambda g, e=e: {"eps": e}, f"eps to be between 1e-30 and 1e30, got {e:f}")
      for e in (0.0, -1.0, 1e-31, math.inf, math.nan)),
    (changed("x", lambda t: t.int()), "x to be float64, float32, float16 or bfloat16, got int32"),
]  # fmt: skip


def test_bad_argument_is_refused_and_nothing_written(device):
    for change, expected in REFUSALS:
        given = some_heads(device)
        QUANTIZE.assert_refused({**given, **change(given)}, expected)


def test_groups_have_to_fit_into_shared_memory(device):
    sizes = {"tokens": (1, 1), "heads": 1, "width": 1, "group_size": 1}
    assert_quantises(some_heads(device, dim=8192, **sizes))
    expected = "group_size to divide x's channels, 8193, into at most 8192 groups, got 1"
    QUANTIZE.assert_refused(some_heads(device, dim=8193, **sizes), expected)


def test_position_past_the_table_is_refused():
    given = some_heads("cpu")
    given["position_ids"][1, 2] = L
    QUANTIZE.assert_refused(given, f"position_ids in [0, {L})")
