"""from_config compared to every rotary module of transformers, each made from its defaults, and to
the recorded conventions of its models.
"""

import inspect
import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
from tiny_models import families, modeling  # noqa: E402

from rope_ext import RotaryEmbedding, frequencies  # noqa: E402
from rope_ext.frequencies.config import resolve  # noqa: E402
from rope_ext.frequencies.families import OTHER_FORMS  # noqa: E402
from rope_ext.integrations.transformers.families import load  # noqa: E402

# Why from_config raises for these defaults: of memory attention, in 2D; half of 42 channels.
REFUSED = {
    "EdgeTamVideoVisionRotaryEmbedding": "config to have head_dim",
    "Glm4MoeRotaryEmbedding": "even, .* got 21",
    "Glm4vMoeTextRotaryEmbedding": "even, .* got 21",
    "Qwen3OmniMoeRotaryEmbedding": "even, .* got 73",
    "Qwen3OmniMoeTalkerRotaryEmbedding": "even, .* got 73",
    "Qwen3OmniMoeThinkerTextRotaryEmbedding": "even, .* got 73",
    "Sam2VideoVisionRotaryEmbedding": "config to have head_dim",
    "Sam3TrackerVideoVisionRotaryEmbedding": "config to have head_dim",
}
OTHERS = {
    "MusicFlamingoRotaryEmbedding",  # it rotates sound, while from_config reads the text's part
    "MiniMaxM3VLRotaryEmbedding",  # ignores rotary_dim, which checkpoints have besides the factor
}
LEAST = 180  # modules, and models with a record, of all of transformers

# Conventions of models whose tokens have more than one position, or no heads.
SPATIAL = ("vision", "2D", "after a prefix", "no heads", "from positions")
WITHOUT_CONFIG = ("esmfold2", "mimi", "neucodec", "xcodec2")
# Their record also has towers with other conventions: the convention of the text model.
OF_TEXT = {"mistral_large4": ["interleaved in, halves out"], "musicflamingo": ["half-split"]}


def rotary_modules(family):
    """The rotary modules of a family that are made from a config, each with its config."""
    for name, owner in vars(modeling(family)).items():
        if not (inspect.isclass(owner) and issubclass(owner, nn.Module) and "Rotary" in name):
            continue
        parameter = inspect.signature(owner).parameters.get("config")
        config_class = getattr(parameter, "annotation", inspect.Parameter.empty)
        if owner.__module__ != modeling(family).__name__ or config_class is inspect.Parameter.empty:
            continue
        config = config_class()
        for given in (config, config.get_text_config()):
            try:
                yield name, owner(given), given
                break
            except (AttributeError, KeyError):  # it takes a part of the config
                continue


def of_module(module):
    """Layer type, inv_freq, attention factor: everything in a rotary module."""
    for name, inv_freq in module.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            prefix = name.removesuffix("inv_freq")
            scaling = getattr(module, f"{prefix}attention_scaling", 1.0)
            yield prefix.removesuffix("_") or None, inv_freq, scaling


@pytest.mark.slow
def test_every_rotary_module_has_the_frequencies_that_from_config_reads_from_its_config():
    compared, refused = 0, set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = [found for family in families() for found in rotary_modules(family)]
    for name, module, config in modules:
        for layer_type, inv_freq, attention_scaling in of_module(module):
            if name in OTHERS:
                continue
            if config.model_type in OTHER_FORMS or name in REFUSED:
                message = REFUSED.get(name, f"'{config.model_type}', which")
                with pytest.raises(ValueError, match=message):
                    frequencies.from_config(config, layer_type)
                refused.add(name)
                continue
            for form in (config, config.to_dict()):
                got = frequencies.from_config(form, layer_type)
                assert torch.equal(got[0], inv_freq), (name, layer_type)
                assert got[1] == attention_scaling, (name, layer_type)
            compared += 1
    assert compared >= LEAST
    assert refused >= REFUSED.keys()


@pytest.mark.slow
def test_pairs_are_those_of_the_record_of_the_models():
    compared = 0
    for name, record in load()["families"].items():
        family = name.split(" ")[0]
        conventions = OF_TEXT.get(family) or [
            convention
            for convention in record.get("convention", ())
            if not any(word in convention for word in SPATIAL)
        ]
        if not conventions or family in WITHOUT_CONFIG:
            continue
        text = getattr(modeling(family), record["model"]).config_class().get_text_config()
        parameters = {"rope_theta": 1e4}
        config = {"model_type": text.model_type, "head_dim": 64, "rope_parameters": parameters}
        if text.model_type in OTHER_FORMS:
            continue
        halves = [convention.startswith("half-split") for convention in conventions]
        one = all(halves) or not any(halves) or hasattr(text, "rope_interleave")
        compared += 1
        if one and not conventions[0].startswith("last channels"):
            assert resolve(config).interleaved == (not all(halves)), name
        else:
            with pytest.raises(ValueError, match="expected a model_type with one rotation"):
                RotaryEmbedding.from_config(config)
    assert compared >= LEAST
