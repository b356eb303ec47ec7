"""Gives a model another rope scaling, and compares its frequencies and tables to rope_ext's."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import rope_ext
from rope_ext.demo.compare import Check, generate
from rope_ext.demo.model_rotation import forget_lengths

TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
# Shorter than the prompt, so that the frequencies for longer sequences are used.
ORIGINAL_BY_LENGTH = 1024


class NotScalable(Exception):
    """The model can't have this scaling: its rotary embedding does not take its frequencies from
    the config, or the numbers are invalid.
    """


def parameters(
    rope_type: str, factor: float, original: int | None, longest: int, pairs: int
) -> dict[str, Any]:
    """rope_parameters, without rope_theta, of a scaling by `factor` from `original` tokens on.

    longest: max_position_embeddings of the model, the default of `original`.
    """
    if original is None:
        original = ORIGINAL_BY_LENGTH if rope_type in ("dynamic", "longrope") else longest
    length = {"original_max_position_embeddings": original}
    own: dict[str, dict[str, Any]] = {
        "linear": {},
        "dynamic": length,
        "yarn": length,
        "longrope": {
            **length,
            "short_factor": [1.0] * pairs,
            # from 1 for the fastest pair to factor for the slowest
            "long_factor": [factor ** (i / max(pairs - 1, 1)) for i in range(pairs)],
        },
        "llama3": {**length, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "proportional": {"partial_rotary_factor": 0.5},
    }
    return {"rope_type": rope_type, "factor": factor, **own[rope_type]}


def apply(model: nn.Module, rope_type: str, factor: float, original: int | None) -> str:
    """Sets the scaling in the model's config and renews its rotary embedding; returns a text."""
    config = model.config.get_text_config()
    (old,) = rotary_embeddings(model).values()
    scaling = parameters(
        rope_type, factor, original, config.max_position_embeddings, old.inv_freq.numel()
    )
    try:
        rope_ext.frequencies.from_scaling(2 * old.inv_freq.numel(), scaling)
    except ValueError as error:
        raise NotScalable(f"--rope-scaling {rope_type}: {error}") from error
    shown = {key: value for key, value in scaling.items() if not isinstance(value, list)}
    if rope_type == "dynamic":  # transformers calls it so
        config.max_position_embeddings = scaling.pop("original_max_position_embeddings")
    config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **scaling}
    for name in rotary_embeddings(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, type(old)(config=config))
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def rotary_embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The one module, by name, that computes the model's cos and sin from position_ids."""
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding")
    }
    takes = {tuple(inspect.signature(module.forward).parameters) for module in found.values()}
    if len(found) != 1 or takes != {("x", "position_ids")}:
        raise NotScalable(
            "--rope-scaling needs a model with one rotary embedding, of (x, position_ids); "
            f"{type(model).__name__} has {len(found)}: {', '.join(found)}"
        )
    return found


def check_frequencies(model: nn.Module) -> Check:
    """rope_ext.frequencies on the model's config, compared bit for bit to the model's own."""
    forget_lengths(model)
    (own,) = rotary_embeddings(model).values()
    inv_freq, attention_scaling = rope_ext.frequencies.from_config(model.config)
    expected = own.inv_freq.cpu()
    same_shape = inv_freq.shape == expected.shape
    differing = int((inv_freq != expected).sum()) if same_shape else expected.numel()
    differing += attention_scaling != own.attention_scaling
    note = f"of {expected.numel()}, and the attention factor {own.attention_scaling:.6g}"
    return Check("frequencies of the config, how many differ", differing, 0, note)


def check_generation(model: nn.Module, prompt: torch.Tensor, own: torch.Tensor) -> Check:
    """Compares the tokens after the prompt with rope_ext's tables to those without.

    The tables of transformers round the angle by 2^-24 of it, too little to change a token.
    """
    with torch.no_grad(), replaced_tables(model):
        ours = generate(model, prompt, len(own))
    differing = int((own != ours).sum())
    name = "generated tokens with the tables of rope_ext"
    return Check(name, differing, 0, f"of {len(own)}")


@contextlib.contextmanager
def replaced_tables(model: nn.Module) -> Iterator[rope_ext.RotaryEmbedding]:
    """Within the block cos and sin come from rope_ext.RotaryEmbedding."""
    (own,) = rotary_embeddings(model).values()
    rotary = rope_ext.RotaryEmbedding.from_config(model.config).to(own.inv_freq.device)

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = rotary.cos_sin(position_ids)
        return torch.cat((cos, cos), -1).to(x.dtype), torch.cat((sin, sin), -1).to(x.dtype)

    own.forward = forward
    try:
        yield rotary
    finally:
        del own.forward
