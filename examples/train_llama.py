"""Trains a Llama-like model of bytes on the source of Python's standard library, and compiles it.

    python examples/train_llama.py [--steps 300]

Three models start from the same weights: in eager code, compiled into one graph, and with the
position 0 for all tokens, so that nothing rotates.
"""

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from llama import Llama
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

BATCH, LENGTH = 16, 64  # sequences, and tokens of each
RATE = 4e-3


def source_text() -> Tensor:
    """The standard library as bytes: uint8 [N], some millions."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)


def bits(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of each next byte: logits [B, S, 256] and tokens [B, S + 1] -> [B, S]."""
    return cross_entropy(logits.mT, tokens[:, 1:], reduction="none") / math.log(2)


def train(model: nn.Module, steps: int, positions: Tensor | None = None) -> float:
    """Trains on windows of the text; the mean of the last tenth of the losses, in bits a byte."""
    text, generator = source_text(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
        window = text[starts + torch.arange(LENGTH + 1)].long()
        loss = bits(model(window[:, :-1], positions), window).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-max(steps // 10, 1) :]
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    losses = {}
    for way in ("eager", "compiled", "no positions"):
        torch.manual_seed(0)
        model = Llama()
        runs = torch.compile(model, fullgraph=True) if way == "compiled" else model
        positions = torch.zeros(LENGTH, dtype=torch.int64) if way == "no positions" else None
        start = time.perf_counter()
        losses[way] = train(runs, steps, positions)
        print(f"{way:12} {losses[way]:.3f} bits a byte, {time.perf_counter() - start:.0f} s")
    off = abs(losses["compiled"] / losses["eager"] - 1)
    worse = losses["no positions"] - losses["eager"]
    print(f"Shown: the compiled model's loss is within {off:.1%} of the eager one's; without")
    print(f"positions it is {worse:+.3f} bits a byte.")


if __name__ == "__main__":
    main()
