"""The cases of the CPU benchmark and their goals."""

import functools
from collections.abc import Callable

import torch
from benchmark import Benchmark, CpuCase
from common import Case
from rotations_cpu import in_place, out_of_place, training
from tables_cpu import decode_rows, whole_table

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def llama(batch: int, seq: int, interleaved: bool = False) -> Case:
    return Case("Llama-3-8B", batch, seq, 32, 8, 128, 128, interleaved)


GPT_NEOX = Case("GPT-NeoX-20B", 1, 2048, 64, 64, 96, 24)
SMOLLM2 = Case("SmolLM2", 4, 2048, 9, 3, 64, 64)
LINES = "rmw of the rotated lines"


def case(name: str, make: Callable[..., Benchmark], *arguments: object) -> CpuCase:
    return CpuCase(
        name,
        functools.partial(make, *arguments),
        inference=make is not training,
        new_memory="decode" not in name,
    )


CPU_CASES = [
    case("prefill 4096, fp32, in place", in_place, llama(1, 4096), FLOAT32, "rmw", 1.10),
    case("prefill 4096, bf16, in place", in_place, llama(1, 4096), BFLOAT16, "rmw", 1.15),
    case("prefill 32768, bf16, in place", in_place, llama(1, 32768), BFLOAT16, "rmw", 1.15),
    case(
        "prefill 4096, bf16, in place, interleaved",
        *(in_place, llama(1, 4096, True), BFLOAT16, "rmw", 1.20),
    ),
    case("24 of 96 channels, bf16, in place", in_place, GPT_NEOX, BFLOAT16, LINES, 1.15),
    case("prefill 4096, fp32, out of place", out_of_place, llama(1, 4096), FLOAT32),
    case("prefill 4096, bf16, out of place", out_of_place, llama(1, 4096), BFLOAT16),
    case("training 4 x 2048, bf16", training, llama(4, 2048), BFLOAT16),
    case("training 4 x 2048, SmolLM2, bf16", training, SMOLLM2, BFLOAT16),
    case("decode 1, fp32, in place", in_place, llama(1, 1), FLOAT32, "null", 1.35),
    case("decode 1, bf16, in place", in_place, llama(1, 1), BFLOAT16, "null", 1.35),
    case("decode 64, fp32, in place", in_place, llama(64, 1), FLOAT32, "rmw", 1.5),
    case("decode 64, bf16, in place", in_place, llama(64, 1), BFLOAT16, "rmw", 1.5),
    case("cos/sin table 131072 x 64, fp32", whole_table),
    case("cos/sin of 64 decode positions", decode_rows),
]
