"""from_config: the frequencies that a Hugging Face config asks for.

Reads config objects and the dicts of config.json alike, by the names of their entries: transformers
itself is not imported.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from rope_ext._explaining import describe
from rope_ext.frequencies.bounds import Device, check_length, check_number
from rope_ext.frequencies.families import (
    BASE,
    FULL_HEAD_DIM,
    HEAD_DIM,
    INTERLEAVED,
    ONLY_SLIDING,
    ONLY_SLIDING_IF_ANY,
    OTHER_FORMS,
    OTHER_ROTATIONS,
    OWN_PARAMETERS,
    PARTIAL,
    TWO_BASES,
)
from rope_ext.frequencies.scaling import from_scaling, known_keys, rope_type_of
from rope_ext.frequencies.spatial import axial

NEEDS_ORIGINAL_LENGTH = ("llama3", "yarn", "longrope")


class Resolved(NamedTuple):
    """What a config says of the rotation of one kind of layer."""

    head_dim: int
    rotary_dim: int
    base: float
    scaling: dict[str, Any]  # rope_type and its parameters
    max_position_embeddings: int | None
    interleaved: bool  # as transformers has it for the model_type
    other_rotation: str | None  # what the model_type does that interleaved does not say


def from_config(
    config: Any,
    layer_type: str | None = None,
    *,
    length: int | Tensor | None = None,
    device: Device = None,
) -> tuple[Tensor, float] | None:
    """The frequencies of a Hugging Face config.

    Args:
        config: a config object of transformers, or a dict as in config.json; with rope_parameters,
            for all layers or for each layer type, or in the older form with rope_theta and
            rope_scaling. Of a config with a text_config it is that one.
        layer_type: "full_attention", "sliding_attention" and the like, where layers differ.
        length: of the sequence, in tokens, for the rope types dynamic and longrope.
        device: where to make inv_freq.

    Returns:
        inv_freq, float32 [P], and attention_scaling; None where layers of this type do not rotate.
        The rotary_dim is 2 P. For vision towers (rope type axial) inv_freq is that of each axis, or
        for Pixtral that of the rows and then of the columns.

    Raises:
        ValueError: for the name or path of a config, a config without head_dim, an unknown
            rope_type or layer_type, entries that ask for what is not computed here, and what the
            function of the rope_type refuses.

    Resolved as transformers does: partial_rotary_factor (rotary_pct, rotary_dim, and for latent
    attention qk_rope_head_dim), head_dim or hidden_size / num_attention_heads, a factor of None
    from max_position_embeddings, truncate of YaRN only where it is not nested by layer type. Two
    things are not: partial_rotary_factor counts for every model, where Llama's classes disregard
    it, and PhiMoE's long_factor is used for long sequences, as its authors published it.
    """
    resolved = resolve(config, layer_type)
    if resolved is None:
        return None
    if rope_type_of(resolved.scaling) == "axial":
        axes = resolved.scaling["axes"]
        alternating = resolved.scaling["alternating"]
        inv_freq, attention_scaling = axial(
            resolved.head_dim, axes=axes, base=resolved.base, alternating=alternating, device=device
        )
        return inv_freq.flatten(), attention_scaling
    return from_scaling(
        resolved.head_dim,
        resolved.scaling,
        base=resolved.base,
        rotary_dim=resolved.rotary_dim,
        max_position_embeddings=resolved.max_position_embeddings,
        length=length,
        device=device,
    )


def resolve(config: Any, layer_type: str | None = None) -> Resolved | None:
    """What the config says, without making frequencies of it; None for no rotation."""
    _check_is_loaded(config)
    config = _text_config(config)
    model_type = _entry(config, "model_type", default="")
    if model_type in OTHER_FORMS:
        raise ValueError(
            "frequencies.from_config: expected a model_type whose frequencies follow from "
            f"rope_parameters alone, got {model_type!r}, which {OTHER_FORMS[model_type]}"
        )
    _check_entries(config, model_type)
    parameters, nested = _parameters(config, model_type, layer_type)
    if parameters is None or not _rotates(config, model_type, layer_type):
        return None
    rope_type = rope_type_of(parameters)
    alpha = parameters.get("alpha")
    if rope_type == "yarn" and model_type in ("phi3", "phi4_multimodal"):
        rope_type = "longrope"  # an older name of theirs
    elif (
        rope_type == "dynamic"
        and alpha
        and (model_type.startswith("hunyuan") or parameters.get("factor") is None)
    ):
        rope_type = "ntk_alpha"

    head_dim, rotary_dim = _dims(config, model_type, parameters, layer_type)
    base = parameters.get("rope_theta")
    if base is None:
        base = _entry(config, "rope_theta", "rotary_emb_base", default=BASE.get(model_type))
    if base is None:
        base = _entry(config, "default_theta", default=10000.0)
    check_number("from_config", "rope_theta", base, above=0)
    longest = _entry(config, "max_position_embeddings", "n_positions")
    if longest is not None:
        check_length("from_config", "max_position_embeddings", longest)

    if rope_type == "axial":
        scaling = {
            "axes": 3 if model_type.startswith("minimax_m3_vl") else 2,
            "alternating": model_type == "pixtral",
        }
    else:
        known = known_keys(rope_type, "from_config")
        scaling = {k: v for k, v in parameters.items() if k in known and v is not None}
        _fill_in(scaling, rope_type, config, longest, nested)
    interleaved = _entry(config, "rope_interleave", default=model_type in INTERLEAVED)
    scaling = {"rope_type": rope_type, **scaling}
    other = OTHER_ROTATIONS.get(model_type)
    return Resolved(head_dim, rotary_dim, base, scaling, longest, interleaved, other)


def _check_entries(config: Any, model_type: str) -> None:
    """Refuses entries that ask for what is not computed here."""
    if model_type == "falcon" and _entry(config, "alibi"):
        raise ValueError(
            "frequencies.from_config: expected a config that rotates, got 'falcon' with alibi"
        )
    ratio = _entry(config, "rope_ratio", default=1)
    if ratio != 1:
        raise ValueError(f"frequencies.from_config: expected rope_ratio to be 1, got {ratio!r}")
    for name in ("rope_parameters", "rope_scaling"):
        value = _entry(config, name, default={})
        if not isinstance(value, Mapping):
            raise ValueError(
                f"frequencies.from_config: expected {name} to be a dict, got {value!r}"
            )


def _rotates(config: Any, model_type: str, layer_type: str | None) -> bool:
    """Whether layers of this type rotate, as the models have it beside their rope_parameters."""
    if layer_type is None:
        return True
    if layer_type != "sliding_attention":
        if model_type in ONLY_SLIDING:
            return False
        given = not isinstance(config, Mapping) or "sliding_window" in config
        if model_type in ONLY_SLIDING_IF_ANY and not (
            given and _entry(config, "sliding_window") is None
        ):
            return False
    layer_types = _entry(config, "layer_types") or ()
    of_layers = _entry(config, "no_rope_layers", "layer_rope_theta") or ()  # 0: none
    of_type = [
        value for value, kind in zip(of_layers, layer_types, strict=False) if kind == layer_type
    ]
    return not of_type or any(of_type)


def _fill_in(
    scaling: dict[str, Any], rope_type: str, config: Any, longest: int | None, nested: bool
) -> None:
    """The parameters that transformers takes from elsewhere in the config."""
    original = "original_max_position_embeddings"
    if rope_type == "dynamic":
        scaling.pop(original, None)  # max_position_embeddings, always
    if rope_type in NEEDS_ORIGINAL_LENGTH:
        top = None if nested else _entry(config, original)
        if top is not None:
            scaling[original] = top
        elif longest is not None:
            scaling.setdefault(original, longest)
    if rope_type == "yarn":
        for name in ("beta_fast", "beta_slow"):
            if not scaling.get(name):  # 0 stands for the default
                scaling.pop(name, None)
        if nested:
            scaling.pop("truncate", None)  # read from the top level alone


def _parameters(
    config: Any, model_type: str, layer_type: str | None
) -> tuple[dict[str, Any] | None, bool]:
    """The parameters of this layer type, None for no rotation; and if they are nested by type."""
    new = _entry(config, "rope_parameters") or {}
    old = _entry(config, "rope_scaling") or {}
    # in an object rope_scaling may be another name of rope_parameters, with what was resolved
    parameters = (old or new) if isinstance(config, Mapping) else (new or old)
    if not parameters and isinstance(config, Mapping) and model_type in OWN_PARAMETERS:
        raise ValueError(
            f"frequencies.from_config: expected a config of {model_type!r} to have rope_parameters "
            "or rope_scaling, got neither: those of its class are in its config objects alone"
        )
    labels = _entry(config, "_rope_type_labels", "layer_types", default=())
    keys = [key for key in parameters if key in labels]
    if not keys and any(isinstance(value, Mapping) for value in parameters.values()):
        keys = list(parameters)
    if keys:
        if layer_type not in keys:
            raise ValueError(
                f"frequencies.from_config: expected layer_type to be one of {', '.join(keys)}, "
                f"got {layer_type!r}"
            )
        chosen = parameters[layer_type]
        if not isinstance(chosen, Mapping | None):
            raise ValueError(
                f"frequencies.from_config: expected rope_parameters of {layer_type!r} to be a dict "
                f"or None, got {chosen!r}"
            )
        return (None if chosen is None else dict(chosen)), True
    if model_type in TWO_BASES and not new:
        kinds = TWO_BASES[model_type]
        if layer_type not in kinds:
            raise ValueError(
                f"frequencies.from_config: expected layer_type to be one of {', '.join(kinds)}, "
                f"got {layer_type!r}"
            )
        key, base, scaled = kinds[layer_type]
        chosen = dict(parameters) if scaled else {}
        chosen.setdefault("rope_theta", _entry(config, key, default=base))
        return chosen, True
    layer_types = _entry(config, "layer_types")
    if layer_type is not None and layer_types and layer_type not in layer_types:
        raise ValueError(
            "frequencies.from_config: expected layer_type to be one of "
            f"{', '.join(sorted(set(layer_types)))}, got {layer_type!r}"
        )
    return dict(parameters), False


def _dims(
    config: Any, model_type: str, parameters: Mapping[str, Any], layer_type: str | None
) -> tuple[int, int]:
    """head_dim and rotary_dim."""
    head_dim = _head_dim_of_layer_type(config, layer_type) or _entry(
        config, "head_dim", "attention_head_dim", "kv_channels"
    )
    rotated = _entry(config, "qk_rope_head_dim")
    part = parameters.get("partial_rotary_factor")
    if part is None:
        part = _entry(config, "partial_rotary_factor", "rotary_pct")
    if part is None and _entry(config, "rotary_dim") is None:
        part = PARTIAL.get(model_type)
    if rotated and isinstance(config, Mapping) and (head_dim is None or part is None):
        head_dim = rotated  # latent attention: a part of the head of its own
        if model_type == "mistral4" and part is not None:  # of the whole head
            head_dim += _entry(config, "qk_nope_head_dim", default=64)
    if head_dim is None and isinstance(config, Mapping) and "head_dim" not in config:
        if layer_type == "full_attention":
            head_dim = FULL_HEAD_DIM.get(model_type)
        head_dim = head_dim or HEAD_DIM.get(model_type)
    if head_dim is None:
        # embed_dim first: beside it, hidden_size is that of the language model
        hidden = _entry(config, "embed_dim", "hidden_size", "n_embd", "d_model")
        heads = _entry(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
        if heads is None:
            heads = _entry(config, "encoder_num_attention_heads")  # moonshine
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
            raise ValueError(
                "frequencies.from_config: expected config to have head_dim, or hidden_size and "
                f"num_attention_heads, got {head_dim!r}, {hidden!r} and {heads!r}"
            )
        # in Zamba2, attention has its input beside that of the model
        head_dim = (2 * hidden if model_type == "zamba2" else hidden) // heads
    if rope_type_of(parameters) == "proportional":
        return head_dim, head_dim
    if part is None:
        return head_dim, _entry(config, "rotary_dim", default=head_dim)
    check_number("from_config", "partial_rotary_factor", part, above=0)
    return head_dim, int(head_dim * part)


def _head_dim_of_layer_type(config: Any, layer_type: str | None) -> int | None:
    """head_dim where layer types differ in it, as in Gemma 4."""
    if layer_type is None:
        return None
    overrides = _entry(config, "per_layer_config")
    layer_types = _entry(config, "layer_types") or ()
    if not isinstance(config, Mapping):
        try:
            return _entry(overrides[layer_type], "head_dim")
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    if overrides and layer_type in layer_types:
        layer = layer_types.index(layer_type)
        by_layer = {int(number): override for number, override in overrides.items()}  # "05"
        return by_layer.get(layer, {}).get("head_dim")
    if layer_type == "full_attention":
        return _entry(config, "global_head_dim")
    return None


def _check_is_loaded(config: Any) -> None:
    """Refuses what a config is loaded by: a name, a path, a class."""
    if isinstance(config, type):
        loaded = f"{config.__name__}() or its from_pretrained"
    elif isinstance(config, (str, os.PathLike)):
        name = os.fspath(config)
        loaded = f"transformers.AutoConfig.from_pretrained({name!r})"
        if str(name).endswith(".json"):
            loaded = f"json.load(open({name!r}))"
    else:
        return
    raise ValueError(
        "frequencies.from_config: expected config to be a config object or a dict, "
        f"got {describe(config)}: {loaded} makes one"
    )


def _text_config(config: Any) -> Any:
    if isinstance(config, Mapping):
        inner = config.get("text_config")
        return inner if isinstance(inner, Mapping) and "hidden_size" in inner else config
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def _entry(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the entries that is there and not None."""
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value is not None:
            return value
    return default
