"""from_scaling: every method from a dict in the terms of Hugging Face (rope_type and so on)."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from rope_ext.frequencies.basic import default, proportional
from rope_ext.frequencies.bounds import (
    MOST_CHANNELS,
    Device,
    check_integer,
    check_number,
    refuse,
    shown,
)
from rope_ext.frequencies.context import linear, llama3, longrope, yarn
from rope_ext.frequencies.ntk_aware import dynamic_ntk, ntk, ntk_alpha

# rope_type: the function, the keys it needs, the keys it may have
METHODS: dict[str, tuple[Callable[..., tuple[Tensor, float]], set[str], set[str]]] = {
    "default": (default, set(), set()),
    "linear": (linear, {"factor"}, set()),
    "ntk": (ntk, set(), {"alpha", "factor"}),
    "ntk_alpha": (ntk_alpha, {"alpha"}, set()),
    "dynamic": (dynamic_ntk, {"factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        yarn,
        {"original_max_position_embeddings"},
        {
            "factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "longrope": (
        longrope,
        {"short_factor", "long_factor", "original_max_position_embeddings"},
        {"factor", "attention_factor", "short_mscale", "long_mscale"},
    ),
    "llama3": (
        llama3,
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        set(),
    ),
    "proportional": (proportional, set(), {"factor", "partial_rotary_factor"}),
}
BY_LENGTH = ("dynamic", "longrope")  # their frequencies depend on the length of the sequence
# what other names say
ALIASES = {"su": "longrope", "mrope": "default", "xdrope": "dynamic"}


def rope_type_of(scaling: Mapping[str, Any] | None) -> Any:
    """rope_type, or its older name type; "default" if there is neither."""
    scaling = scaling or {}
    name = scaling.get("rope_type")
    if name is None:
        name = scaling.get("type")
    if name is None:
        return "default"
    return ALIASES.get(name, name) if isinstance(name, str) else name


def known_keys(rope_type: Any, function: str = "from_scaling") -> set[str]:
    """The keys of a rope type. Raises a ValueError for an unknown rope type."""
    if not isinstance(rope_type, str) or rope_type not in METHODS:
        refuse(function, "rope_type", f"one of {', '.join(METHODS)}", rope_type)
    _, needed, optional = METHODS[rope_type]
    return needed | optional


def from_scaling(
    head_dim: int,
    scaling: Mapping[str, Any] | None,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    max_position_embeddings: int | None = None,
    length: int | Tensor | None = None,
    device: Device = None,
) -> tuple[Tensor, float]:
    """The frequencies of a dict such as ``{"rope_type": "yarn", "factor": 4.0, ...}``.

    Args:
        head_dim: channels of a head, D.
        scaling: rope_type and its parameters, named like the arguments of its function here. The
            rope types: default, linear, ntk, ntk_alpha, dynamic (:func:`dynamic_ntk`), yarn
            (without low and high), longrope, llama3, proportional. A parameter of None counts as
            missing. None: default.
        base, rotary_dim, device: as for :func:`default`. proportional takes all of D as rotary_dim.
        max_position_embeddings: in tokens. If the dict lacks them, gives dynamic its
            original_max_position_embeddings, and yarn and longrope their factor, the ratio of the
            two.
        length: of the sequence, for dynamic (also a tensor) and longrope; no effect on others.

    Returns:
        inv_freq, float32 [P], and attention_scaling.

    Raises:
        ValueError: for an unknown rope_type, an unknown or missing key, and the errors of the
            rope_type's function.

    Source: rope_parameters of transformers, modeling_rope_utils.py.
    """
    if scaling is not None and not isinstance(scaling, Mapping):
        refuse("from_scaling", "scaling", "a dict or None", scaling)
    if max_position_embeddings is not None:
        check_integer("from_scaling", "max_position_embeddings", max_position_embeddings)
    rope_type = rope_type_of(scaling)
    known = known_keys(rope_type)
    function, needed, _ = METHODS[rope_type]
    options = {
        key: value
        for key, value in (scaling or {}).items()
        if value is not None and key not in ("rope_type", "type")
    }
    if unknown := [key for key in options if key not in known]:
        among = ", ".join(sorted(known)) or "none"
        refuse("from_scaling", f"the keys of rope_type {rope_type!r}", f"among {among}", unknown)
    if rope_type == "dynamic" and max_position_embeddings is not None:
        options.setdefault("original_max_position_embeddings", max_position_embeddings)
    if missing := sorted(needed - options.keys()):
        raise ValueError(
            f"frequencies.from_scaling: expected rope_type {rope_type!r} to have "
            f"{', '.join(missing)}, got {', '.join(sorted(options)) or 'nothing'}"
        )
    if rope_type == "yarn":
        options["max_position_embeddings"] = max_position_embeddings
    if rope_type == "longrope" and "factor" not in options and max_position_embeddings is not None:
        original = options["original_max_position_embeddings"]
        if isinstance(original, int) and original > 0:
            # a ratio below 1 has no effect, as in transformers
            options["factor"] = max(1.0, max_position_embeddings / original)
    if rope_type in BY_LENGTH:
        options["length"] = length
    if rope_type != "proportional":
        options["rotary_dim"] = rotary_dim
    return function(head_dim, base=base, device=device, **options)


def split_scaling(
    head_dim: int,
    base: float | None,
    rotary_dim: int | None,
    scaling: Mapping[str, Any] | None,
) -> tuple[float, int, dict[str, Any]]:
    """base, rotary_dim and scaling without them: the first two may be entries of scaling."""
    if scaling is not None and not isinstance(scaling, Mapping):
        raise ValueError(
            f"RotaryEmbedding: expected scaling to be a dict or None, got {shown(scaling)}"
        )
    rest = {key: value for key, value in (scaling or {}).items() if value is not None}
    theta = rest.pop("rope_theta", None)
    if base is not None and theta not in (None, base):
        raise ValueError(
            "RotaryEmbedding: expected base to be rope_theta of scaling, "
            f"{shown(theta)}, got {shown(base)}"
        )
    if rope_type_of(rest) == "proportional":
        if rotary_dim not in (None, head_dim):
            raise ValueError(
                "RotaryEmbedding: expected rotary_dim to be head_dim for the rope_type "
                f"'proportional', got {shown(rotary_dim)}"
            )
        part = None
    else:
        part = rest.pop("partial_rotary_factor", None)
    if part is not None:
        check_integer("from_scaling", "head_dim", head_dim, most=MOST_CHANNELS)
        check_number("from_scaling", "partial_rotary_factor", part, above=0, most=1)
        of_part = int(head_dim * part)
        if rotary_dim not in (None, of_part):
            raise ValueError(
                "RotaryEmbedding: expected rotary_dim to be partial_rotary_factor of scaling times "
                f"head_dim, {of_part}, got {shown(rotary_dim)}"
            )
        rotary_dim = of_part
    base = base if base is not None else theta if theta is not None else 10000.0
    return base, head_dim if rotary_dim is None else rotary_dim, rest
