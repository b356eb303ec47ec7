"""from_config: the frequencies that a Hugging Face config asks for.

Reads config objects and the dicts of config.json by the names of their entries. transformers is not
imported.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from rope_ext._argument_errors import describe, shown
from rope_ext.frequencies.bounds import MOST_CHANNELS, Device, refuse
from rope_ext.frequencies.entries import Entries
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
    """The rotation of one layer type, as a config defines it."""

    head_dim: int
    rotary_dim: int
    base: float
    scaling: dict[str, Any]  # rope_type and its parameters
    max_position_embeddings: int | None
    interleaved: bool  # as transformers does it for the model_type
    other_rotation: str | None  # another way in which the model_type rotates, in words


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
            rope_scaling. If it has a text_config, that one is read.
        layer_type: "full_attention", "sliding_attention" and so on, if layer types differ.
        length: of the sequence, in tokens, for the rope types dynamic and longrope.
        device: where to make inv_freq.

    Returns:
        inv_freq, float32 [P], and attention_scaling; None if layers of this type do not rotate. The
        rotary_dim is 2 P. For vision towers (rope type axial) inv_freq is that of each axis, for
        Pixtral that of the rows and then of the columns.

    Raises:
        ValueError: for the name or path of a config, a config without head_dim, an unknown
            rope_type or layer_type, an entry of a wrong type or size, an entry that asks for
            frequencies that are not computed here, and the errors of the rope_type's function.

    Entries are read as transformers reads them: partial_rotary_factor (rotary_pct, rotary_dim, and
    for latent attention qk_rope_head_dim), head_dim or hidden_size / num_attention_heads, a factor
    of None from max_position_embeddings, truncate of YaRN only if it is not nested by layer type.
    There are two differences: partial_rotary_factor counts for every model, while Llama's classes
    ignore it; and PhiMoE's long_factor is used for long sequences, as its authors published it.
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
    """The rotation that a config defines, without its frequencies; None for no rotation."""
    _check_is_loaded(config)
    if not isinstance(layer_type, str | None):
        refuse("from_config", "layer_type", "a string or None", layer_type)
    entries = _entries_of_text(config)
    model_type = entries.text("model_type", default="")
    if model_type in OTHER_FORMS:
        raise ValueError(
            "frequencies.from_config: expected a model_type whose frequencies follow from "
            f"rope_parameters alone, got {model_type!r}, which {OTHER_FORMS[model_type]}"
        )
    _check_entries(entries, model_type)
    parameters, nested = _parameters(entries, model_type, layer_type)
    if parameters is None or not _rotates(entries, model_type, layer_type):
        return None
    rope_type = _rope_type(parameters, model_type)
    head_dim, rotary_dim = _dims(entries, model_type, parameters, layer_type)
    base = parameters.number("rope_theta", above=0)
    if base is None:
        names, default = ("rope_theta", "rotary_emb_base"), BASE.get(model_type)
        base = entries.number(*names, default=default, above=0)
    if base is None:
        base = entries.number("default_theta", default=10000.0, above=0)
    longest = entries.integer("max_position_embeddings", "n_positions")

    if rope_type == "axial":
        scaling = {
            "axes": 3 if model_type.startswith("minimax_m3_vl") else 2,
            "alternating": model_type == "pixtral",
        }
    else:
        known = known_keys(rope_type, "from_config")
        given = parameters.config.items()
        scaling = {k: v for k, v in given if k in known and v is not None}
        _fill_in(scaling, rope_type, entries, longest, nested)
    interleaved = entries.flag("rope_interleave", default=model_type in INTERLEAVED)
    scaling = {"rope_type": rope_type, **scaling}
    other = OTHER_ROTATIONS.get(model_type)
    return Resolved(head_dim, rotary_dim, base, scaling, longest, interleaved, other)


def _check_entries(entries: Entries, model_type: str) -> None:
    """Raises for entries that ask for frequencies that are not computed here."""
    if model_type == "falcon" and entries.flag("alibi", default=False):
        raise ValueError(
            "frequencies.from_config: expected a config that rotates, got 'falcon' with alibi"
        )
    ratio = entries.number("rope_ratio", default=1)
    if ratio != 1:
        refuse("from_config", "rope_ratio", "1", ratio)


def _rope_type(parameters: Entries, model_type: str) -> str:
    rope_type = rope_type_of(parameters.config)
    if rope_type == "yarn" and model_type in ("phi3", "phi4_multimodal"):
        return "longrope"  # its older name in these models
    if rope_type != "dynamic" or not parameters.number("alpha"):
        return rope_type
    own = model_type.startswith("hunyuan") or parameters.number("factor") is None
    return "ntk_alpha" if own else rope_type


def _rotates(entries: Entries, model_type: str, layer_type: str | None) -> bool:
    """Whether layers of this type rotate, by the entries besides rope_parameters."""
    if layer_type is None:
        return True
    if layer_type != "sliding_attention":
        if model_type in ONLY_SLIDING:
            return False
        given = not entries.lacks("sliding_window")
        if model_type in ONLY_SLIDING_IF_ANY and not (
            given and entries.first("sliding_window")[1] is None
        ):
            return False
    of_layers = entries.per_layer(  # 0: no rotation
        "no_rope_layers", "layer_rope_theta", kind=(int, float), in_words="a number"
    )
    layer_types = _layer_types(entries)
    of_type = [
        value for value, kind in zip(of_layers, layer_types, strict=False) if kind == layer_type
    ]
    return not of_type or any(of_type)


def _layer_types(entries: Entries, *other_names: str) -> Sequence[str]:
    return entries.per_layer(*other_names, "layer_types", kind=str, in_words="a string")


def _fill_in(
    scaling: dict[str, Any], rope_type: str, entries: Entries, longest: int | None, nested: bool
) -> None:
    """Sets the parameters that transformers takes from other entries of the config."""
    original = "original_max_position_embeddings"
    if rope_type == "dynamic":
        scaling.pop(original, None)  # transformers always takes max_position_embeddings
    if rope_type in NEEDS_ORIGINAL_LENGTH:
        top = None if nested else entries.integer(original)
        if top is not None:
            scaling[original] = top
        elif longest is not None:
            scaling.setdefault(original, longest)
    if rope_type == "yarn":
        for name in ("beta_fast", "beta_slow"):
            if not Entries(scaling).number(name):  # 0 stands for the default
                scaling.pop(name, None)
        if nested:
            scaling.pop("truncate", None)  # transformers reads it only at the top level


def _parameters(
    entries: Entries, model_type: str, layer_type: str | None
) -> tuple[Entries | None, bool]:
    """Parameters of this layer type, None for no rotation; and whether they are nested by type."""
    new, old = entries.mapping("rope_parameters"), entries.mapping("rope_scaling")
    # in a config object rope_scaling may be another name of rope_parameters, with resolved entries
    parameters = (old or new) if entries.is_dict else (new or old)
    if not parameters and entries.is_dict and model_type in OWN_PARAMETERS:
        raise ValueError(
            f"frequencies.from_config: expected a config of {model_type!r} to have rope_parameters "
            "or rope_scaling, got neither: those of its class are in its config objects alone"
        )
    labels = {*_layer_types(entries, "_rope_type_labels")}
    keys = [key for key in parameters if key in labels]
    if not keys and any(isinstance(value, Mapping) for value in parameters.values()):
        keys = list(parameters)
    if keys:
        _check_layer_type(layer_type, keys)
        chosen = parameters[layer_type]
        name = f"rope_parameters of {shown(layer_type)}"
        if not isinstance(chosen, Mapping | None):
            refuse("from_config", name, "a dict or None", chosen)
        if chosen is not None and any(isinstance(value, Mapping) for value in chosen.values()):
            refuse("from_config", name, "a dict without others in it", chosen)
        return (None if chosen is None else Entries(chosen)), True
    if model_type in TWO_BASES and not new:
        kinds = TWO_BASES[model_type]
        _check_layer_type(layer_type, kinds)
        key, base, scaled = kinds[layer_type]
        base = entries.number(key, default=base, above=0)
        return Entries({"rope_theta": base, **(parameters if scaled else {})}), True
    layer_types = _layer_types(entries)
    if layer_type is not None and layer_types:
        _check_layer_type(layer_type, sorted({*layer_types}))
    return Entries(parameters), False


def _check_layer_type(layer_type: str | None, kinds: Collection[str]) -> None:
    if layer_type not in kinds:
        some = ", ".join(shown(kind) for kind in islice(kinds, 9))
        refuse("from_config", "layer_type", f"one of {some}", layer_type)


def _dims(
    entries: Entries, model_type: str, parameters: Entries, layer_type: str | None
) -> tuple[int, int]:
    """head_dim and rotary_dim."""
    head_dim = _head_dim_of_layer_type(entries, layer_type) or entries.integer(
        "head_dim", "attention_head_dim", "kv_channels", most=MOST_CHANNELS
    )
    rotated = entries.integer("qk_rope_head_dim", least=0, most=MOST_CHANNELS)
    rotary_dim = entries.integer("rotary_dim", most=MOST_CHANNELS)
    is_proportional = rope_type_of(parameters.config) == "proportional"
    bounds = {"least" if is_proportional else "above": 0, "most": 1}
    part = parameters.number("partial_rotary_factor", **bounds)
    if part is None:
        part = entries.number("partial_rotary_factor", "rotary_pct", **bounds)
    if part is None and rotary_dim is None:
        part = PARTIAL.get(model_type)
    if rotated and entries.is_dict and (head_dim is None or part is None):
        head_dim = rotated  # latent attention: the rotated part is a head of its own
        if model_type == "mistral4" and part is not None:  # part is of the whole head
            head_dim += entries.integer("qk_nope_head_dim", default=64, least=0, most=MOST_CHANNELS)
    if head_dim is None and entries.lacks("head_dim"):
        if layer_type == "full_attention":
            head_dim = FULL_HEAD_DIM.get(model_type)
        head_dim = head_dim or HEAD_DIM.get(model_type)
    if head_dim is None:
        # embed_dim first: if both are there, hidden_size is that of the language model
        hidden = entries.integer("embed_dim", "hidden_size", "n_embd", "d_model")
        heads = entries.integer("num_attention_heads", "n_head", "n_heads", "num_heads")
        if heads is None:
            heads = entries.integer("encoder_num_attention_heads")  # moonshine
        if hidden is None or heads is None:
            raise ValueError(
                "frequencies.from_config: expected config to have head_dim, or hidden_size and "
                f"num_attention_heads, got {head_dim!r}, {hidden!r} and {heads!r}"
            )
        # Zamba2's attention reads its input concatenated with that of the model
        head_dim = (2 * hidden if model_type == "zamba2" else hidden) // heads
    if is_proportional:
        return head_dim, head_dim
    if part is None:
        return head_dim, head_dim if rotary_dim is None else rotary_dim
    return head_dim, int(head_dim * part)


def _head_dim_of_layer_type(entries: Entries, layer_type: str | None) -> int | None:
    """head_dim if layer types differ in it, as in Gemma 4."""
    if layer_type is None:
        return None
    if not entries.is_dict:
        try:
            of_type = entries.first("per_layer_config")[1][layer_type]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
        return Entries(of_type).integer("head_dim", most=MOST_CHANNELS)
    overrides, layer_types = entries.mapping("per_layer_config"), _layer_types(entries)
    if overrides and layer_type in layer_types:
        by_layer = {_layer(number): override for number, override in overrides.items()}
        override = by_layer.get(layer_types.index(layer_type), {})
        if not isinstance(override, Mapping):
            refuse("from_config", "per_layer_config", "a dict of dicts", overrides)
        return Entries(override).integer("head_dim", most=MOST_CHANNELS)
    if layer_type == "full_attention":
        return entries.integer("global_head_dim", most=MOST_CHANNELS)
    return None


def _check_is_loaded(config: Any) -> None:
    """Raises for what a config is loaded from: a name, a path, a class."""
    if isinstance(config, type):
        loaded = f"{config.__name__}() or its from_pretrained"
    elif isinstance(config, (str, os.PathLike)):
        name = os.fspath(config)
        loaded = f"transformers.AutoConfig.from_pretrained({shown(name)})"
        if str(name).endswith(".json"):
            loaded = f"json.load(open({shown(name)}))"
    else:
        return
    raise ValueError(
        "frequencies.from_config: expected config to be a config object or a dict, "
        f"got {describe(config)}: {loaded} makes one"
    )


def _layer(number: Any) -> int:
    """A layer's number from its key in a config.json: "05" is 5."""
    text = number if isinstance(number, str) else shown(number)
    if not text.isdecimal() or len(text) > 9:
        refuse("from_config", "the keys of per_layer_config", "numbers of layers", number)
    return int(text)


def _entries_of_text(config: Any) -> Entries:
    if isinstance(config, Mapping):
        inner = Entries(config).mapping("text_config")
        return Entries(inner if "hidden_size" in inner else config)
    get = getattr(config, "get_text_config", None)
    return Entries(get() if callable(get) else config)
