"""Replaces the rotary functions of a transformers model, and counts calls."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from rope_ext.integrations.patching.pairs import ALL_PAIRS
from rope_ext.integrations.patching.recognition import Rotation
from rope_ext.integrations.transformers import UnrecognizedRotation
from rope_ext.integrations.transformers.forms import recognize
from rope_ext.integrations.transformers.loaded_models import substituted
from rope_ext.integrations.transformers.rotations import q_and_k

FLOAT32_EPS = 2.0**-23

# the arguments of one call: q, k, cos, sin, unsqueeze_dim
Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]


class NotLlamaForm(Exception):
    """The model's rotary function has another form than the replacement."""


@dataclass
class Tally:
    """How often a function ran, and its last arguments (if no gradient is taken)."""

    calls: int = 0
    last: Call | None = None

    def counting(self, function: Callable) -> Callable:
        def counted(q, k, cos, sin, unsqueeze_dim=1):
            self.calls += 1
            if not torch.is_grad_enabled():  # otherwise this would keep the graph of the step alive
                self.last = q, k, cos, sin, unsqueeze_dim
            return function(q, k, cos, sin, unsqueeze_dim)

        return counted


def unchanged(original: Callable) -> Callable:
    return original


def with_rope_ext(original: Callable) -> Callable:
    """The function by which patch(model) replaces `original`."""
    rotation = recognize(original)
    assert rotation is not None, "require_llama_form comes first"
    return rotation.replacement


def one_ulp_off(original: Callable) -> Callable:
    """`original`, with its results and the gradients that it receives moved by one unit.

    Each number moves up or down by one unit in the last place, at random (seeded). The resulting
    change in a model is the change that other roundings may cause: the scale of the tolerances.
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


@contextlib.contextmanager
def replaced_rotary(model: nn.Module, make: Callable[[Callable], Callable]) -> Iterator[Tally]:
    """Within the block every rotary function f of `model` is `make(f)`, with its calls counted."""
    forget_lengths(model)
    tally = Tally()
    with substituted(model, lambda function, rotation: tally.counting(make(function))):
        yield tally


def forget_lengths(model: nn.Module) -> None:
    """Resets the longest sequence so far, on which frequencies may depend."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq") and hasattr(module, "original_max_seq_len"):
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len


def own_rotations(model: nn.Module) -> list[tuple[Callable, Rotation]]:
    """The model's rotary functions and their rotations. Raises UnrecognizedRotation."""
    found = []

    def note(function: Callable, rotation: Rotation) -> Callable:
        found.append((function, rotation))
        return function

    with substituted(model, note):
        return found


def require_llama_form(model: nn.Module) -> list[str]:
    """The full names of the model's rotary functions, all of Llama's form.

    The comparisons call them with q and k, and their tolerance is that of a half-split rotation;
    patch(model) replaces other forms too. Raises NotLlamaForm with the reason.
    """
    try:
        rotations = own_rotations(model)
    except UnrecognizedRotation as error:
        raise NotLlamaForm(str(error)) from error
    names = []
    for function, rotation in rotations:
        shown = type(function).forward if isinstance(function, nn.Module) else function
        names.append(f"{shown.__module__}.{shown.__qualname__}")
        if rotation.form is not q_and_k or rotation.pairs != ALL_PAIRS[0]:
            raise NotLlamaForm(f"{names[-1]} is {rotation.convention}, not {ALL_PAIRS[0].name}")
    return names
