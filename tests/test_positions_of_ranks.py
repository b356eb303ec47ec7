"""Positions of a rank's tokens, under context parallelism."""

from itertools import product
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rope_ext import positions

WORLDS = (1, 2, 3, 4, 8)
RANKS_OF_WORLDS = [(world, rank) for world in WORLDS for rank in range(world)]
UNIT = 48  # a multiple of 2 * world for every world above
# Lengths of packed sequences, in units.
LENGTHS = {
    "one sequence": [2],
    "several": [1, 3, 2],
    "empty ones": [0, 1, 0, 2, 0],
    "no tokens at all": [0],
}
FUNCTIONS = (positions.context_parallel, positions.context_parallel_indices)


def packed(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype) * UNIT


def transformer_engine_indices(cu_seqlens, total_tokens, world, rank):
    """The indices of the kernel of thd_get_partitioned_indices, token by token."""
    shares = [int(bound) // world for bound in cu_seqlens]
    indices = []
    for token in range(total_tokens // world):
        sequence = max(i for i in range(len(shares) - 1) if shares[i] <= token)
        length = shares[sequence + 1] - shares[sequence]
        index = token - shares[sequence]
        offset = rank if index < length // 2 else (world - 1) * 2 - rank
        indices.append(index + shares[sequence] * world + length // 2 * offset)
    return torch.tensor(indices, dtype=torch.int64)


@pytest.mark.parametrize("load_balanced", [True, False])
def test_a_rank_has_its_chunks_in_order(load_balanced):
    for world, rank in RANKS_OF_WORLDS:
        chunks = torch.arange(UNIT).chunk(2 * world if load_balanced else world)
        got = positions.context_parallel(UNIT, world, rank, load_balanced)
        mine = [rank, 2 * world - 1 - rank] if load_balanced else [rank]  # as in Megatron-LM
        assert got.dtype == torch.int64
        assert torch.equal(got, torch.cat([chunks[i] for i in mine])), (world, rank)


@pytest.mark.parametrize("load_balanced", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_sequences_are_cut_one_by_one(load_balanced, lengths):
    cu_seqlens = packed(lengths, torch.int32 if load_balanced else torch.int64)
    total = int(cu_seqlens[-1])
    within = torch.cat([torch.arange(n * UNIT) for n in lengths])
    options = {"cu_seqlens": cu_seqlens, "load_balanced": load_balanced}
    everyone = {world: [] for world in WORLDS}
    for world, rank in RANKS_OF_WORLDS:
        indices = positions.context_parallel_indices(total, world, rank, **options)
        got = positions.context_parallel(total, world, rank, **options)
        alone = [positions.context_parallel(n * UNIT, world, rank, load_balanced) for n in lengths]
        assert torch.equal(got, torch.cat(alone)), (world, rank)
        assert torch.equal(got, within[indices]), (world, rank)
        everyone[world].append(indices)
    for indices in everyone.values():
        assert torch.equal(torch.cat(indices).sort().values, torch.arange(total))


@pytest.mark.parametrize("lengths", [[2], [1, 3, 2], [4, 1]])  # the kernel needs nonempty sequences
def test_packed_indices_are_those_of_transformer_engine(lengths):
    cu_seqlens = packed(lengths)
    total = int(cu_seqlens[-1])
    for world, rank in RANKS_OF_WORLDS:
        got = positions.context_parallel_indices(total, world, rank, cu_seqlens=cu_seqlens)
        expected = transformer_engine_indices(cu_seqlens, total, world, rank)
        assert torch.equal(got, expected), (world, rank)


def test_load_balance_gives_every_rank_the_same_causal_work():
    work = {int((positions.context_parallel(96, 4, rank) + 1).sum()) for rank in range(4)}
    assert len(work) == 1


class Devices(TorchDispatchMode):
    seen: ClassVar = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen.add(result.device.type)
        return result


def test_result_is_made_on_the_device_that_is_asked_for_and_waits_for_no_value():
    """A copy from the CPU would wait for the device, and is not possible in a CUDA graph. The meta
    device has no values: reading one would raise.
    """
    for function in FUNCTIONS:
        with Devices() as devices:
            function(8, 2, 1, device="meta")
        assert devices.seen == {"meta"}
        with torch.device("meta"):
            assert function(8, 2, 0).device.type == "meta"
    got = positions.context_parallel(3 * UNIT, 2, 1, cu_seqlens=packed([1, 2]).to("meta"))
    assert (got.shape, got.device.type) == ((3 * UNIT // 2,), "meta")


def test_compiles_to_one_graph_for_all_lengths():
    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def compiled(cu_seqlens, total, rank):
        return positions.context_parallel(total, 2, rank, cu_seqlens=cu_seqlens)

    for lengths in ([1, 2], [3, 1], [2, 2]):
        cu_seqlens, total = packed(lengths), sum(lengths) * UNIT
        expected = positions.context_parallel(total, 2, 1, cu_seqlens=cu_seqlens)
        assert torch.equal(compiled(cu_seqlens, total, 1), expected)
    # values are not looked at: tokens past the last sequence read no bound
    got = compiled(torch.tensor([0, UNIT]), 2 * UNIT, 1)
    assert torch.equal(got[: UNIT // 2], positions.context_parallel(UNIT, 2, 1))


REFUSALS = [
    ((8, 0, 0), {}, "expected world to be an integer of at least 1, got 0"),
    (("8", 2, 0), {}, "expected seq_len to be an integer of at least 0, got '8'"),
    ((8, None, 0), {}, "expected world to be an integer of at least 1, got None"),
    ((8, 2, 2), {}, r"expected rank in \[0, 2\), of world ranks, got 2"),
    ((8, 2, -1), {}, "expected rank to be an integer of at least 0, got -1"),
    ((6, 2, 0), {}, "expected seq_len to be a multiple of 4, the chunks of 2 ranks, got 6"),
    ((5, 2, 0, False), {}, "expected seq_len to be a multiple of 2, .*, got 5"),
    ((-8, 2, 0), {}, "expected seq_len to be an integer of at least 0, got -8"),
    ((8, 2, 0), {"cu_seqlens": [0.0, 8.0]}, "expected cu_seqlens of dtype int32 or int64"),
    ((8, 2, 0), {"cu_seqlens": [8]}, r"expected cu_seqlens to have shape .*, got \[1\]"),
    ((8, 2, 0), {"cu_seqlens": [0, 4]}, "expected cu_seqlens from 0 to seq_len, 8, got 0 to 4"),
    ((8, 2, 0), {"cu_seqlens": [0, 2, 8]}, "sequence 0 of cu_seqlens .* of 4, .*, got 2"),
    ((8, 2, 0), {"cu_seqlens": [0, 12, 8]}, "sequence 1 of cu_seqlens .* of 4, .*, got -4"),
]


def test_invalid_arguments_raise_and_are_named():
    for function, (arguments, options, message) in product(FUNCTIONS, REFUSALS):
        options = {name: torch.tensor(value) for name, value in options.items()}
        name = rf"rope_ext\.positions\.{function.__name__}"
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            function(*arguments, **options)
