"""The operators that write to a paged cache, with q as float8: the bits of the separate steps."""

import math

import pytest
import torch
from appending import D_LATENT, F8, KV, LATENT, NORMED, B, D, H, K, R, S
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
)
from torch.distributed.tensor import Replicate, Shard

F64, F32, F16, BF16 = DTYPES
APPENDING = {"kv": KV, "normed": NORMED, "latent": LATENT}
SCALES = "none", "one", "a head", "own"
ROTATIONS = {  # sizes and options of the caches of keys and values, and of latents
    "all channels": ({}, {}, {"dim": R}, {}),
    "a part, of odd pairs": ({"width": 3}, {"rotary_offset": 5}, {"dim": 11, "rotary_dim": 6}, {}),
    "interleaved": ({}, {"interleaved": True}, {}, {"interleaved": True}),
    "another order": (
        {"width": 4},
        {"rotary_offset": 8, "inverse": True},
        {},
        {"interleaved": True, "interleaved_out": False},
    ),
    "one angle a channel": ({"width": 12}, {"rotary_dim": 12}, {}, {}),
}


def with_float8_q(given, dtype=F8, scale="none"):
    """A q_out of this dtype for q, with a scale, or scales of its own."""
    q = given["q"]
    *tokens, heads, _ = q.shape
    made = {"q_out": random_cache(*q.shape, dtype=dtype, device=q.device)}
    if scale == "one":
        made["q_scale"] = torch.tensor([0.37]).to(q.device)
    elif scale == "a head":
        made["q_scale"] = torch.linspace(0.01, 3, heads).to(q.device)
    elif scale == "own":
        made["q_scale_out"] = torch.full((*tokens, heads), math.nan).to(q.device)
    return {**given, **made}


@pytest.fixture(params=APPENDING.values(), ids=APPENDING)
def appending(request):
    return request.param


@pytest.mark.parametrize(
    ("appending", "dtype", "q_dtype", "cache_dtype", "scale", "rotation"),
    pairwise(
        appending=APPENDING,
        dtype=DTYPES,
        q_dtype=FLOAT8,
        cache_dtype={"of the model": None, "float8": F8},
        scale=SCALES,
        rotation=ROTATIONS,
    ),
)
def test_q_becomes_what_rotation_and_quantisation_give(
    appending, dtype, q_dtype, cache_dtype, scale, rotation, backend
):
    """All its channels, and q itself stays as it is; the caches get what they get without."""
    sizes, options = rotation[2:] if appending is LATENT else rotation[:2]
    given = appending.arguments(backend, dtype, cache_dtype, **sizes)
    q = given["q"].cpu().clone()
    appending.assert_appends(with_float8_q(given, q_dtype, scale), **options)
    assert_same_bits(given["q"], q)


SIZES = {
    "Qwen3": ((32, 8), 128),
    "long heads, in several pieces or steps": ((3, 1), 4100),
    "more keys than queries": ((1, 5), 64),
    "one head": ((1, 1), 2),
}


@pytest.mark.parametrize("appending", [KV, NORMED], ids=["kv", "normed"])
@pytest.mark.parametrize(("heads", "dim"), SIZES.values(), ids=SIZES)
def test_numbers_of_heads_and_channels(heads, dim, appending, device):
    for scale in ("one", "own"):
        sizes = {"tokens": (7,), "heads": heads, "dim": dim}
        given = appending.arguments(device, BF16, F8, **sizes)
        with naming(scale):
            appending.assert_appends(with_float8_q(given, scale=scale))


def test_own_scales_of_heads_that_share_a_norm(device):
    for heads, dim in (((H, K), D), ((40, 40), 128), ((7, 3), 40)):
        given = NORMED.arguments(device, BF16, tokens=(3,), heads=heads, dim=dim)
        for name, count in zip(("q_weight", "k_weight"), heads, strict=True):
            given[name] = random(count, dim, dtype=BF16, device=device, seed=count)
        with naming((heads, dim)):
            NORMED.assert_appends(with_float8_q(given, scale="own"))


@pytest.mark.parametrize(
    ("heads", "dim", "rank"), [(16, 192, 512), (3, 576, 512), (2, 64, 0), (2, 80, 24)], ids=str
)
def test_latents_of_models(heads, dim, rank, device):
    sizes = {"tokens": (5,), "heads": heads, "dim": dim, "rotary_dim": 64, "rank": rank}
    for scale in ("a head", "own"):
        for options in ({}, {"interleaved": True, "interleaved_out": False}):
            given = LATENT.arguments(device, BF16, F8, **sizes)
            LATENT.assert_appends(with_float8_q(given, scale=scale), **options)


@pytest.mark.parametrize("view", VIEWS)
def test_only_the_elements_of_a_view_are_written(view, appending, device):
    given = with_float8_q(appending.arguments(device, BF16), scale="own")
    wholes = {}

    def viewed(name, dtype, *shape):
        def base(*shape):
            inner, wholes[name] = guarded(*shape, dtype=dtype, device=device)
            return inner

        given[name] = VIEWS[view](base, *shape)

    viewed("q_out", F8, B, S, H, D_LATENT if appending is LATENT else D)
    given["q_scale_out"] = torch.full((H, S, B, 2), math.nan).to(device)[..., 1].permute(2, 1, 0)
    expected_whole = wholes["q_out"].cpu().clone()
    expected = appending.expected_of(given)
    part = given["q_out"]
    expected_whole.view(torch.uint8).as_strided(
        part.shape, part.stride(), part.storage_offset()
    ).copy_(expected["q_out"].view(torch.uint8))
    appending.append(given)
    assert_same_bits(wholes["q_out"], expected_whole)
    assert_same_bits(given["q_scale_out"], expected["q_scale_out"])


