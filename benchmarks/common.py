"""The shapes of the benchmarks, and how cases are chosen."""

from dataclasses import dataclass

import torch

FIRST_POSITION = 1000  # not 0: there nothing rotates, and a wrong result would look right
DECODE_STRIDE = 37  # tokens between the positions of the sequences of a decode batch


@dataclass(frozen=True)
class Case:
    """q [B, S, Hq, D] and k [B, S, Hk, D], of whose channels rotary_dim rotate."""

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
    def step(self) -> str:
        return "decode" if self.seq == 1 else "prefill"

    @property
    def heads(self) -> int:
        return self.q_heads + self.k_heads

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


def matching(names: list[str], patterns: list[str], of: str = "case") -> list[str]:
    """The names that contain one of the patterns; all, if there are none."""
    found = [name for name in names if not patterns or any(part in name for part in patterns)]
    if not found:
        listed = "\n  ".join(names)
        raise SystemExit(f"no {of} has {' or '.join(patterns)} in its name:\n  {listed}")
    return found
