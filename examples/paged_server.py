"""A server with continuous batching and a paged KV cache, in one packed batch a step.

    python examples/paged_server.py [--requests 12]

One operator rotates q and k and stores k and v. The cache is too small for all requests, so blocks
are reused. Weights are random; each request must get the tokens that it gets alone.
"""

import argparse
import random
from dataclasses import dataclass, field

import torch
from llama import Llama
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import rope_ext
from rope_ext import positions

BLOCKS, BLOCK_SIZE = 12, 8
PROMPT, NEW = (3, 30), (4, 20)  # tokens, from and to


@dataclass
class Request:
    tokens: list[int]  # of the prompt, then generated
    new: int  # tokens to generate
    cached: int = 0
    blocks: list[int] = field(default_factory=list)


class Server:
    def __init__(self, model: Llama):
        self.model, self.free, self.running = model, list(range(BLOCKS)), []
        attention = model.layers[0].attention
        shape = (BLOCKS, BLOCK_SIZE, attention.wk.out_features // attention.head_dim)
        self.caches = [torch.zeros(2, *shape, attention.head_dim) for _ in model.layers]  # k, v

    def step(self, waiting: list[Request]) -> None:
        """Admits requests and generates a token for each; blocks of those that end are free."""
        while waiting and len(self.free) >= (need := blocks_of(waiting[0])):
            self.running.append(waiting.pop(0))
            self.running[-1].blocks = [self.free.pop() for _ in range(need)]
        counts = [len(request.tokens) - request.cached for request in self.running]
        tokens = torch.tensor([t for r in self.running for t in r.tokens[r.cached :]])  # [T]
        for request, token in zip(self.running, self.forward(tokens, counts), strict=True):
            request.cached = len(request.tokens)
            request.tokens.append(token)
            request.new -= 1
        self.free += [b for request in self.running if not request.new for b in request.blocks]
        self.running = [request for request in self.running if request.new]

    def forward(self, tokens: Tensor, counts: list[int]) -> list[int]:
        """The next token of each request."""
        cu_seqlens = torch.tensor([0, *counts]).cumsum(0)
        cached = torch.tensor([request.cached for request in self.running])
        table = [torch.tensor(request.blocks) for request in self.running]
        table = torch.nn.utils.rnn.pad_sequence(table, batch_first=True, padding_value=-1)
        ids = positions.from_cu_seqlens(cu_seqlens, offsets=cached)  # [T]
        sequence = positions.sequence_of_tokens(cu_seqlens)
        slots = positions.slot_mapping(table, ids, BLOCK_SIZE, sequence)
        cos, sin = self.model.rotary.cos_sin(ids)  # [T, D / 2]: once for all layers
        x = self.model.tok_embeddings(tokens)  # [T, dim]
        for layer, cache in zip(self.model.layers, self.caches, strict=True):
            q, k, v = layer.attention.qkv(layer.attention_norm(x))  # [T, H, D]
            rope_ext.apply_rotary_qk_append_kv_(
                q, k, v, *cache, slots, cos, sin, layout="thd", interleaved=True
            )
            each = zip(q.split(counts), self.running, strict=True)
            y = torch.cat([self.attend(part, request, cache) for part, request in each])
            x = x + layer.attention.wo(y.flatten(-2))
            x = x + layer.feed_forward(layer.ffn_norm(x))
        last = self.model.output(self.model.norm(x[cu_seqlens[1:] - 1]))
        return last.argmax(-1).tolist()

    def attend(self, q: Tensor, request: Request, cache: Tensor) -> Tensor:
        """Attention of a request's new tokens [S, H, D] to all of its cache."""
        k, v = cache[:, request.blocks].flatten(1, 2)[:, : len(request.tokens)].movedim(1, 2)
        seen = torch.ones(len(q), len(request.tokens), dtype=torch.bool).tril(request.cached)
        q = q.transpose(0, 1)  # [H, S, D]
        y = scaled_dot_product_attention(q[None], k[None], v[None], seen, enable_gqa=True)
        return y[0].transpose(0, 1)


def blocks_of(request: Request) -> int:
    return -(-(len(request.tokens) + request.new) // BLOCK_SIZE)


def alone(model: Llama, request: Request) -> list[int]:
    tokens = torch.tensor([request.tokens])
    for _ in range(request.new):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens[0].tolist()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=12)
    torch.manual_seed(0)
    model, draw = Llama(), random.Random(0)
    torch._foreach_mul_(list(model.parameters()), 2)  # attention that depends on positions
    requests = [
        Request([draw.randrange(256) for _ in range(draw.randint(*PROMPT))], draw.randint(*NEW))
        for _ in range(parser.parse_args().requests)
    ]
    waiting = list(requests)
    expected = [alone(model, request) for request in requests]
    needed, server, steps = sum(map(blocks_of, requests)), Server(model), 0
    while waiting or server.running:
        server.step(waiting)
        steps += 1
    assert [request.tokens for request in requests] == expected
    print(f"Shown: {len(requests)} requests in {steps} steps, with {BLOCKS} blocks where they need")
    print(f"{needed}; each got the tokens that it gets alone.")


if __name__ == "__main__":
    main()
