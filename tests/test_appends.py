"""The operators that write to a paged cache: slots, memory, refusals, and features of PyTorch."""

import pytest
import torch
from appending import (
    BLOCK_SIZE,
    BLOCKS,
    D_LATENT,
    F8,
    KV,
    LATENT,
    NORMED,
    RANK,
    SLOTS,
    B,
    D,
    H,
    K,
    L,
    R,
    S,
    changed,
)
from ranks import RANKS, as_rank, on_every_rank, place
from support import ORDERS, VIEWS, assert_same_bits, guarded, naming
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

TO_HALVES = ORDERS["neighbours to halves"]  # held in a buffer on the way


@pytest.fixture(params=[KV, NORMED, LATENT], ids=["kv", "normed", "latent"])
def appending(request):
    return request.param


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
# The views of tokens and of caches do not interact, so each view of one meets some of the other.
VIEWED = [(view, list(CACHES)[i % len(CACHES)]) for i, view in enumerate(VIEWS)]


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, F8], ids=["bfloat16", "float8"])
@pytest.mark.parametrize(("view", "cache_view"), VIEWED)
def test_only_what_is_rotated_or_stored_of_a_view_is_written(
    view, cache_view, cache_dtype, appending, device
):
    given = appending.arguments(device, torch.bfloat16, cache_dtype)
    wholes = {}

    def viewed(name, dtype, table, *shape):
        def base(*shape):
            inner, wholes[name] = guarded(*shape, dtype=dtype, device=device)
            return inner

        given[name] = table(base, *shape)

    if appending is not LATENT:
        for name, heads in (("q", H), ("k", K), ("v", K)):
            viewed(name, torch.bfloat16, VIEWS[view], B, S, heads, D)
        of_v = [*CACHES][[*CACHES].index(cache_view) - 3]  # strides of their own
        for name, of_cache in (("k_cache", cache_view), ("v_cache", of_v)):
            viewed(name, cache_dtype, CACHES[of_cache], BLOCKS, BLOCK_SIZE, K, D)
        options = {}
    else:
        viewed("q", torch.bfloat16, VIEWS[view], B, S, H, D_LATENT)
        viewed("kv_cache", cache_dtype, CACHES[cache_view], BLOCKS, BLOCK_SIZE, 1, RANK + R)
        given["kv_cache"] = given["kv_cache"][:, :, 0]
        options = TO_HALVES if cache_dtype is F8 else {}
    expected_wholes = {name: whole.cpu().clone() for name, whole in wholes.items()}
    for name, expected in appending.expected_of({**given, **options}).items():
        if name in wholes:
            t = given[name]
            part = expected_wholes[name].as_strided(t.shape, t.stride(), t.storage_offset())
            part.copy_(expected)
    appending.append({**given, **options})
    for name, whole in wholes.items():
        assert_same_bits(whole, expected_wholes[name])


def test_nothing_at_all(appending, device):
    def shortened(given, dim, *names):
        return {**given, **{n: given[n].narrow(dim, 0, 0) for n in names if n in given}}

    given = appending.arguments(device)
    caches = [name for name in given if name.endswith("cache")]
    of_tokens = [name for name, t in given.items() if t.shape[:2] == (B, S)]
    no_slots = {"slot_mapping": torch.full_like(given["slot_mapping"], -1)}
    for empty in (
        shortened(given, 1, *of_tokens),
        shortened(given, 2, "q"),
        shortened(given, 0, *caches) | no_slots,
        *([shortened(given, 2, "k", "v", *caches)] if appending is not LATENT else []),
    ):
        appending.assert_appends(dict(empty))
        if appending is LATENT:
            appending.assert_appends(dict(empty), **TO_HALVES)


# ---- slots

KINDS_OF_SLOTS = {
    "int32": lambda slots: slots.int(),
    "[B * S]": lambda slots: slots.flatten(),
    "[B * S], every second": lambda slots: torch.stack((slots.flatten(), slots.flatten()), 1)[:, 0],
    "transposed": lambda slots: slots.T.contiguous().T,
    "none is stored": lambda slots: torch.full_like(slots, -1),
    "rising": lambda slots: torch.arange(B * S).view(B, S) + 3,
}


