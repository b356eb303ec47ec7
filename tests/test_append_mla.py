"""apply_rotary_mla_append_, of DeepSeek's latent attention, has the bits of the separate steps."""

import pytest
import torch
from appending import (
    D_LATENT,
    F8,
    LATENT,
    RANK,
    B,
    H,
    L,
    R,
    S,
    changed,
    inside,
)
from support import DTYPES, FLOAT8, ORDERS, assert_same_bits, name_of, random, random_table

F64, F32, F16, BF16 = DTYPES
TO_HALVES = ORDERS["neighbours to halves"]

# ---- the numbers


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "order"),
    [
        # each dtype of the model with each of the cache; orders that stay, and that change
        (F64, F64, "half-split"),
        (F64, F8, "neighbours to halves"),
        (F64, torch.float8_e5m2, "halves to neighbours"),
        (F32, F32, "neighbours to halves"),
        (F32, F8, "halves to neighbours"),
        (F32, torch.float8_e5m2, "half-split"),
        (F16, F16, "halves to neighbours"),
        (F16, F8, "interleaved"),
        (F16, torch.float8_e5m2, "neighbours to halves"),
        (BF16, BF16, "neighbours to halves"),
        (BF16, F8, "half-split"),
        (BF16, torch.float8_e5m2, "interleaved"),
        (F64, F64, "neighbours to halves"),
        (F16, F16, "half-split"),
    ],
    ids=lambda x: name_of(x),
)
def test_the_cache_gets_what_rotation_and_quantisation_give(dtype, cache_dtype, order, backend):
    given = LATENT.arguments(backend, dtype, cache_dtype, scales=cache_dtype in FLOAT8)
    options = ORDERS[order]
    rows = [given[name] for name in ("cos", "sin", "position_ids")]
    q = torch.ops.rope.apply_rotary(given["q"], *rows, rotary_offset=D_LATENT - R, **options)
    LATENT.assert_appends(given, **options)
    assert_same_bits(given["q"], q)


# heads of q, D, R, rank
SIZES = {
    "a few of the channels": (H, D_LATENT, R, RANK),
    "DeepSeek-V3": (16, 192, 64, 512),
    "absorbed queries, more heads than there is room for copies of": (70, 576, 64, 512),
    "all channels of q": (H, 16, 16, 48),
    "a rank that ends within a piece": (H, 48, 32, 72),
    "odd numbers of pairs": (H, 11, 6, 20),
    "no latent": (H, D_LATENT, R, 0),
    "the most that change their order": (1, 512, 512, 24),
}


@pytest.mark.parametrize("cache_dtype", [BF16, F8], ids=name_of)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_order_of_the_pairs(sizes, cache_dtype, device):
    heads, dim, rotary_dim, rank = sizes
    shape = {"heads": heads, "dim": dim, "rotary_dim": rotary_dim, "rank": rank}
    for options in ORDERS.values():
        given = LATENT.arguments(device, BF16, cache_dtype, tokens=(6,), **shape)
        LATENT.assert_appends(given, **options)


# ---- memory


@pytest.mark.parametrize("tokens", [(B, S), (7,), (B, 1)], ids=str)
def test_k_pe_may_have_its_one_head(tokens, device):
    given = LATENT.arguments(device, F16, tokens=tokens)
    given["k_pe"] = given["k_pe"].unsqueeze(-2)
    LATENT.assert_appends(given, **TO_HALVES)


def test_q_and_the_compressed_row_of_larger_projections(device):
    """As in models: q after the channels without positions, kv_c and k_pe side by side."""
    given = LATENT.arguments(device, BF16, tokens=(7,))
    row = random(7, RANK + R, dtype=BF16, device=device)
    given["kv_c"], given["k_pe"] = row.split((RANK, R), dim=-1)
    whole = random(7, H, 16 + D_LATENT, dtype=BF16, device=device)
    given["q"] = whole[..., 16:]
    kept, latent = whole[..., :16].clone(), given["kv_c"].clone()
    LATENT.assert_appends(given, **TO_HALVES)
    assert_same_bits(whole[..., :16], kept)
    assert_same_bits(row[:, :RANK], latent)


