"""Frequencies: the bits of transformers for published models and for random parameters, the
formulas of the papers, and what is refused.
"""

import copy
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_same_bits

import rope_ext
from rope_ext import frequencies

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

# The factors of Phi-3-mini-128k rise like these, from about 1 to 3 and to 64, a number a pair.
PHI3_SHORT = [round(1 + 2 * (i / 47) ** 2, 2) for i in range(48)]
PHI3_LONG = [round(1.07 * (64 / 1.07) ** (i / 47), 2) for i in range(48)]

LLAMA31 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
DEEPSEEK_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
GPT_OSS_YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
HUNYUAN_ALPHA = {
    "alpha": 1000.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "type": "dynamic",
}


def config_json(model_type, hidden_size, num_attention_heads, max_position_embeddings, **others):
    return {
        "model_type": model_type,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_attention_heads,
        "max_position_embeddings": max_position_embeddings,
        "num_hidden_layers": 6,
        **others,
    }


GEMMA3 = config_json(
    "gemma3_text",
    2560,
    8,
    131072,
    head_dim=256,
    rope_theta=1000000.0,
    rope_local_base_freq=10000.0,
    rope_scaling={"factor": 8.0, "rope_type": "linear"},
)
GEMMA4 = config_json(
    "gemma4_text",
    2304,
    8,
    131072,
    head_dim=256,
    global_head_dim=512,
    layer_types=["sliding_attention"] * 5 + ["full_attention"],
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1_000_000.0,
        },
    },
)
NESTED_YARN = config_json(
    "gemma3_text",
    2560,
    8,
    131072,
    head_dim=256,
    layer_types=["sliding_attention"] * 5 + ["full_attention"],
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {**GPT_OSS_YARN, "rope_theta": 1_000_000.0},
    },
)

