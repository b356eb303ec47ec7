"""The server of benchmarks/paged_decode.py: every request gets the tokens that it gets alone."""

import copy
import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch
from support import assert_same_bits, small_llama

pytest.importorskip("tqdm", reason="pip install 'rope_ext[test]'")
pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import paged_decode
from paged_attention import SCALES, Heads, Latent, NormedHeads
from paged_models import deepseek_v3, generated_alone, logits_with_mask, qwen3
from paged_server import BlockAllocator, PagedModel, Request, Server

# Prompt, new tokens, arrival and place of the system prompt; in a cache of 16 blocks of 4 tokens,
# that need 2 for the system prompt, and 7, 3, 6, 2, 4, 5 and 7.
SIZES = [(20, 6, 0), (5, 6, 0), (13, 9, 1), (2, 5, 3), (9, 8, 4), (17, 1, 4), (20, 8, 2, 8)]
BLOCKS, BLOCK_SIZE = 16, 4
TOKENS = torch.randint(3, 96, (100,), generator=torch.Generator().manual_seed(1)).tolist()
SYSTEM = TOKENS[-7:]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
MODELS = {
    "llama": functools.partial(small_llama, layers=2),
    "qwen3": functools.partial(qwen3, **SMALL),
    "deepseek_v3": functools.partial(deepseek_v3, **SMALL),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def llama():
    return MODELS["llama"]()


def make_requests():
    requests = []
    for name, (prompt, new, *when) in enumerate(SIZES):
        tokens = TOKENS[3 * name : 3 * name + prompt]
        requests.append(Request(name, tokens, new, *when))
        if requests[-1].system_at is not None:
            at = requests[-1].system_at
            tokens[at : at + len(SYSTEM)] = SYSTEM
    return requests


def make_server(model, way="fused", cache=None, ends=(), budget=8):
    paged = PagedModel(model, BLOCKS, BLOCK_SIZE, way, cache)
    limits = {"budget": budget, "most_running": 4, "ends": frozenset(ends)}
    return Server(paged, BLOCKS, system=SYSTEM, **limits)


def serve(model, *how, **options):
    """Runs step by step, and checks the blocks between steps."""
    server, requests = make_server(model, *how, **options), make_requests()
    for _ in server.serve(requests):
        owners = [server.system, *requests]
        held = [block for request in owners for block in request.blocks]
        assert sorted(held + server.allocator.free) == list(range(BLOCKS))
    return server, requests


@pytest.mark.parametrize("way", ["fused", "apart"])
def test_every_request_gets_the_tokens_that_it_gets_alone(model, way, device):
    server, requests = serve(copy.deepcopy(model).to(device), way)
    for request in requests:
        assert request.generated == generated_alone(model, request, len(SYSTEM))
        assert len(request.generated) == request.new_tokens
    assert server.mixed_steps > 0
    assert requests[0].first_token >= 2  # its prompt takes three steps
    assert any(request.first_token > request.arrival + 3 for request in requests)  # it had to wait
    assert sum(request.blocks_reused for request in requests) > 0
    assert len(server.allocator.free) == BLOCKS - len(server.system.blocks)


@pytest.mark.parametrize("cache", [None, E4M3, E5M2], ids=["float32", "e4m3", "e5m2"])
def test_one_operator_leaves_the_bits_of_the_separate_ones(model, cache):
    served = [serve(model, way, cache) for way in ("fused", "apart")]
    (fused, requests), (apart, expected) = served
    assert [r.generated for r in requests] == [r.generated for r in expected]
    for ours, separate in zip(fused.model.attentions, apart.model.attentions, strict=True):
        for got, kept in zip(ours.caches, separate.caches, strict=True):
            assert got.rows.dtype == (cache or torch.float32)
            assert_same_bits(got.rows, kept.rows)


@pytest.mark.parametrize("cache", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_a_float8_cache_is_read_as_what_was_stored(model, cache):
    """In the first layer: in others, keys and values depend on the cache."""
    rows = [
        torch.cat([c.read(torch.tensor(server.system.blocks)) for c in first.caches], -1)
        for server in (make_server(model), make_server(model, cache=cache))
        for first in server.model.attentions[:1]
    ]
    half_a_step = torch.finfo(cache).eps / 2
    least = half_a_step * torch.finfo(cache).tiny * max(SCALES)  # among subnormals
    torch.testing.assert_close(rows[1], rows[0], rtol=half_a_step, atol=least)
    assert not torch.equal(*rows)


def chat(server):
    """The logits after a prompt with the system prompt behind two blocks of other text."""
    request = make_requests()[-1]
    while (count := request.unread) > 0:
        logits = server.read([(request, count)])
    return request, logits[0]


@pytest.mark.parametrize("way", ["fused", "apart"])
def test_a_moved_system_prompt_gives_the_logits_of_the_whole(model, way, device):
    """Of a model that reads all at once, the system prompt not seeing the text before it."""
    request, logits = chat(make_server(copy.deepcopy(model).to(device), way))
    whole = logits_with_mask(model, request.prompt, request.system_at, len(SYSTEM))
    # float32 through two layers, summed in another order: ten times what is seen
    torch.testing.assert_close(logits.cpu(), whole, rtol=0, atol=1e-5 * whole.abs().max().item())


def stays(attention, move):
    pass


def test_keys_that_stay_give_other_logits(model, monkeypatch):
    for family in (Heads, Latent):
        monkeypatch.setattr(family, "move_fused", stays)
    request, logits = chat(make_server(model))
    whole = logits_with_mask(model, request.prompt, request.system_at, len(SYSTEM))
    assert (logits - whole).abs().max() > 1e-2 * whole.abs().max()


def test_a_text_ends_with_its_last_token(llama):
    _, requests = serve(llama)
    end = requests[0].generated[2]
    _, ended = serve(llama, ends=[end])
    for got, whole in zip(ended, requests, strict=True):
        until = whole.generated.index(end) + 1 if end in whole.generated else None
        assert got.generated == whole.generated[:until]


def one_token_further(append):
    def wrong(attention, step, *projected):
        cos, sin = step.cos.roll(1, 0), step.sin.roll(1, 0)
        return append(attention, dataclasses.replace(step, cos=cos, sin=sin), *projected)

    return wrong


@pytest.mark.parametrize("cache", [None, E4M3], ids=["float32", "float8"])
def test_wrong_tokens_end_the_run(model, cache, monkeypatch):
    monkeypatch.setattr(paged_decode, "BLOCK_SIZE", BLOCK_SIZE)
    monkeypatch.setattr(paged_decode, "blocks_for", lambda requests, system: BLOCKS)
    work = paged_decode.Work(model, SYSTEM, make_requests, cache)
    paged_decode.check(work, [paged_decode.serve(work, lambda tokens: None)])
    for family in (Heads, NormedHeads, Latent):
        monkeypatch.setattr(family, "append_fused", one_token_further(family.append_fused))
    runs = paged_decode.serve(work, lambda tokens: None)
    with pytest.raises(SystemExit, match=r"^wrong tokens:\nrequest \d, fused: \["):
        paged_decode.check(work, [runs])


def test_a_request_that_never_fits_is_refused(llama):
    server = make_server(llama)
    with pytest.raises(SystemExit, match="request 7 needs more blocks than there are"):
        list(server.serve([Request(7, [5] * 40, 30, 0)]))


def test_the_block_given_back_last_is_taken_first():
    allocator = BlockAllocator(4)
    first, second = (Request(name, [1], 1, 0) for name in range(2))
    for _ in range(3):
        allocator.take(first)
    assert first.blocks == [0, 1, 2]
    allocator.give_back(first)
    for _ in range(4):
        allocator.take(second)
    assert second.blocks == [0, 1, 2, 3]
    assert (second.blocks_had, second.blocks_reused) == (4, 3)
    assert allocator.free == first.blocks == []
