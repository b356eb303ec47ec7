"""A small server of a Llama model: continuous batching of requests over a paged KV cache.

Requests arrive and end between steps. A step takes the next token of every decoding sequence and,
within its budget of tokens, parts of prompts, all packed into one batch [T]. Positions, slots and
the rows of cos and sin are computed once a step, for all layers.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import rope_ext
from rope_ext import positions


@dataclass
class Request:
    name: int
    prompt: list[int]
    new_tokens: int  # at most; fewer with an end-of-text token
    arrival: int  # the step before which it arrives
    generated: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)
    blocks_had: int = 0  # in all, and of these, reused blocks of other requests
    blocks_reused: int = 0
    first_token: int | None = None  # the step that generated it
    finished: int | None = None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated

    @property
    def most_cached(self) -> int:
        """The last generated token is never read, so it needs no slot."""
        return len(self.prompt) + self.new_tokens - 1


class BlockAllocator:
    """Free blocks of the cache. The block that was freed last is allocated first."""

    def __init__(self, blocks: int) -> None:
        self.free = list(reversed(range(blocks)))
        self.used: set[int] = set()

    def take(self, request: Request) -> None:
        block = self.free.pop()
        request.blocks.append(block)
        request.blocks_had += 1
        request.blocks_reused += block in self.used
        self.used.add(block)

    def give_back(self, request: Request) -> None:
        self.free += reversed(request.blocks)
        request.blocks = []


@dataclass
class Step:
    """The inputs of a step for all layers: T packed tokens, a part of each of n sequences."""

    tokens: Tensor  # int64 [T]
    bounds: list[int]  # n + 1: the start of each sequence's part, and T
    cached: list[int]  # n: earlier tokens of each sequence
    block_table: Tensor  # int64 [n, most blocks], -1 for no block
    slots: Tensor  # int64 [T]
    cos: Tensor  # float32 [T, P]
    sin: Tensor  # float32 [T, P]

    def last_tokens(self) -> Tensor:
        return torch.tensor(self.bounds[1:], device=self.tokens.device) - 1


# Rotates q and k [T, H, D] in place and stores k and v in the caches [blocks, block_size, Hk, D]:
# (q, k, v, k_cache, v_cache, slots, cos, sin).
Append = Callable[..., object]


def fused(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> None:
    rope_ext.apply_rotary_qk_append_kv_(q, k, v, *rest, layout="thd")


def apart(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """The same in three operators."""
    rope_ext.apply_rotary_qk(q, k, cos, sin, layout="thd", inplace=True)
    k_cache.flatten(0, 1)[slots] = k
    v_cache.flatten(0, 1)[slots] = v


class Clock:
    """Sums up the seconds during which it runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds += self.now() - start


