"""shift_cached_k_ rotates keys in a paged cache as reading, rotating and storing them would."""

import re
from itertools import pairwise, product

import pytest
import torch
from appending import Appending, changed
from support import (
    DTYPES,
    FLOAT8,
    assert_same_bits,
    name_of,
    naming,
    random,
    random_cache,
    random_slots,
)

import rope_ext
from rope_ext import reference

F64, F32, F16, BF16 = DTYPES
E4M3, E5M2 = FLOAT8
BLOCKS, BLOCK_SIZE, N, K, D = 3, 8, 11, 2, 16
FAR = 2**50  # still exact in float64


def inv_freq_of(pairs, device="cpu"):
    return rope_ext.frequencies.default(2 * pairs)[0].to(device)


def some_keys(device, dtype=F32, *, dim=D, pairs=D // 2, ids=torch.int64):
    """Positions up to 100,000 apart, also negative."""
    old, new = (100_000 * random(N, dtype=F64, device=device, seed=i) for i in (3, 4))
    return {
        "k_cache": random_cache(BLOCKS, BLOCK_SIZE, K, dim, dtype=dtype, device=device),
        "slot_mapping": random_slots(N, capacity=BLOCKS * BLOCK_SIZE, device=device),
        "old_position_ids": old.to(ids),
        "new_position_ids": new.to(ids),
        "inv_freq": inv_freq_of(pairs, device),
    }


def by_steps(k_cache, slot_mapping, old_position_ids, new_position_ids, inv_freq, *,
             attention_scaling=1.0, **options):  # fmt: skip
    """The keys are read, rotated by the difference of their positions, and stored."""
    dtype = F32 if k_cache.dtype in FLOAT8 else k_cache.dtype
    keys = k_cache.flatten(0, 1).to(dtype)[slot_mapping.clamp(min=0)]
    distance = new_position_ids.double() - old_position_ids.double()
    keys, _ = rope_ext.apply_rotary_qk_at(
        keys, keys[:, :0], inv_freq, distance, attention_scaling=attention_scaling, layout="thd",
        **options,
    )  # fmt: skip
    return (reference._stored(k_cache, keys, slot_mapping, None),)


SHIFT = Appending(
    torch.ops.rope.shift_cached_k_, rope_ext.shift_cached_k_, by_steps, some_keys, ("k_cache",)
)


def moved(given, **options):
    SHIFT.append({**given, **options})
    return given["k_cache"]


# ---- the numbers

# (channels of a head, pairs, offset): pairs below, at and above whole vectors, channels before and
# after them, more pairs than are computed at a time.
PARTS = [(16, 8, 0), (48, 16, 8), (10, 3, 2), (5, 2, 0), (6, 1, 4), (64, 32, 0), (300, 130, 24)]
POSITIONS = (torch.int64, torch.int32, F32, BF16)


@pytest.mark.parametrize("dtype", [*DTYPES, *FLOAT8], ids=name_of)
def test_keys_are_read_rotated_and_stored(dtype, backend):
    for part, ids, interleaved in product(PARTS, POSITIONS, (False, True)):
        dim, pairs, offset = part
        given = SHIFT.arguments(backend, dtype, dim=dim, pairs=pairs, ids=ids)
        options = {"rotary_offset": offset, "interleaved": interleaved, "attention_scaling": 1.25}
        with naming(f"{part}, {ids}, interleaved: {interleaved}"):
            SHIFT.assert_appends(given, **options)


@pytest.mark.parametrize("dtype", [*DTYPES, *FLOAT8], ids=name_of)
def test_new_frequencies(dtype, device):
    """Within the roundings of the table (to float32), of the products, and of the result."""
    given = SHIFT.arguments(device, dtype)
    given |= {"new_inv_freq": inv_freq_of(D // 2, device) / 8, "attention_scaling": 1.25}
    arithmetic = F64 if dtype == F64 else F32
    for interleaved in (False, True):
        on_host = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        on_host["k_cache"] = before = on_host["k_cache"].double()
        exact = reference.shift_cached_k(**on_host, interleaved=interleaved)
        got = moved(given, interleaved=interleaved).cpu().double()
        half = torch.finfo(dtype).eps / 2
        roundings = half + 5 * torch.finfo(arithmetic).eps / 2
        # positions up to 400,000 have angles that float64 rounds to 2^-34: those of `exact`
        allowed = (roundings + 2**-33) * 1.25 * 2**0.5 * before.abs().amax() + least_of(dtype)
        torch.testing.assert_close(got, exact, rtol=0, atol=allowed.item())
        given["k_cache"] = before.to(dtype).to(device)


def least_of(dtype):
    """Half of the smallest step."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("new_frequencies", [False, True], ids=["same", "new frequencies"])
def test_angles_are_exact_at_any_distance(new_frequencies, device):
    """Positions that float32 can't hold, and frequencies that are powers of two: the angles of both
    are the same, but for multiples of the step.
    """
    given = SHIFT.arguments(device, F32)
    options = {}
    if new_frequencies:
        given["inv_freq"] = torch.exp2(-torch.arange(D / 2)).to(device)
        options["new_inv_freq"] = 2 * given["inv_freq"]
    far = dict(given, k_cache=given["k_cache"].clone())
    start = FAR if not new_frequencies else 0
    for name, steps in (("old_position_ids", 7), ("new_position_ids", 12)):
        given[name] = torch.arange(N, device=device) * steps
        far[name] = given[name] + start
    if new_frequencies:  # old * f - new * 2 f stays
        shift = 2**40
        far["old_position_ids"] = given["old_position_ids"] + 2 * shift
        far["new_position_ids"] = given["new_position_ids"] + shift
    near, far = moved(given, **options), moved(far, **options)
    if new_frequencies:  # composed of two angles, each rounded to 2^-36
        torch.testing.assert_close(far, near, rtol=0, atol=2**-23 * near.abs().max().item())
    else:
        assert_same_bits(far, near)


@pytest.mark.parametrize("dtype", FLOAT8, ids=name_of)
def test_each_float8_is_read_as_what_it_is(dtype, backend):
    """Beside a zero, and turned by nothing, each stays; infinity becomes the largest."""
    codes = torch.arange(256, dtype=torch.uint8)
    cache = torch.stack((codes, torch.zeros_like(codes)), -1).view(32, 8, 1, 2).to(backend)
    cache = cache.view(dtype)
    slots = torch.arange(256, device=backend)
    torch.ops.rope.shift_cached_k_(cache, slots, slots, slots, inv_freq_of(1, backend))
    got, given = cache.cpu().float()[..., 0].flatten(), codes.view(dtype).float()
    largest = torch.finfo(dtype).max
    assert_same_bits(got, given.clamp(-largest, largest))


# ---- what it is for


@pytest.mark.parametrize("dtype", [F32, F16, BF16, E4M3], ids=name_of)
def test_pieces_cached_apart_are_attended_to_as_the_whole(dtype):
    """A piece whose positions began at 0 is moved behind another one. A score q . k / sqrt(D) is
    off by the roundings of the key, one at each of two rotations, where the whole has one: at most
    `of_score`. Then each weight of the softmax is off by a factor of at most exp(2 of_score).
    """
    first, second, dim, block = 9, 14, 64, 8
    total = first + second
    inv_freq, of_model = inv_freq_of(dim // 2), F32 if dtype in FLOAT8 else dtype
    q, k, v = (random(total, 1, dim, dtype=of_model, seed=i) for i in range(3))
    rows = rope_ext.cos_sin_cache(inv_freq, 64)

    def cached(position_ids):
        cache = torch.zeros(2, 4, block, 1, dim).to(dtype)
        step = k.clone(), v.clone(), *cache, torch.arange(total), *rows, position_ids
        rope_ext.apply_rotary_qk_append_kv_(q.clone(), *step, layout="thd")
        return cache[0]

    def scores(cache):
        query = rope_ext.apply_rotary(
            q[-1:].float(), *rows, torch.tensor([total - 1]), layout="thd"
        )
        return (cache.flatten(0, 1)[:total].float() * query).sum(-1).flatten() / dim**0.5

    whole = cached(torch.arange(total))
    apart = cached(torch.cat((torch.arange(first), torch.arange(second))))
    own = torch.arange(second)
    rope_ext.shift_cached_k_(apart, first + own, own, first + own, inv_freq)

    pairs_of_k = k.double().unflatten(-1, (2, -1)).norm(dim=-2).repeat(1, 1, 2)
    pairs_of_q = q[-1:].double().unflatten(-1, (2, -1)).norm(dim=-2).repeat(1, 1, 2)
    half = torch.finfo(dtype).eps / 2 + 2**-22  # and the arithmetic in float32
    off = (3 * half * pairs_of_k + 3 * least_of(dtype)) * pairs_of_q
    of_score = (off.sum(-1) / dim**0.5).max().item()
    wanted, got = scores(whole), scores(apart)
    torch.testing.assert_close(got, wanted, rtol=0, atol=of_score)
    outputs = (scores.softmax(0) @ v[:, 0].float() for scores in (got, wanted))
    allowed = (torch.tensor(2 * of_score).exp() - 1).item() * v.abs().max().item()
    torch.testing.assert_close(*outputs, rtol=0, atol=allowed)


@pytest.mark.parametrize("far", [True, False], ids=["far", "by one token"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=name_of)
def test_a_thousand_moves_in_a_row(dtype, far):
    """Each rounds, by half a step at most. The roundings of far moves add up as a random walk does,
    to sqrt(moves) of one. In float32 so do those of cos and sin, which are the same for the same
    distance. A slow pair that turns by less than half a step a move stays where it is: its errors
    are the moves themselves, and docs/serving.md says so.
    """
    moves, pairs = 1000, 32
    given = some_keys("cpu", dtype, dim=2 * pairs, pairs=pairs)
    slots = given["slot_mapping"] = torch.arange(BLOCKS * BLOCK_SIZE)
    before = given["k_cache"].double()
    distances = torch.randint(1, 50, (moves + 1, len(slots))) if far else torch.ones(moves + 1, 24)
    ids = torch.cumsum(distances.long(), 0)
    for old, new in pairwise(ids):
        moved(given, old_position_ids=old, new_position_ids=new)
    exact = reference.shift_cached_k(before, slots, ids[0], ids[-1], given["inv_freq"])
    off = (given["k_cache"].double() - exact).norm() / before.norm()
    eps = torch.finfo(dtype).eps
    walk = eps / 12**0.5 * moves**0.5
    assert walk / 3 < off < (walk * (5 if dtype == F32 else 1.5) if far else moves * eps / 2)


# ---- the cache


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=name_of)
def test_keys_of_a_larger_tensor_in_each_layout(layout, dtype, device):
    """k_cache and v_cache side by side, in blocks that are not neighbours."""
    sizes = (2, BLOCK_SIZE, K, D) if layout == "NHD" else (2, K, BLOCK_SIZE, D)
    whole = random_cache(2 * BLOCKS, *sizes, dtype=dtype, device=device)
    given = some_keys(device, dtype)
    given["k_cache"] = whole[::2, 0]
    kept = whole.view(torch.uint8).clone()
    plain = given["k_cache"] if layout == "NHD" else given["k_cache"].transpose(1, 2)
    expected = SHIFT.expected_of({**given, "k_cache": plain.contiguous()})["k_cache"]
    SHIFT.append({**given, "cache_layout": layout}, rope_ext.shift_cached_k_)
    assert_same_bits(plain, expected)
    changes = whole.view(torch.uint8) != kept
    assert changes[::2, 0].any()
    changes[::2, 0] = False
    assert not changes.any()


def test_rows_of_latent_attention(device):
    """The last channels of [blocks, block_size, rank + R], with one head."""
    given = some_keys(device, BF16, dim=48, pairs=8)
    given["k_cache"] = given["k_cache"][:, :, :1].contiguous()
    latent = {**given, "k_cache": given["k_cache"].squeeze(2).clone()}
    SHIFT.append(latent, rope_ext.shift_cached_k_)
    assert_same_bits(latent["k_cache"], moved(given, rotary_offset=32).squeeze(2))


def test_only_slots_that_exist_are_moved(device):
    given = SHIFT.arguments(device)
    given["slot_mapping"] = torch.full((N,), -1, device=device)
    SHIFT.assert_appends(given)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    names = ("slot_mapping", "old_position_ids", "new_position_ids")
    SHIFT.assert_appends({**given, **dict.fromkeys(names, none)})
    SHIFT.assert_appends({**given, "k_cache": given["k_cache"][:, :, :0]})


# ---- refusals


def twice(slots):
    slots = slots.clone()
    slots[2] = slots[0]
    return slots


REFUSALS = [
    (changed("k_cache", lambda c: c.int()), "k_cache to be float64, float32, float16, bfloat16, "
     "float8_e4m3fn or float8_e5m2, got int32"),
    (changed("k_cache", lambda c: c[0]), "k_cache to have shape [blocks, block_size, Hk, D], got "
     "[8, 2, 16]"),
    (changed("k_cache", lambda c: c.transpose(2, 3)), "k_cache to have stride 1 in its last "
     "dimension, got strides"),
    (changed("k_cache", lambda c: c[:1].expand(3, -1, -1, -1)), "k_cache to have no two elements "
     "in one place, as it is written, got strides"),
    (changed("slot_mapping", lambda s: s.float()), "slot_mapping to be int32 or int64, got "
     "float32"),
    (changed("slot_mapping", lambda s: s.view(1, -1)), "slot_mapping to have shape [N], got "
     "[1, 11]"),
    (changed("old_position_ids", lambda p: p[1:]), "old_position_ids of slot_mapping's shape [11], "
     "got [10]"),
    (changed("new_position_ids", lambda p: p.view(1, -1)), "new_position_ids of slot_mapping's "
     "shape [11], got [1, 11]"),
    (changed("new_position_ids", lambda p: p.bool()), "new_position_ids to be int32, int64, "
     "float64, float32, float16 or bfloat16, got bool"),
    (changed("inv_freq", lambda f: f.view(1, -1)), "inv_freq to have shape [P], got [1, 8]"),
    (changed("inv_freq", lambda f: f.int()), "inv_freq to be float64, float32, float16 or "
     "bfloat16, got int32"),
    (lambda g: {"new_inv_freq": g["inv_freq"][1:]}, "new_inv_freq of inv_freq's shape [8], got "
     "[7]"),
    (lambda g: {"new_inv_freq": g["inv_freq"].long()}, "new_inv_freq to be float64, float32, "
     "float16 or bfloat16, got int64"),
    (changed("inv_freq", lambda f: torch.cat((f, f))), "rotary_dim, twice the length of inv_freq, "
     "to be even, at least 2 and at most head_dim 16, got 32"),
    (lambda g: {"rotary_offset": 2}, "rotary_offset to be at least 0 and at most"),
    (lambda g: {"inv_freq": g["k_cache"].flatten()[:8]}, "inv_freq to share no memory with "
     "k_cache, which is written, got overlapping tensors"),
]  # fmt: skip
OF_VALUES = [
    (changed("slot_mapping", lambda s: s + 24), "slot_mapping below 24, the slots of the cache, or "
     "negative, got"),
    (changed("slot_mapping", twice), "slot_mapping to have no slot twice, got"),
]  # fmt: skip


def test_bad_argument_is_refused_and_nothing_written(device):
    on_host = device.type == "cpu"  # where values are looked at
    for change, expected in REFUSALS + (OF_VALUES if on_host else []):
        given = SHIFT.arguments(device)
        SHIFT.assert_refused({**given, **change(given)}, expected)


def test_a_cache_that_requires_grad_is_refused():
    given = SHIFT.arguments("cpu")
    given["k_cache"].requires_grad_()
    for function in (SHIFT.operator, SHIFT.function):
        with pytest.raises(RuntimeError, match="k_cache"):
            SHIFT.append(given, function)


def test_layouts_that_do_not_fit_are_named():
    given = SHIFT.arguments("cpu")
    for change, expected in (
        ({"cache_layout": "HDN"}, "expected cache_layout to be one of NHD, HND, got 'HDN'"),
        ({"k_cache": given["k_cache"][0, 0]},
         "[blocks, block_size, Hk, D] (cache_layout 'NHD'), got [2, 16]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(expected)):
            SHIFT.append({**given, **change}, rope_ext.shift_cached_k_)
