"""Frequencies: the bits of transformers for published models and random parameters; configs."""

import copy
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_configs import (
    GEMMA3,
    GEMMA4,
    HUNYUAN_ALPHA,
    LLAMA31,
    ORIGINAL,
    PHI3,
    PUBLISHED,
    config_json,
)
from support import assert_same_bits, error_of

from rope_ext import frequencies
from rope_ext.frequencies.config import resolve
from rope_ext.frequencies.families import HEAD_DIM, OTHER_FORMS, OWN_PARAMETERS, TWO_BASES

transformers = pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
from tiny_models import modeling  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

LENGTHS_READ = (None, 1, 4096, 4097, 131_072)
NEOX = modeling("gpt_neox").GPTNeoXRotaryEmbedding
HUNYUAN = modeling("hunyuan_v1_dense").HunYuanDenseV1RotaryEmbedding
PHI = modeling("phi3").Phi3RotaryEmbedding
LLAMA = modeling("llama").LlamaRotaryEmbedding
ROTARY_CLASSES = {"gpt_neox": NEOX, "glm": PHI, "hunyuan_v1_dense": HUNYUAN, "phi3": PHI}


def config_object(json):
    json = copy.deepcopy(json)  # the classes write into it
    return transformers.AutoConfig.for_model(json.pop("model_type"), **json)


def of_transformers(config, layer_type, length=None):
    """inv_freq and attention factor of the family's rotary module."""
    if config.model_type == "gemma4_text":
        config = config.per_layer_config[layer_type]
    parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    rotary = ROTARY_CLASSES.get(config.model_type, LLAMA)
    rope_type = parameters["rope_type"]
    options = {} if layer_type is None else {"layer_type": layer_type}
    if rope_type == "dynamic" and "alpha" in parameters:
        return rotary.compute_ntk_alpha_rope_parameters(config)
    if rope_type == "default" and layer_type:
        rotary = modeling("gemma4").Gemma4TextRotaryEmbedding
        return rotary.compute_default_rope_parameters(config, **options)
    if rope_type == "default":
        return rotary.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=length, **options)


def assert_equal(got, expected):
    assert_same_bits(got[0], expected[0])
    assert got[0].dtype == torch.float32
    assert type(got[1]) is float
    assert got[1] == expected[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_bits_of_transformers(name):
    json, layer_type = PUBLISHED[name]
    config = config_object(json)
    for form in (json, config, config.to_dict()):
        before = copy.deepcopy(form)
        for length in LENGTHS_READ:
            expected = of_transformers(config_object(json), layer_type, length)
            assert_equal(frequencies.from_config(form, layer_type, length=length), expected)
        assert form is config or form == before  # the caller's


def numbers(least, most):
    return st.floats(least, most, allow_nan=False, width=32)


EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # the machine may be busy
)
FACTORS = numbers(1, 128) | st.integers(1, 128)
BASES = numbers(100, 1e8) | st.sampled_from([10000, 10000.0, 500000.0, 1000000])
LENGTHS = st.integers(16, 1_000_000)


def llama(head_dim, base, longest, **parameters):
    parameters = {"rope_theta": base, **parameters}
    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "head_dim": head_dim}
    return transformers.LlamaConfig(
        **sizes, max_position_embeddings=longest, rope_parameters=parameters
    )


def lists(most, pairs):
    return st.lists(numbers(0.5, most), min_size=pairs, max_size=pairs)


OF_ATTENTION = {"attention_factor": st.none() | numbers(0.5, 2)}
MSCALE = st.none() | st.just(0.0) | numbers(0.125, 2)
MSCALES = {"mscale": MSCALE, "mscale_all_dim": MSCALE}
BETAS = {"beta_slow": numbers(1, 8), "beta_fast": numbers(8, 512), "truncate": st.booleans()}
BANDS = {"low_freq_factor": numbers(0.25, 8), "high_freq_factor": numbers(9, 128)}
SIXTEENTHS = st.integers(0, 16).map(lambda sixteenths: sixteenths / 16)
# The parameters of each rope_type besides the factor, for a number of pairs.
PARAMETERS = {
    "linear": lambda pairs: {},
    "dynamic": lambda pairs: {},
    "yarn": lambda pairs: {ORIGINAL: LENGTHS, **BETAS, **OF_ATTENTION, **MSCALES},
    "longrope": lambda pairs: {
        "short_factor": lists(4, pairs),
        "long_factor": lists(64, pairs),
        ORIGINAL: LENGTHS,
        "factor": st.none() | FACTORS,
        **OF_ATTENTION,
    },
    "llama3": lambda pairs: {ORIGINAL: LENGTHS, **BANDS},
    "proportional": lambda pairs: {"partial_rotary_factor": SIXTEENTHS},
}


