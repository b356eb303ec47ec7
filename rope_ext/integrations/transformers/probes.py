"""Test arguments for functions that may be rotations: a generator for each form (rotations.py).

A function may refuse some of the arguments of its form; only those that it accepts are compared.
"""

import types
from collections.abc import Iterator
from typing import Any

import torch

from rope_ext.integrations.patching.probes import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    SEQ,
    WIDTHS,
    Numbers,
    Probe,
)


def q_and_k(numbers: Numbers, *position_ids: Any) -> Iterator[Probe]:
    for width in WIDTHS:
        for batch in (1, BATCH):
            tables = numbers.pair(batch, SEQ, width)
            q, k = numbers(BATCH, HEADS, SEQ, HEAD_DIM), numbers(BATCH, KV_HEADS, SEQ, HEAD_DIM)
            yield [q, k, *tables, *position_ids], {}
            yield [q, k, *tables, *position_ids], {"unsqueeze_dim": 1}
            q, k = q.transpose(1, 2), k.transpose(1, 2)
            yield [q, k, *tables, *position_ids], {"unsqueeze_dim": 2}
        q, k = numbers(BATCH, HEADS, SEQ, HEAD_DIM), numbers(BATCH, KV_HEADS, SEQ, HEAD_DIM)
        yield [q, k, *numbers.pair(SEQ, width), *position_ids], {"unsqueeze_dim": 0}
        # one token, as in decoding
        q, k = numbers(BATCH, HEADS, 1, HEAD_DIM), numbers(BATCH, KV_HEADS, 1, HEAD_DIM)
        yield [q, k, *numbers.pair(BATCH, 1, width), *position_ids], {}


def q_and_k_in_every_way(numbers: Numbers) -> Iterator[Probe]:
    yield from q_and_k(numbers)
    for width in WIDTHS:
        q, k = numbers(BATCH, HEADS, SEQ - 2, HEAD_DIM), numbers(BATCH, KV_HEADS, SEQ, HEAD_DIM)
        yield [q, k, *numbers.pair(BATCH, SEQ, width)], {}
        yield [numbers(BATCH, HEADS, SEQ, HEAD_DIM), None, *numbers.pair(BATCH, SEQ, width)], {}


def q_and_k_position_ids(numbers: Numbers) -> Iterator[Probe]:
    yield from q_and_k(numbers)
    yield from q_and_k(numbers, torch.arange(SEQ))


def q_and_k_by_sections(numbers: Numbers) -> Iterator[Probe]:
    for sections in ([3, 4, 1], [4, 2, 2]):
        q, k = numbers(BATCH, HEADS, SEQ, HEAD_DIM), numbers(BATCH, KV_HEADS, SEQ, HEAD_DIM)
        tables = numbers.pair(3, BATCH, SEQ, HEAD_DIM)
        yield [q, k, *tables, sections], {}
        yield [q.transpose(1, 2), k.transpose(1, 2), *tables, sections], {"unsqueeze_dim": 2}


def q_k_and_v(numbers: Numbers) -> Iterator[Probe]:
    for width in WIDTHS:
        qkv = [numbers(BATCH, HEADS, SEQ, HEAD_DIM) for _ in range(3)]
        for position_ids in (torch.tensor([[3, 0, 1, 6, 2]]), torch.arange(2 * SEQ).view(2, SEQ)):
            yield [*qkv, *numbers.pair(2 * SEQ, width), position_ids], {}
        swapped = [x.transpose(1, 2) for x in qkv]
        yield [*swapped, *numbers.pair(2 * SEQ, width), position_ids], {"unsqueeze_dim": 2}


def one_tensor(numbers: Numbers) -> Iterator[Probe]:
    for width in WIDTHS:
        for batch in (1, BATCH):
            tables = numbers.pair(batch, SEQ, width)
            x = numbers(BATCH, HEADS, SEQ, HEAD_DIM)
            yield [x, *tables], {}
            yield [x, *tables], {"unsqueeze_dim": 1}
            yield [x.transpose(1, 2), *tables], {"unsqueeze_dim": 2}
        x = numbers(BATCH, HEADS, 1, HEAD_DIM)  # one token, as in decoding
        yield [x, *numbers.pair(BATCH, 1, width)], {}


def one_tensor_sin_first(numbers: Numbers) -> Iterator[Probe]:
    for width in WIDTHS:
        for batch in (1, BATCH):
            yield [numbers(BATCH, SEQ, HEADS, HEAD_DIM), *numbers.pair(batch, SEQ, width)], {}


def one_tensor_longer_tables(numbers: Numbers) -> Iterator[Probe]:
    for batch, rows in ((1, SEQ), (BATCH, SEQ), (1, SEQ + 3)):
        x = numbers(BATCH, HEADS, SEQ, HEAD_DIM)
        yield [x, *numbers.pair(batch, 1, rows, HEAD_DIM)], {}