class PagedLlama:
    """The layers of a Llama of transformers, with our attention over a paged cache."""

    def __init__(self, model: nn.Module, blocks: int, block_size: int, append: Append) -> None:
        self.model, self.append, self.block_size = model, append, block_size
        self.layers = model.model.layers
        self.head_dim = self.layers[0].self_attn.head_dim
        weight = model.lm_head.weight
        self.device = weight.device
        frequencies = rope_ext.frequencies.from_config(model.config, device=self.device)
        self.inv_freq, self.attention_scaling = frequencies
        shape = (blocks, block_size, model.config.num_key_value_heads, self.head_dim)
        self.caches = [
            (weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(len(self.layers))
        ]
        self.clock = Clock(self.device)  # of rotation and append

    def prepare(self, parts: list[tuple[Request, int]]) -> Step:
        """The inputs for the next tokens of each request. Their blocks are allocated already."""
        bounds, cached, tokens = [0], [], []
        for request, count in parts:
            tokens += request.tokens[request.cached : request.cached + count]
            cached.append(request.cached)
            bounds.append(len(tokens))
        most = max(len(request.blocks) for request, _ in parts)
        table = [request.blocks + [-1] * (most - len(request.blocks)) for request, _ in parts]
        at, offsets, block_table, ids = (
            torch.tensor(values, device=self.device) for values in (bounds, cached, table, tokens)
        )
        with self.clock.running():
            position_ids = positions.from_cu_seqlens(at, len(tokens), offsets=offsets)
            sequence = positions.sequence_of_tokens(at, len(tokens))
            slots = positions.slot_mapping(block_table, position_ids, self.block_size, sequence)
            cos, sin = rope_ext.cos_sin(
                self.inv_freq, position_ids, attention_scaling=self.attention_scaling
            )
        return Step(ids, bounds, cached, block_table, slots, cos, sin)

    def __call__(self, step: Step) -> Tensor:
        """The logits after the last token of each sequence's part, [n, vocabulary]."""
        x = self.model.model.embed_tokens(step.tokens)  # [T, hidden]
        for layer, (k_cache, v_cache) in zip(self.layers, self.caches, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                project(normed).unflatten(-1, (-1, self.head_dim))  # [T, heads, D]
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            with self.clock.running():
                self.append(q, k, v, k_cache, v_cache, step.slots, step.cos, step.sin)
            x = x + attention.o_proj(self.attend(q, k_cache, v_cache, step).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(self.model.model.norm(x[step.last_tokens()]))

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, step: Step) -> Tensor:
        """Attention of each sequence's part of q [T, H, D] to all of its tokens: [T, H, D]."""
        out = torch.empty_like(q)
        for i, cached in enumerate(step.cached):
            begin, end = step.bounds[i : i + 2]
            length = cached + end - begin
            blocks = step.block_table[i, : math.ceil(length / self.block_size)]
            keys, values = (
                cache[blocks].flatten(0, 1)[:length].transpose(0, 1)[None]  # [1, Hk, length, D]
                for cache in (k_cache, v_cache)
            )
            part = q[begin:end].transpose(0, 1)[None]  # [1, H, tokens, D]
            mask = None
            if end - begin > 1:  # each token attends to itself and to earlier tokens
                order = torch.arange(length, device=q.device)
                mask = order <= order[cached:, None]
            seen = scaled_dot_product_attention(part, keys, values, mask, enable_gqa=True)
            out[begin:end] = seen[0].transpose(0, 1)
        return out


class Server:
    """Runs requests until all have finished."""

    def __init__(
        self,
        llama: PagedLlama,
        blocks: int,
        *,
        budget: int,  # tokens of a step
        most_running: int,  # sequences at the same time
        ends: frozenset[int],  # tokens that end a text
    ) -> None:
        self.llama, self.budget, self.most_running, self.ends = llama, budget, most_running, ends
        self.allocator = BlockAllocator(blocks)
        self.running: list[Request] = []
        self.mixed_steps = 0  # steps with both parts of prompts and decoding

    def blocks_of(self, tokens: int) -> int:
        return math.ceil(tokens / self.llama.block_size)

    def admit(self, waiting: deque[Request], step: int) -> None:
        """Admits requests in the order of arrival, while there are blocks for all their tokens."""
        promised = sum(self.blocks_of(r.most_cached) - len(r.blocks) for r in self.running)
        while waiting and waiting[0].arrival <= step and len(self.running) < self.most_running:
            need = self.blocks_of(waiting[0].most_cached)
            if promised + need > len(self.allocator.free):
                return
            promised += need
            self.running.append(waiting.popleft())

    def parts(self) -> list[tuple[Request, int]]:
        """The tokens of each request in a step: decoding first, then prompts within the budget."""
        left, parts = self.budget, []
        for request in sorted(self.running, key=lambda r: r.first_token is None):
            count = min(len(request.tokens) - request.cached, left)
            if count > 0:
                parts.append((request, count))
                left -= count
        return parts

    @torch.inference_mode()
    def step(self, number: int) -> int:
        """Runs one batch through the model. Returns the number of generated tokens."""
        parts = self.parts()
        decoding = sum(request.first_token is not None for request, _ in parts)
        self.mixed_steps += 0 < decoding < len(parts)
        for request, count in parts:
            while len(request.blocks) < self.blocks_of(request.cached + count):
                self.allocator.take(request)
        following = self.llama(self.llama.prepare(parts)).argmax(-1).tolist()
        made = 0
        for (request, count), token in zip(parts, following, strict=True):
            request.cached += count
            if request.cached < len(request.tokens):
                continue  # the prompt continues in the next step
            request.generated.append(token)
            made += 1
            if request.first_token is None:
                request.first_token = number
            if len(request.generated) == request.new_tokens or token in self.ends:
                request.finished = number
                self.running.remove(request)
                self.allocator.give_back(request)
        return made

    def serve(self, requests: list[Request]) -> Iterator[int]:
        """Serves all requests, a step at a time. Yields the tokens that each step generates."""
        waiting, number = deque(sorted(requests, key=lambda r: r.arrival)), 0
        while waiting or self.running:
            self.admit(waiting, number)
            if self.running:
                yield self.step(number)
            elif waiting[0].arrival <= number:
                raise SystemExit(f"request {waiting[0].name} needs more blocks than there are")
            number += 1
