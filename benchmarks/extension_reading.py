"""A language model reads a long text: the loss of each token, time and memory."""

import contextlib
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CHUNK = 1024  # tokens that are read together
LOGITS = 256  # tokens whose logits, one for each word of the vocabulary, are in memory at a time


@dataclass(frozen=True)
class Reading:
    nll: Tensor  # float64 [S - 1]: -log p of token i + 1 after tokens 0 .. i, in nats
    seconds: float
    peak_bytes: int | None  # of the process; None if the system does not report it


def perplexity(nll: Tensor) -> float:
    return nll.mean().exp().item()


@torch.inference_mode()
def read(model: nn.Module, tokens: Tensor, tick: Callable[[int], object]) -> Reading:
    """tokens: int64 [1, S]. Calls tick(tokens read) after each chunk."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    # the argument's name in the newest transformers, and its older name
    parameters = inspect.signature(model.model.forward).parameters
    cached = {"cache" if "cache" in parameters else "past_key_values": cache, "use_cache": True}
    length = tokens.shape[1]
    nll = torch.empty(length - 1, dtype=torch.float64)
    forget_peak()
    start = time.perf_counter()
    for first in range(0, length, CHUNK):
        chunk = tokens[:, first : first + CHUNK]
        place = torch.arange(first, first + chunk.shape[1])[None]
        hidden = model.model(chunk, position_ids=place, **cached).last_hidden_state[0]
        for at in range(0, len(hidden), LOGITS):
            targets = tokens[0, first + at + 1 : first + at + 1 + LOGITS]
            if len(part := hidden[at : at + min(LOGITS, len(targets))]) == 0:
                continue
            targets = targets[: len(part)]
            losses = cross_entropy(model.lm_head(part), targets, reduction="none")
            nll[first + at : first + at + len(part)] = losses
        tick(chunk.shape[1])
    return Reading(nll, time.perf_counter() - start, peak_bytes())


def forget_peak() -> None:
    """Linux: resets the peak of the process's memory (man 5 proc, clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")),
        None,
    )
