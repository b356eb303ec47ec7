"""apply_rotary_qk_append_kv_ has the bits of the separate steps, and writes nothing else."""

import math
from itertools import product

import pytest
import torch
from appending import F8, KV, B, D, K, L, S, changed, inside
from support import (
    DTYPES,
    FLOAT8,
    assert_same_bits,
    in_layout,
    name_of,
    naming,
    random,
    random_positions,
    random_table,
)

import rope_ext

rope = torch.ops.rope

F64, F32, F16, BF16 = DTYPES
E4M3, E5M2 = FLOAT8

# ---- the numbers

ROTATIONS = {  # width of the table, options
    "all channels": (D // 2, {}),
    "interleaved": (D // 2, {"interleaved": True}),
    "inverse": (D // 2, {"inverse": True}),
    "first channels": (4, {}),
    "last channels, interleaved": (4, {"rotary_offset": D - 8, "interleaved": True}),
    "channels in the middle, of odd pairs": (3, {"rotary_offset": 5}),
    "one angle a channel": (8, {"rotary_dim": 8, "rotary_offset": 8}),
    "one angle a channel, interleaved, inverse":
        (12, {"rotary_dim": 12, "interleaved": True, "inverse": True}),
}  # fmt: skip
CASES = [
    # the dtypes of the model and of its cache, with each rotation in some of them
    (F64, F64, "channels in the middle, of odd pairs"),
    (F64, E4M3, "last channels, interleaved"),
    (F64, E5M2, "inverse"),
    (F32, F32, "last channels, interleaved"),
    (F32, E4M3, "channels in the middle, of odd pairs"),
    (F32, E5M2, "one angle a channel"),
    (F16, F16, "first channels"),
    (F16, E4M3, "one angle a channel, interleaved, inverse"),
    (F16, E5M2, "interleaved"),
    (BF16, BF16, "one angle a channel"),
    (BF16, E4M3, "first channels"),
    (BF16, E5M2, "last channels, interleaved"),
    # rotations that are vectors of other sizes in a cache of 16 bits
    (BF16, BF16, "all channels"),
    (F16, F16, "interleaved"),
    (BF16, BF16, "channels in the middle, of odd pairs"),
    (BF16, BF16, "one angle a channel, interleaved, inverse"),
    (F16, F16, "inverse"),
]
case_ids = [f"{name_of(dtype)}-{name_of(cache)}-{rotation}" for dtype, cache, rotation in CASES]


@pytest.mark.parametrize(("dtype", "cache_dtype", "rotation"), CASES, ids=case_ids)
def test_caches_get_what_rotation_and_quantisation_give(dtype, cache_dtype, rotation, backend):
    width, options = ROTATIONS[rotation]
    given = KV.arguments(backend, dtype, cache_dtype, width=width, scales=cache_dtype in FLOAT8)
    rows = [given[name] for name in ("cos", "sin", "position_ids")]
    q, k = given["q"].clone(), given["k"].clone()
    rope.apply_rotary_qk_(q, k, *rows, **options)
    KV.assert_appends(given, **options)
    assert_same_bits(given["q"], q)
    assert_same_bits(given["k"], k)


def test_every_kind_of_rows(device):
    table = random_table(L, D // 2, device=device)
    for *rows, ids in (
        (*table, None),
        (*random_table(1, S, D // 2, device=device), None),
        (*random_table(B, S, D // 2, device=device), None),
        (*table, random_positions(S, rows=L, dtype=torch.int32, device=device)),
    ):
        given = KV.arguments(device)
        del given["position_ids"]
        given |= zip(("cos", "sin"), rows, strict=True)
        KV.assert_appends(given if ids is None else {**given, "position_ids": ids})


@pytest.mark.parametrize(("tokens", "cache_dtype"), [(1, E5M2), (31, BF16), (700, BF16), (700, F8)])
def test_packed_tokens(tokens, cache_dtype, device):
    """Enough for several threads and blocks of threads."""
    sizes = {"tokens": (tokens,), "heads": (6, 3), "dim": 64, "blocks": 90}
    KV.assert_appends(KV.arguments(device, BF16, cache_dtype, **sizes))


# ---- memory


def test_q_k_and_v_of_one_packed_tensor(device):
    given = KV.arguments(device, BF16)
    qkv = random(B, S, 4 + 2 * K, D, dtype=BF16, device=device)
    given.update(zip("qkv", qkv.split((4, K, K), dim=2), strict=True))
    v = given["v"].clone()
    KV.assert_appends(given)
    assert_same_bits(qkv[:, :, -K:], v)


@pytest.mark.parametrize(
    ("layout", "cache_layout"), [("bshd", "NHD"), ("bhsd", "HND"), ("sbhd", "NHD"), ("thd", "HND")]
)
def test_function_takes_every_layout(layout, cache_layout, device):
    given = KV.arguments(device, tokens=(B * S,) if layout == "thd" else (B, S))
    expected = KV.expected_of(given)

    def in_call(name, t):
        if name.endswith("cache"):
            return t.transpose(1, 2) if cache_layout == "HND" else t
        return in_layout(t, layout) if name in ("q", "k", "v") else t

    call = {n: in_call(n, t.cpu()).contiguous().to(device) for n, t in given.items()}
    options = {"layout": layout, "cache_layout": cache_layout}
    KV.append({**call, **options}, rope_ext.apply_rotary_qk_append_kv_)
    for name, t in expected.items():
        assert_same_bits(call[name], in_call(name, t))


# ---- float8

# As [T, Hk, D]; v is stored without rotation, so each of its values becomes a float8.
STORED = (64, 4, 256)


def stored_as_float8(values, cache_dtype, device, scale=None):
    """values, 2^16 of them, stored to a cache and read back."""
    v = values.view(STORED).to(device)
    tokens, _, dim = STORED
    zero = torch.zeros(STORED, dtype=values.dtype).to(device)
    cache = torch.zeros(1, *STORED).to(cache_dtype).to(device)
    given = {"q": zero, "k": zero.clone(), "v": v, "k_cache": cache.clone(), "v_cache": cache}
    table = (t.to(device) for t in (torch.ones(tokens, dim // 2), torch.zeros(tokens, dim // 2)))
    scales = {} if scale is None else {"v_scale": scale.to(device)}
    slots = torch.arange(tokens).to(device)
    rope.apply_rotary_qk_append_kv_(*given.values(), slots, *table, **scales)
    return cache.flatten()


def as_torch_does(values, cache_dtype):
    limit = torch.finfo(cache_dtype).max
    return values.clamp(-limit, limit).to(cache_dtype)


def hard_values(cache_dtype):
    """Every float8, midpoints between neighbours, the float32 values next to these, the ends."""
    finite = torch.arange(256).to(torch.uint8).view(cache_dtype).float()
    finite = finite[finite.isfinite()].unique()
    half_way = (finite[1:] + finite[:-1]) / 2
    at = torch.cat((finite, half_way))
    up, down = at.nextafter(torch.tensor(math.inf)), at.nextafter(torch.tensor(-math.inf))
    largest = torch.finfo(F32).max
    ends = torch.tensor([0.0, 1e-45, 1e-38, largest, math.inf, math.nan])
    special = torch.cat((at, up, down, ends, -ends))
    spread = torch.randn(2**16 - len(special), generator=torch.Generator().manual_seed(0))
    spread = spread * torch.exp2(torch.arange(len(spread)) % 40 - 24.0)
    return torch.cat((special, spread))


@pytest.mark.parametrize("cache_dtype", FLOAT8, ids=name_of)
def test_values_become_the_nearest_float8(cache_dtype, backend):
    """Each value of 16 bits, and of float32 those that are hard to round."""
    bits = torch.arange(2**16).to(torch.int32).to(torch.int16)
    for values in (bits.view(F16), bits.view(BF16), hard_values(cache_dtype)):
        got = stored_as_float8(values, cache_dtype, backend)
        with naming(values.dtype):
            assert_same_bits(got, as_torch_does(values, cache_dtype))


@pytest.mark.parametrize("cache_dtype", FLOAT8, ids=name_of)
def test_float64_is_rounded_once(cache_dtype, backend):
    """Rounded first to float32, a value next to a midpoint would become the midpoint."""
    float8 = torch.arange(127 if cache_dtype is E4M3 else 124).to(torch.uint8).view(cache_dtype)
    low, high = float8[:-1].double(), float8[1:].double()
    above, below = ((low + high) / 2 * (1 + off) for off in (2.0**-40, -(2.0**-40)))
    values = torch.zeros(2**16, dtype=F64)
    n = len(low)
    values[:n], values[n : 2 * n] = above, below
    got = stored_as_float8(values, cache_dtype, backend)
    assert_same_bits(got[:n], float8[1:])
    assert_same_bits(got[n : 2 * n], float8[:-1])


def test_values_are_divided_by_their_scale_in_float32(backend):
    each_head = torch.tensor([3.0, 1e-3, 1.1, 7e4])
    strided = torch.stack((each_head, -each_head), 1)[:, 0]
    for scale in (torch.tensor([0.37]), each_head, strided):
        for dtype in (F32, BF16):
            values = random(2**16, dtype=dtype)
            divided = (values.view(STORED).float() / scale.view(-1, 1)).flatten()
            for cache_dtype in FLOAT8:
                got = stored_as_float8(values, cache_dtype, backend, scale)
                with naming((scale, dtype, cache_dtype)):
                    assert_same_bits(got, as_torch_does(divided, cache_dtype))


@pytest.mark.cuda
def test_scale_of_0_gives_what_the_division_gives_on_cuda():
    given = KV.arguments("cuda", cache_dtype=F8)
    given["v_scale"] = torch.zeros(1).cuda()
    expected = KV.expected_of(given)  # +-inf, so +-448
    KV.append(given)
    assert_same_bits(given["v_cache"], expected["v_cache"])


@pytest.mark.cuda
def test_position_outside_of_the_table_is_stored_as_nan_on_cuda():
    given = KV.arguments("cuda")
    given["slot_mapping"] = torch.arange(B * S).cuda()
    ids = given["position_ids"].cpu()
    ids[0, 2] = L
    given["position_ids"] = ids.cuda()
    KV.append(given)
    assert given["k"].cpu()[0, 2].isnan().all()
    stored = given["k_cache"].cpu().flatten(0, 1)
    assert stored[2].isnan().all()
    assert not stored[3:].isnan().any()
    assert not given["v_cache"].cpu().isnan().any()


# ---- refusals


def every_second(t):
    return torch.cat((t, t), -1)[..., ::2]


def with_scale(name, *values):
    return lambda g: {
        "k_cache": g["k_cache"].to(F8),
        "v_cache": g["v_cache"].to(F8),
        name: torch.tensor(values).to(g["q"].device),
    }


def slots_in_the_cache(given):
    slots = torch.arange(B * S).to(given["q"].device)
    in_cache = given["k_cache"].flatten().view(torch.int64)[: B * S]
    return {"slot_mapping": in_cache.copy_(slots).view(B, S)}


CACHE = "k_cache to have shape [blocks, block_size, 2, 16], got"
CACHE_DTYPES = "k_cache of q's dtype float32, or float8_e4m3fn or float8_e5m2, got"
SLOT_SHAPES = "slot_mapping to have shape [B, S], or [B * S] or less, with B = 2, S = 5, got"
SHARED = "to share no memory with k_cache, which is written, got overlapping tensors"
REFUSALS = [
    (changed("k", lambda k: k[:, 1:]), "k to have q's shape [2, 5, 4, 16] in all but the number of "
     "heads, got [2, 4, 2, 16]"),
    (changed("v", lambda v: v[..., :8]), "v of k's shape [2, 5, 2, 16], got [2, 5, 2, 8]"),
    (changed("v", lambda v: v.double()), "v of k's dtype float32, got float64"),
    (changed("v", every_second), "v to have stride 1 in its last dimension, got strides [320, 64, "
     "32, 2]"),
    (changed("k_cache", lambda c: c[0]), f"{CACHE} [8, 2, 16]"),
    (changed("k_cache", lambda c: c[..., :8]), f"{CACHE} [3, 8, 2, 8]"),
    (changed("k_cache", lambda c: c.half()), f"{CACHE_DTYPES} float16"),
    (changed("k_cache", every_second), "k_cache to have stride 1 in its last dimension, got"),
    (changed("k_cache", lambda c: c[:, :, :1].expand(-1, -1, K, -1)), "k_cache to have no two "
     "elements in one place, as it is written, got strides ["),
    (changed("v_cache", lambda c: c[:2]), "v_cache of k_cache's shape [3, 8, 2, 16], got [2, 8, 2, "
     "16]"),
    (changed("v_cache", lambda c: c.to(F8)), "v_cache of k_cache's dtype float32, got "
     "float8_e4m3fn"),
    (changed("v_cache", every_second), "v_cache to have stride 1 in its last dimension, got"),
    (changed("slot_mapping", lambda s: s.float()), "slot_mapping to be int32 or int64, got "
     "float32"),
    (changed("slot_mapping", lambda s: s[:, 1:]), f"{SLOT_SHAPES} [2, 4]"),
    (changed("slot_mapping", lambda s: torch.cat((s.flatten(), s[0, :1]))), f"{SLOT_SHAPES} [11]"),
    (lambda g: {"k_scale": torch.ones(1).to(g["q"].device)}, "k_scale to be None for a cache that "
     "is not of float8, got one for a cache of float32"),
    (with_scale("k_scale", 1.0, 1.0, 1.0), "k_scale to have one element, or shape [2], got [3]"),
    (with_scale("v_scale"), "v_scale to have one element, or shape [2], got [0]"),
    (with_scale("k_scale", [1.0], [1.0]), "k_scale to have one element, or shape [2], got [2, 1]"),
    (with_scale("k_scale", 1, 1), "k_scale to be float32, got int64"),
    (inside("q", "k_cache"), "q and k_cache to share no memory, as both are written, got "
     "overlapping tensors"),
    (inside("k", "v_cache"), "k and v_cache to share no memory, as both are written, got"),
    (lambda g: {"v_cache": g["k_cache"]}, "k_cache and v_cache to share no memory, as both are "
     "written, got"),
    (inside("v", "k_cache"), f"v {SHARED}"),
    (inside("cos", "k_cache"), f"cos {SHARED}"),
    (slots_in_the_cache, f"slot_mapping {SHARED}"),
    (inside("v", "q"), "v to share no memory with q, which is written, got overlapping tensors"),
]  # fmt: skip


def test_bad_argument_is_refused_and_nothing_written(device):
    for change, expected in REFUSALS:
        given = KV.arguments(device)
        KV.assert_refused({**given, **change(given)}, expected)
    packed = KV.arguments(device, tokens=(10,))
    for slots in (torch.arange(10).view(2, 5), torch.arange(11)):
        expected = f"slot_mapping to have shape [T] or less, with T = 10, got {[*slots.shape]}"
        KV.assert_refused({**packed, "slot_mapping": slots.to(device)}, expected)


def test_scale_that_is_not_finite_and_above_0_is_refused(device, monkeypatch):
    """On CUDA where asked."""
    monkeypatch.setenv("ROPE_EXT_CHECK", "1")
    for name, value in product(("k_scale", "v_scale"), (0.0, -1.0, math.nan, math.inf, -math.inf)):
        for values in ([value], [1.0, value]):
            given = KV.arguments(device)
            given |= with_scale(name, *values)(given)
            KV.assert_refused(given, f"{name} to be finite and above 0, got {value}")


def test_layout_of_the_cache_that_is_unknown_is_refused():
    given = KV.arguments("cpu")
    with pytest.raises(ValueError, match="expected cache_layout to be one of NHD, HND, got 'nhd'"):
        KV.append({**given, "cache_layout": "nhd"}, rope_ext.apply_rotary_qk_append_kv_)
    given["k_cache"] = given["k_cache"][0]
    match = r"expected k_cache to have shape \[blocks, Hk, block_size, D\] .*, got \[8, 2, 16\]"
    with pytest.raises(ValueError, match=match):
        KV.append({**given, "cache_layout": "HND"}, rope_ext.apply_rotary_qk_append_kv_)
