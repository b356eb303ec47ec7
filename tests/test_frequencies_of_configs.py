"""Frequencies: the bits of transformers for published models and random parameters; configs."""

import copy
import importlib
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published_configs import (
    GEMMA3,
    GEMMA4,
    HUNYUAN_ALPHA,
    LLAMA31,
    PHI3_LONG,
    PHI3_SHORT,
    PUBLISHED,
    config_json,
)
from support import assert_same_bits

from rope_ext import RotaryEmbedding, frequencies
from rope_ext.frequencies.config import resolve
from rope_ext.frequencies.families import HEAD_DIM, OTHER_FORMS, OWN_PARAMETERS, TWO_BASES
from rope_ext.integrations.transformers import families

transformers = pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.gemma4.modeling_gemma4 import (  # noqa: E402
    Gemma4TextRotaryEmbedding,
    Gemma4VisionRotaryEmbedding,
)
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding  # noqa: E402
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import (  # noqa: E402
    HunYuanDenseV1RotaryEmbedding,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding  # noqa: E402
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding  # noqa: E402

SEED_LENGTHS = (1, 100, 4096, 4097, 131_072)

ROTARY_CLASSES = {
    "gpt_neox": GPTNeoXRotaryEmbedding,
    "gemma4_text": Gemma4TextRotaryEmbedding,
    "glm": Phi3RotaryEmbedding,
    "hunyuan_v1_dense": HunYuanDenseV1RotaryEmbedding,
    "phi3": Phi3RotaryEmbedding,
}


def config_object(json):
    json = copy.deepcopy(json)  # the classes write into it
    return transformers.AutoConfig.for_model(json.pop("model_type"), **json)


def of_transformers(config, layer_type, length=None):
    """inv_freq and attention factor of the family's rotary module."""
    if config.model_type == "gemma4_text":
        config = config.per_layer_config[layer_type]
    parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    rotary = ROTARY_CLASSES.get(config.model_type, LlamaRotaryEmbedding)
    rope_type = parameters["rope_type"]
    options = {} if layer_type is None else {"layer_type": layer_type}
    if rope_type == "dynamic" and "alpha" in parameters:
        return rotary.compute_ntk_alpha_rope_parameters(config)
    if rope_type == "default" and layer_type:
        return Gemma4TextRotaryEmbedding.compute_default_rope_parameters(config, **options)
    if rope_type == "default":
        return rotary.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=length, **options)


def assert_equal(got, expected):
    assert_same_bits(got[0], expected[0])
    assert got[0].dtype == torch.float32
    assert type(got[1]) is float
    assert got[1] == expected[1]


# ---- against transformers


@pytest.mark.parametrize("form", ["config.json", "object", "saved again"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_bits_of_transformers(name, form):
    json, layer_type = PUBLISHED[name]
    config = config_object(json)
    given = {"config.json": json, "object": config, "saved again": config.to_dict()}[form]
    before = copy.deepcopy(given)
    for length in (None, *SEED_LENGTHS):
        expected = of_transformers(config_object(json), layer_type, length)
        assert_equal(frequencies.from_config(given, layer_type, length=length), expected)
    assert form == "object" or given == before


def test_attention_factors_are_those_that_the_papers_give():
    """YaRN: 0.1 ln 4 + 1. Phi-3: sqrt(1 + ln 32 / ln 4096). DeepSeek-V3: equal mscale cancel."""
    for name, expected in (
        ("Qwen2.5-7B with YaRN", 0.1 * math.log(4) + 1),
        ("Phi-3-mini-128k", math.sqrt(1 + 5 / 12)),
        ("DeepSeek-V3: a part of the head of its own", 1.0),
        ("gpt-oss-20b: not truncated", 0.1 * math.log(32) + 1),
    ):
        _, attention_scaling = frequencies.from_config(*PUBLISHED[name])
        assert attention_scaling == pytest.approx(expected, rel=1e-15)


def numbers(least, most):
    return st.floats(least, most, allow_nan=False, width=32)


EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
FACTORS = numbers(1, 128) | st.integers(1, 128)
BASES = numbers(100, 1e8) | st.sampled_from([10000, 10000.0, 500000.0, 1000000])
HEADS = st.integers(2, 64).map(lambda pairs: 2 * pairs)
LENGTHS = st.integers(16, 1_000_000)


def llama(head_dim, base, longest, **parameters):
    return transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=longest,
        rope_parameters={"rope_theta": base, **parameters},
    )


def compare(head_dim, base, longest, parameters, length=None):
    """Compares function, dict and config with transformers."""
    config = llama(head_dim, base, longest, **copy.deepcopy(parameters))
    rope_type = parameters["rope_type"]
    expected = ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=length)
    options = {"max_position_embeddings": longest, "length": length, "base": base}
    assert_equal(frequencies.from_scaling(head_dim, parameters, **options), expected)
    assert_equal(frequencies.from_config(config, length=length), expected)


