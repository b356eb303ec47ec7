"""A small server of models of transformers: continuous batching over a paged KV cache.

Requests arrive and end between steps. A step takes the next token of every decoding sequence and,
within its budget of tokens, parts of prompts, all packed into one batch [T]. Positions, slots and
the rows of cos and sin are computed once a step, for all layers. A system prompt is read once, at
the first positions; where it stands in a prompt, its cached keys are copied and moved there.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from paged_attention import FAMILIES, Cache, Heads, Move, Step
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
    system_at: int | None = None  # where the system prompt is in the prompt: after whole blocks
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
    def unread(self) -> int:
        """The next tokens that the model can read: none of the system prompt, which is cached."""
        ahead = self.system_at is not None and self.cached < self.system_at
        return (self.system_at if ahead else len(self.tokens)) - self.cached

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


class PagedModel:
    """The layers of a model of transformers, with our attention over a paged cache.

    way: "fused" or "apart" (paged_attention.py). cache: its dtype, if not that of the model.
    """

    def __init__(
        self, model: nn.Module, blocks: int, block_size: int, way: str, cache: torch.dtype | None
    ) -> None:
        self.model, self.block_size, self.way = model, block_size, way
        self.layers = model.model.layers
        weight = model.lm_head.weight
        self.device = weight.device
        frequencies = rope_ext.frequencies.from_config(model.config, device=self.device)
        self.inv_freq, self.attention_scaling = frequencies

        def new_cache(*row: int) -> Cache:
            return Cache(weight.new_zeros(blocks, block_size, *row), cache or weight.dtype)

        family = FAMILIES[model.config.model_type]
        self.attentions = [family(layer.self_attn, new_cache) for layer in self.layers]
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
        for layer, attention in zip(self.layers, self.attentions, strict=True):
            projected = attention.project(layer.input_layernorm(x))
            with self.clock.running():
                q = getattr(attention, f"append_{self.way}")(step, *projected)
            x = x + layer.self_attn.o_proj(self.attend(attention, q, step).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(self.model.model.norm(x[step.last_tokens()]))

    def attend(self, attention: Heads, q: Tensor, step: Step) -> Tensor:
        """Attention of each sequence's part of q [T, H, D] to all of its tokens: [T, H, D of v]."""
        parts = []
        for i, cached in enumerate(step.cached):
            begin, end = step.bounds[i : i + 2]
            length = cached + end - begin
            blocks = step.block_table[i, : math.ceil(length / self.block_size)]
            keys, values = (x[:length].transpose(0, 1)[None] for x in attention.read(blocks))
            part = q[begin:end].transpose(0, 1)[None]  # [1, H, tokens, D]
            mask = None
            if end - begin > 1:  # each token attends to itself and to earlier tokens
                order = torch.arange(length, device=q.device)
                mask = order <= order[cached:, None]
            options = {"scale": attention.module.scaling, "enable_gqa": True}
            seen = scaled_dot_product_attention(part, keys, values, mask, **options)
            parts.append(seen[0].transpose(0, 1))
        return torch.cat(parts)

    def copy(self, source: Request, target: list[int], position: int) -> None:
        """Copies all cached tokens of a request to other blocks, and moves them to a position."""
        blocks, copies = (torch.tensor(x, device=self.device) for x in (source.blocks, target))
        with self.clock.running():
            old = torch.arange(source.cached, device=self.device)
            slots = positions.slot_mapping(copies[None], old[None], self.block_size)[0]
            move = Move(slots, old, old + position, self.inv_freq)
            for attention in self.attentions:
                for cache in attention.caches:
                    cache.rows[copies] = cache.rows[blocks]
                getattr(attention, f"move_{self.way}")(move)


class Server:
    """Runs requests until all have finished."""

    def __init__(
        self,
        model: PagedModel,
        blocks: int,
        *,
        budget: int,  # tokens of a step
        most_running: int,  # sequences at the same time
        ends: frozenset[int],  # tokens that end a text
        system: list[int],  # the system prompt
    ) -> None:
        self.model, self.budget, self.most_running, self.ends = model, budget, most_running, ends
        self.allocator = BlockAllocator(blocks)
        self.system = Request(-1, system, 1, 0)
        self.read([(self.system, len(system))])
        self.running: list[Request] = []
        self.mixed_steps = 0  # steps with both parts of prompts and decoding

    def blocks_of(self, tokens: int) -> int:
        return math.ceil(tokens / self.model.block_size)

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
            count = min(request.unread, left)
            if count > 0:
                parts.append((request, count))
                left -= count
        return parts

    def take_blocks(self, request: Request, tokens: int) -> None:
        """Blocks for the next tokens of a request."""
        while len(request.blocks) < self.blocks_of(request.cached + tokens):
            self.allocator.take(request)

    @torch.inference_mode()
    def read(self, parts: list[tuple[Request, int]]) -> Tensor:
        """Reads the next tokens of each request. Returns the logits after them."""
        for request, count in parts:
            self.take_blocks(request, count)
        logits = self.model(self.model.prepare(parts))
        for request, count in parts:
            request.cached += count
            if request.cached == request.system_at:
                self.reuse_system_prompt(request)
        return logits

    def reuse_system_prompt(self, request: Request) -> None:
        have, count = len(request.blocks), self.system.cached
        self.take_blocks(request, count)
        self.model.copy(self.system, request.blocks[have:], request.cached)
        request.cached += count

    def step(self, number: int) -> int:
        """Runs one batch through the model. Returns the number of generated tokens."""
        parts = self.parts()
        decoding = sum(request.first_token is not None for request, _ in parts)
        self.mixed_steps += 0 < decoding < len(parts)
        following = self.read(parts).argmax(-1).tolist()
        made = 0
        for (request, _), token in zip(parts, following, strict=True):
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
