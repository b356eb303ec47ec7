"""The cases of the CPU benchmark and their goals."""

import functools
from collections.abc import Callable, Iterator

import torch
from benchmark import Benchmark, CpuCase
from common import Case
from rotations_cpu import in_place, out_of_place, training
from tables_cpu import decode_rows, whole_table

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def llama(batch: int, seq: int, interleaved: bool = False) -> Case:
    return Case("Llama-3-8B", batch, seq, 32, 8, 128, 128, interleaved)


GPT_NEOX = Case("GPT-NeoX-20B", 1, 2048, 64, 64, 96, 24)
SMOLLM2 = Case("SmolLM2", 4, 2048, 9, 3, 64, 64)
LINES = "rmw of the rotated lines"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IN_PLACE = [  # step, batch, length, interleaved, floor, goal of each dtype
    ("prefill 4096", 1, 4096, False, "rmw", (1.10, 1.15, 1.15)),
    ("prefill 4096", 1, 4096, True, "rmw", (1.20, 1.20, 1.20)),
    ("decode 64", 64, 1, False, "neg_", (1.3, 2.0, 1.5)),
    ("decode 64", 64, 1, True, "neg_", (1.3, 2.0, 1.5)),
    ("decode 1", 1, 1, False, "mul_", (0.4, 0.4, 0.4)),
    ("decode 1", 1, 1, True, "mul_", (0.4, 0.4, 0.4)),
]


def case(name: str, make: Callable[..., Benchmark], *arguments: object) -> CpuCase:
    return CpuCase(
        name,
        functools.partial(make, *arguments),
        inference=make is not training,
        new_memory="decode" not in name,
    )


def in_place_cases() -> Iterator[CpuCase]:
    for step, batch, seq, interleaved, floor, goals in IN_PLACE:
        shape = llama(batch, seq, interleaved)
        for (short, dtype), goal in zip(DTYPES.items(), goals, strict=True):
            name = f"{step}, {short}, in place" + ", interleaved" * interleaved
            yield case(name, in_place, shape, dtype, floor, goal)


CPU_CASES = [
    *in_place_cases(),
    case("prefill 32768, bf16, in place", in_place, llama(1, 32768), BFLOAT16, "rmw", 1.15),
    case("24 of 96 channels, bf16, in place", in_place, GPT_NEOX, BFLOAT16, LINES, 1.15),
    case("prefill 4096, fp32, out of place", out_of_place, llama(1, 4096), FLOAT32),
    case("prefill 4096, bf16, out of place", out_of_place, llama(1, 4096), BFLOAT16),
    case("training 4 x 2048, bf16", training, llama(4, 2048), BFLOAT16),
    case("training 4 x 2048, SmolLM2, bf16", training, SMOLLM2, BFLOAT16),
    case("cos/sin table 131072 x 64, fp32", whole_table),
    case("cos/sin of 64 decode positions", decode_rows),
]