@EXAMPLES
@given(HEADS, BASES, LENGTHS, FACTORS)
def test_linear_has_the_bits_of_transformers(head_dim, base, longest, factor):
    compare(head_dim, base, longest, {"rope_type": "linear", "factor": factor})


@EXAMPLES
@given(HEADS, BASES, LENGTHS, FACTORS, st.none() | LENGTHS)
def test_dynamic_has_the_bits_of_transformers(head_dim, base, longest, factor, length):
    parameters = {"rope_type": "dynamic", "factor": factor}
    compare(head_dim, base, longest, parameters, length)
    if length is not None:  # transformers' modules give a tensor
        length = torch.tensor(length)
        expected = ROPE_INIT_FUNCTIONS["dynamic"](
            llama(head_dim, base, longest, **parameters), seq_len=length
        )
        options = {"original_max_position_embeddings": longest, "factor": factor, "base": base}
        assert_equal(frequencies.dynamic_ntk(head_dim, length=length, **options), expected)
        several = frequencies.dynamic_ntk(head_dim, length=length.expand(2, 3), **options)[0]
        assert several.shape == (2, 3, head_dim // 2)
        torch.testing.assert_close(several[1, 2], expected[0], rtol=2.0**-22, atol=0)


@EXAMPLES
@given(
    st.tuples(HEADS, BASES, LENGTHS, LENGTHS, FACTORS),
    st.tuples(numbers(1, 8), numbers(1, 64), st.booleans()),
    st.none() | numbers(0.5, 2),
    st.none() | numbers(0, 2),
    st.none() | numbers(0, 2),
)
def test_yarn_has_the_bits_of_transformers(common, ramp, attention_factor, mscale, mscale_all_dim):
    head_dim, base, longest, original, factor = common
    slow, ratio, truncate = ramp
    parameters = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_slow": slow,
        "beta_fast": slow * ratio,
        "truncate": truncate,
        "attention_factor": attention_factor,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }
    compare(head_dim, base, longest, parameters)


