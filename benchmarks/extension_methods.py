"""The methods of context extension, as frequencies for one length."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rope_ext import cos_sin, frequencies
from rope_ext.demo.scaling import rotary_embeddings
from rope_ext.integrations.transformers import patched

Frequencies = tuple[Tensor, float]  # inv_freq float32 [P], attention_scaling


def none(head_dim: int, base: float, trained: int, length: int) -> Frequencies:
    return frequencies.default(head_dim, base=base)


def linear(head_dim: int, base: float, trained: int, length: int) -> Frequencies:
    return frequencies.linear(head_dim, factor=length / trained, base=base)


def ntk(head_dim: int, base: float, trained: int, length: int) -> Frequencies:
    return frequencies.ntk(head_dim, alpha=length / trained, base=base)


def dynamic_ntk(head_dim: int, base: float, trained: int, length: int) -> Frequencies:
    """The frequencies of a config with factor length / trained, at the last token of the text."""
    return frequencies.dynamic_ntk(
        head_dim,
        factor=length / trained,
        original_max_position_embeddings=trained,
        length=length,
        base=base,
    )


def yarn(head_dim: int, base: float, trained: int, length: int) -> Frequencies:
    return frequencies.yarn(
        head_dim, factor=length / trained, original_max_position_embeddings=trained, base=base
    )


def longrope(head_dim: int, base: float, trained: int, length: int) -> Frequencies:
    """LongRoPE searches a factor for each pair. Without a search, the factors rise from 1 for the
    fastest pair to length / trained for the slowest. This is NTK's choice, with LongRoPE's factor
    on attention.
    """
    pairs, factor = head_dim // 2, length / trained
    factors = [factor ** (i / (pairs - 1)) for i in range(pairs)]
    return frequencies.longrope(
        head_dim,
        short_factor=[1.0] * pairs,
        long_factor=factors,
        factor=factor,
        original_max_position_embeddings=trained,
        length=length,
        base=base,
    )


METHODS: dict[str, Callable[[int, float, int, int], Frequencies]] = {
    "none": none,
    "linear": linear,
    "NTK": ntk,
    "dynamic NTK": dynamic_ntk,
    "YaRN": yarn,
    "LongRoPE, no search": longrope,
}


@contextlib.contextmanager
def extended(model: nn.Module, method: str, trained: int, length: int) -> Iterator[None]:
    """Within the block the model, trained to `trained` tokens, rotates as for `length` tokens, with
    rope_ext's tables and rotation.
    """
    config = model.config
    inv_freq, attention_scaling = METHODS[method](
        config.head_dim, config.rope_parameters["rope_theta"], trained, length
    )
    (own,) = rotary_embeddings(model).values()

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin(inv_freq, position_ids, attention_scaling=attention_scaling)
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    own.forward = forward
    try:
        with patched(model):
            yield
    finally:
        del own.forward