@pytest.mark.parametrize("rope_type", PARAMETERS)
@EXAMPLES
@given(st.data(), st.integers(2, 64), BASES, LENGTHS, st.none() | LENGTHS)
def test_random_parameters_have_the_bits_of_transformers(
    rope_type, data, pairs, base, longest, length
):
    """Dict and config."""
    drawn = data.draw(st.fixed_dictionaries({"factor": FACTORS, **PARAMETERS[rope_type](pairs)}))
    parameters = {"rope_type": rope_type, **drawn}
    config = llama(2 * pairs, base, longest, **copy.deepcopy(parameters))
    expected = ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=length)
    options = {"max_position_embeddings": longest, "length": length, "base": base}
    assert_equal(frequencies.from_scaling(2 * pairs, parameters, **options), expected)
    assert_equal(frequencies.from_config(config, length=length), expected)


def test_lengths_in_a_tensor_have_the_bits_of_transformers():
    """Its modules give the length of dynamic frequencies as a tensor."""
    options = {"factor": 3.5, "base": 5e5, ORIGINAL: 2048}
    config = llama(64, 5e5, 2048, rope_type="dynamic", factor=3.5)
    for length in (torch.tensor(length) for length in (16, 2048, 2049, 100_000)):
        expected = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=length)
        assert_equal(frequencies.dynamic_ntk(64, length=length, **options), expected)
        several = frequencies.dynamic_ntk(64, length=length.expand(2, 3), **options)[0]
        assert several.shape == (2, 3, 32)
        torch.testing.assert_close(several[1, 2], expected[0], rtol=2.0**-22, atol=0)


SHAPES = [(32, 100.0), (80, 10000), (96, 1e6), (256, 5e5)]  # head_dim, base


def test_methods_of_other_classes_have_the_bits_of_transformers():
    for head_dim, base in SHAPES:
        sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4}
        for part in (0.25, 0.5, 0.75, 1.0):
            parameters = {"rope_theta": base, "partial_rotary_factor": part}
            config = transformers.GPTNeoXConfig(**sizes, rope_parameters=parameters)
            expected = NEOX.compute_default_rope_parameters(config)
            assert_equal(frequencies.partial(head_dim, rotary_pct=part, base=base), expected)
            assert_equal(frequencies.from_config(config), expected)
        sizes["head_dim"] = head_dim
        for alpha in (1, 2.5, 1000, 10_000.0):
            parameters = {**HUNYUAN_ALPHA, "rope_theta": base, "alpha": alpha}
            config = transformers.HunYuanDenseV1Config(**sizes, rope_parameters=parameters)
            expected = HUNYUAN.compute_ntk_alpha_rope_parameters(config)
            assert_equal(frequencies.ntk_alpha(head_dim, alpha=alpha, base=base), expected)
            assert_equal(frequencies.from_config(config), expected)


def test_vision_towers_have_the_bits_of_transformers():
    rotary = modeling("gemma4").Gemma4VisionRotaryEmbedding
    for head_dim, base in SHAPES:
        parameters = {"rope_type": "axial", "rope_theta": base}
        json = {"model_type": "gemma4_vision", "head_dim": head_dim, "rope_parameters": parameters}
        expected = rotary.compute_axial_rope_parameters(config_object(json))
        assert_equal(frequencies.axial(head_dim, base=base), expected)
        assert_equal(frequencies.from_config(config_object(json)), expected)
    config = transformers.PixtralVisionConfig(rope_parameters={"rope_theta": 10000.0})
    rotary = modeling("pixtral").PixtralVisionRotaryEmbedding
    expected = rotary.compute_axial_rope_parameters(config)
    inv_freq, _ = frequencies.axial(config.head_dim, alternating=True)
    assert_same_bits(inv_freq.flatten(), expected[0])
    assert_equal(frequencies.from_config(config), expected)