def test_every_kind_of_slots(appending, device):
    for kind, change in KINDS_OF_SLOTS.items():
        given = appending.arguments(device)
        given["slot_mapping"] = change(given["slot_mapping"].cpu()).to(device)
        with naming(kind):
            appending.assert_appends(given)


@pytest.mark.parametrize(
    ("tokens", "count"),
    [
        ((B, S), 0),
        ((B, S), S + 2),  # ends within the second sequence
        ((B, S), B * S - 1),
        ((1, B * S), 1),
        ((B * S, 1), S),  # one token a sequence is launched as one sequence
        ((B * S,), S),  # packed
    ],
    ids=str,
)
def test_tokens_past_the_end_of_the_slots_are_rotated_and_not_stored(
    tokens, count, appending, device
):
    """With slots in a view."""
    for options in ({}, TO_HALVES) if appending is LATENT else ({},):
        given = appending.arguments(device, torch.float16, tokens=tokens)
        slots = torch.arange(B * S).flip(0)
        given["slot_mapping"] = torch.stack((slots, slots + 99), 1).to(device)[:count, 0]
        of_all = slots.where(torch.arange(B * S) < count, -1).view(tokens)
        expected = appending.expected_of({**given, "slot_mapping": of_all, **options})
        appending.assert_appends(given, **options)
        for name in appending.written:
            assert_same_bits(given[name], expected[name])


def test_the_same_bits_with_any_number_of_threads(appending, threads):
    sizes = {"heads": (6, 3), "dim": 64}
    if appending is LATENT:
        sizes = {"dim": 96, "rotary_dim": 64}
    for count in (1, 2, 5):
        threads(count)
        given = appending.arguments("cpu", torch.bfloat16, F8, tokens=(300,), blocks=40, **sizes)
        appending.assert_appends(given, **(TO_HALVES if appending is LATENT else {}))


# ---- values that are refused on the CPU, and on CUDA where asked: reading them would wait


def slots_with(value, at):
    def change(slots):
        slots = torch.arange(B * S).view(B, S).to(slots)
        slots[at] = value
        return slots

    return changed("slot_mapping", change)


OUTSIDE = "slot_mapping below 24, the slots of the cache, or negative, got"
VALUES = [
    (slots_with(24, (1, 2)), f"{OUTSIDE} 24 at index [1, 2]"),
    (slots_with(2**40, (0, 0)), f"{OUTSIDE} {2**40} at index [0, 0]"),
    (slots_with(7, (0, 3)), "slot_mapping to have no slot twice, got 7 at index [0, 3] and at "
     "[1, 2]"),
    (slots_with(4, (1, 0)), "slot_mapping to have no slot twice, got 4 at index [0, 4] and at "
     "[1, 0]"),
    (changed("slot_mapping", lambda s: torch.full_like(s[0], 24)), f"{OUTSIDE} 24 at index [0]"),
    (changed("position_ids", lambda p: p + L), "position_ids in [0, 9), the rows of cos and sin, "
     "got"),
]  # fmt: skip


def assert_values_are_refused(appending, device):
    for change, expected in VALUES:
        given = appending.arguments(device)
        appending.assert_refused({**given, **change(given)}, expected)


def test_bad_value_is_refused_on_the_cpu(appending):
    assert_values_are_refused(appending, "cpu")


@pytest.mark.cuda
def test_bad_value_is_refused_on_cuda_where_asked(appending, monkeypatch):
    monkeypatch.setenv("ROPE_EXT_CHECK", "1")
    assert_values_are_refused(appending, "cuda")