@EXAMPLES
@given(
    st.tuples(HEADS, BASES, LENGTHS, LENGTHS),
    st.none() | FACTORS,
    st.none() | numbers(0.5, 2),
    st.none() | LENGTHS,
    st.randoms(use_true_random=False),
)
def test_longrope_has_the_bits_of_transformers(common, factor, attention_factor, length, random):
    head_dim, base, longest, original = common
    parameters = {
        "rope_type": "longrope",
        "short_factor": [random.uniform(0.5, 4) for _ in range(head_dim // 2)],
        "long_factor": [random.uniform(0.5, 64) for _ in range(head_dim // 2)],
        "original_max_position_embeddings": original,
        "factor": factor,
        "attention_factor": attention_factor,
    }
    compare(head_dim, base, longest, parameters, length)


@EXAMPLES
@given(st.tuples(HEADS, BASES, LENGTHS, LENGTHS, FACTORS), numbers(0.25, 8), numbers(1.125, 16))
def test_llama3_has_the_bits_of_transformers(common, low, ratio):
    head_dim, base, longest, original, factor = common
    parameters = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low * ratio,
        "original_max_position_embeddings": original,
    }
    compare(head_dim, base, longest, parameters)


@EXAMPLES
@given(HEADS, BASES, st.none() | FACTORS, st.none() | numbers(0, 1))
def test_proportional_has_the_bits_of_transformers(head_dim, base, factor, part):
    parameters = {"rope_type": "proportional", "factor": factor, "partial_rotary_factor": part}
    parameters = {key: value for key, value in parameters.items() if value is not None}
    compare(head_dim, base, 4096, parameters)


@EXAMPLES
@given(st.sampled_from([32, 64, 80, 96, 128, 256]), BASES, st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_partial_has_the_bits_of_transformers(head_dim, base, part):
    config = transformers.GPTNeoXConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        rope_parameters={"rope_theta": base, "partial_rotary_factor": part},
    )
    expected = GPTNeoXRotaryEmbedding.compute_default_rope_parameters(config)
    assert_equal(frequencies.partial(head_dim, rotary_pct=part, base=base), expected)
    assert_equal(frequencies.from_config(config), expected)


@EXAMPLES
@given(HEADS, BASES, numbers(1, 10_000) | st.integers(1, 10_000))
def test_ntk_alpha_has_the_bits_of_transformers(head_dim, base, alpha):
    config = transformers.HunYuanDenseV1Config(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        rope_parameters={**HUNYUAN_ALPHA, "rope_theta": base, "alpha": alpha},
    )
    expected = HunYuanDenseV1RotaryEmbedding.compute_ntk_alpha_rope_parameters(config)
    assert_equal(frequencies.ntk_alpha(head_dim, alpha=alpha, base=base), expected)
    assert_equal(frequencies.from_config(config), expected)


@EXAMPLES
@given(HEADS.map(lambda channels: 2 * channels), BASES)
def test_axial_has_the_bits_of_transformers(head_dim, base):
    rope_parameters = {"rope_type": "axial", "rope_theta": base}
    config = transformers.AutoConfig.for_model(
        "gemma4_vision", head_dim=head_dim, rope_parameters=rope_parameters
    )
    expected = Gemma4VisionRotaryEmbedding.compute_axial_rope_parameters(config)
    assert_equal(frequencies.axial(head_dim, base=base), expected)
    assert_equal(frequencies.from_config(config), expected)


def test_vision_towers_have_the_bits_of_transformers():
    config = transformers.AutoConfig.for_model("gemma4_vision")
    expected = Gemma4VisionRotaryEmbedding.compute_axial_rope_parameters(config)
    assert_equal(frequencies.axial(config.head_dim, base=100.0), expected)
    assert_equal(frequencies.from_config(config), expected)
    config = transformers.PixtralVisionConfig(rope_parameters={"rope_theta": 10000.0})
    expected = PixtralVisionRotaryEmbedding.compute_axial_rope_parameters(config)
    inv_freq, _ = frequencies.axial(config.head_dim, alternating=True)
    assert_same_bits(inv_freq.flatten(), expected[0])
    assert_equal(frequencies.from_config(config), expected)


# ---- configs


def test_layers_of_a_type_without_parameters_do_not_rotate():
    config = copy.deepcopy(GEMMA4)
    config["rope_parameters"]["full_attention"] = None
    assert frequencies.from_config(config, "full_attention") is None
    assert frequencies.from_config(config, "sliding_attention") is not None
    assert frequencies.from_config(config_object(config), "full_attention") is None


def test_text_config_of_a_multimodal_config_is_the_one_that_is_read():
    outer = {"model_type": "gemma3", "text_config": GEMMA3, "vision_config": {"hidden_size": 7}}
    for layer_type in ("full_attention", "sliding_attention"):
        expected = frequencies.from_config(GEMMA3, layer_type)
        assert_equal(frequencies.from_config(outer, layer_type), expected)


def test_rotary_dim_of_a_config_counts():
    json = {"model_type": "gptj", "n_embd": 4096, "n_head": 16, "rotary_dim": 64}
    assert_equal(frequencies.from_config(json), frequencies.default(256, rotary_dim=64))


def test_su_is_an_older_name_of_longrope():
    """In the configs of Phi-3's publication."""
    json, _ = PUBLISHED["Phi-3-mini-128k"]
    older = {**json, "rope_scaling": {**json["rope_scaling"], "type": "su"}}
    for length in (None, 4097):
        expected = frequencies.from_config(json, length=length)
        assert_equal(frequencies.from_config(older, length=length), expected)


def test_any_object_with_the_entries_is_a_config(monkeypatch):
    """Without transformers: the frequencies import none of it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)

    class Config:
        head_dim = 64
        rope_theta = 5e5
        max_position_embeddings = 131072
        rope_scaling = LLAMA31

    options = {key: value for key, value in LLAMA31.items() if key != "rope_type"}
    assert_equal(frequencies.from_config(Config()), frequencies.llama3(64, base=5e5, **options))


def test_phimoe_has_a_factor_of_attention_for_each_regime():
    json = config_json(
        "phimoe",
        4096,
        32,
        131072,
        head_dim=96,
        original_max_position_embeddings=4096,
        rope_scaling={
            "short_factor": PHI3_SHORT,
            "long_factor": PHI3_LONG,
            "short_mscale": 1.243163121016122,
            "long_mscale": 1.5,
            "type": "longrope",
        },
    )
    for length, factors, attention_scaling in (
        (4096, PHI3_SHORT, 1.243163121016122),
        (4097, PHI3_LONG, 1.5),
    ):
        got = frequencies.from_config(json, length=length)
        plain, _ = frequencies.default(96, base=1e6)
        torch.testing.assert_close(got[0], plain / torch.tensor(factors), rtol=2.0**-22, atol=0)
        assert got[1] == attention_scaling


# ---- entries that a config.json omits


@pytest.mark.parametrize("model_type", [name for name in HEAD_DIM if name != "kimi_k2"])
def test_heads_that_a_config_json_leaves_unsaid_are_those_of_the_config_class(model_type):
    config = transformers.AutoConfig.for_model(model_type)
    json = {"model_type": model_type, "hidden_size": 960, "num_attention_heads": 8}
    if model_type in OWN_PARAMETERS:
        json["rope_parameters"] = config.rope_parameters
    expected = []
    for layer_type in getattr(config, "rope_parameters", None) or ():
        if layer_type not in (getattr(config, "layer_types", None) or ()):
            layer_type = None
        try:
            expected.append((layer_type, resolve(config, layer_type)))
        except ValueError:  # it needs a layer type, which other tests cover
            continue
    assert expected
    for layer_type, of_class in expected:
        got = resolve(json, layer_type) if of_class is not None else None
        if got is not None:
            if not hasattr(config, "qk_rope_head_dim"):  # latent attention: the part that rotates
                assert got.head_dim == of_class.head_dim
            assert got.rotary_dim == of_class.rotary_dim


def test_config_json_without_the_parameters_of_its_class_is_refused():
    own = set()
    for model_type in transformers.CONFIG_MAPPING:
        try:
            config = transformers.AutoConfig.for_model(model_type)
        except Exception:  # some have no defaults
            continue
        if getattr(config, "text_config", None) is not None:
            continue
        parameters = getattr(config, "rope_parameters", None) or {}
        nested = any(isinstance(value, dict) for value in parameters.values())
        if nested or parameters.get("rope_type", "default") != "default":
            own.add(config.model_type)
    assert own - set(TWO_BASES) - set(OTHER_FORMS) == OWN_PARAMETERS
    for model_type in OWN_PARAMETERS:
        with pytest.raises(ValueError, match=f"a config of '{model_type}' to have rope_parameters"):
            resolve({"model_type": model_type, "head_dim": 64}, "full_attention")


def test_partial_rotary_factor_of_mistral4_is_of_the_whole_head():
    config = transformers.AutoConfig.for_model("mistral4")
    json = {key: value for key, value in config.to_dict().items() if key != "head_dim"}
    assert resolve(json).rotary_dim == resolve(config).rotary_dim == config.qk_rope_head_dim


def test_zamba2_has_heads_of_twice_the_width():
    config = transformers.AutoConfig.for_model("zamba2", hidden_size=960, num_attention_heads=8)
    json = {"model_type": "zamba2", "hidden_size": 960, "num_attention_heads": 8}
    assert resolve(json).head_dim == resolve(config, "hybrid").head_dim == 240


WITHOUT_CONFIG = (
    "esmfold2 (EsmFold2AtomDecoder)",
    "mimi (MimiTransformerModel)",
    "neucodec (NeuCodecDecoder)",
    "xcodec2 (Xcodec2Decoder)",
)


def of_record():
    """Config class and conventions of the recorded models whose tokens have one position each."""
    spatial = ("vision", "2D", "after a prefix", "no heads", "from positions")
    for name, family in families.load()["families"].items():
        conventions = [
            convention
            for convention in family.get("convention", ())
            if not any(word in convention for word in spatial)
        ]
        if conventions and name not in WITHOUT_CONFIG:
            module = name.split(" ")[0]
            yield pytest.param(module, family["model"], conventions, id=name)


# Their record also has towers with other conventions: the convention of the text model.
OF_TEXT = {"mistral_large4": "interleaved in, halves out", "musicflamingo": "half-split"}


@pytest.mark.parametrize(("family", "model", "conventions"), list(of_record()))
def test_interleaved_agrees_with_the_record_of_the_models(family, model, conventions):
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(modeling, model).config_class()
    text = config.get_text_config()
    if family in OF_TEXT:
        conventions = [OF_TEXT[family]]
    json = {"model_type": text.model_type, "head_dim": 64, "rope_parameters": {"rope_theta": 1e4}}
    halves = [convention.startswith("half-split") for convention in conventions]
    one = all(halves) or not any(halves) or hasattr(text, "rope_interleave")
    try:
        resolved = resolve(json)
    except ValueError as error:
        assert "expected a model_type whose frequencies follow" in str(error)  # noqa: PT017
        return
    if not one or conventions[0].startswith("last channels"):
        with pytest.raises(ValueError, match="expected a model_type with one rotation"):
            RotaryEmbedding.from_config(json)
        return
    assert resolved.interleaved == (not all(halves))


@pytest.mark.parametrize("model_type", ["afmoe", "cohere2", "exaone4", "exaone_moe", "kolibri1"])
@pytest.mark.parametrize("form", ["dict", "object"])
def test_only_sliding_layers_of_some_models_rotate(model_type, form):
    options = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    if form == "object":
        config = transformers.AutoConfig.for_model(model_type, sliding_window=64, **options)
    else:
        config = {"model_type": model_type, "head_dim": 64, "sliding_window": 64, **options}
    assert frequencies.from_config(config, "full_attention") is None
    assert frequencies.from_config(config, "sliding_attention") is not None


@pytest.mark.parametrize("model_type", ["exaone4", "exaone_moe"])
def test_without_a_sliding_window_all_layers_rotate(model_type):
    config = {"model_type": model_type, "head_dim": 64, "sliding_window": None}
    assert frequencies.from_config(config, "full_attention") is not None


def test_layers_that_no_rope_layers_or_layer_rope_theta_switch_off_do_not_rotate():
    kinds = ["chunked_attention", "full_attention"]
    for name, values in (("no_rope_layers", [1, 0]), ("layer_rope_theta", [5e5, 0])):
        config = {"head_dim": 64, "layer_types": kinds, name: values}
        assert frequencies.from_config(config, "full_attention") is None
        assert frequencies.from_config(config, "chunked_attention") is not None


def test_scaling_without_a_type_is_the_default_as_in_transformers():
    json = config_json("llama", 4096, 32, 4096, rope_scaling={"factor": 4.0})
    expected = of_transformers(config_object(json), None)
    assert_equal(frequencies.from_config(json), expected)
    assert_equal(frequencies.from_config(config_object(json)), expected)


def test_yarn_for_a_context_shorter_than_the_original_has_the_bits_of_transformers():
    yarn = {"type": "yarn", "factor": None, "original_max_position_embeddings": 8192}
    json = config_json("llama", 4096, 32, 4096, rope_scaling=yarn)
    expected = of_transformers(config_object(json), None)
    assert_equal(frequencies.from_config(json), expected)


# ---- refusals

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("config", "layer_type", "message"),
    [
        ({"rope_scaling": {"type": "yarnn"}, "head_dim": 64}, None, "rope_type to be one of"),
        ({"rope_scaling": {"type": ["yarn"]}, "head_dim": 64}, None, "rope_type to be one of"),
        (
            {"head_dim": 64, "rope_parameters": {"full_attention": {}, "sliding_attention": 3}},
            "sliding_attention",
            "rope_parameters of 'sliding_attention' to be a dict or None, got 3",
        ),
        ({"hidden_size": 64}, None, "config to have head_dim, or hidden_size and num_attention"),
        (GEMMA4, None, "layer_type to be one of 'sliding_attention', 'full_attention', got"),
        (GEMMA4, "linear_attention", "layer_type to be one of .* got 'linear_attention'"),
        (GEMMA3, None, "layer_type to be one of 'full_attention', 'sliding_attention', got"),
        ({"head_dim": 64, "partial_rotary_factor": NAN}, None, "partial_rotary_factor"),
        ({"head_dim": 64, "rope_theta": -1}, None, "rope_theta to be above 0, got -1"),
        ({"model_type": "dinov3_vit", "head_dim": 64}, None, "got 'dinov3_vit', which turns by"),
        ({"model_type": "chatglm", "head_dim": 64}, None, "got 'chatglm', which has rope_ratio"),
        ({"model_type": "falcon", "head_dim": 64, "alibi": True}, None, "'falcon' with alibi"),
        ({"head_dim": 64, "rope_ratio": 500}, None, "rope_ratio to be 1, got 500"),
        ({"head_dim": 64, "rope_scaling": "yarn"}, None, "rope_scaling to be a dict, got 'yarn'"),
        ({"head_dim": 64, "rope_theta": 10**400}, None, "rope_theta .* an integer of 1329 bits"),
        ({"head_dim": 64, "rope_theta": INF}, None, "rope_theta to be a finite .* got inf"),
        ({"head_dim": 64, "rope_theta": True}, None, "rope_theta to be a finite .* got True"),
        ({"model_type": ["llama"]}, None, r"model_type to be a string, got \['llama'\]"),
        ({"head_dim": "128"}, None, "head_dim to be an integer .* got '128'"),
        ({"head_dim": 2**28}, None, "head_dim to be .* at most 65536, got 268435456"),
        ({"head_dim": False}, None, "head_dim to be an integer .* got False"),
        ({"hidden_size": 2**70, "num_attention_heads": 1}, None, "hidden_size to be an integer"),
        ({"hidden_size": 64, "num_attention_heads": [4]}, None, r"_attention_heads .* got \[4\]"),
        ({"head_dim": 64, "rotary_dim": "all"}, None, "rotary_dim to be an integer .* got 'all'"),
        ({"head_dim": 64, "rope_interleave": 1}, None, "interleave to be true or false, got 1"),
        ({"head_dim": 64, "text_config": "llama"}, None, "text_config to be a dict, got 'llama'"),
        ({"head_dim": 64, "rope_scaling": {"type": 0}}, None, "rope_type to be one of .* got 0"),
        ({"head_dim": 64, "layer_types": 1}, "x", "layer_types to be a list of .* got 1"),
        ({"head_dim": 64, "layer_types": [1]}, "x", r"layer_types\[0\] to be a string, got 1"),
        (
            {"head_dim": 64, "layer_types": ["x"], "no_rope_layers": ["0"]},
            "x",
            r"no_rope_layers\[0\] to be a number, got '0'",
        ),
        (
            {"head_dim": 64, "layer_types": ["x"] * 100_000},
            "x",
            "layer_types to be a list of at most 65536, each a string, got .'x', 'x'",
        ),
        (
            {"head_dim": 64, "layer_types": ["x"], "per_layer_config": [1]},
            "x",
            r"per_layer_config to be a dict, got \[1\]",
        ),
        (
            {"head_dim": 64, "layer_types": ["x"], "per_layer_config": {"first": {}}},
            "x",
            "the keys of per_layer_config to be numbers of layers, got 'first'",
        ),
        (
            {"head_dim": 64, "layer_types": ["x"], "per_layer_config": {"0": {"head_dim": "8"}}},
            "x",
            "head_dim to be an integer .* got '8'",
        ),
        (
            {"head_dim": 64, "rope_parameters": {"x": {"x": {"rope_theta": 1e4}}}},
            "x",
            "rope_parameters of 'x' to be a dict without others in it",
        ),
        ({"head_dim": 64}, ["x"], r"layer_type to be a string or None, got \['x'\]"),
        ({"head_dim": 64, "max_position_embeddings": 32.5}, None, "max_position_embed.* got 32.5"),
        ({"head_dim": 64, "partial_rotary_factor": "x"}, None, "partial_rotary_factor to be a fin"),
        (
            {"head_dim": 64, "layer_types": ["full_attention"]},
            "sliding_attention",
            "layer_type to be one of 'full_attention', got 'sliding_attention'",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(config, layer_type, message):
    with pytest.raises(ValueError, match=rf"frequencies\.from_config: expected .*{message}"):
        frequencies.from_config(config, layer_type)
