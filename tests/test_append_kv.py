"""apply_rotary_qk_append_kv_ has the bits of the separate steps, and writes nothing else."""

import math
import re
import shutil

import pytest
import torch
from appending import Appending
from ranks import RANKS, as_rank, on_every_rank, place
from support import (
    DTYPES,
    FLOAT8,
    VIEWS,
    assert_same_bits,
    guarded,
    in_layout,
    name_of,
    random,
    random_cache,
    random_positions,
    random_slots,
    random_table,
)
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.func import vmap

import rope_ext
from rope_ext import reference

rope = torch.ops.rope

B, S, H, K, D, L = 2, 5, 4, 2, 16, 9
BLOCKS, BLOCK_SIZE = 3, 8
SLOTS = BLOCKS * BLOCK_SIZE  # for 10 tokens
WRITTEN = ("q", "k", "k_cache", "v_cache")
APPENDING = Appending(rope.apply_rotary_qk_append_kv_, reference.apply_rotary_qk_append_kv, WRITTEN)

# ---- arguments


def arguments(
    device, dtype=torch.float32, cache_dtype=None, *, width=D // 2, heads=(H, K), scales=False
):
    cos, sin = random_table(L, width, device=device)
    h, k = heads
    shape, cache_dtype = (BLOCKS, BLOCK_SIZE, k, D), cache_dtype or dtype
    made = {
        "q": random(B, S, h, D, dtype=dtype, device=device),
        "k": random(B, S, k, D, dtype=dtype, device=device, seed=1),
        "v": random(B, S, k, D, dtype=dtype, device=device, seed=2),
        "k_cache": random_cache(*shape, dtype=cache_dtype, device=device),
        "v_cache": random_cache(*shape, dtype=cache_dtype, device=device, seed=6),
        "slot_mapping": random_slots(B, S, capacity=SLOTS, device=device),
        "cos": cos,
        "sin": sin,
        "position_ids": random_positions(B, S, rows=L, device=device),
    }
    if scales:
        made["k_scale"] = torch.linspace(0.02, 0.3, k, device="cpu").to(device)  # one a head
        made["v_scale"] = torch.tensor(1.7, device=device)
    return made


# ---- the numbers


