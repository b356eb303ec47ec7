"""Positions of packed, cached and padded sequences, and their slots in a paged cache."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import error_of
from torch.utils._pytree import tree_leaves, tree_map

from rope_ext import positions

INT_DTYPES = (torch.int32, torch.int64)
drawn = settings(deadline=None, derandomize=True, database=None, max_examples=60)
lengths = st.lists(st.integers(0, 5), max_size=6)
dtypes = st.sampled_from(INT_DTYPES)


def boundaries(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)


@drawn
@given(lengths, st.data(), dtypes, st.integers(0, 3))
def test_packed_tokens_count_from_the_offset_of_their_sequence(lengths, data, dtype, padding):
    offsets = [data.draw(st.integers(0, 1000)) for _ in lengths]
    tokens = [(i, n) for i, length in enumerate(lengths) for n in range(length)]
    cu_seqlens, total = boundaries(lengths, dtype), sum(lengths) + padding
    got = positions.from_cu_seqlens(cu_seqlens, total, offsets=torch.tensor(offsets, dtype=dtype))
    assert got.dtype == torch.int64
    assert got.tolist() == [offsets[i] + n for i, n in tokens] + [-1] * padding
    got = positions.sequence_of_tokens(cu_seqlens, total)
    assert got.tolist() == [i for i, _ in tokens] + [-1] * padding


def test_positions_pass_the_range_of_int32():
    offsets = torch.tensor([2**31 - 1], dtype=torch.int32)
    packed = positions.from_cu_seqlens(boundaries([2], torch.int32), offsets=offsets)
    assert packed.tolist() == [2**31 - 1, 2**31]
    assert positions.from_offsets(offsets, 2).tolist() == [[2**31 - 1, 2**31]]
    table = torch.tensor([[2**31 - 1]], dtype=torch.int32)
    at = torch.tensor([[3]], dtype=torch.int32)
    assert positions.slot_mapping(table, at, 16).item() == (2**31 - 1) * 16 + 3


def test_next_tokens_count_from_their_offsets():
    for dtype in INT_DTYPES:
        offsets = torch.tensor([5, 0, 9], dtype=dtype)
        assert positions.from_offsets(offsets, 2).tolist() == [[5, 6], [0, 1], [9, 10]]
        assert positions.from_offsets(offsets, 0).shape == (3, 0)
    assert positions.from_offsets(4, 3).tolist() == [[4, 5, 6]]
    assert positions.from_offsets(4, 3, device="meta").is_meta
    cu_seqlens = boundaries([2, 0, 3])  # total and offsets may be left out or be numbers
    assert positions.from_cu_seqlens(cu_seqlens).tolist() == [0, 1, 0, 1, 2]
    assert positions.from_cu_seqlens(cu_seqlens, offsets=7).tolist() == [7, 8, 7, 8, 9]
    assert positions.sequence_of_tokens(cu_seqlens).tolist() == [0, 0, 2, 2, 2]


@drawn
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), max_size=4))
def test_padding_on_either_side_has_position_0(rows):
    mask = torch.tensor(rows, dtype=torch.bool).view(-1, 5)
    expected = [[sum(row[:i]) if row[i] else 0 for i in range(5)] for row in rows]
    for dtype in (torch.bool, *INT_DTYPES):
        got = positions.from_attention_mask(mask.to(dtype))
        assert got.dtype == torch.int64
        assert got.tolist() == expected


def test_padding_has_the_position_that_is_asked_for():
    """-1 marks padding for slots; 0 is a row of a table, which has none for position -1."""
    offsets = torch.tensor([-2, 4, -3])  # two tokens of padding, none, all three
    cu_seqlens = torch.tensor([0, 2, 5])
    for padding in (-1, 0):
        got = positions.from_offsets(offsets, 3, padding=padding).tolist()
        assert got == [[padding, padding, 0], [4, 5, 6], [padding] * 3]
        assert positions.from_offsets(-1, 3, padding=padding).tolist() == [[padding, 0, 1]]
        got = positions.from_cu_seqlens(cu_seqlens, 7, padding=padding).tolist()
        assert got == [0, 1, 0, 1, 2, padding, padding]


@drawn
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.data(), dtypes)
def test_slots_of_packed_tokens_are_those_of_their_blocks(rows, most, block_size, data, dtype):
    row = st.lists(st.integers(0, 99), min_size=most, max_size=most)
    table = data.draw(st.lists(row, min_size=rows, max_size=rows))
    places = st.integers(-2, most * block_size - 1)
    tokens = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), places), max_size=8))
    expected = [
        table[b][p // block_size] * block_size + p % block_size if p >= 0 else -1 for b, p in tokens
    ]
    sequence, at = torch.tensor(tokens, dtype=dtype).view(-1, 2).unbind(1)
    got = positions.slot_mapping(torch.tensor(table, dtype=dtype), at, block_size, sequence)
    assert got.dtype == torch.int64
    assert got.tolist() == expected


def test_slots_of_a_batch(device):
    block_table = torch.tensor([[7, 2], [0, -1], [5, 6]], dtype=torch.int32, device=device)
    at = torch.tensor([[3, 4], [0, -1], [-1, 7]], device=device)
    got = positions.slot_mapping(block_table, at, 4)
    assert got.tolist() == [[31, 8], [0, -1], [-1, 27]]
    one_row = torch.tensor([[1, 2]], device=device)
    assert positions.slot_mapping(block_table, one_row, 4).tolist() == [[29, 30], [1, 2], [21, 22]]
    masked = positions.slot_mapping(block_table, at, 4, mask=at % 2 == 0)
    assert masked.tolist() == [[-1, 8], [0, -1], [-1, -1]]
    nowhere = torch.full((3, 1), -1, device=device)
    assert torch.equal(positions.slot_mapping(block_table[:, :0], nowhere, 4), nowhere)
    assert positions.slot_mapping(block_table[:0], at[:0], 4).shape == (0, 2)
    kv_indptr = torch.tensor([0, 2, 2, 3], device=device)
    kv_indices = torch.tensor([7, 2, 5, 9], device=device)  # the last belongs to no sequence
    at = torch.tensor([[3, 4], [-1, -1], [-1, 2]], device=device)
    got = positions.slot_mapping(kv_indices, at, 4, kv_indptr=kv_indptr)
    assert got.tolist() == [[31, 8], [-1, -1], [-1, 22]]


@drawn
@given(st.lists(st.integers(0, 9), max_size=5), st.integers(1, 4), st.data(), dtypes)
def test_slots_and_lengths_from_pages_of_flashinfer(cached, page_size, data, dtype):
    """With the pages of a step's new tokens; padded, as for CUDA graphs."""
    new = [data.draw(st.integers(0, 3)) for _ in cached]
    lengths = [a + b for a, b in zip(cached, new, strict=True)]
    pages = [-(-length // page_size) for length in lengths]
    indices = data.draw(st.permutations(range(sum(pages) + 2)))
    last_page_len = [n - page_size * max(p - 1, 0) for n, p in zip(lengths, pages, strict=True)]
    expected, begin = [], 0
    for length, count, more in zip(lengths, pages, new, strict=True):
        table = indices[begin : begin + count]
        begin += count
        places = range(length - more, length)
        expected += [table[p // page_size] * page_size + p % page_size for p in places]
    kv_indptr, qo_indptr = boundaries(pages, dtype), boundaries(new, dtype)
    kv_indices = torch.tensor(indices, dtype=dtype)
    seq_lens = positions.seq_lens(kv_indptr, torch.tensor(last_page_len, dtype=dtype), page_size)
    assert (seq_lens.dtype, seq_lens.tolist()) == (torch.int64, lengths)
    total = sum(new) + 2
    sequence = positions.sequence_of_tokens(qo_indptr, total)
    for padding, mask in ((-1, None), (0, sequence >= 0)):
        offsets = seq_lens - qo_indptr.diff()
        at = positions.from_cu_seqlens(qo_indptr, total, offsets=offsets, padding=padding)
        got = positions.slot_mapping(
            kv_indices, at, page_size, sequence, kv_indptr=kv_indptr, mask=mask
        )
        assert got.tolist() == [*expected, -1, -1]


def packed_step(cu_seqlens, total, cached, block_table):
    at = positions.from_cu_seqlens(cu_seqlens, total, offsets=cached)
    sequence = positions.sequence_of_tokens(cu_seqlens, total)
    return positions.slot_mapping(block_table, at, 4, sequence)


def step_on_pages(qo_indptr, total, kv_indptr, kv_indices, last_page_len):
    seq_lens = positions.seq_lens(kv_indptr, last_page_len, 4)
    offsets = seq_lens - qo_indptr.diff()
    at = positions.from_cu_seqlens(qo_indptr, total, offsets=offsets, padding=0)
    sequence = positions.sequence_of_tokens(qo_indptr, total)
    options = {"kv_indptr": kv_indptr, "mask": sequence >= 0}
    return positions.slot_mapping(kv_indices, at, 4, sequence, **options)


def padded_step(offsets, seq_len, mask, block_table):
    at = positions.from_offsets(offsets, seq_len, padding=-1)
    slots = positions.slot_mapping(block_table, at, 4)
    return slots, positions.from_offsets(offsets.abs(), 2), positions.from_attention_mask(mask)


def of_images(height, width, tokens, mask):
    prompt = [tokens, (1, height, 2), tokens + 1, (3, height, 2, 2.5), 2]
    return (
        positions.grid(2 * height, 2 * width, merge=2),
        positions.patch_centers(height, width),
        positions.mrope(prompt),
        positions.mrope_batch([[tokens, (1, 2, 2)], [(1, 1, 2)]], mask),
    )


def rows_of_axes(cos, axes, factor):
    taking_turns = positions.mrope_axes([4, 2, 2], interleaved=True)
    return positions.mrope_rows(cos, 2 * cos, axes), factor * taking_turns


def padded_masks(i):
    return (torch.arange(9 + i) >= torch.tensor([[0], [7 + i]])).int()


def pages(i):
    rows = 3 + i
    qo_indptr, kv_indptr = boundaries([1] * rows), boundaries([2] * rows)
    return qo_indptr, 9 + 2 * i, kv_indptr, torch.arange(40 + 3 * i), torch.full((rows,), 3)


def blocks(i):
    lengths = boundaries([3 + i, 0, *range(i), 2])
    return lengths, 7 + 2 * i, torch.arange(2, 5 + i), torch.arange(9 * (3 + i)).view(-1, 9)


# Functions in a graph, with sizes and values of their arguments, all different: the graph would
# treat equal ones as one.
IN_A_GRAPH = {
    packed_step: blocks,
    step_on_pages: pages,
    padded_step: lambda i: (
        torch.arange(-2, 3 + i),
        9 + i,
        torch.ones(3 + i, 7 + i).bool(),
        torch.arange(9 * (5 + i)).view(-1, 9),
    ),
    of_images: lambda i: (3 + i, 11 + 2 * i, 5 + i, padded_masks(i)),
    rows_of_axes: lambda i: (
        torch.arange(24.0 * (5 + i)).view(3, -1, 8),
        torch.arange(8) % 3,
        i + 2,
    ),
}


@pytest.mark.parametrize("on", ["meta", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_device_has_the_numbers_of_the_cpu(on):
    """The meta device has no values, so none is waited for: reading one would raise."""
    for function, arguments in IN_A_GRAPH.items():
        given = tree_map(lambda t: t.to(on) if isinstance(t, torch.Tensor) else t, arguments(0))
        expected = tree_leaves(function(*arguments(0)))
        for got, same in zip(tree_leaves(function(*given)), expected, strict=True):
            if isinstance(same, torch.Tensor):
                assert (got.shape, got.dtype) == (same.shape, same.dtype), function
                assert got.is_meta or torch.equal(got.cpu(), same), function


@pytest.mark.parametrize("function", IN_A_GRAPH)
def test_one_graph_serves_all_lengths(function):
    arguments = IN_A_GRAPH[function]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    for i in range(3):
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            got = compiled(*arguments(i))
        expected = tree_leaves(function(*arguments(i)))
        assert all(map(torch.equal, tree_leaves(got), expected))


def test_in_a_graph_a_slot_that_is_not_there_is_minus_1():
    table, at = torch.tensor([[3, -1]]), torch.tensor([[0, 4, 9]])
    compiled = torch.compile(positions.slot_mapping, fullgraph=True, backend="eager")
    assert compiled(table, at, 4).tolist() == [[12, -1, -1]]
    outside = compiled(table, torch.tensor([0, 0, 0]), 4, torch.tensor([0, 1, -1]))
    assert outside.tolist() == [12, -1, -1]
    sequence, kv_indptr = torch.tensor([1, 1, 2, -1]), torch.tensor([0, 1, 9])
    at = torch.tensor([3, 4, 0, 0])  # kv_indices ends before kv_indptr does
    pages = compiled(torch.tensor([3, 5]), at, 4, sequence, kv_indptr=kv_indptr)
    assert pages.tolist() == [23, -1, -1, -1]


def T(*values, dtype=None, device=None):
    return torch.tensor(values, dtype=dtype, device=device)


PAGES = T(7, 2, 5), T(9), 4, T(0)
META = {"device": "meta"}

REFUSALS = {
    "from_cu_seqlens": [
        ((T(0.0, 1.0),), {}, "cu_seqlens of dtype int32 or int64, got torch.float32"),
        ((T([0, 1]),), {}, r"cu_seqlens to have shape \[sequences \+ 1\], got \[1, 2\]"),
        ((T(1, 2),), {}, "cu_seqlens to begin with 0, got 1"),
        ((T(0, 3, 2),), {}, "sequence 1 of cu_seqlens to have a length of at least 0, got -1"),
        ((T(0, 3), 2), {}, "total to be at least 3, the last of cu_seqlens, got 2"),
        ((T(0, 3), 3.0), {}, "total to be an integer of at least 0, got 3.0"),
        ((T(0, 3, **META),), {}, "total, .* for cu_seqlens on meta, .*, got None"),
        ((T(0, 3),), {"offsets": -1}, "offsets to be an integer of at least 0, got -1"),
        ((T(0, 3),), {"offsets": T(1, 2)}, r"offsets to have shape .*, \[1\], got \[2\]"),
        ((T(0, 3),), {"offsets": T(-1)}, r"offsets of at least 0, got -1 at index \[0\]"),
        ((T(0, 3),), {"offsets": T(1, **META)}, "offsets on the device of .*, got meta"),
        ((T(0, 3),), {"padding": -2}, "padding to be an integer of at least -1, got -2"),
    ],
    "sequence_of_tokens": [((T(0, 3), 2), {}, "total to be at least 3, .* of cu_seqlens, got 2")],
    "from_offsets": [
        ((T(3, -2), 1), {}, r"offsets of at least 0, got -2 at index \[1\] \(give padding="),
        ((-2, 1), {}, r"offsets to be an integer of at least 0, got -2 \(give padding="),
        ((2.0, 1), {"padding": 0}, r"offsets to be an integer, got 2.0$"),
        ((T([2]), 1), {}, r"offsets to have shape \[B\], got \[1, 1\]"),
        ((2, -1), {}, "seq_len to be an integer of at least 0, got -1"),
        ((2**63, 1), {}, "offsets to be an integer of at most 63 bits, got 9223372036854775808"),
        ((0, -(10**5000)), {}, "seq_len to be an integer of .*, got an integer of 16610 bits"),
    ],
    "from_attention_mask": [
        ((T([0.0]),), {}, "attention_mask of dtype bool, int32 or int64, got torch.float32"),
        ((T(0, 1),), {}, r"attention_mask to have shape \[B, S\], got \[2\]"),
        ((T([0, 2]),), {}, r"attention_mask of 0 and 1, got \[0, 2\]"),
    ],
    "slot_mapping": [
        ((T([1]), T([0]), 0), {}, "block_size to be an integer of at least 1, got 0"),
        ((T([1]), T([0]), 2**64), {}, "block_size to be an integer of at most 63 bits, got 184467"),
        ((T(1), T([0]), 4), {}, r"block_table to have shape \[B, .*, got \[1\]"),
        ((T([1], [1]), T([0], [0], [0]), 4), {}, r"positions .*, \[2, 1\], got \[3, 1\]"),
        ((T([1]), T(0), 4), {}, r"positions to have shape \[1\|B, S\], got \[1\]"),
        ((T([1]), T([0], **META), 4), {}, "positions on the device of block_table, cpu"),
        ((T([1]), T([0]), 4, T(0)), {}, r"positions to have shape \[T\], got \[1, 1\]"),
        ((T([1]), T(0), 4, T(0, 0)), {}, r"sequence to have shape .*, \[1\], got \[2\]"),
        ((T([1]), T(0), 4, T(0, **META)), {}, "sequence on the device of block_table"),
        ((T([1]), T(0), 4, T(1)), {}, r"sequence in \[0, 1\), the rows .*, got 1 at index \[0\]"),
        ((T([1]), T([0]), 4), {"mask": T([1])}, "mask of dtype bool, got torch.int64"),
        ((T([1]), T([0]), 4), {"mask": T(True)}, r"mask to have .*, \[1, 1\], got \[1\]"),
        ((T([1, 2], [3, -1]), T([7]), 4), {}, r"block 1 of sequence 1, for position 7, .*, -1\]"),
        ((T([1, 2]), T(0, 8), 4, T(0, 0)), {}, r"block 2 .* position 8, got \[1, 2\]"),
        (PAGES, {"kv_indptr": T(0, 4)}, "block_table to have the 4 pages of kv_indptr, got 3"),
        (PAGES, {"kv_indptr": T(0, 3, 2)}, "sequence 1 of kv_indptr to have a length .*, got -1"),
        (PAGES, {"kv_indptr": T(0, 3, **META)}, "kv_indptr on the device of block_table"),
        ((T([7]), *PAGES[1:]), {"kv_indptr": T(0, 1)}, r"\[pages\] with kv_indptr, got \[1, 1\]"),
        ((*PAGES[:3], T(1)), {"kv_indptr": T(0, 3)}, r"got 1 .*\(tokens of no sequence take a"),
    ],
    "seq_lens": [
        ((T(0, 2), T(3), 0), {}, "page_size to be an integer of at least 1, got 0"),
        ((T(0, 2), T(3, 1), 4), {}, r"kv_last_page_len to have shape .*, \[1\], got \[2\]"),
        ((T(0, 2), T(5), 4), {}, r"kv_last_page_len of at most page_size, 4, got \[5\]"),
        ((T(0, 2), T(-1), 4), {}, r"kv_last_page_len of at least 0, got -1 at index \[0\]"),
        ((T(0, 2), T(1, **META), 4), {}, "kv_last_page_len on the device of kv_indptr, cpu"),
    ],
}


@pytest.mark.parametrize("function", REFUSALS)
def test_invalid_arguments_raise_and_are_named(function):
    for arguments, options, message in REFUSALS[function]:
        got = error_of(getattr(positions, function), *arguments, **options)
        assert re.match(rf"rope_ext\.positions\.{function}: expected .*{message}", got)
