"""The shapes that the benchmarks time and reckon with, and how they print times."""

import statistics
from dataclasses import dataclass, replace

import torch

FIRST_POSITION = 1000  # at position 0 nothing turns, and a wrong result would look right


@dataclass(frozen=True)
class Case:
    """q [B, S, Hq, D] and k [B, S, Hk, D] of which rotary_dim channels turn."""

    name: str
    batch: int
    seq: int
    q_heads: int
    k_heads: int
    head_dim: int
    rotary_dim: int
    interleaved: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def heads(self) -> int:
        return self.q_heads + self.k_heads

    def with_few_tokens(self) -> "Case":
        return replace(self, batch=min(self.batch, 2), seq=min(self.seq, 4))

    def label(self, dtype: torch.dtype) -> str:
        return f"{self.name}, B={self.batch} S={self.seq}, {str(dtype).removeprefix('torch.')}"


CASES = [
    Case("Llama-3-8B prefill", 1, 4096, 32, 8, 128, 128),
    Case("Llama-3-8B decode", 1, 1, 32, 8, 128, 128),
    Case("Llama-3-8B decode", 64, 1, 32, 8, 128, 128),
    Case("SmolLM2 prefill", 1, 2048, 9, 3, 64, 64),
    Case("GPT-NeoX-20B prefill, partial", 1, 2048, 64, 64, 96, 24),
]
GPU_CASES = [
    *CASES,
    Case("Llama-3-8B prefill", 1, 32768, 32, 8, 128, 128),
    Case("Llama-3-8B prefill, interleaved", 1, 4096, 32, 8, 128, 128, interleaved=True),
]


def microseconds(times: list[float]) -> str:
    """The median and the 10th to 90th percentile of times in seconds."""
    ordered = sorted(times)
    low, high = (ordered[min(len(ordered) - 1, int(p * len(ordered)))] for p in (0.1, 0.9))
    return f"{1e6 * statistics.median(times):.4g} ({1e6 * low:.4g}-{1e6 * high:.4g})"
