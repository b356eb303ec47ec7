"""The server of benchmarks/paged_decode.py: every request gets the tokens that it gets alone."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from support import small_llama

pytest.importorskip("tqdm", reason="pip install 'rope_ext[test]'")
pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import paged_decode
from paged_server import BlockAllocator, PagedLlama, Request, Server, apart, fused

# Prompt, new tokens, arrival; in a cache of 14 blocks of 4 tokens, that need 7, 3, 6, 2, 4 and 5.
SIZES = [(20, 6, 0), (5, 6, 0), (13, 9, 1), (2, 5, 3), (9, 8, 4), (17, 1, 4)]
BLOCKS, BLOCK_SIZE = 14, 4


@pytest.fixture(scope="module")
def model():
    return small_llama(layers=2)


def make_requests():
    tokens = torch.randint(3, 96, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    return [
        Request(name, tokens[3 * name : 3 * name + prompt], new, arrival)
        for name, (prompt, new, arrival) in enumerate(SIZES)
    ]


def make_server(model, append=fused, ends=(), budget=8):
    llama = PagedLlama(model, BLOCKS, BLOCK_SIZE, append)
    return Server(llama, BLOCKS, budget=budget, most_running=4, ends=frozenset(ends))


def serve(model, append=fused, **options):
    """Runs step by step, and checks the blocks between steps."""
    server, requests = make_server(model, append, **options), make_requests()
    for _ in server.serve(requests):
        held = [block for request in requests for block in request.blocks]
        assert sorted(held + server.allocator.free) == list(range(BLOCKS))
    return server, requests


@pytest.mark.parametrize("append", [fused, apart])
def test_every_request_gets_the_tokens_that_it_gets_alone(model, append, device):
    server, requests = serve(copy.deepcopy(model).to(device), append)
    for request in requests:
        assert request.generated == paged_decode.generated_alone(model, request)
        assert len(request.generated) == request.new_tokens
    assert server.mixed_steps > 0
    assert requests[0].first_token >= 2  # its prompt takes three steps
    assert any(request.first_token > request.arrival + 3 for request in requests)  # it had to wait
    assert sum(request.blocks_reused for request in requests) > 0
    assert len(server.allocator.free) == BLOCKS


def test_a_text_ends_with_its_last_token(model):
    _, requests = serve(model)
    end = requests[0].generated[2]
    _, ended = serve(model, ends=[end])
    for got, whole in zip(ended, requests, strict=True):
        until = whole.generated.index(end) + 1 if end in whole.generated else None
        assert got.generated == whole.generated[:until]


def one_token_further(q, k, v, k_cache, v_cache, slots, cos, sin):
    apart(q, k, v, k_cache, v_cache, slots, cos.roll(1, 0), sin.roll(1, 0))


def test_wrong_tokens_end_the_run(model, monkeypatch):
    monkeypatch.setattr(paged_decode, "WAYS", {"fused": fused, "wrong": one_token_further})
    monkeypatch.setattr(paged_decode, "BLOCK_SIZE", BLOCK_SIZE)
    monkeypatch.setattr(paged_decode, "blocks_for", lambda requests: BLOCKS)
    runs = paged_decode.serve(model, make_requests, lambda tokens: None)
    paged_decode.check(model, [runs["fused"]])
    with pytest.raises(SystemExit, match=r"^wrong tokens:\nrequest \d: \["):
        paged_decode.check(model, list(runs.values()))


def test_a_request_that_never_fits_is_refused(model):
    server = make_server(model)
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
