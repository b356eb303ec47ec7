"""rms_norm_rotary_qk_append_kv_ has the bits of the separate steps, and writes nothing else."""

import math

import pytest
import torch
from appending import F8, KV, NORMED, B, D, H, K, S, changed, inside
from support import DTYPES, FLOAT8, assert_same_bits, name_of, naming, pairwise, random

import rope_ext
from rope_ext import reference

F64, F32, F16, BF16 = DTYPES
ROTATIONS = {  # width of the table, options
    "all channels": (D // 2, {}),
    "interleaved, inverse": (D // 2, {"interleaved": True, "inverse": True}),
    "last channels": (4, {"rotary_offset": D - 8}),
    "channels in the middle, of odd pairs": (3, {"rotary_offset": 5}),
    "one angle a channel": (12, {"rotary_dim": 12, "interleaved": True}),
}
NORMS = {  # whether a row is all heads of a token; options
    "Qwen3, Gemma 3": (False, {"unit_offset": True}),
    "Gemma 4": (False, {"norm_v": True}),
    "OLMo 2": (True, {"eps": 1e-2}),
    "all heads of v": (True, {"norm_v": True, "unit_offset": True}),
}


def given_for(device, all_heads, dtype=F32, cache_dtype=None, **how):
    given = NORMED.arguments(device, dtype, cache_dtype, **how)
    for name, heads in (("q_weight", H), ("k_weight", K)) if all_heads else ():
        weight = given[name]
        given[name] = random(heads, *weight.shape, dtype=weight.dtype, device=device, seed=9)
    return given


@pytest.mark.parametrize(
    ("dtype", "cache", "weights", "rotation", "norm"),
    pairwise(
        dtype=DTYPES,
        cache={"of the model": None, **{name_of(dtype): dtype for dtype in FLOAT8}},
        weights={"of the model": None, "float32": F32},
        rotation=ROTATIONS,
        norm=NORMS,
    ),
)
def test_caches_get_what_norm_rotation_and_quantisation_give(
    dtype, cache, weights, rotation, norm, backend
):
    width, rotary = rotation
    all_heads, options = norm
    sizes = {"width": width, "weights": weights, "scales": cache is not None}
    given = given_for(backend, all_heads, dtype, cache, **sizes)
    NORMED.assert_appends(given, **rotary, **options)


def test_against_plain_pytorch_in_float64(device):
    for name, (all_heads, options) in NORMS.items():
        given = given_for(device, all_heads, F64)
        on_host = {n: t.cpu() for n, t in given.items()}
        expected = reference.rms_norm_rotary_qk_append_kv(**on_host, **options)
        NORMED.append({**given, **options})
        for written, exact in zip(NORMED.written, expected, strict=True):
            with naming((name, written)):
                torch.testing.assert_close(given[written].cpu(), exact, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("heads", "dim"),
    [((3, 1), 128), ((5, 2), 4100), ((2, 0), 16), ((0, 2), 16), ((1, 3), 32)],
    ids=str,
)
def test_numbers_of_heads_and_channels(heads, dim, device):
    """A long head is in several pieces, or several steps of a block of threads."""
    for norm_v in (False, True):
        for cache_dtype in (BF16, F8):
            sizes = {"tokens": (37,), "heads": heads, "dim": dim, "blocks": 6}
            given = NORMED.arguments(device, BF16, cache_dtype, **sizes)
            with naming((norm_v, cache_dtype)):
                NORMED.assert_appends(given, norm_v=norm_v)


def test_all_heads_of_a_wide_model(device):
    given = NORMED.arguments(device, BF16, F8, tokens=(3,), heads=(40, 40), dim=128)
    for name, seed in (("q_weight", 1), ("k_weight", 2)):
        given[name] = random(40, 128, dtype=BF16, device=device, seed=seed)
    NORMED.assert_appends(given, norm_v=True)


def test_v_that_is_not_normalised_keeps_every_bit(device):
    given = NORMED.arguments(device, BF16)
    bits = torch.arange(B * S * K * D).to(torch.int16) * 101 + 0x7F00
    given["v"] = bits.view(BF16).view(B, S, K, D).to(device)
    given["slot_mapping"] = torch.arange(B * S).to(device)
    before = given["v"].cpu().clone()
    NORMED.append(given)
    stored = given["v_cache"].cpu().flatten(0, 1)[: B * S].view(B, S, K, D)
    for t in (given["v"].cpu(), stored):
        assert torch.equal(t.view(torch.int16), before.view(torch.int16))


def test_q_k_and_v_of_one_packed_tensor(device):
    given = NORMED.arguments(device, BF16)
    qkv = random(B, S, H + 2 * K, D, dtype=BF16, device=device)
    given.update(zip("qkv", qkv.split((H, K, K), dim=2), strict=True))
    NORMED.assert_appends(given, norm_v=True)


@pytest.mark.parametrize(("layout", "cache_layout"), [("bhsd", "HND"), ("sbhd", "NHD")])
def test_function_takes_every_layout(layout, cache_layout, device):
    swap = {"bhsd": (1, 2), "sbhd": (0, 1)}[layout]
    given = NORMED.arguments(device)
    expected = NORMED.expected_of({**given, "norm_v": True})

    def in_call(name, t):
        if name.endswith("cache"):
            return t.transpose(1, 2) if cache_layout == "HND" else t
        return t.transpose(*swap) if name in ("q", "k", "v") else t

    call = {n: in_call(n, t.cpu()).contiguous().to(device) for n, t in given.items()}
    options = {"layout": layout, "cache_layout": cache_layout, "norm_v": True}
    NORMED.append({**call, **options}, rope_ext.rms_norm_rotary_qk_append_kv_)
    for name, t in expected.items():
        assert_same_bits(call[name], in_call(name, t))


@pytest.mark.cuda
def test_position_outside_of_the_table_is_stored_as_nan_on_cuda():
    given = NORMED.arguments("cuda")
    given["slot_mapping"] = torch.arange(B * S).cuda()
    ids = given["position_ids"].cpu()
    ids[0, 2] = -1
    given["position_ids"] = ids.cuda()
    NORMED.append(given)
    stored = given["k_cache"].cpu().flatten(0, 1)
    assert stored[2].isnan().all()
    assert not stored[3:].isnan().any()


# ---- refusals; those that it shares with the append without a norm are in test_append_kv.py


def swapped(given):
    """Caches in the other order: heads first."""
    return {name: given[name].transpose(1, 2) for name in ("k_cache", "v_cache")}


REFUSALS = [
    (changed("q_weight", lambda w: w[1:]), "q_weight to have shape [16] or [4, 16], the heads and "
     "head_dim of q, got [15]"),
    (changed("k_weight", lambda w: w.expand(3, -1)), "k_weight to have shape [16] or [2, 16], the "
     "heads and head_dim of k, got [3, 16]"),
    (changed("k_weight", lambda w: w.expand(K, -1)), "k_weight to have 1 dimension, as q_weight "
     "has, got [2, 16]"),
    (changed("q_weight", lambda w: w.half()), "q_weight of q's dtype float32, got float16"),
    (lambda g: {"eps": math.nan}, "eps to be at least 0, got nan"),
    (swapped, "k_cache to have shape [blocks, block_size, 2, 16], got [3, 2, 8, 16]"),
    (inside("v", "k"), "k and v to share no memory, as both are written, got overlapping tensors"),
    (inside("v", "k_cache"), "k_cache and v to share no memory, as both are written, got"),
    (changed("v", lambda v: v[:, :, :1].expand(-1, -1, K, -1)), "v to have no two elements in one "
     "place, as it is written, got strides ["),
    (inside("q_weight", "q"), "q_weight to share no memory with q, which is written, got"),
    (inside("k_weight", "v_cache"), "k_weight to share no memory with v_cache, which is written"),
]  # fmt: skip


def test_bad_argument_is_refused_and_nothing_written(device):
    for change, expected in REFUSALS:
        given = NORMED.arguments(device)
        NORMED.assert_refused({**given, **change(given)}, expected)
    if device.type == "cpu":  # where values are looked at
        given = NORMED.arguments(device, cache_dtype=F8)
        given["v_scale"] = torch.tensor([1.0, math.nan])
        NORMED.assert_refused(given, "v_scale to be finite and above 0, got nan")


def test_without_a_norm_v_is_only_read_and_may_be_expanded():
    given = KV.arguments("cpu")
    given["v"] = given["v"][:, :, :1].expand(-1, -1, K, -1)
    KV.assert_appends(given)
