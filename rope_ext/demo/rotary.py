"""Puts rope_ext in the place of a transformers model's rotary function, and takes it out again.

Attention code in transformers calls `apply_rotary_pos_emb` by its module-global name, and every
model family has its own copy: replacing that name in the model's own module reaches every layer.
The name may hold a plain function or, where the `kernels` package is installed, an nn.Module
instance; both are called the same way, so both are replaced and restored the same way.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

import rope_ext

NAME = "apply_rotary_pos_emb"
FLOAT32_EPS = 2.0**-23

# the arguments of one call: q, k, cos, sin, unsqueeze_dim
Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]


class NotLlamaForm(Exception):
    """The model's rotary function isn't the one that is replaced here."""


@dataclass
class Tally:
    """How often a function ran, and its last arguments (where no gradient is taken)."""

    calls: int = 0
    last: Call | None = None

    def counting(self, function: Callable) -> Callable:
        def counted(q, k, cos, sin, unsqueeze_dim=1):
            self.calls += 1
            if not torch.is_grad_enabled():  # else the graph of the step would be kept alive
                self.last = q, k, cos, sin, unsqueeze_dim
            return function(q, k, cos, sin, unsqueeze_dim)

        return counted


def rope_ext_rotary(q, k, cos, sin, unsqueeze_dim=1):
    """What takes the place of `apply_rotary_pos_emb`: the same arguments and results, by rope_ext.

    unsqueeze_dim=1: q [B, H, S, D], k [B, Hk, S, D]; 2: q [B, S, H, D], k [B, S, Hk, D].
    cos, sin [1|B, S, R]: one angle a channel, for the first R channels.
    """
    layout = "bhsd" if unsqueeze_dim == 1 else "bshd"
    return rope_ext.apply_rotary_qk(q, k, cos, sin, rotary_dim=cos.shape[-1], layout=layout)


def unchanged(original: Callable) -> Callable:
    return original


def with_rope_ext(original: Callable) -> Callable:
    return rope_ext_rotary


def one_ulp_off(original: Callable) -> Callable:
    """`original` with every number that it returns, and every gradient that it receives, moved.

    Up or down by one unit in the last place, at random (seeded). What this changes in a model is
    what another rounding may change: the yardstick for the tolerances.
    """
    generators = {}

    def shaken(x: torch.Tensor) -> torch.Tensor:
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(0)
        up = torch.randint(0, 2, x.shape, generator=generators[x.device], device=x.device)
        return x * (1.0 + (2 * up - 1) * FLOAT32_EPS)

    def shaken_rotary(*args, **kwargs):
        q, k = original(*args, **kwargs)
        return shaken(q), shaken(k)

    return shaken_rotary


def rotary_modules(model: nn.Module) -> list[ModuleType]:
    """The Python modules that define the model's layers and hold a rotary function."""
    names = dict.fromkeys(type(layer).__module__ for layer in model.modules())
    return [sys.modules[name] for name in names if hasattr(sys.modules.get(name), NAME)]


@contextlib.contextmanager
def replaced_rotary(model: nn.Module, make: Callable[[Callable], Callable]) -> Iterator[Tally]:
    """Within the block every rotary function f of `model` is `make(f)`, counted; then f again."""
    forget_lengths(model)
    tally = Tally()
    originals = [(module, getattr(module, NAME)) for module in rotary_modules(model)]
    try:
        for module, original in originals:
            setattr(module, NAME, tally.counting(make(original)))
        yield tally
    finally:
        for module, original in originals:
            setattr(module, NAME, original)


def forget_lengths(model: nn.Module) -> None:
    """As if no sequence had been read: frequencies may depend on the longest one so far."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq") and hasattr(module, "original_max_seq_len"):
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(x1, x2) -> (-x2, x1), the halves of the last dimension."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def require_llama_form(model: nn.Module) -> list[str]:
    """The full names of the model's rotary functions, all of Llama's form.

    Many families have a function of this name that pairs other channels or takes other tables:
    replacing those would change the model. Raises NotLlamaForm with the reason.
    """
    modules = rotary_modules(model)
    if not modules:
        raise NotLlamaForm(f"{type(model).__module__} has no function {NAME}")
    for module in modules:
        if problem := find_other_form(getattr(module, NAME)):
            raise NotLlamaForm(f"{module.__name__}.{NAME} {problem}")
    return [f"{module.__name__}.{NAME}" for module in modules]


def find_other_form(function: Callable) -> str | None:
    """How `function` differs from Llama's rotary function, in words; None when it doesn't."""
    # an nn.Module's own __call__ shows only (*args, **kwargs)
    shown = function.forward if isinstance(function, nn.Module) else function
    parameters = inspect.signature(shown).parameters
    if (
        list(parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]
        or parameters["unsqueeze_dim"].default != 1
    ):
        taken = ", ".join(map(str, parameters.values()))
        return f"takes ({taken}), expected (q, k, cos, sin, unsqueeze_dim=1)"

    generator = torch.Generator().manual_seed(0)
    cos, sin = torch.randn(
        2, 2, 5, 8, generator=generator
    )  # [B, S, D] each; halves differ on purpose
    for unsqueeze_dim in (1, 2):
        q = torch.randn(2, 4, 5, 8, generator=generator)  # [B, H, S, D]
        k = torch.randn(2, 2, 5, 8, generator=generator)  # [B, Hk, S, D]
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        expected = [x * c + rotate_half(x) * s for x in (q, k)]
        if unsqueeze_dim == 2:
            q, k, *expected = (x.transpose(1, 2) for x in (q, k, *expected))
        try:
            got = function(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        except Exception as error:
            return f"fails on q [2, 4, 5, 8], cos [2, 5, 8]: {type(error).__name__}: {error}"
        # a few roundings of numbers of size 1 to 10: another convention is off by 1 and more
        if not all(
            g.shape == e.shape and torch.allclose(g, e, rtol=0, atol=1e-5)
            for g, e in zip(got, expected, strict=True)
        ):
            return "doesn't compute x cos + rotate_half(x) sin"
    return None