def test_entries_have_other_names_and_places():
    """As in configs of GPT-J, of Phi-3 at first, and of multimodal models."""
    gptj = {"model_type": "gptj", "n_embd": 4096, "n_head": 16, "rotary_dim": 64}
    assert_equal(frequencies.from_config(gptj), frequencies.default(256, rotary_dim=64))
    phi3, _ = PUBLISHED["Phi-3-mini-128k"]
    older = {**phi3, "rope_scaling": {**phi3["rope_scaling"], "type": "su"}}
    multimodal = {
        "model_type": "gemma3",
        "text_config": GEMMA3,
        "vision_config": {"hidden_size": 7},
    }
    for config, other, layer_type in (
        (older, phi3, None),
        (multimodal, GEMMA3, "full_attention"),
        (multimodal, GEMMA3, "sliding_attention"),
    ):
        expected = frequencies.from_config(other, layer_type, length=4097)
        assert_equal(frequencies.from_config(config, layer_type, length=4097), expected)


def test_heads_of_zamba2_and_mistral4_are_those_of_their_config_class():
    """Twice as wide; and the part that rotates, while the factor is of the whole head."""
    sizes = {"hidden_size": 960, "num_attention_heads": 8}
    config = transformers.AutoConfig.for_model("zamba2", **sizes)
    json = {"model_type": "zamba2", **sizes}
    assert resolve(json).head_dim == resolve(config, "hybrid").head_dim == 240
    config = transformers.AutoConfig.for_model("mistral4")
    json = {key: value for key, value in config.to_dict().items() if key != "head_dim"}
    assert resolve(json).rotary_dim == resolve(config).rotary_dim == config.qk_rope_head_dim