# name: config.json with what is published that matters here, layer type, class of transformers
PUBLISHED = {
    "Llama-2-7b: no rope_theta": (config_json("llama", 4096, 32, 4096), None),
    "Llama-3.1-8B": (
        config_json("llama", 4096, 32, 131072, rope_theta=500000.0, rope_scaling=LLAMA31),
        None,
    ),
    "Llama-3.2-1B": (
        config_json(
            "llama",
            2048,
            32,
            131072,
            head_dim=64,
            rope_theta=500000.0,
            rope_scaling={**LLAMA31, "factor": 32.0},
        ),
        None,
    ),
    "Mistral-7B-v0.3": (config_json("mistral", 4096, 32, 32768, rope_theta=1000000.0), None),
    "Qwen2.5-7B with YaRN": (
        config_json(
            "qwen2",
            3584,
            28,
            32768,
            rope_theta=1000000.0,
            rope_scaling={
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
        ),
        None,
    ),
    "Phi-3-mini-128k": (
        config_json(
            "phi3",
            3072,
            32,
            131072,
            original_max_position_embeddings=4096,
            rope_theta=10000.0,
            rope_scaling={"long_factor": PHI3_LONG, "short_factor": PHI3_SHORT, "type": "longrope"},
        ),
        None,
    ),
    "DeepSeek-V3: a part of the head of its own": (
        config_json(
            "deepseek_v3",
            7168,
            128,
            163840,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            rope_theta=10000,
            rope_scaling=DEEPSEEK_YARN,
        ),
        None,
    ),
    "Gemma-3-4b, full": (GEMMA3, "full_attention"),
    "Gemma-3-4b, sliding: another base": (GEMMA3, "sliding_attention"),
    "Gemma 4, full: heads of 512": (GEMMA4, "full_attention"),
    "Gemma 4, sliding": (GEMMA4, "sliding_attention"),
    "YaRN by layer type: truncate is not read there": (NESTED_YARN, "full_attention"),
    "GPT-NeoX-20B: a quarter of the head": (
        config_json("gpt_neox", 6144, 64, 2048, rotary_pct=0.25, rotary_emb_base=10000),
        None,
    ),
    "gpt-oss-20b: not truncated": (
        config_json(
            "gpt_oss",
            2880,
            64,
            131072,
            head_dim=64,
            rope_theta=150000,
            rope_scaling=GPT_OSS_YARN,
        ),
        None,
    ),
    "SmolLM2-135M": (config_json("llama", 576, 9, 8192, rope_theta=100000), None),
    "Hunyuan-7B: dynamic with alpha": (
        config_json(
            "hunyuan_v1_dense",
            4096,
            32,
            32768,
            head_dim=128,
            rope_theta=10000.0,
            rope_scaling=HUNYUAN_ALPHA,
        ),
        None,
    ),
    "GLM-4-9B: half a head, unsaid": (
        config_json("glm", 4096, 32, 131072, head_dim=128, rope_theta=10000.0),
        None,
    ),
    "a dynamic Llama": (
        config_json("llama", 4096, 32, 4096, rope_scaling={"type": "dynamic", "factor": 2.0}),
        None,
    ),
}
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
    """inv_freq and attention factor as the family's rotary module has them."""
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
    """YaRN: 0.1 ln 4 + 1. Phi-3: sqrt(1 + ln 32 / ln 4096). DeepSeek-V3: its two mscale cancel."""
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
    """Function, dict and config against transformers."""
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
    """As Phi-3 had it when it was published."""
    json, _ = PUBLISHED["Phi-3-mini-128k"]
    older = {**json, "rope_scaling": {**json["rope_scaling"], "type": "su"}}
    for length in (None, 4097):
        expected = frequencies.from_config(json, length=length)
        assert_equal(frequencies.from_config(older, length=length), expected)


def test_any_object_with_the_entries_is_a_config(monkeypatch):
    """Without transformers: the frequencies import nothing of it."""
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


# ---- formulas of papers, where transformers has none


def test_ntk_slows_the_slowest_pair_alpha_times_and_leaves_the_fastest():
    plain, _ = frequencies.default(128)
    for function in (frequencies.ntk, frequencies.ntk_alpha):
        stretched, attention_scaling = function(128, alpha=8.0)
        ratio = plain.double() / stretched.double()
        # 2^-24 a rounding: of each exponent times ln base, each power and each reciprocal
        torch.testing.assert_close(ratio[-1].item(), 8.0, rtol=64 * 2.0**-24, atol=0)
        assert ratio[0] == 1
        assert (ratio.diff() > 0).all()
        assert attention_scaling == 1.0


def test_dynamic_ntk_at_twice_the_length_is_ntk_with_twice_the_factor_less_one():
    """alpha = f L / O - (f - 1) = 2 * 2 - 1."""
    dynamic = frequencies.dynamic_ntk(
        64, factor=2.0, original_max_position_embeddings=2048, length=4096
    )
    assert_equal(dynamic, frequencies.ntk(64, alpha=3.0))


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    head_dim, base, factor, original = 128, 10000.0, 16.0, 4096
    plain = frequencies.default(head_dim, base=base)[0]
    inv_freq, _ = frequencies.yarn(
        head_dim, base=base, factor=factor, original_max_position_embeddings=original
    )
    turns = original * plain / (2 * math.pi)
    fast = turns > 34  # beta_fast, and the pair that truncate rounds to
    slow = turns < 0.9
    assert fast.any()
    assert slow.any()
    assert_same_bits(inv_freq[fast], plain[fast])
    torch.testing.assert_close(inv_freq[slow], plain[slow] / factor, rtol=2.0**-22, atol=0)
    between = ~fast & ~slow
    assert (inv_freq[between] <= plain[between]).all()
    assert (inv_freq[between] * (1 + 1e-6) >= plain[between] / factor).all()


def test_xpos_tables_rotate_and_decay_with_the_distance():
    """The score of q at m and k at n is that of RoPE times z ** ((m - n) / scale_base), a pair."""
    head_dim = 16
    inv_freq, log_scale = frequencies.xpos(head_dim, scale_base=8.0)
    z = (torch.arange(0, head_dim, 2) / head_dim + 0.4) / 1.4  # arXiv 2212.10554, with gamma = 0.4
    torch.testing.assert_close(log_scale.double(), z.double().log() / 8, rtol=1e-6, atol=0)
    assert_same_bits(inv_freq, frequencies.default(head_dim)[0])
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 9, 1, head_dim, generator=generator, dtype=torch.float64)
    position_ids = torch.arange(9)[None] - 4
    cos, sin = rope_ext.cos_sin(inv_freq.double(), position_ids)
    scale = torch.exp(position_ids.unsqueeze(-1) * log_scale.double())
    q_x = rope_ext.apply_rotary(q, cos * scale, sin * scale)
    k_x = rope_ext.apply_rotary(k, cos / scale, sin / scale)
    q_r, k_r = (rope_ext.apply_rotary(x, cos, sin) for x in (q, k))

    def scores(a, b):  # [S, S, P]
        pairs = a[0, :, 0].unsqueeze(1) * b[0, :, 0]
        return pairs[..., : head_dim // 2] + pairs[..., head_dim // 2 :]

    distance = position_ids[0].unsqueeze(1) - position_ids[0]
    decay = torch.exp(distance.unsqueeze(-1) * log_scale.double())
    torch.testing.assert_close(scores(q_x, k_x), scores(q_r, k_r) * decay, rtol=1e-12, atol=1e-12)
    assert (decay[8, 0] < 1).all()


@pytest.mark.parametrize(("head_dim", "axes", "pairs"), [(64, 2, 16), (64, 3, 10), (80, 1, 40)])
def test_axial_shares_the_channels_of_a_head_among_the_axes(head_dim, axes, pairs):
    inv_freq, _ = frequencies.axial(head_dim, axes=axes, base=100.0)
    assert_same_bits(inv_freq, frequencies.default(2 * pairs, base=100.0)[0])


def test_axes_side_by_side_rotate_by_each():
    """A token at (h, w): the score of two depends on the differences of h and of w alone."""
    inv_freq, _ = frequencies.axial(16, axes=2)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def rotated(x, h, w):
        rows = [rope_ext.cos_sin(inv_freq, torch.tensor([[p]])) for p in (h, w)]
        cos, sin = (torch.cat(parts, -1) for parts in zip(*rows, strict=True))
        return rope_ext.apply_rotary(x, cos, sin)

    def score(a, b):
        return (rotated(q, *a) * rotated(k, *b)).sum()

    # 16 products and rotations of numbers of about 1, each rounded to 2^-24 of its size
    torch.testing.assert_close(score((5, 7), (2, 1)), score((13, 6), (10, 0)), rtol=0, atol=1e-5)
    assert (score((5, 7), (2, 1)) - score((5, 7), (1, 2))).abs() > 1e-2


def test_pixel_frequencies_make_whole_numbers_of_half_turns_between_the_edges():
    inv_freq, _ = frequencies.pixel(8, max_freq=10.0)
    torch.testing.assert_close(
        inv_freq, math.pi * torch.tensor([1.0, 7 / 3, 11 / 3, 5.0]), rtol=2.0**-22, atol=0
    )
    size = 224
    by_pixel, _ = frequencies.pixel(8, max_freq=10.0, size=size)
    cos, _ = rope_ext.cos_sin(by_pixel, 2 * torch.arange(size) - (size - 1))
    expected = torch.cos(torch.linspace(-1, 1, size, dtype=torch.float64)[:, None] * inv_freq)
    # angles of at most 5 pi, of two float32 roundings each
    torch.testing.assert_close(cos, expected.float(), rtol=0, atol=5 * math.pi * 2.0**-22)


def test_constant_frequencies_are_alike():
    inv_freq, attention_scaling = frequencies.constant(6, value=0.5)
    assert_same_bits(inv_freq, torch.full((3,), 0.5))
    assert attention_scaling == 1.0


# ---- whatever the method


YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}
LONGROPE = {
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 4096,
    "factor": 4.0,
}
LLAMA3 = {key: value for key, value in LLAMA31.items() if key != "rope_type"}
METHODS = {
    "default": {},
    "partial": {"rotary_pct": 0.5},
    "proportional": {"partial_rotary_factor": 0.5},
    "linear": {"factor": 4.0},
    "ntk": {"alpha": 4.0},
    "ntk_alpha": {"alpha": 4.0},
    "dynamic_ntk": YARN,
    "yarn": YARN,
    "longrope": LONGROPE,
    "llama3": LLAMA3,
    "axial": {},
    "pixel": {},
    "constant": {},
    "xpos": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_frequencies_are_float32_whatever_the_default_dtype(method, device):
    function = getattr(frequencies, method)
    expected = function(16, **METHODS[method])[0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = function(16, device=device, **METHODS[method])[0]
    finally:
        torch.set_default_dtype(before)
    assert got.dtype == torch.float32
    assert got.device.type == device.type
    if device.type == "cpu":
        assert_same_bits(got, expected)
    else:  # another pow: a few units in the last place
        torch.testing.assert_close(got.cpu(), expected, rtol=2.0**-20, atol=0)


def test_length_on_a_device_is_not_waited_for(device):
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        length = torch.full((), 9000, device=device)
        inv_freq, _ = frequencies.dynamic_ntk(16, length=length, device=device, **YARN)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    expected = frequencies.dynamic_ntk(16, length=9000, **YARN)[0]
    torch.testing.assert_close(inv_freq.cpu(), expected, rtol=2.0**-20, atol=0)


# ---- refusals

NAN = float("nan")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("default", {"rotary_dim": 7}, "rotary_dim to be even, at least 2 .* got 7"),
        ("default", {"rotary_dim": 18}, "at most head_dim 16, got 18"),
        ("default", {"base": 0}, "base to be above 0, got 0"),
        ("default", {"base": NAN}, "base to be a finite number above 0, got nan"),
        ("default", {"base": "1e4"}, "base to be a finite number above 0, got '1e4'"),
        ("partial", {"rotary_pct": 0.0}, "rotary_pct to be above 0 and at most 1, got 0.0"),
        ("partial", {"rotary_pct": 0.2}, "rotary_dim to be even, .* got 3"),
        ("proportional", {"partial_rotary_factor": 1.5}, "at least 0 and at most 1, got 1.5"),
        ("proportional", {"factor": 0.5}, "factor to be at least 1, got 0.5"),
        ("linear", {"factor": 0.9}, "factor to be at least 1, got 0.9"),
        ("linear", {"factor": None}, "factor to be a finite number at least 1, got None"),
        ("linear", {"factor": True}, "factor to be a finite number at least 1, got True"),
        ("ntk", {"alpha": 0.5}, "alpha to be at least 1, got 0.5"),
        ("ntk", {"rotary_dim": 2}, "rotary_dim to be even, at least 4 .* got 2"),
        ("ntk_alpha", {"alpha": float("inf")}, "alpha to be a finite number"),
        ("dynamic_ntk", {"original_max_position_embeddings": 0}, "an integer of at least 1"),
        ("dynamic_ntk", {"length": 0}, "length to be an integer of at least 1 .* got 0"),
        ("dynamic_ntk", {"length": torch.ones(())}, "length .* got torch.float32"),
        ("yarn", {"factor": NAN}, "factor to be a finite number at least 1, got nan"),
        ("yarn", {"base": 1.0}, "base to be above 1, got 1.0"),
        ("yarn", {"beta_fast": 0.5}, "beta_fast to be at least beta_slow 1, got 0.5"),
        ("yarn", {"beta_slow": 0}, "beta_slow to be above 0, got 0"),
        ("yarn", {"attention_factor": -1.0}, "attention_factor to be above 0, got -1.0"),
        ("yarn", {"mscale": -1.0}, "mscale to be at least 0, got -1.0"),
        ("yarn", {"original_max_position_embeddings": 4096.0}, "an integer .* got 4096.0"),
        ("longrope", {"short_factor": [1.0] * 7}, "short_factor to have 8 numbers, .* got 7"),
        ("longrope", {"long_factor": [1.0] * 9}, "long_factor to have 8 numbers, .* got 9"),
        ("longrope", {"long_factor": [1.0] * 7 + [0]}, r"long_factor\[7\] to be above 0, got 0"),
        ("longrope", {"long_factor": 2.0}, "long_factor to be a list of 8 numbers, got float"),
        ("longrope", {"factor": None}, "factor or attention_factor, .* got neither"),
        ("longrope", {"short_mscale": 1.0}, "short_mscale and long_mscale together"),
        ("longrope", {"length": torch.ones(())}, "length to be an integer of at least 1"),
        ("llama3", {"high_freq_factor": 1.0}, "high_freq_factor to be above 1, got 1.0"),
        ("llama3", {"low_freq_factor": 0.0}, "low_freq_factor to be above 0, got 0.0"),
        ("axial", {"axes": 0}, "axes to be an integer of at least 1"),
        ("axial", {"axes": 9}, "head_dim to be even, at least 18, got 16"),
        ("axial", {"axes": 3, "alternating": True}, "head_dim to be a multiple of 6, .* got 16"),
        ("pixel", {"max_freq": 1}, "max_freq to be at least 2, got 1"),
        ("pixel", {"size": 1}, "size to be an integer of at least 2"),
        ("constant", {"value": NAN}, "value to be a finite number"),
        ("xpos", {"scale_base": 0}, "scale_base to be above 0, got 0"),
    ],
)
def test_parameters_out_of_bounds_are_refused_by_name(method, options, message):
    with pytest.raises(ValueError, match=rf"frequencies\.{method}: expected .*{message}"):
        getattr(frequencies, method)(16, **{**METHODS[method], **options})


