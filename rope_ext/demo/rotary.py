"""Puts rope_ext in the place of a transformers model's rotary function, and takes it out again.

Attention code in transformers calls `apply_rotary_pos_emb` by its module-global name, and every
model family has its own copy: replacing that name in the model's own module reaches every layer.
The name may hold a plain function or, where the `kernels` package is installed, an nn.Module
instance; both are called the same way, so both are replaced and restored the same way.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

from rope_ext.integrations.transformers.recognition import recognize
from rope_ext.integrations.transformers.rotations import ALL_PAIRS, q_and_k

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


def unchanged(original: Callable) -> Callable:
    return original


def with_rope_ext(original: Callable) -> Callable:
    """What patch(model) puts in the place of `original`."""
    rotation = recognize(original)
    assert rotation is not None, "require_llama_form comes first"
    return rotation.replacement


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


def require_llama_form(model: nn.Module) -> list[str]:
    """The full names of the model's rotary functions, all of Llama's form.

    The comparisons call them with q and k and know the error of a half-split rotation; patch(model)
    knows others. Raises NotLlamaForm with the reason.
    """
    modules = rotary_modules(model)
    if not modules:
        raise NotLlamaForm(f"{type(model).__module__} has no function {NAME}")
    for module in modules:
        rotation = recognize(getattr(module, NAME))
        got = "a rotation that rope_ext does not know" if rotation is None else rotation.convention
        if rotation is None or rotation.form is not q_and_k or rotation.pairs != ALL_PAIRS[0]:
            raise NotLlamaForm(f"{module.__name__}.{NAME} is {got}, not {ALL_PAIRS[0].name}")
    return [f"{module.__name__}.{NAME}" for module in modules]
