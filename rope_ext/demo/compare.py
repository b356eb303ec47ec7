"""Runs a model with its own rotary function and with rope_ext, and measures what differs.

All in float32, where rope_ext computes x cos + rotate_half(x) sin in the same order, so every
difference is expected to be 0. Only sums that a model takes over q or k or their gradients (such as
the gradient of a norm's weight) may differ by roundings: torch's order of terms depends on strides.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from rope_ext.demo.model_rotation import (
    FLOAT32_EPS,
    Call,
    Tally,
    one_ulp_off,
    replaced_rotary,
    unchanged,
    with_rope_ext,
)

# A function rounds x1 c, x2 s and their sum once, each by at most half a unit in the last place. So
# it is at most 2 * 2^-24 (|x1 c| + |x2 s|) from the exact value. Two functions are at most twice
# that apart.
ROTATION_TOLERANCE = 2 * FLOAT32_EPS
# Later differences are compared to the effect of `one_ulp_off` on the unpatched model. Twice that,
# as the largest of many rounding differences varies by less between sets of roundings.
ONE_ULP_FACTOR = 2.0

TIMING_ROUNDS = 41
TIMING_SECONDS_A_ROUND = 0.003


class NeverCalled(Exception):
    """The replacement ran less often than the model's own function: nothing was compared."""


@dataclass
class Check:
    """One comparison, which passes if `difference` is at most `tolerance`."""

    name: str
    difference: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN


@dataclass
class Timing:
    """Microseconds a call of one function, over the rounds."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile


@dataclass
class Generation:
    """The tokens that each function generated, int64 [tokens]."""

    own: torch.Tensor
    ours: torch.Tensor
    check: Check
    calls: int
    decode_call: Call  # q [1, H, 1, D]


@dataclass
class Prompt:
    """The comparisons of one forward pass."""

    checks: list[Check]
    calls: int
    prefill_call: Call  # q [1, H, S, D]


def require_same_calls(own: Tally, replaced: Tally) -> None:
    if own.calls == 0 or own.calls != replaced.calls:
        raise NeverCalled(
            f"the model's rotary function ran {own.calls} times, its replacement {replaced.calls}"
        )


def compare_generation(model: nn.Module, prompt: torch.Tensor, tokens: int) -> Generation:
    """Greedy continuations of prompt int64 [1, S] by `tokens` tokens, with a KV cache."""
    with torch.no_grad():
        with replaced_rotary(model, unchanged) as own_tally:
            own = generate(model, prompt, tokens)
        with replaced_rotary(model, with_rope_ext) as our_tally:
            ours = generate(model, prompt, tokens)
    require_same_calls(own_tally, our_tally)
    differing = int((own != ours).sum())
    check = Check("generated tokens, how many differ", differing, 0, f"of {tokens}")
    return Generation(own, ours, check, our_tally.calls, own_tally.last)


def generate(model: nn.Module, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,  # also after the end of the answer: more tokens to compare
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :]


def compare_prompt(model: nn.Module, tokens: torch.Tensor) -> Prompt:
    """Rotated q and k of every layer, and the logits of every position, for tokens int64 [1, S]."""
    rotation_differences = []

    def beside_rope_ext(original: Callable) -> Callable:
        """`original`; rope_ext runs on the same arguments, and the results are compared."""

        def both(q, k, cos, sin, unsqueeze_dim=1):
            own = original(q, k, cos, sin, unsqueeze_dim)
            ours = with_rope_ext(original)(q, k, cos, sin, unsqueeze_dim)
            c, s = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
            for x, theirs, mine in zip((q, k), own, ours, strict=True):
                rotation_differences.append(rotation_difference(x, c, s, theirs, mine))
            return own

        return both

    def logits(make: Callable) -> tuple[torch.Tensor, Tally]:
        with torch.no_grad(), replaced_rotary(model, make) as tally:
            return model(tokens, use_cache=False).logits, tally

    own, own_tally = logits(beside_rope_ext)
    ours, our_tally = logits(with_rope_ext)
    require_same_calls(own_tally, our_tally)
    difference = largest_difference(own, ours)
    del ours  # 0.4 GB for 2,000 tokens and a vocabulary of 49,152
    rounding = largest_difference(own, logits(one_ulp_off)[0])
    rotation = Check(
        "rotated q and k of all layers, relative",
        torch.stack(rotation_differences).max().item(),
        ROTATION_TOLERANCE,
    )
    after = Check(
        f"logits of {tokens.shape[1]:,} tokens",
        difference,
        ONE_ULP_FACTOR * rounding,
        f"largest logit {own.abs().max().item():.3g}",
    )
    return Prompt([rotation, after], our_tally.calls, own_tally.last)


def rotation_difference(x, cos, sin, own, ours) -> torch.Tensor:
    """Largest |own - ours| relative to |x cos| + |rotate_half(x) sin|, the size of the terms.

    x, own, ours [B, H, S, D] and cos, sin [1|B, 1, S, R], or with S and H swapped. Scalar.
    """
    unturned = x.shape[-1] - cos.shape[-1]
    turned = x[..., : cos.shape[-1]]
    size = (turned * cos).abs() + (turned.roll(turned.shape[-1] // 2, -1) * sin).abs()
    size = nn.functional.pad(size, (0, unturned))
    difference = (own - ours).abs()
    return torch.where(difference == 0, 0.0, difference / size).max()


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs_().max().item()


def compare_training_step(model: nn.Module, tokens: torch.Tensor) -> tuple[list[Check], int]:
    """Gradients of one next-token loss over tokens int64 [B, S]; also the number of calls."""

    def gradients(make: Callable) -> tuple[dict[str, torch.Tensor], Tally]:
        model.train()
        torch.manual_seed(0)  # the same dropout, if the model has any
        with replaced_rotary(model, make) as tally:
            model(tokens, labels=tokens, use_cache=False).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        model.eval()
        return grads, tally

    own, own_tally = gradients(unchanged)
    ours, our_tally = gradients(with_rope_ext)
    require_same_calls(own_tally, our_tally)
    absolute, relative = gradient_difference(own, ours)
    del ours  # as large as the model
    rounding, relative_rounding = gradient_difference(own, gradients(one_ulp_off)[0])
    largest = torch.stack([grad.abs().max() for grad in own.values()]).max().item()
    checks = [
        Check(
            f"gradients of one step of {tokens.numel():,} tokens",
            absolute,
            ONE_ULP_FACTOR * rounding,
            f"largest gradient {largest:.3g}",
        ),
        Check(
            "the same, relative to a parameter's largest",
            relative,
            ONE_ULP_FACTOR * relative_rounding,
            f"{len(own)} parameters",
        ),
    ]
    return checks, our_tally.calls


def gradient_difference(a: dict, b: dict) -> tuple[float, float]:
    """Over all parameters, the largest |a - b|, and the largest of max |a - b| / max |a|."""
    if a.keys() != b.keys():
        return float("nan"), float("nan")
    absolute = torch.stack([(a[name] - b[name]).abs().max() for name in a])
    size = torch.stack([a[name].abs().max() for name in a])
    relative = torch.where(absolute == 0, 0.0, absolute / size)
    return absolute.max().item(), relative.max().item()


def time_side_by_side(call: Call, functions: list[Callable]) -> list[Timing]:
    """Times the functions on the same arguments in turns, so that other load slows all of them."""
    device = call[0].device

    def seconds(function: Callable, times: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            function(*call)
        synchronize(device)
        return (time.perf_counter() - start) / times

    with torch.no_grad():
        for function in functions:
            seconds(function, 3)  # warm up
        times = [max(1, round(TIMING_SECONDS_A_ROUND / seconds(f, 3))) for f in functions]
        rounds = [
            [seconds(f, n) for f, n in zip(functions, times, strict=True)]
            for _ in range(TIMING_ROUNDS)
        ]
    timings = []
    for samples in zip(*rounds, strict=True):
        tenths = statistics.quantiles((1e6 * s for s in samples), n=10)
        timings.append(Timing(median=tenths[4], low=tenths[0], high=tenths[8]))
    return timings


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