def angles_of_one_tensor(numbers: Numbers) -> Iterator[Probe]:
    for batch in (1, BATCH):
        yield [numbers(batch, SEQ, HEADS, HEAD_DIM), numbers(SEQ, HEAD_DIM // 2)], {}


def one_tensor_without_heads(numbers: Numbers) -> Iterator[Probe]:
    for width in WIDTHS:
        yield [numbers(BATCH, SEQ, HEAD_DIM), *numbers.pair(BATCH, SEQ, width)], {}


def axes_of_one_tensor(numbers: Numbers) -> Iterator[Probe]:
    for axes in (1, 2, 4):
        x, tables = numbers(BATCH, SEQ, HEADS, HEAD_DIM), numbers.pair(BATCH, SEQ, HEAD_DIM)
        position_ids = torch.zeros(BATCH, SEQ, axes, dtype=torch.int64)
        yield [x, *tables, position_ids], {}
        yield [x, *tables, position_ids], {"unsqueeze_dim": 2}
        yield [x.transpose(1, 2), *tables, position_ids], {"unsqueeze_dim": 1}


def heads_last(numbers: Numbers) -> Iterator[Probe]:
    for width in WIDTHS:
        q, k = numbers(SEQ, HEADS, HEAD_DIM), numbers(SEQ, KV_HEADS, HEAD_DIM)
        yield [q, k, *numbers.pair(SEQ, width)], {}


def heads_first(numbers: Numbers) -> Iterator[Probe]:
    for shape in ((SEQ,), (1, SEQ), (1, 1, SEQ), (BATCH, 1, SEQ)):
        for width in WIDTHS:
            q, k = numbers(BATCH, HEADS, SEQ, HEAD_DIM), numbers(BATCH, KV_HEADS, SEQ, HEAD_DIM)
            yield [q, k, *numbers.pair(*shape, width)], {}


def after_prefix(numbers: Numbers) -> Iterator[Probe]:
    for prefix in (0, 2):
        q = numbers(BATCH, HEADS, SEQ + prefix, HEAD_DIM)
        k = numbers(BATCH, KV_HEADS, SEQ + prefix, HEAD_DIM)
        yield [q, k, *numbers.pair(SEQ, HEAD_DIM)], {}
        yield [q, k, *numbers.pair(BATCH, 1, SEQ, HEAD_DIM)], {}


def memory(numbers: Numbers) -> Iterator[Probe]:
    for repeats, excluded in ((0, 2), (1, 0), (1, 3), (2, 0), (3, 2)):
        q = numbers(BATCH, HEADS, SEQ, HEAD_DIM)
        k = numbers(BATCH, KV_HEADS, repeats * SEQ + excluded, HEAD_DIM)
        keywords = {"num_k_exclude_rope": excluded, "repeat_freqs_k": repeats > 1}
        yield [q, k, *numbers.pair(SEQ, HEAD_DIM)], keywords
        yield [q, k, *numbers.pair(1, 1, SEQ, HEAD_DIM)], keywords


def memory_groups(numbers: Numbers) -> Iterator[Probe]:
    for repeats, stay, excluded in ((1, 0, 0), (1, 2, 3), (3, 2, 0), (2, 0, 1)):
        q = numbers(BATCH, HEADS, SEQ, HEAD_DIM)
        k = numbers(BATCH, HEADS, repeats * (stay + 4) + excluded, HEAD_DIM)
        keywords = {"num_k_exclude_rope": excluded, "repeat_freqs_k": repeats}
        for ones in ((), (1, 1)):
            tables = numbers.pair(*ones, SEQ, HEAD_DIM) + numbers.pair(*ones, 4, HEAD_DIM)
            yield [q, k, *tables], keywords


def complex_heads_last(numbers: Numbers) -> Iterator[Probe]:
    for batch in (1, BATCH):
        q, k = numbers(BATCH, SEQ, HEADS, HEAD_DIM), numbers(BATCH, SEQ, KV_HEADS, HEAD_DIM)
        yield [q, k, numbers.complex(batch, SEQ, HEAD_DIM // 2)], {}


def complex_heads_first(numbers: Numbers) -> Iterator[Probe]:
    for (q, k, freqs), _ in complex_heads_last(numbers):
        yield [q.transpose(1, 2), k.transpose(1, 2), freqs], {}


def complex_of_tokens(numbers: Numbers) -> Iterator[Probe]:
    q, k = numbers(BATCH, SEQ, HEADS, HEAD_DIM), numbers(BATCH, SEQ, KV_HEADS, HEAD_DIM)
    for shape in ((SEQ, HEAD_DIM // 2), (1, SEQ, 1, HEAD_DIM // 2)):
        yield [q, k, numbers.complex(*shape)], {}


def positions_of_one_tensor(numbers: Numbers) -> Iterator[Probe]:
    x = numbers(BATCH, HEADS, SEQ, HEAD_DIM)
    yield [x, torch.tensor([3, 0, 7, 1, 2])], {}
    yield [x, torch.arange(BATCH * SEQ).view(BATCH, 1, SEQ).expand(BATCH, HEADS, SEQ)], {}


def method_on_hidden_states(numbers: Numbers) -> Iterator[Probe]:
    module = types.SimpleNamespace(num_heads=HEADS, head_size=HEAD_DIM)
    for rows in (SEQ, SEQ + 2):
        hidden_states = numbers(BATCH, SEQ, HEADS * HEAD_DIM)
        yield [module, hidden_states, numbers(2, rows, 1, 1, HEAD_DIM)], {}


def method_with_sinusoidal_pos(numbers: Numbers) -> Iterator[Probe]:
    q, k, v = (numbers(BATCH, HEADS, SEQ, HEAD_DIM) for _ in range(3))
    sinusoidal_pos = numbers(1, 1, SEQ, HEAD_DIM)
    yield [sinusoidal_pos, q, k], {}
    yield [sinusoidal_pos, q, k, v], {}
