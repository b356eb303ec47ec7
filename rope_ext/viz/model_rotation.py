"""The rotation of a model, as figures and page show it."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rope_ext.frequencies.bounds import LAST_POSITION
from rope_ext.frequencies.config import from_config, resolve
from rope_ext.frequencies.scaling import from_scaling, rope_type_of

# The rotation of Llama 3 8B.
LLAMA_LIKE: dict[str, Any] = {
    "model_type": "llama",
    "head_dim": 128,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
MOST_CHANNELS = 1024  # that rotate: twice the widest known head; more take minutes to draw
# Scalings that do not stretch the context by a factor: for these, the other methods use FACTOR and
# LLAMA3, those of Llama 3.1. Hunyuan's models are trained with the alpha of ntk_alpha.
NOT_STRETCHED = ("default", "longrope", "ntk_alpha", "proportional")
FACTOR = 8.0
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class ModelRotation:
    """The rotation of a model, and the factor by which methods stretch its context.

    Attributes:
        head_dim, rotary_dim: channels of a head, D, and those that rotate, R.
        base: often called rope_theta.
        scaling: rope_type and its parameters, as for ``frequencies.from_scaling``.
        trained: tokens of the context of the training.
        extended: tokens of the stretched context.
        factor: of the methods other than the model's own; at least 1.
        inv_freq: float32 [P], radians per token, as in a sequence of `extended` tokens.
        attention_scaling: factor on cos and sin.
    """

    head_dim: int
    rotary_dim: int
    base: float
    scaling: dict[str, Any]
    trained: int
    extended: int
    factor: float
    inv_freq: Tensor
    attention_scaling: float

    @classmethod
    def of(cls, config: Any = LLAMA_LIKE, layer_type: str | None = None) -> "ModelRotation":
        """The rotation of a Hugging Face config, or of a model like Llama 3.

        Args:
            config, layer_type: as for ``frequencies.from_config``. trained is
                original_max_position_embeddings where the config has it, else
                max_position_embeddings; extended is factor times as much, but at least
                max_position_embeddings.

        Raises:
            ValueError: as ``from_config``, and for a config whose layers of this type do not
                rotate, or more than 1,024 channels, whose positions have several axes, whose base
                is at most 1, whose context is shorter than that of the training or longer than
                2^31 - 1, or that has no max_position_embeddings of at least 2.
        """
        if from_config(config, layer_type) is None:
            raise ValueError(
                f"viz: expected a layer_type whose layers rotate, got {layer_type or 'none'}"
            )
        found = resolve(config, layer_type)
        rope_type = rope_type_of(found.scaling)
        if rope_type == "axial":
            raise ValueError("viz: expected a config with one position a token, got an axial one")
        if found.rotary_dim > MOST_CHANNELS:
            raise ValueError(
                f"viz: expected rotary_dim to be at most {MOST_CHANNELS}, got {found.rotary_dim}"
            )
        if found.base <= 1:  # otherwise no pair is slower than the first
            raise ValueError(f"viz: expected rope_theta to be above 1, got {found.base}")
        longest = found.max_position_embeddings
        trained = found.scaling.get("original_max_position_embeddings") or longest
        if trained is None or trained < 2:
            raise ValueError(
                "viz: expected config to have max_position_embeddings of at least 2, got "
                f"{'none' if trained is None else trained}"
            )
        longest = longest or trained
        stretched_by = found.scaling.get("factor")
        if rope_type == "ntk":
            stretched_by = stretched_by or found.scaling["alpha"]
        factor = stretched_by or longest / trained
        if factor == 1 and rope_type in NOT_STRETCHED:
            factor = FACTOR
        if factor < 1:  # yarn's, if it follows from the lengths
            raise ValueError(
                "viz: expected max_position_embeddings to be at least those of the training, "
                f"{trained}, got {longest}"
            )
        if trained * factor > LAST_POSITION:
            raise ValueError(
                f"viz: expected a context of at most 2^31 - 1 tokens, got {trained} times a factor "
                f"of {factor:g}"
            )
        extended = max(longest, round(trained * factor))
        inv_freq, attention_scaling = from_config(config, layer_type, length=extended)
        return cls(
            found.head_dim,
            found.rotary_dim,
            found.base,
            found.scaling,
            trained,
            extended,
            factor,
            inv_freq,
            attention_scaling,
        )

    @property
    def rope_type(self) -> str:
        """The method that the model has."""
        return rope_type_of(self.scaling)

    @property
    def pairs(self) -> int:
        """P, the pairs of channels that rotate."""
        return len(self.inv_freq)

    def methods(self) -> dict[str, Tensor]:
        """inv_freq [P] of each method: the model's own from its config, the others by `factor`."""
        original = {"original_max_position_embeddings": self.trained}
        parameters: dict[str, dict[str, Any]] = {
            "default": {},
            "linear": {"factor": self.factor},
            "ntk": {"alpha": self.factor},
            "yarn": {"factor": self.factor, **original},
            "llama3": {"factor": self.factor, **LLAMA3, **original},
        }
        if self.pairs == 1:
            del parameters["ntk"]  # it changes all pairs but the first, the only one
        others = {
            name: self.frequencies({"rope_type": name, **of_method})
            for name, of_method in parameters.items()
            if name != self.rope_type
        }
        return {name: others.get(name, self.inv_freq) for name in (*parameters, self.rope_type)}

    def frequencies(self, scaling: dict[str, Any]) -> Tensor:
        """inv_freq [P] with another scaling of the same head and base."""
        return from_scaling(self.head_dim, scaling, base=self.base, rotary_dim=self.rotary_dim)[0]


def tokens_per_turn(inv_freq: Tensor) -> Tensor:
    """The wavelengths: float64, like inv_freq; inf for pairs that do not rotate."""
    return 2 * math.pi / inv_freq.double()