@pytest.mark.parametrize("cache", ["of the model", *FLOAT8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_caches_get_what_rotation_and_quantisation_give(dtype, cache, backend):
    float8 = cache in FLOAT8
    APPENDING.assert_appends(arguments(backend, dtype, cache if float8 else dtype, scales=float8))


OPTIONS = {
    "interleaved": (D // 2, {"interleaved": True}),
    "inverse": (D // 2, {"inverse": True}),
    "first channels": (4, {}),
    "last channels, interleaved": (4, {"rotary_offset": D - 8, "interleaved": True}),
    "channels in the middle, of odd pairs": (3, {"rotary_offset": 5}),
    "one angle a channel": (8, {"rotary_dim": 8, "rotary_offset": 8}),
    "one angle a channel, interleaved, inverse":
        (12, {"rotary_dim": 12, "interleaved": True, "inverse": True}),
}  # fmt: skip


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=name_of)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_rotation(options, cache_dtype, backend):
    width, options = OPTIONS[options]
    APPENDING.assert_appends(
        arguments(backend, torch.bfloat16, cache_dtype, width=width), **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_q_and_k_have_the_bits_of_the_rotation_in_place(dtype, backend):
    given = arguments(backend, dtype)
    rows = [given[name] for name in ("cos", "sin", "position_ids")]
    q, k = given["q"].clone(), given["k"].clone()
    rope.apply_rotary_qk_(q, k, *rows)
    APPENDING.append(given)
    assert_same_bits(given["q"], q)
    assert_same_bits(given["k"], k)


ROWS = {
    "table, no positions": lambda device: (*random_table(L, D // 2, device=device), None),
    "rows [1, S, W]": lambda device: (*random_table(1, S, D // 2, device=device), None),
    "rows [B, S, W]": lambda device: (*random_table(B, S, D // 2, device=device), None),
    "positions [S]":
        lambda device: (*random_table(L, D // 2, device=device),
                        random_positions(S, rows=L, dtype=torch.int32, device=device)),
}  # fmt: skip


@pytest.mark.parametrize("rows", ROWS)
def test_every_kind_of_rows(rows, backend):
    given = arguments(backend)
    given.update(zip(("cos", "sin", "position_ids"), ROWS[rows](backend), strict=True))
    if given["position_ids"] is None:
        del given["position_ids"]
    APPENDING.assert_appends(given)


def many_tokens(device, tokens, cache_dtype=torch.float8_e4m3fn):
    """Packed, all stored, and enough for several threads and blocks of threads."""
    block_size, heads, dim = 16, 3, 64
    cos, sin = random_table(50, dim // 2, device=device)
    cache = (-(-tokens // block_size) + 1, block_size, heads, dim)
    return {
        "q": random(tokens, 6, dim, dtype=torch.bfloat16, device=device),
        "k": random(tokens, heads, dim, dtype=torch.bfloat16, device=device, seed=1),
        "v": random(tokens, heads, dim, dtype=torch.bfloat16, device=device, seed=2),
        "k_cache": random_cache(*cache, dtype=cache_dtype, device=device),
        "v_cache": random_cache(*cache, dtype=cache_dtype, device=device, seed=6),
        "slot_mapping": random_slots(tokens, capacity=cache[0] * block_size, device=device),
        "cos": cos,
        "sin": sin,
        "position_ids": random_positions(tokens, rows=50, device=device),
    }


@pytest.mark.parametrize("count", [0, 1, S - 1, S, S + 2, B * S - 1])
@pytest.mark.parametrize("batch", [B, 1, B * S], ids=lambda batch: f"batch {batch}")
def test_tokens_past_the_end_of_the_slots_are_rotated_and_not_stored(batch, count, backend):
    """Also packed, and with slots in a view; one token a sequence is launched as one sequence."""
    given = arguments(backend)
    for name in ("q", "k", "v", "position_ids"):
        given[name] = given[name].reshape(batch, -1, *given[name].shape[2:])
    slots = torch.arange(B * S).flip(0)
    wide = torch.stack((slots, slots + 99), 1).to(backend)
    given["slot_mapping"] = wide[:count, 0]
    whole = {**given, "slot_mapping": slots.where(torch.arange(B * S) < count, -1)}
    expected = APPENDING.expected_of(whole)
    packed = {name: given[name].clone() for name in given}
    for name in ("q", "k", "v", "position_ids"):
        packed[name] = packed[name].flatten(0, 1)
    APPENDING.append(packed)
    APPENDING.assert_appends(given)
    for name in WRITTEN:
        assert_same_bits(given[name], expected[name])
        assert_same_bits(packed[name].view_as(given[name]), expected[name])


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e5m2], ids=name_of)
@pytest.mark.parametrize("tokens", [1, 31, 700])
def test_packed_tokens(tokens, cache_dtype, backend):
    APPENDING.assert_appends(many_tokens(backend, tokens, cache_dtype))


def test_the_same_bits_with_any_number_of_threads(threads):
    written = []
    for count in (1, 2, 5):
        threads(count)
        given = many_tokens("cpu", 300)
        APPENDING.append(given)
        written.append([given[name] for name in WRITTEN])
    for got in written[1:]:
        for a, b in zip(got, written[0], strict=True):
            assert_same_bits(a, b)


# ---- memory

CACHES = {
    "NHD": lambda base, N, S, H, D: base(N, S, H, D),
    "HND": lambda base, N, S, H, D: base(N, H, S, D).transpose(1, 2),
    "v of [2, blocks, ..]": lambda base, N, S, H, D: base(2, N, S, H, D)[1],
    "v of [blocks, 2, ..]": lambda base, N, S, H, D: base(N, 2, S, H, D)[:, 1],
    "v beside k": lambda base, N, S, H, D: base(N, S, H, 2 * D)[..., D:],
    "every second": lambda base, N, S, H, D: base(2 * N, 2 * S, 2 * H, D)[::2, 1::2, ::2],
    "rows of odd length": lambda base, N, S, H, D: base(N, S, H, D + 1)[..., :D],
    "one element off": lambda base, N, S, H, D: base(N * S * H * D + 1)[1:].view(N, S, H, D),
}


@pytest.mark.parametrize("cache_dtype", [torch.float16, *FLOAT8[:1]], ids=name_of)
@pytest.mark.parametrize("view", CACHES)
def test_only_the_slots_of_a_view_of_a_cache_are_written(view, cache_dtype, backend):
    given = arguments(backend, torch.float16, cache_dtype)
    wholes = {}
    for name in ("k_cache", "v_cache"):

        def base(*shape, name=name):
            _, whole = guarded(*shape, dtype=torch.float16, device="cpu")
            wholes[name] = whole.to(cache_dtype).to(backend)
            return wholes[name][16:-16].view(shape)

        given[name] = CACHES[view](base, BLOCKS, BLOCK_SIZE, K, D)
    expected_wholes = {name: whole.cpu().clone() for name, whole in wholes.items()}
    expected = APPENDING.expected_of(given)
    APPENDING.append(given)
    for name, whole in wholes.items():
        t = given[name]
        part = expected_wholes[name].as_strided(t.shape, t.stride(), t.storage_offset())
        part.copy_(expected[name])
        assert_same_bits(whole, expected_wholes[name])
    assert_same_bits(given["k"], expected["k"])


@pytest.mark.parametrize("view", VIEWS)
def test_q_k_and_v_in_every_layout(view, backend):
    given = arguments(backend, torch.bfloat16)
    wholes = {}
    for name, heads in (("q", H), ("k", K), ("v", K)):

        def base(*shape, name=name):
            inner, wholes[name] = guarded(*shape, dtype=torch.bfloat16, device=backend)
            return inner

        given[name] = VIEWS[view](base, B, S, heads, D)
    expected_wholes = {name: whole.cpu().clone() for name, whole in wholes.items()}
    expected = APPENDING.expected_of(given)
    APPENDING.append(given)
    for name in ("q", "k"):
        t = given[name]
        part = expected_wholes[name].as_strided(t.shape, t.stride(), t.storage_offset())
        part.copy_(expected[name])
    for name, whole in wholes.items():
        assert_same_bits(whole, expected_wholes[name])
    for name in ("k_cache", "v_cache"):
        assert_same_bits(given[name], expected[name])


def test_q_k_and_v_of_one_packed_tensor(backend):
    given = arguments(backend, torch.bfloat16)
    qkv = random(B, S, H + 2 * K, D, dtype=torch.bfloat16, device=backend)
    given.update(zip("qkv", qkv.split((H, K, K), dim=2), strict=True))
    v = given["v"].clone()
    APPENDING.assert_appends(given)
    assert_same_bits(qkv[:, :, -K:], v)


@pytest.mark.parametrize("cache_layout", ["NHD", "HND"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
def test_function_takes_every_layout(layout, cache_layout, device):
    given = arguments(device)
    if layout == "thd":
        for name in ("q", "k", "v", "slot_mapping", "position_ids"):
            given[name] = given[name].flatten(0, 1)
    expected = APPENDING.expected_of(given)
    call = dict(given)
    call.update({name: in_layout(given[name], layout).to(device) for name in "qkv"})
    if cache_layout == "HND":
        for name in ("k_cache", "v_cache"):
            call[name] = given[name].cpu().transpose(1, 2).contiguous().to(device)
    options = {"layout": layout, "cache_layout": cache_layout}
    APPENDING.append({**call, **options}, rope_ext.apply_rotary_qk_append_kv_)
    for name in ("k_cache", "v_cache"):
        got = call[name].transpose(1, 2) if cache_layout == "HND" else call[name]
        assert_same_bits(got, expected[name])
    for name in "qk":
        assert_same_bits(call[name], in_layout(expected[name], layout))


KINDS_OF_SLOTS = {
    "int32": lambda slots: slots.int(),
    "[B * S]": lambda slots: slots.flatten(),
    "[B * S], every second": lambda slots: torch.stack((slots.flatten(), slots.flatten()), 1)[:, 0],
    "transposed": lambda slots: slots.T.contiguous().T,
    "none is stored": lambda slots: torch.full_like(slots, -1),
    "rising": lambda slots: torch.arange(B * S).view(B, S) + 3,
}


@pytest.mark.parametrize("change", KINDS_OF_SLOTS.values(), ids=KINDS_OF_SLOTS)
def test_every_kind_of_slots(change, backend):
    given = arguments(backend)
    given["slot_mapping"] = change(given["slot_mapping"].cpu()).to(backend)
    APPENDING.assert_appends(given)


def test_nothing_at_all(backend):
    for empty in ("tokens", "heads of q", "heads of k", "slots"):
        given = arguments(backend)
        if empty == "tokens":
            given = {n: t[:, :0] if t.shape[:2] == (B, S) else t for n, t in given.items()}
        elif empty == "heads of q":
            given["q"] = given["q"][:, :, :0]
        elif empty == "heads of k":
            for name in ("k", "v", "k_cache", "v_cache"):
                given[name] = given[name][:, :, :0]
        else:
            given["k_cache"], given["v_cache"] = given["k_cache"][:0], given["v_cache"][:0]
            given["slot_mapping"] = torch.full_like(given["slot_mapping"], -1)
        APPENDING.assert_appends(given)


# ---- float8

# As [T, Hk, D]; v is stored without rotation, so each of its values becomes a float8.
STORED = (64, 4, 256)


def stored_as_float8(values, cache_dtype, device, scale=None):
    """values, 2^16 of them, stored to a cache and read back."""
    v = values.view(STORED).to(device)
    tokens, heads, dim = STORED
    cache = torch.zeros(1, tokens, heads, dim, device="cpu").to(cache_dtype).to(device)
    zero = torch.zeros(tokens, heads, dim, dtype=values.dtype).to(device)
    cos, sin = (t.to(device) for t in (torch.ones(tokens, dim // 2), torch.zeros(tokens, dim // 2)))
    slots = torch.arange(tokens).to(device)
    options = {} if scale is None else {"v_scale": scale.to(device)}
    rope.apply_rotary_qk_append_kv_(
        zero, zero.clone(), v, cache.clone(), cache, slots, cos, sin, **options
    )
    return cache.flatten()


def as_torch_does(values, cache_dtype):
    limit = torch.finfo(cache_dtype).max
    return values.clamp(-limit, limit).to(cache_dtype)


@pytest.mark.parametrize("cache_dtype", FLOAT8, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_every_value_of_16_bits_becomes_the_nearest_float8(dtype, cache_dtype, backend):
    values = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
    assert_same_bits(
        stored_as_float8(values, cache_dtype, backend), as_torch_does(values, cache_dtype)
    )


def hard_values(cache_dtype):
    """Every float8, midpoints between neighbours, the float32 values next to these, the ends."""
    finite = torch.arange(256).to(torch.uint8).view(cache_dtype).float()
    finite = finite[finite.isfinite()].unique()
    half_way = (finite[1:] + finite[:-1]) / 2
    at = torch.cat((finite, half_way))
    up, down = at.nextafter(torch.tensor(math.inf)), at.nextafter(torch.tensor(-math.inf))
    largest = torch.finfo(torch.float32).max
    ends = torch.tensor([0.0, 1e-45, 1e-38, largest, math.inf, math.nan])
    special = torch.cat((at, up, down, ends, -ends))
    spread = torch.randn(2**16 - len(special), generator=torch.Generator().manual_seed(0))
    spread = spread * torch.exp2(torch.arange(len(spread)) % 40 - 24.0)
    return torch.cat((special, spread))


@pytest.mark.parametrize("cache_dtype", FLOAT8, ids=name_of)
def test_float32_becomes_the_nearest_float8(cache_dtype, backend):
    values = hard_values(cache_dtype)
    assert_same_bits(
        stored_as_float8(values, cache_dtype, backend), as_torch_does(values, cache_dtype)
    )


@pytest.mark.parametrize("cache_dtype", FLOAT8, ids=name_of)
def test_float64_is_rounded_once(cache_dtype, backend):
    """Rounded first to float32, a value next to a midpoint would become the midpoint."""
    float8 = (
        torch.arange(127 if cache_dtype is FLOAT8[0] else 124).to(torch.uint8).view(cache_dtype)
    )
    low, high = float8[:-1].double(), float8[1:].double()
    above = (low + high) / 2 * (1 + 2.0**-40)
    below = (low + high) / 2 * (1 - 2.0**-40)
    values = torch.zeros(2**16, dtype=torch.float64)
    n = len(low)
    values[:n], values[n : 2 * n] = above, below
    got = stored_as_float8(values, cache_dtype, backend)
    assert_same_bits(got[:n], float8[1:])
    assert_same_bits(got[n : 2 * n], float8[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("scale", [torch.tensor([0.37]), torch.tensor([3.0, 1e-3, 1.1, 7e4])],
                         ids=["one", "each head"])  # fmt: skip
def test_values_are_divided_by_their_scale_in_float32(scale, dtype, backend):
    values = random(2**16, dtype=dtype)
    divided = (values.view(STORED).float() / scale.view(-1, 1)).flatten()
    for cache_dtype in FLOAT8:
        got = stored_as_float8(values, cache_dtype, backend, scale)
        assert_same_bits(got, as_torch_does(divided, cache_dtype))


# ---- refusals


def changed(name, change):
    return lambda given: {name: change(given[name])}


def inside(name, other):
    """Argument `name` as a part of the memory of `other`."""

    def change(given):
        whole = given[other].flatten().view(torch.uint8)
        wanted = given[name]
        count = wanted.numel() * wanted.element_size()
        return {name: whole[:count].view(wanted.dtype).view(wanted.shape)}

    return change


def slots_with(value, at):
    def change(slots):
        slots = torch.arange(B * S).view(B, S).to(slots)
        slots[at] = value
        return slots

    return changed("slot_mapping", change)


F8 = torch.float8_e4m3fn
SLOT_SHAPES = "slot_mapping to have shape [B, S], or [B * S] or less, with B = 2, S = 5"
# name -> (the replaced arguments from the good ones, expected, got); looks: checks values, on the
# CPU
REFUSALS = {
    "v of another shape": (changed("v", lambda v: v[..., :8]), "v of k's shape [2, 5, 2, 16]",
                           "[2, 5, 2, 8]"),
    "v of another dtype": (changed("v", lambda v: v.double()), "v of k's dtype float32", "float64"),
    "v with stride 2": (changed("v", lambda v: torch.cat((v, v), -1)[..., ::2]),
                        "v to have stride 1 in its last dimension", "strides [320, 64, 32, 2]"),
    "k of other tokens": (changed("k", lambda k: k[:, 1:]),
                          "k to have q's shape [2, 5, 4, 16] in all but the number of heads",
                          "[2, 4, 2, 16]"),
    "k_cache of rank 3": (changed("k_cache", lambda c: c[0]),
                          "k_cache to have shape [blocks, block_size, 2, 16]", "[8, 2, 16]"),
    "k_cache of other heads": (changed("k_cache", lambda c: c[:, :, :1]),
                               "k_cache to have shape [blocks, block_size, 2, 16]",
                               "[3, 8, 1, 16]"),
    "k_cache of another head_dim": (changed("k_cache", lambda c: c[..., :8]),
                                    "k_cache to have shape [blocks, block_size, 2, 16]",
                                    "[3, 8, 2, 8]"),
    "k_cache of another dtype": (changed("k_cache", lambda c: c.half()),
                                 "k_cache of q's dtype float32, or float8_e4m3fn or float8_e5m2",
                                 "float16"),
    "k_cache of bytes": (changed("k_cache", lambda c: c.to(torch.uint8)),
                         "k_cache of q's dtype float32, or float8_e4m3fn or float8_e5m2", "uint8"),
    "k_cache with stride 2": (changed("k_cache", lambda c: torch.cat((c, c), -1)[..., ::2]),
                              "k_cache to have stride 1 in its last dimension",
                              "strides [512, 64,"),
    "v_cache of another shape": (changed("v_cache", lambda c: c[:2]),
                                 "v_cache of k_cache's shape [3, 8, 2, 16]", "[2, 8, 2, 16]"),
    "v_cache of another dtype": (changed("v_cache", lambda c: c.to(F8)),
                                 "v_cache of k_cache's dtype float32", "float8_e4m3fn"),
    "v_cache with stride 2": (changed("v_cache", lambda c: torch.cat((c, c), -1)[..., ::2]),
                              "v_cache to have stride 1 in its last dimension",
                              "strides [512, 64,"),
    "float slots": (changed("slot_mapping", lambda s: s.float()),
                    "slot_mapping to be int32 or int64", "float32"),
    "slots of another shape": (changed("slot_mapping", lambda s: s[:, 1:]),
                               SLOT_SHAPES, "[2, 4]"),
    "slots of more tokens": (changed("slot_mapping", lambda s: torch.cat((s.flatten(), s[0]))),
                             SLOT_SHAPES, "[15]"),
    "scale of a cache of the model's": (lambda g: {"k_scale": torch.ones(1).to(g["q"].device)},
                                        "k_scale to be None for a cache that is not of float8",
                                        "one for a cache of float32"),
    "q in the cache": (inside("q", "k_cache"), "q and k_cache to share no memory, as both are "
                       "written", "overlapping tensors"),
    "k in the cache": (inside("k", "v_cache"), "k and v_cache to share no memory, as both are "
                       "written", "overlapping tensors"),
    "v in the cache": (inside("v", "v_cache"), "v to share no memory with v_cache, which is "
                       "written", "overlapping tensors"),
    "v in q": (inside("v", "q"), "v to share no memory with q, which is written",
               "overlapping tensors"),
    "cos in the cache": (inside("cos", "k_cache"), "cos to share no memory with k_cache, which is "
                         "written", "overlapping tensors"),
    "one cache for both": (lambda g: {"v_cache": g["k_cache"]}, "k_cache and v_cache to share no "
                           "memory, as both are written", "overlapping tensors"),
    "an expanded cache": (changed("k_cache", lambda c: c[:, :, :1].expand(-1, -1, K, -1)),
                          "k_cache to have no two elements in one place, as it is written",
                          "strides ["),
}  # fmt: skip
VALUES = {
    "slot past the cache": (slots_with(24, (1, 2)), "slot_mapping below 24, the slots of the "
                            "cache, or negative", "24 at index [1, 2]"),
    "slot far past the cache": (slots_with(2**40, (0, 0)), "slot_mapping below 24, the slots of "
                                "the cache, or negative", f"{2**40} at index [0, 0]"),
    "one slot twice": (slots_with(7, (0, 3)), "slot_mapping to have no slot twice",
                       "7 at index [0, 3] and at [1, 2]"),
    "slot past the cache, of the first tokens alone":
        (changed("slot_mapping", lambda s: torch.full_like(s[0], 24)),
         "slot_mapping below 24, the slots of the cache, or negative", "24 at index [0]"),
}  # fmt: skip


def as_bytes(t):
    return t.cpu().contiguous().flatten().view(torch.uint8)


def expect_refusal(given, expected, got, operator=rope.apply_rotary_qk_append_kv_):
    kept = {name: t.cpu().clone() for name, t in given.items()}
    versions = {name: t._version for name, t in given.items()}
    message = f"rope::apply_rotary_qk_append_kv_: expected {expected}, got {got}"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        APPENDING.append(given, operator)
    for name, t in given.items():
        assert torch.equal(as_bytes(t), as_bytes(kept[name]))
    assert {name: t._version for name, t in given.items()} == versions


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_argument_is_refused_and_nothing_written(case, device):
    change, expected, got = REFUSALS[case]
    given = arguments(device)
    expect_refusal({**given, **change(given)}, expected, got)


@pytest.mark.parametrize("case", VALUES)
def test_bad_slot_is_refused_on_the_cpu(case):
    change, expected, got = VALUES[case]
    given = arguments("cpu")
    expect_refusal({**given, **change(given)}, expected, got)


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_scale_that_is_not_finite_and_above_0_is_refused_on_the_cpu(value, name):
    given = arguments("cpu", cache_dtype=F8)
    for scale in (torch.tensor(value), torch.tensor([1.0, value])):
        expected = f"{name} to be finite and above 0"
        expect_refusal({**given, name: scale}, expected, str(value).replace("0.0", "0.000000"))


@pytest.mark.parametrize(
    ("scale", "expected", "got"),
    [
        (torch.ones(2).double(), "k_scale to be float32", "float64"),
        (torch.ones(3), "k_scale to have one element, or shape [2]", "[3]"),
        (torch.ones(2, 1), "k_scale to have one element, or shape [2]", "[2, 1]"),
        (torch.ones(0), "k_scale to have one element, or shape [2]", "[0]"),
    ],
)
def test_scale_of_another_kind_is_refused(scale, expected, got, device):
    given = arguments(device, cache_dtype=F8)
    expect_refusal({**given, "k_scale": scale.to(device)}, expected, got)


def test_packed_slots_of_another_shape_are_refused(device):
    given = many_tokens(device, 10)
    given["slot_mapping"] = given["slot_mapping"].view(2, 5)
    expected = "slot_mapping to have shape [T] or less, with T = 10"
    expect_refusal(given, expected, "[2, 5]")
    given["slot_mapping"] = torch.arange(11).to(device)
    expect_refusal(given, expected, "[11]")


def test_layout_of_the_cache_that_is_unknown_is_refused():
    given = arguments("cpu")
    with pytest.raises(ValueError, match="expected cache_layout to be one of NHD, HND, got 'nhd'"):
        APPENDING.append({**given, "cache_layout": "nhd"}, rope_ext.apply_rotary_qk_append_kv_)
    given["k_cache"] = given["k_cache"][0]
    match = r"expected k_cache to have shape \[blocks, Hk, block_size, D\] .*, got \[8, 2, 16\]"
    with pytest.raises(ValueError, match=match):
        APPENDING.append({**given, "cache_layout": "HND"}, rope_ext.apply_rotary_qk_append_kv_)


@pytest.mark.parametrize("name", ["v", "k_cache", "v_cache", "slot_mapping", "v_scale"])
def test_argument_on_another_device_is_refused(name):
    """A meta tensor replaces one on another device."""
    given = arguments("cpu", cache_dtype=F8, scales=True)
    given[name] = given[name].to("meta")
    with pytest.raises(RuntimeError, match=f"expected {name} on the device of q, cpu, got meta"):
        APPENDING.append(given)


# ---- CUDA, where reading values would wait


@pytest.mark.parametrize(
    "value", [BLOCKS * BLOCK_SIZE, 2**31 - 1, 2**40, 2**63 - 1, -(2**63), -1],
    ids=["one past", "2^31 - 1", "2^40", "the largest", "the smallest", "-1"],
)  # fmt: skip
@pytest.mark.parametrize("cache_dtype", [torch.float32, F8], ids=name_of)
@pytest.mark.cuda
def test_token_with_a_slot_outside_of_the_cache_is_rotated_and_not_stored(value, cache_dtype):
    given = arguments("cuda", cache_dtype=cache_dtype)
    slots = given["slot_mapping"].cpu()
    slots[1, 1] = value
    expected = APPENDING.expected_of(
        {**given, "slot_mapping": slots.clamp(max=23).where(slots < 24, -1)}
    )
    given["slot_mapping"] = slots.cuda()
    APPENDING.append(given)
    for name in WRITTEN:
        assert_same_bits(given[name], expected[name])


@pytest.mark.cuda
def test_bad_values_raise_on_cuda_where_asked(monkeypatch):
    monkeypatch.setenv("ROPE_EXT_CHECK", "1")
    for change, expected, got in VALUES.values():
        given = arguments("cuda")
        expect_refusal({**given, **change(given)}, expected, got)
    given = arguments("cuda", cache_dtype=F8)
    given["v_scale"] = torch.tensor([1.0, -1.0]).cuda()
    expect_refusal(given, "v_scale to be finite and above 0", "-1.0")


@pytest.mark.cuda
def test_scale_of_0_gives_what_the_division_gives_on_cuda():
    given = arguments("cuda", cache_dtype=F8)
    given["v_scale"] = torch.zeros(1).cuda()
    expected = APPENDING.expected_of(given)  # +-inf, so +-448
    APPENDING.append(given)
    assert_same_bits(given["v_cache"], expected["v_cache"])


@pytest.mark.cuda
def test_position_outside_of_the_table_is_stored_as_nan_on_cuda():
    given = arguments("cuda")
    given["slot_mapping"] = torch.arange(B * S).cuda()
    ids = given["position_ids"].cpu()
    ids[0, 2] = L
    given["position_ids"] = ids.cuda()
    APPENDING.append(given)
    assert given["k"].cpu()[0, 2].isnan().all()
    stored = given["k_cache"].cpu().flatten(0, 1)
    assert stored[2].isnan().all()
    assert not stored[3:].isnan().any()
    assert not given["v_cache"].cpu().isnan().any()


def test_position_outside_of_the_table_is_refused_on_the_cpu():
    given = arguments("cpu")
    given["position_ids"][1, 3] = L
    expect_refusal(given, "position_ids in [0, 9), the rows of cos and sin", "9 at index [1, 3]")


# ---- with other features of PyTorch


CALLS = {
    "operator": rope.apply_rotary_qk_append_kv_,
    "function": rope_ext.apply_rotary_qk_append_kv_,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_versions_of_what_is_written_are_bumped(mode, call, device):
    given = arguments(device)
    before = {name: t._version for name, t in given.items()}
    with mode():
        APPENDING.append(given, call)
    for name, t in given.items():
        assert t._version == before[name] + (name in WRITTEN), name


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_tokens_of_inference_mode_go_to_a_cache_made_outside_of_it(call, device):
    given = arguments(device)
    with torch.inference_mode():
        given.update({name: given[name].clone() for name in ("q", "k", "v", "position_ids")})
        expected = APPENDING.expected_of(given)
        version = given["k_cache"]._version
        APPENDING.append(given, call)
        for name in WRITTEN:
            assert_same_bits(given[name], expected[name])
    assert given["k_cache"]._version == version + 1


@pytest.mark.parametrize("name", ["q", "k", "v", "k_cache", "v_cache", "cos", "sin"])
def test_tensor_that_requires_grad_is_refused(name, device):
    given = arguments(device)
    given[name] = given[name].requires_grad_()
    message = (
        rf"rope::apply_rotary_qk_append_kv_: expected {name} to need no gradient \(what a cache"
    )
    for call in (rope.apply_rotary_qk_append_kv_, rope_ext.apply_rotary_qk_append_kv_):
        kept = given["k_cache"].detach().cpu().clone()
        with pytest.raises(RuntimeError, match=message):
            APPENDING.append(given, call)
        assert_same_bits(given["k_cache"], kept)


def test_vmap_is_refused(device):
    given = arguments(device)
    values = [given[n] for n in ("q", "k", "v", "k_cache", "v_cache", "slot_mapping", "cos", "sin")]
    batched = [t[None] if i < 3 else t for i, t in enumerate(values)]
    with pytest.raises(RuntimeError, match="expected to be called with a batch of sequences"):
        vmap(rope.apply_rotary_qk_append_kv_, (0, 0, 0, *[None] * 5))(*batched)


@pytest.mark.parametrize("scales", [False, True])
def test_opcheck_of_the_append(scales, device):
    given = arguments(device, torch.bfloat16, F8 if scales else None, scales=scales)
    scale = {name: given.pop(name) for name in ("k_scale", "v_scale") if name in given}
    operator = rope.apply_rotary_qk_append_kv_.default
    if scales:  # written tensors are not compared: PyTorch has no allclose for float8
        utils = ("test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, tuple(given.values()), scale, test_utils=utils)
    else:
        torch.library.opcheck(operator, tuple(given.values()))


def test_one_graph_for_all_lengths(device):
    """torch.compile; the slots and the caches are arguments of the graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def step(given):
        rope_ext.apply_rotary_qk_append_kv_(**given, layout="thd")
        return given["q"] * 1

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (7, 12, 40):
        given = many_tokens(device, tokens, torch.bfloat16)
        expected = APPENDING.expected_of(given)
        assert_same_bits(compiled(given), expected["q"])
        for name in WRITTEN:
            assert_same_bits(given[name], expected[name])
    assert len(graphs) == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
def test_nothing_is_copied_in_the_code_of_inductor():
    """q and k of a packed tensor, and caches that are arguments of the graph, are written in place.
    Functionalization on the way leaves no copy.
    """
    tokens, dim = 24, 8

    def function(x, k_cache, v_cache, slots, cos, sin):
        q, k, v = (x @ x.T).unflatten(-1, (3, -1))[..., :dim].split(1, dim=1)
        rope_ext.apply_rotary_qk_append_kv_(
            q, k, v, k_cache, v_cache, slots, cos, sin, layout="thd"
        )
        return q * 1

    x = random(tokens, 48)
    slots, table = random_slots(tokens, capacity=tokens), random_table(tokens, dim // 2)
    caches = [random(6, 4, 1, dim, seed=i) for i in (1, 2)]
    copies = [cache.clone() for cache in caches]
    expected = function(x, *copies, slots, *table)
    got, (code,) = run_and_get_code(
        torch.compile(function, fullgraph=True), x, *caches, slots, *table
    )
    for a, b in zip((got, *caches), (expected, *copies), strict=True):
        assert_same_bits(a, b)
    assert code.count("torch.ops.rope.apply_rotary_qk_append_kv_.default(") == 1
    assert "clone" not in code
    assert "copy" not in code.replace("async_compile", "").replace("copy_misaligned", "")


# ---- DTensors

PLACED = {"q": 2, "k": 2, "v": 2, "k_cache": 2, "v_cache": 2, "k_scale": 0}  # dimension of heads


@pytest.mark.parametrize("sharded", ["q and k", "q", "k"])
def test_heads_are_sharded_as_those_of_the_caches(sharded):
    given = arguments("cpu", torch.bfloat16, F8, heads=(2 * RANKS, RANKS), scales=True)
    expected = APPENDING.expected_of(given)
    dims = {n: dim for n, dim in PLACED.items() if ("q" if n == "q" else "k") in sharded}

    def on_rank(mesh):
        placed = {
            n: place(t.clone(), mesh, Shard(dims[n]) if n in dims else Replicate())
            for n, t in given.items()
        }
        APPENDING.append(placed)
        return [placed[name] for name in WRITTEN]

    for got, whole in zip(on_every_rank(on_rank), expected.values(), strict=True):
        assert_same_bits(got, whole)


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ({"q": 1, "k": 1, "v": 1}, "expected tokens to be replicated on dimension 0 of the mesh, "
         "as the caches that take them are, got q or another one sharded along sequence"),
        ({"q": 1}, r"expected k to be .*, beside q as"),
        ({"q": 2, "k": 2, "v": 2}, r"expected k_cache to be .*, beside k as"),
        ({"k_cache": 2, "v_cache": 2}, r"expected k to be .*, beside k_cache as"),
        ({"k_cache": 0}, r"expected k_cache to be Replicate\(\), as it is needed whole"),
        ({"slot_mapping": 0}, r"expected slot_mapping to be Replicate\(\), as it is needed whole"),
    ],
    ids=str,
)  # fmt: skip
def test_shards_that_do_not_fit_are_refused(dims, expected):
    given = arguments("cpu", heads=(2 * RANKS, RANKS))
    with as_rank(0):
        mesh = init_device_mesh("cpu", (RANKS,))
        placed = {n: place(t, mesh, *([Shard(dims[n])] if n in dims else []))
                  for n, t in given.items()}  # fmt: skip
        with pytest.raises(RuntimeError, match=f"apply_rotary_qk_append_kv_: {expected}"):
            APPENDING.append(placed)


def test_flops_are_those_of_the_rotation():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        APPENDING.append(arguments("cpu"))
    assert counter.get_total_flops() == 3 * B * S * (H + K) * D