def test_scales_of_zeros_infinities_and_nan(appending, device):
    """A head of zeros has 1, one with a NaN has NaN, as PyTorch's amax gives it."""
    given = with_float8_q(appending.arguments(device, F32), scale="own")
    q = given["q"].cpu()
    q[0, 0, 0] = 0
    q[0, 1, 1], q[0, 1, 1, -1] = 1, 1e38
    q[0, 2, 2, 3], q[1, 0, 3, -1] = math.nan, math.inf
    q[1, 1, 0] *= 1e-45
    given["q"] = q.to(device)
    appending.assert_appends(given)
    assert given["q_scale_out"].cpu()[0, 0, 0] == 1


@pytest.mark.parametrize("layout", ["bhsd", "sbhd", "thd"])
def test_function_takes_q_out_in_the_layout_of_q(layout, device):
    packed = layout == "thd"
    for appending in (KV, NORMED):
        given = with_float8_q(
            appending.arguments(device, tokens=(B * S,) if packed else (B, S)), scale="own"
        )
        expected = appending.expected_of(given)
        call = {n: in_layout(t.cpu(), layout).contiguous().to(device)
                if n in ("q", "k", "v", "q_out") else t for n, t in given.items()}  # fmt: skip
        appending.append({**call, "layout": layout}, appending.function)
        assert_same_bits(call["q_out"], in_layout(expected["q_out"], layout))
        assert_same_bits(call["q_scale_out"], expected["q_scale_out"])


def test_in_a_graph(appending):
    given = with_float8_q(appending.arguments("cpu", BF16), scale="own")
    expected = appending.expected_of(given)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def step(given):
        appending.function(**given)
        return given["q_scale_out"] * 1

    assert_same_bits(step(given), expected["q_scale_out"])
    assert_same_bits(given["q_out"], expected["q_out"])
    assert len(graphs) == 1


def test_heads_of_q_out_are_sharded_as_those_of_q():
    for scale, dim in (("a head", {"q_scale": 0}), ("own", {"q_scale_out": 2})):
        given = with_float8_q(KV.arguments("cpu", BF16, heads=(2 * RANKS, RANKS)), scale=scale)
        expected = KV.expected_of(given)
        dims = {"q": 2, "q_out": 2, "k": 2, "v": 2, "k_cache": 2, "v_cache": 2, **dim}

        def on_rank(mesh, given=given, dims=dims, names=tuple(expected)):
            shards = {n: place(t.clone(), mesh, Shard(dims[n]) if n in dims else Replicate())
                      for n, t in given.items()}  # fmt: skip
            KV.append(shards)
            return [shards[name] for name in names]

        for got, whole in zip(on_every_rank(on_rank), expected.values(), strict=True):
            assert_same_bits(got, whole)


# ---- refusals


REFUSALS = [
    (lambda g: {"q_out": None, "q_scale": torch.ones(1)}, "q_scale to be None without q_out"),
    (lambda g: {"q_out": None, "q_scale_out": torch.ones(B, S, H)}, "q_scale_out to be None "
     "without q_out, got [2, 5, 4]"),
    (lambda g: {"q_out": g["q_out"].half()}, "q_out of float8_e4m3fn or float8_e5m2, got float16"),
    (lambda g: {"q_out": g["q_out"][:, 1:]}, "q_out of q's shape "),
    (lambda g: {"q_out": torch.cat([g["q_out"].view(torch.uint8)] * 2, -1).view(F8)[..., ::2]},
     "q_out to have stride 1 in its last dimension, got"),
    (lambda g: {"q_out": g["q_out"][:1].expand(B, -1, -1, -1)}, "q_out to have no two elements in "
     "one place, as it is written, got"),
    (lambda g: {"q_out": g["q"].view(torch.uint8)[..., : g["q"].shape[-1]].view(F8)}, "q and q_out "
     "to share no memory, as both are written, got overlapping tensors"),
    (lambda g: {"q_scale": torch.ones(1), "q_scale_out": torch.ones(B, S, H)}, "q_scale or "
     "q_scale_out, got both"),
    (lambda g: {"q_scale": torch.ones(3)}, "q_scale to have one element, or shape [4], got [3]"),
    (lambda g: {"q_scale": torch.ones(1).double()}, "q_scale to be float32, got float64"),
    (lambda g: {"q_scale_out": torch.ones(B, H, S)}, "q_scale_out to have shape [2, 5, 4], q's "
     "without its channels, got [2, 4, 5]"),
    (lambda g: {"q_scale_out": torch.ones(B, S, H).half()}, "q_scale_out to be float32, got "
     "float16"),
    (lambda g: {"q_scale_out": torch.ones(B, S, 1).to(g["q"].device).expand(-1, -1, H)},
     "q_scale_out to have no two elements in one place, as it is written, got"),
]  # fmt: skip


def test_bad_argument_is_refused_and_nothing_written(appending, device):
    for change, expected in REFUSALS:
        given = with_float8_q(appending.arguments(device))
        changed = {**given, **change(given)}
        on_device = {n: t if t is None or t.device.type == device.type else t.to(device)
                     for n, t in changed.items()}  # fmt: skip
        appending.assert_refused(on_device, expected)
    if device.type == "cpu":  # where values are looked at
        for value in (0.0, -1.0, math.nan, math.inf):
            given = with_float8_q(appending.arguments(device))
            given["q_scale"] = torch.tensor([1.0, 1.0, value, 1.0])
            appending.assert_refused(given, f"q_scale to be finite and above 0, got {value}")
