"""apply_rotary_mla_append_, of DeepSeek's latent attention, has the bits of the separate steps."""

import re

import pytest
import torch
from appending import Appending
from ranks import RANKS, as_rank, on_every_rank, place
from support import (
    DTYPES,
    FLOAT8,
    ORDERS,
    VIEWS,
    assert_same_bits,
    guarded,
    name_of,
    random,
    random_cache,
    random_positions,
    random_slots,
    random_table,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.func import vmap

import rope_ext
from rope_ext import reference

rope = torch.ops.rope

B, S, H, L = 2, 5, 3, 9
D, R, RANK = 24, 8, 32  # 16 channels of q stay
BLOCKS, BLOCK_SIZE = 3, 8
SLOTS = BLOCKS * BLOCK_SIZE  # for 10 tokens
F8 = torch.float8_e4m3fn
WRITTEN = ("q", "k_pe", "kv_cache")
APPENDING = Appending(rope.apply_rotary_mla_append_, reference.apply_rotary_mla_append, WRITTEN)


def arguments(
    device, dtype=torch.float32, cache_dtype=None, *, tokens=(B, S), heads=H, dim=D, rotary_dim=R,
    rank=RANK, blocks=BLOCKS, scale=False,
):  # fmt: skip
    cos, sin = random_table(L, rotary_dim // 2, device=device)
    row = blocks, BLOCK_SIZE, rank + rotary_dim
    made = {
        "q": random(*tokens, heads, dim, dtype=dtype, device=device),
        "k_pe": random(*tokens, rotary_dim, dtype=dtype, device=device, seed=1),
        "kv_c": random(*tokens, rank, dtype=dtype, device=device, seed=2),
        "kv_cache": random_cache(*row, dtype=cache_dtype or dtype, device=device),
        "slot_mapping": random_slots(*tokens, capacity=blocks * BLOCK_SIZE, device=device),
        "cos": cos,
        "sin": sin,
        "position_ids": random_positions(*tokens, rows=L, device=device),
    }
    if scale:
        made["scale"] = torch.tensor([0.3], device=device)
    return made


# ---- the numbers


@pytest.mark.parametrize("cache", ["of the model", *FLOAT8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_cache_gets_what_rotation_and_quantisation_give(dtype, cache, backend):
    float8 = cache in FLOAT8
    APPENDING.assert_appends(arguments(backend, dtype, cache if float8 else dtype, scale=float8))


# heads of q, D, R, rank
SIZES = {
    "a few of the channels": (H, D, R, RANK),
    "DeepSeek-V3": (16, 192, 64, 512),
    "absorbed queries, more heads than there is room for copies of": (70, 576, 64, 512),
    "all channels of q": (H, 16, 16, 48),
    "a rank that ends within a piece": (H, 48, 32, 72),
    "odd numbers of pairs": (H, 11, 6, 20),
    "no latent": (H, D, R, 0),
    "the most that change their order": (1, 512, 512, 24),
}


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, F8], ids=name_of)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_order_of_the_pairs(sizes, order, cache_dtype, backend):
    heads, dim, rotary_dim, rank = SIZES[sizes]
    given = arguments(
        backend, torch.bfloat16, cache_dtype, tokens=(6,), heads=heads, dim=dim,
        rotary_dim=rotary_dim, rank=rank,
    )  # fmt: skip
    APPENDING.assert_appends(given, **ORDERS[order])


@pytest.mark.parametrize("order", ["half-split", "neighbours to halves"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pairs_that_change_their_order_in_every_dtype(dtype, order, backend):
    APPENDING.assert_appends(arguments(backend, dtype), **ORDERS[order])


def test_q_has_the_bits_of_the_rotation_out_of_place(device):
    given = arguments(device, torch.bfloat16)
    rows = [given[name] for name in ("cos", "sin", "position_ids")]
    options = ORDERS["neighbours to halves"]
    expected = rope.apply_rotary(given["q"], *rows, rotary_offset=D - R, **options)
    APPENDING.append({**given, **options})
    assert_same_bits(given["q"], expected)


@pytest.mark.parametrize("order", ["interleaved", "neighbours to halves"])
def test_the_same_bits_with_any_number_of_threads(order, threads):
    written = []
    for count in (1, 2, 5):
        threads(count)
        given = arguments(
            "cpu", torch.bfloat16, F8, tokens=(300,), heads=6, dim=96, rotary_dim=64, blocks=40
        )
        APPENDING.append({**given, **ORDERS[order]})
        written.append([given[name] for name in WRITTEN])
    for got in written[1:]:
        for a, b in zip(got, written[0], strict=True):
            assert_same_bits(a, b)


# ---- memory


@pytest.mark.parametrize("tokens", [(B, S), (7,), (B, 1), (1,)], ids=str)
@pytest.mark.parametrize("with_head", [False, True])
def test_tokens_and_the_one_head_of_k(with_head, tokens, backend):
    given = arguments(backend, torch.float16, tokens=tokens)
    if with_head:
        given["k_pe"] = given["k_pe"].unsqueeze(-2)
    APPENDING.assert_appends(given, interleaved=True, interleaved_out=False)


@pytest.mark.parametrize("order", ["half-split", "neighbours to halves"])
@pytest.mark.parametrize("count", [0, 3, S, B * S - 1])
@pytest.mark.parametrize("tokens", [(B, S), (B * S,)], ids=str)
def test_tokens_past_the_end_of_the_slots_are_rotated_and_not_stored(tokens, count, order, backend):
    given = arguments(backend, torch.float16, tokens=tokens)
    slots = torch.arange(B * S).flip(0)
    given["slot_mapping"] = slots[:count].to(backend)
    whole = {**given, "slot_mapping": slots.where(torch.arange(B * S) < count, -1), **ORDERS[order]}
    expected = APPENDING.expected_of(whole)
    APPENDING.assert_appends(given, **ORDERS[order])
    for name in WRITTEN:
        assert_same_bits(given[name], expected[name])


@pytest.mark.parametrize("order", ["half-split", "neighbours to halves"])
@pytest.mark.parametrize("view", VIEWS)
def test_only_the_channels_of_a_view_of_q_that_rotate_are_written(view, order, backend):
    given = arguments(backend, torch.bfloat16)
    wholes = []

    def base(*shape):
        inner, whole = guarded(*shape, dtype=torch.bfloat16, device=backend)
        wholes.append(whole)
        return inner

    given["q"] = q = VIEWS[view](base, B, S, H, D)
    expected_whole = wholes[0].cpu().clone()
    expected = APPENDING.expected_of({**given, **ORDERS[order]})
    part = expected_whole.as_strided(q.shape, q.stride(), q.storage_offset())
    part.copy_(expected["q"])
    APPENDING.append({**given, **ORDERS[order]})
    assert_same_bits(wholes[0], expected_whole)
    assert_same_bits(given["kv_cache"], expected["kv_cache"])


def test_q_and_the_compressed_row_of_larger_projections(backend):
    """As in models: q after the channels without positions, kv_c and k_pe side by side."""
    given = arguments(backend, torch.bfloat16, tokens=(7,))
    row = random(7, RANK + R, dtype=torch.bfloat16, device=backend)
    given["kv_c"], given["k_pe"] = row.split((RANK, R), dim=-1)
    whole = random(7, H, 16 + D, dtype=torch.bfloat16, device=backend)
    given["q"] = whole[..., 16:]
    kept, latent = whole[..., :16].clone(), given["kv_c"].clone()
    APPENDING.assert_appends(given, interleaved=True, interleaved_out=False)
    assert_same_bits(whole[..., :16], kept)
    assert_same_bits(row[:, :RANK], latent)


CACHES = {
    "one element off": lambda base, N, S, W: base(N * S * W + 1)[1:].view(N, S, W),
    "rows of odd length": lambda base, N, S, W: base(N, S, W + 1)[..., :W],
    "a layer of many": lambda base, N, S, W: base(N, 4, S, W)[:, 2],
    "every second": lambda base, N, S, W: base(2 * N, 2 * S, W)[::2, 1::2],
}


@pytest.mark.parametrize("cache_dtype", [torch.float16, F8], ids=name_of)
@pytest.mark.parametrize("view", CACHES)
def test_only_the_slots_of_a_view_of_the_cache_are_written(view, cache_dtype, backend):
    given = arguments(backend, torch.float16, cache_dtype)
    whole = random_cache(20000, dtype=cache_dtype, device=backend)

    def base(*shape):
        return whole[16 : 16 + torch.Size(shape).numel()].view(shape)

    given["kv_cache"] = cache = CACHES[view](base, BLOCKS, BLOCK_SIZE, RANK + R)
    expected_whole = whole.cpu().clone()
    part = expected_whole.as_strided(cache.shape, cache.stride(), cache.storage_offset())
    part.copy_(APPENDING.expected_of(given)["kv_cache"])
    APPENDING.append(given)
    assert_same_bits(whole, expected_whole)


def test_nothing_at_all(backend):
    for empty in ("tokens", "heads", "slots"):
        given = arguments(backend)
        if empty == "tokens":
            given = {n: t[:, :0] if t.shape[:2] == (B, S) else t for n, t in given.items()}
        elif empty == "heads":
            given["q"] = given["q"][:, :, :0]
        else:
            given["kv_cache"] = given["kv_cache"][:0]
            given["slot_mapping"] = torch.full_like(given["slot_mapping"], -1)
        APPENDING.assert_appends(given)
        APPENDING.assert_appends(given, interleaved=True, interleaved_out=False)


# ---- refusals


def changed(name, change):
    return lambda given: {name: change(given[name])}


def with_slot(value, at):
    def change(slots):
        slots = torch.arange(B * S).view(B, S).to(slots)
        slots[at] = value
        return slots

    return changed("slot_mapping", change)


def within(name, other):
    """Argument `name` as a part of the memory of `other`."""

    def change(given):
        t = given[name]
        return {name: given[other].flatten()[: t.numel()].view(t.shape)}

    return change


# name -> (the replaced arguments from the good ones, expected, got)
REFUSALS = {
    "int q": (changed("q", lambda q: q.int()), "q to be float64, float32, float16 or bfloat16",
              "int32"),
    "a table wider than q": (lambda g: dict(zip(("cos", "sin"), random_table(
        L, 13, device=g["q"].device), strict=True)), "rotary_dim, twice the width of cos, to be "
        "even, at least 2 and at most head_dim 24", "26"),
    "k_pe of other channels": (changed("k_pe", lambda k: k[..., :6]),
                               "k_pe to have shape [2, 5, 8] or [2, 5, 1, 8]", "[2, 5, 6]"),
    "k_pe of two heads": (changed("k_pe", lambda k: torch.stack((k, k), -2)),
                          "k_pe to have shape [2, 5, 8] or [2, 5, 1, 8]", "[2, 5, 2, 8]"),
    "k_pe of other tokens": (changed("k_pe", lambda k: k[:1]),
                             "k_pe to have shape [2, 5, 8] or [2, 5, 1, 8]", "[1, 5, 8]"),
    "k_pe of another dtype": (changed("k_pe", lambda k: k.half()), "k_pe of q's dtype float32",
                              "float16"),
    "k_pe with stride 2": (changed("k_pe", lambda k: torch.cat((k, k), -1)[..., ::2]),
                           "k_pe to have stride 1 in its last dimension", "strides [80, 16, 2]"),
    "kv_c of other tokens": (changed("kv_c", lambda c: c[:, 1:]),
                             "kv_c to have shape [2, 5, rank]", "[2, 4, 32]"),
    "kv_c with a head": (changed("kv_c", lambda c: c.unsqueeze(-2)),
                         "kv_c to have shape [2, 5, rank]", "[2, 5, 1, 32]"),
    "kv_c of another dtype": (changed("kv_c", lambda c: c.double()), "kv_c of q's dtype float32",
                              "float64"),
    "a cache of other rows": (changed("kv_cache", lambda c: c[..., 1:]),
                              "kv_cache to have shape [blocks, block_size, 40]", "[3, 8, 39]"),
    "a cache with heads": (changed("kv_cache", lambda c: c.unsqueeze(2)),
                           "kv_cache to have shape [blocks, block_size, 40]", "[3, 8, 1, 40]"),
    "a cache of another dtype": (changed("kv_cache", lambda c: c.bfloat16()),
                                 "kv_cache of q's dtype float32, or float8_e4m3fn or float8_e5m2",
                                 "bfloat16"),
    "slots of another shape": (changed("slot_mapping", lambda s: s[:1]),
                               "slot_mapping to have shape [B, S], or [B * S] or less, with B = 2, "
                               "S = 5",
                               "[1, 5]"),
    "scale of a cache of the model's": (lambda g: {"scale": torch.ones(1).to(g["q"].device)},
                                        "scale to be None for a cache that is not of float8",
                                        "one for a cache of float32"),
    "two scales": (lambda g: {"kv_cache": g["kv_cache"].to(F8), "scale": torch.ones(2).to(
        g["q"].device)}, "scale to have one element", "[2]"),
    "k_pe in q": (within("k_pe", "q"), "q and k_pe to share no memory, as both are written",
                  "overlapping tensors"),
    "kv_c in the cache": (within("kv_c", "kv_cache"), "kv_c to share no memory with kv_cache, "
                          "which is written", "overlapping tensors"),
    "kv_c in k_pe": (lambda g: {"k_pe": g["kv_c"][..., 4:12]}, "kv_c to share no memory with k_pe, "
                     "which is written", "overlapping tensors"),
}  # fmt: skip
VALUES = {
    "slot past the cache": (with_slot(24, (1, 2)), "slot_mapping below 24, the slots of the cache, "
                            "or negative", "24 at index [1, 2]"),
    "one slot twice": (with_slot(7, (0, 3)), "slot_mapping to have no slot twice",
                       "7 at index [0, 3] and at [1, 2]"),
    "position outside": (changed("position_ids", lambda p: p + L), "position_ids in [0, 9), the "
                         "rows of cos and sin", ""),
    "scale of 0": (lambda g: {"kv_cache": g["kv_cache"].to(F8), "scale": torch.zeros(1)},
                   "scale to be finite and above 0", "0.000000"),
}  # fmt: skip


def as_bytes(t):
    return t.cpu().contiguous().flatten().view(torch.uint8)


def expect_refusal(given, expected, got):
    kept = {name: as_bytes(t).clone() for name, t in given.items() if isinstance(t, torch.Tensor)}
    message = f"rope::apply_rotary_mla_append_: expected {expected}, got {got}"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        APPENDING.append(given)
    for name, before in kept.items():
        assert torch.equal(as_bytes(given[name]), before)


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_argument_is_refused_and_nothing_written(case, device):
    change, expected, got = REFUSALS[case]
    given = arguments(device)
    expect_refusal({**given, **change(given)}, expected, got)


@pytest.mark.parametrize("case", VALUES)
def test_bad_value_is_refused_on_the_cpu(case):
    change, expected, got = VALUES[case]
    given = arguments("cpu")
    expect_refusal({**given, **change(given)}, expected, got)


def test_more_channels_than_can_change_their_order_are_refused(device):
    given = arguments(device, heads=1, dim=514, rotary_dim=514, rank=8)
    expected = ("interleaved_out to be None or interleaved where more than 512 channels rotate, as "
                "all of a head are held at once")  # fmt: skip
    given.update(ORDERS["neighbours to halves"])
    expect_refusal(given, expected, "the other order for 514")
    del given["interleaved_out"]
    APPENDING.assert_appends(
        {n: t for n, t in given.items() if n != "interleaved"}, interleaved=True
    )


@pytest.mark.parametrize("name", ["k_pe", "kv_c", "kv_cache", "slot_mapping", "scale"])
def test_argument_on_another_device_is_refused(name):
    """A meta tensor replaces one on another device."""
    given = arguments("cpu", cache_dtype=F8, scale=True)
    given[name] = given[name].to("meta")
    with pytest.raises(RuntimeError, match=f"expected {name} on the device of q, cpu, got meta"):
        APPENDING.append(given)


@pytest.mark.cuda
@pytest.mark.parametrize("value", [SLOTS, 2**40, 2**63 - 1, -1])
@pytest.mark.parametrize("cache_dtype", [torch.float32, F8], ids=name_of)
def test_token_with_a_slot_outside_of_the_cache_is_rotated_and_not_stored(value, cache_dtype):
    given = arguments("cuda", cache_dtype=cache_dtype)
    slots = given["slot_mapping"].cpu()
    slots[1, 1] = value
    expected = APPENDING.expected_of({**given, "slot_mapping": slots.where(slots < SLOTS, -1)})
    given["slot_mapping"] = slots.cuda()
    APPENDING.append(given)
    for name in WRITTEN:
        assert_same_bits(given[name], expected[name])


@pytest.mark.cuda
def test_bad_values_raise_on_cuda_where_asked(monkeypatch):
    monkeypatch.setenv("ROPE_EXT_CHECK", "1")
    for change, expected, got in VALUES.values():
        given = arguments("cuda")
        replaced = {name: t.cuda() for name, t in change(given).items()}
        expect_refusal({**given, **replaced}, expected, got)


# ---- with other features of PyTorch

CALLS = {
    "operator": rope.apply_rotary_mla_append_,
    "function": rope_ext.apply_rotary_mla_append_,
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


@pytest.mark.parametrize("name", ["q", "k_pe", "kv_c", "kv_cache", "cos", "sin"])
def test_tensor_that_requires_grad_is_refused(name, device):
    given = arguments(device)
    given[name] = given[name].requires_grad_()
    kept = given["kv_cache"].detach().cpu().clone()
    message = rf"append_: expected {name} to need no gradient \(what a cache keeps has none\)"
    for call in CALLS.values():
        with pytest.raises(RuntimeError, match=message):
            APPENDING.append(given, call)
        assert_same_bits(given["kv_cache"], kept)


def test_vmap_is_refused(device):
    values = list(arguments(device).values())
    batched = [t[None] if i < 3 else t for i, t in enumerate(values)]
    with pytest.raises(RuntimeError, match="expected to be called with a batch of sequences"):
        vmap(rope.apply_rotary_mla_append_, (0, 0, 0, *[None] * 5))(*batched)


def test_opcheck_of_the_append(device):
    given = tuple(arguments(device, torch.bfloat16).values())
    torch.library.opcheck(rope.apply_rotary_mla_append_.default, given)
    options = {"interleaved": True, "interleaved_out": False}
    torch.library.opcheck(rope.apply_rotary_mla_append_.default, given, options)


def test_one_graph_for_all_lengths(device):
    """torch.compile; the slots and the cache are arguments of the graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def step(given):
        options = {"interleaved": True, "interleaved_out": False}
        rope_ext.apply_rotary_mla_append_(**given, **options)
        return given["q"] * 1

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (7, 12, 20):
        given = arguments(device, tokens=(tokens,))
        expected = APPENDING.expected_of({**given, "interleaved": True, "interleaved_out": False})
        assert_same_bits(compiled(given), expected["q"])
        assert_same_bits(given["kv_cache"], expected["kv_cache"])
    assert len(graphs) == 1


def test_heads_of_q_are_sharded_and_the_cache_is_written_by_every_rank():
    given = arguments("cpu", heads=RANKS, cache_dtype=F8, scale=True)
    expected = APPENDING.expected_of(given)

    def on_rank(mesh):
        placed = {n: place(t.clone(), mesh, *([Shard(2)] * (n == "q"))) for n, t in given.items()}
        APPENDING.append(placed)
        assert placed["q"].placements == (Shard(2),)
        return [placed[name] for name in WRITTEN]

    for got, whole in zip(on_every_rank(on_rank), expected.values(), strict=True):
        assert_same_bits(got, whole)


@pytest.mark.parametrize(
    ("name", "dim", "expected"),
    [
        ("q", 1, r"expected tokens to be replicated on dimension 0 of the mesh, .* sequence"),
        ("k_pe", 0, r"expected k_pe to be Replicate\(\), as it is needed whole"),
        ("kv_cache", 0, r"expected kv_cache to be Replicate\(\), as it is needed whole"),
        ("slot_mapping", 1, r"expected slot_mapping to be Replicate\(\), as it is needed whole"),
    ],
)
def test_other_shards_are_refused(name, dim, expected):
    given = arguments("cpu", tokens=(4, 4))
    with as_rank(0):
        mesh = init_device_mesh("cpu", (RANKS,))
        placed = {n: place(t, mesh, *([Shard(dim)] * (n == name))) for n, t in given.items()}
        with pytest.raises(RuntimeError, match=f"apply_rotary_mla_append_: {expected}"):
            APPENDING.append(placed)


def test_flops_are_those_of_the_rotation():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        APPENDING.append(arguments("cpu"))
    assert counter.get_total_flops() == 3 * B * S * (H + 1) * R