# ---- refusals; those of slots, scales and devices are shared with the cache of keys and values


def of_float8(*scale):
    return lambda g: {
        "kv_cache": g["kv_cache"].to(F8),
        "scale": torch.tensor(scale).to(g["q"].device),
    }


K_PE = "k_pe to have shape [2, 5, 8] or [2, 5, 1, 8], got"
KV_C = "kv_c to have shape [2, 5, rank], got"
CACHE = "kv_cache to have shape [blocks, block_size, 40], got"
REFUSALS = [
    (changed("q", lambda q: q.int()), "q to be float64, float32, float16 or bfloat16, got int32"),
    (lambda g: dict(zip(("cos", "sin"), random_table(L, 13, device=g["q"].device), strict=True)),
     "rotary_dim, twice the width of cos, to be even, at least 2 and at most head_dim 24, got 26"),
    (changed("k_pe", lambda k: k[..., :6]), f"{K_PE} [2, 5, 6]"),
    (changed("k_pe", lambda k: torch.stack((k, k), -2)), f"{K_PE} [2, 5, 2, 8]"),
    (changed("k_pe", lambda k: k[:1]), f"{K_PE} [1, 5, 8]"),
    (changed("k_pe", lambda k: k.half()), "k_pe of q's dtype float32, got float16"),
    (changed("k_pe", lambda k: torch.cat((k, k), -1)[..., ::2]), "k_pe to have stride 1 in its "
     "last dimension, got strides [80, 16, 2]"),
    (changed("kv_c", lambda c: c[:, 1:]), f"{KV_C} [2, 4, 32]"),
    (changed("kv_c", lambda c: c.unsqueeze(-2)), f"{KV_C} [2, 5, 1, 32]"),
    (changed("kv_c", lambda c: c.double()), "kv_c of q's dtype float32, got float64"),
    (changed("kv_cache", lambda c: c[..., 1:]), f"{CACHE} [3, 8, 39]"),
    (changed("kv_cache", lambda c: c.unsqueeze(2)), f"{CACHE} [3, 8, 1, 40]"),
    (changed("kv_cache", lambda c: c.bfloat16()), "kv_cache of q's dtype float32, or float8_e4m3fn "
     "or float8_e5m2, got bfloat16"),
    (changed("slot_mapping", lambda s: s[:1]), "slot_mapping to have shape [B, S], or [B * S] or "
     "less, with B = 2, S = 5, got [1, 5]"),
    (lambda g: {"scale": torch.ones(1).to(g["q"].device)}, "scale to be None for a cache that is "
     "not of float8, got one for a cache of float32"),
    (of_float8(1.0, 1.0), "scale to have one element, got [2]"),
    (inside("k_pe", "q"), "q and k_pe to share no memory, as both are written, got overlapping"),
    (inside("kv_c", "kv_cache"), "kv_c to share no memory with kv_cache, which is written, got"),
    (lambda g: {"k_pe": g["kv_c"][..., 4:12]}, "kv_c to share no memory with k_pe, which is "
     "written, got overlapping tensors"),
]  # fmt: skip


def test_bad_argument_is_refused_and_nothing_written(device):
    for change, expected in REFUSALS:
        given = LATENT.arguments(device)
        LATENT.assert_refused({**given, **change(given)}, expected)
    if device.type == "cpu":  # where values are looked at
        given = LATENT.arguments(device)
        expected = "scale to be finite and above 0, got 0.000000"
        LATENT.assert_refused({**given, **of_float8(0.0)(given)}, expected)


def test_more_channels_than_can_change_their_order_are_refused(device):
    given = LATENT.arguments(device, heads=1, dim=514, rotary_dim=514, rank=8)
    expected = ("interleaved_out to be None or interleaved where more than 512 channels rotate, as "
                "all of a head are held at once, got the other order for 514")  # fmt: skip
    with pytest.raises(RuntimeError, match=expected):
        LATENT.append({**given, **TO_HALVES})
    LATENT.assert_appends(given, interleaved=True)