@pytest.mark.parametrize("cache_dtype", [torch.float32, F8], ids=["float32", "float8"])
@pytest.mark.cuda
def test_token_with_a_slot_outside_of_the_cache_is_rotated_and_not_stored(cache_dtype, appending):
    given = appending.arguments("cuda", cache_dtype=cache_dtype)
    slots = torch.arange(B * S).flip(0)
    slots[1:8] = torch.tensor([SLOTS, 2**31 - 1, 2**40, 2**63 - 1, -(2**63), -1, -SLOTS])
    inside = slots.where((slots >= 0) & (slots < SLOTS), -1).view(B, S)
    expected = appending.expected_of({**given, "slot_mapping": inside})
    given["slot_mapping"] = slots.view(B, S).cuda()
    appending.append(given)
    for name in appending.written:
        assert_same_bits(given[name], expected[name])


# ---- with other features of PyTorch; those of operators are in test_every_operator.py


def test_function_counts_versions_and_refuses_what_requires_grad(appending, device):
    given = appending.arguments(device)
    before = {name: t._version for name, t in given.items()}
    appending.append(given, appending.function)
    for name, t in given.items():
        assert t._version == before[name] + (name in appending.written), name
    for name, t in given.items():
        if t.is_floating_point():
            message = f"expected {name} to need no gradient \\(what a cache keeps has none\\)"
            with pytest.raises(RuntimeError, match=message):
                appending.append({**given, name: t.detach().requires_grad_()}, appending.function)


def test_tokens_of_inference_mode_go_to_a_cache_made_outside_of_it(appending, device):
    given = appending.arguments(device)
    caches = {name: t for name, t in given.items() if name.endswith("cache")}
    versions = [t._version for t in caches.values()]
    with torch.inference_mode():
        given = {name: t.clone() for name, t in given.items()} | caches
        expected = appending.expected_of(given)
        appending.append(given, appending.function)
        for name in appending.written:
            assert_same_bits(given[name], expected[name])
    assert [t._version for t in caches.values()] == [version + 1 for version in versions]


def test_one_graph_for_all_lengths(appending, device):
    """torch.compile; the slots and the caches are arguments of the graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    options = TO_HALVES if appending is LATENT else {"layout": "thd"}

    def step(given):
        appending.function(**given, **options)
        return given["q"] * 1

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (7, 12, 20):
        given = appending.arguments(device, tokens=(tokens,))
        expected = appending.expected_of({**given, **(TO_HALVES if appending is LATENT else {})})
        assert_same_bits(compiled(given), expected["q"])
        for name in appending.written:
            assert_same_bits(given[name], expected[name])
    assert len(graphs) == 1


# ---- DTensors


def placed(given, mesh, dims):
    return {n: place(t.clone(), mesh, Shard(dims[n]) if n in dims else Replicate())
            for n, t in given.items()}  # fmt: skip


def test_heads_are_sharded_as_those_of_the_caches_and_their_scales():
    given = KV.arguments("cpu", torch.bfloat16, F8, heads=(2 * RANKS, RANKS), scales=True)
    expected = KV.expected_of(given)

    def on_rank(mesh):
        shards = placed(given, mesh, {"k": 2, "v": 2, "k_cache": 2, "v_cache": 2, "k_scale": 0})
        KV.append(shards)
        return [shards[name] for name in KV.written]

    for got, whole in zip(on_every_rank(on_rank), expected.values(), strict=True):
        assert_same_bits(got, whole)


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ({"q": 1, "k": 1, "v": 1}, "tokens to be replicated on dimension 0 of the mesh, as the "
         "caches that take them are, got q or another one sharded along sequence"),
        ({"q": 2, "k": 2, "v": 2}, r"k_cache to be .*, beside k as"),
        ({"k_cache": 2, "v_cache": 2}, r"k to be .*, beside k_cache as"),
    ],
    ids=str,
)  # fmt: skip
def test_shards_that_do_not_fit_are_refused(dims, expected):
    given = KV.arguments("cpu", heads=(2 * RANKS, RANKS))
    with as_rank(0):
        mesh = init_device_mesh("cpu", (RANKS,))
        with pytest.raises(RuntimeError, match=f"apply_rotary_qk_append_kv_: expected {expected}"):
            KV.append(placed(given, mesh, dims))