def test_any_object_with_the_entries_is_a_config(monkeypatch):
    """Without transformers: the frequencies import none of it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    config = SimpleNamespace(head_dim=64, rope_theta=5e5, rope_scaling=LLAMA31)
    options = {key: value for key, value in LLAMA31.items() if key != "rope_type"}
    assert_equal(frequencies.from_config(config), frequencies.llama3(64, base=5e5, **options))


def test_phimoe_has_a_factor_of_attention_for_each_regime():
    scaling = {**PHI3, "short_mscale": 1.25, "long_mscale": 1.5}
    json = config_json("phimoe", 4096, 32, 131072, head_dim=96, rope_scaling=scaling)
    json[ORIGINAL] = 4096
    plain, _ = frequencies.default(96, base=1e6)
    for length, factors in ((4096, "short"), (4097, "long")):
        inv_freq, mscale = frequencies.from_config(json, length=length)
        expected = plain / torch.tensor(PHI3[f"{factors}_factor"])
        torch.testing.assert_close(inv_freq, expected, rtol=2.0**-22, atol=0)
        assert mscale == scaling[f"{factors}_mscale"]


def test_heads_that_a_config_json_leaves_unsaid_are_those_of_the_config_class():
    for model_type in HEAD_DIM.keys() - {"kimi_k2"}:
        config = transformers.AutoConfig.for_model(model_type)
        json = {"model_type": model_type, "hidden_size": 960, "num_attention_heads": 8}
        if model_type in OWN_PARAMETERS:
            json["rope_parameters"] = config.rope_parameters
        compared = 0
        for layer_type in getattr(config, "rope_parameters", None) or ():
            if layer_type not in (getattr(config, "layer_types", None) or ()):
                layer_type = None
            try:
                expected = resolve(config, layer_type)
            except ValueError:  # it needs a layer type, which other tests cover
                continue
            got, compared = resolve(json, layer_type), compared + 1
            if got is not None and expected is not None:
                if not hasattr(config, "qk_rope_head_dim"):  # latent: the part that rotates
                    assert got.head_dim == expected.head_dim, model_type
                assert got.rotary_dim == expected.rotary_dim, model_type
        assert compared, model_type


@pytest.mark.slow
def test_config_json_without_the_parameters_of_its_class_is_refused():
    own = set()
    for model_type in transformers.CONFIG_MAPPING:
        try:
            config = transformers.AutoConfig.for_model(model_type)
        except Exception:  # some have no defaults
            continue
        parameters = getattr(config, "rope_parameters", None) or {}
        nested = any(isinstance(value, dict) for value in parameters.values())
        of_text = getattr(config, "text_config", None) is None
        if of_text and (nested or parameters.get("rope_type", "default") != "default"):
            own.add(config.model_type)
    assert own - set(TWO_BASES) - set(OTHER_FORMS) == OWN_PARAMETERS
    for model_type in OWN_PARAMETERS:
        with pytest.raises(ValueError, match=f"a config of '{model_type}' to have rope_parameters"):
            resolve({"model_type": model_type, "head_dim": 64}, "full_attention")


def test_some_layers_do_not_rotate():
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    configs = []
    for model_type in ("afmoe", "cohere2", "exaone4", "exaone_moe", "kolibri1"):
        json = {"model_type": model_type, "head_dim": 64, "sliding_window": 64, **kinds}
        configs += [json, config_object(json)]
        if model_type.startswith("exaone"):
            json = {"model_type": model_type, "head_dim": 64, "sliding_window": None}
            assert frequencies.from_config(json, "full_attention") is not None, model_type
    configs.append({"head_dim": 64, **kinds, "no_rope_layers": [1, 0]})
    configs.append({"head_dim": 64, **kinds, "layer_rope_theta": [5e5, 0]})
    json = copy.deepcopy(GEMMA4)
    json["rope_parameters"]["full_attention"] = None
    for config in (*configs, json, config_object(json)):
        assert frequencies.from_config(config, "full_attention") is None, config
        assert frequencies.from_config(config, "sliding_attention") is not None, config


HEAD, X = {"head_dim": 64}, {"head_dim": 64, "layer_types": ["x"]}
REFUSED = [
    ({**HEAD, "rope_scaling": {"type": "yarnn"}}, None, "rope_type to be one of"),
    ({**HEAD, "rope_scaling": "yarn"}, None, "rope_scaling to be a dict, got 'yarn'"),
    ({**HEAD, "text_config": "llama"}, None, "text_config to be a dict, got 'llama'"),
    ({"hidden_size": 64}, None, "config to have head_dim, or hidden_size and num_attention"),
    ({"hidden_size": 2**70, "num_attention_heads": 1}, None, "hidden_size to be an integer"),
    ({"head_dim": "128"}, None, "head_dim to be an integer .* got '128'"),
    ({"head_dim": 2**28}, None, "head_dim to be .* at most 65536, got 268435456"),
    ({**HEAD, "rotary_dim": "all"}, None, "rotary_dim to be an integer .* got 'all'"),
    ({**HEAD, "partial_rotary_factor": math.nan}, None, "partial_rotary_factor to be a finite"),
    ({**HEAD, "rope_theta": -1}, None, "rope_theta to be above 0, got -1"),
    ({**HEAD, "rope_ratio": 500}, None, "rope_ratio to be 1, got 500"),
    ({**HEAD, "rope_interleave": 1}, None, "interleave to be true or false, got 1"),
    ({**HEAD, "max_position_embeddings": 32.5}, None, "max_position_embed.* got 32.5"),
    ({**HEAD, "model_type": "dinov3_vit"}, None, "got 'dinov3_vit', which turns by"),
    ({**HEAD, "model_type": "chatglm"}, None, "got 'chatglm', which has rope_ratio"),
    ({**HEAD, "model_type": "falcon", "alibi": True}, None, "'falcon' with alibi"),
    ({"model_type": ["llama"]}, None, r"model_type to be a string, got \['llama'\]"),
    # layer types
    (GEMMA4, None, "layer_type to be one of 'sliding_attention', 'full_attention', got"),
    (X, "y", "layer_type to be one of 'x', got 'y'"),
    (HEAD, ["x"], r"layer_type to be a string or None, got \['x'\]"),
    ({**HEAD, "layer_types": 1}, "x", "layer_types to be a list of .* got 1"),
    ({**HEAD, "layer_types": ["x"] * 100_000}, "x", "at most 65536, each a string, got .'x', 'x'"),
    ({**X, "no_rope_layers": ["0"]}, "x", r"no_rope_layers\[0\] to be a number, got '0'"),
    ({**X, "per_layer_config": [1]}, "x", r"per_layer_config to be a dict, got \[1\]"),
    ({**X, "per_layer_config": {"first": {}}}, "x", "to be numbers of layers, got 'first'"),
    ({**X, "per_layer_config": {"0": {"head_dim": "8"}}}, "x", "head_dim to be an .* got '8'"),
    ({**HEAD, "rope_parameters": {"x": {}, "y": 3}}, "y", "of 'y' to be a dict or None, got 3"),
    ({**HEAD, "rope_parameters": {"x": {"x": {}}}}, "x", "of 'x' to be a dict without others in"),
]


def test_an_invalid_config_raises_and_its_entry_is_named():
    for config, layer_type, message in REFUSED:
        got = error_of(frequencies.from_config, config, layer_type)
        assert re.match(rf"frequencies\.from_config: expected .*{message}", got), message