@pytest.mark.parametrize("method", METHODS)
def test_an_odd_head_is_refused_by_name(method):
    with pytest.raises(ValueError, match=rf"frequencies\.{method}: expected .*, got \d+"):
        getattr(frequencies, method)(15, **METHODS[method])


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yarnn"}, "rope_type to be one of default, .* got 'yarnn'"),
        ({"rope_type": "yarn", "factor": 4.0}, "to have original_max_position_embeddings, got fac"),
        ({"rope_type": "dynamic", "factor": 4.0}, "to have original_max_position_embeddings"),
        ({"rope_type": "linear", "fator": 4.0}, "keys of rope_type 'linear' .* got fator"),
        ({"rope_type": "linear"}, "rope_type 'linear' to have factor, got nothing"),
        ({"rope_type": "default", "factor": 4.0}, "to be among none, got factor"),
    ],
)
def test_a_dict_that_does_not_fit_is_refused_by_name(scaling, message):
    with pytest.raises(ValueError, match=rf"frequencies\.from_scaling: expected .*{message}"):
        frequencies.from_scaling(16, scaling)


@pytest.mark.parametrize(
    ("config", "layer_type", "message"),
    [
        ({"rope_scaling": {"type": "yarnn"}, "head_dim": 64}, None, "rope_type to be one of"),
        ({"hidden_size": 64}, None, "config to have head_dim, or hidden_size and num_attention"),
        (GEMMA4, None, "layer_type to be one of sliding_attention, full_attention, got None"),
        (GEMMA4, "linear_attention", "layer_type to be one of .* got 'linear_attention'"),
        (GEMMA3, None, "layer_type to be one of full_attention, sliding_attention, got None"),
        ({"head_dim": 64, "partial_rotary_factor": NAN}, None, "partial_rotary_factor"),
        ({"head_dim": 64, "rope_theta": -1}, None, "rope_theta to be above 0, got -1"),
        ({"model_type": "dinov3_vit", "head_dim": 64}, None, "got 'dinov3_vit', which turns by"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(config, layer_type, message):
    with pytest.raises(ValueError, match=rf"frequencies\.from_config: expected .*{message}"):
        frequencies.from_config(config, layer_type)
