"""patch(model, tables=True): the tables are exact, and the rotary module stays what it was else.

tests/test_model_families.py runs it for every family of transformers.
"""

import copy
import io
import warnings

import pytest
import torch
from rotating_models import TOKENS, rotations_of_rope_ext
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
from support import naming, small_llama  # noqa: E402
from tiny_families import CASES  # noqa: E402
from tiny_models import build, floats, inputs  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

import rope_ext  # noqa: E402
from rope_ext.integrations.transformers import (  # noqa: E402
    UnrecognizedRotation,
    patch,
    patched,
    unpatch,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 2
FAR = 131_072
ORIGINAL = 64  # the original length of scaled models, in tokens
LONGER = 4 * ORIGINAL
PAIRS = 8
HALF_UNIT = 2.0**-25  # the rounding of a number between 1/2 and 1 to float32
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
SCALINGS = {
    "default": DEFAULT,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "rope_type": "longrope", "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0 + i / 16 for i in range(PAIRS)],
        "long_factor": [1.0 + i for i in range(PAIRS)],
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}  # fmt: skip


def config_of(rope_type, layers=LAYERS):
    scaling = {"rope_theta": 1e4, **SCALINGS[rope_type]}
    longest = ORIGINAL if rope_type in ("default", "dynamic") else LONGER
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaConfig(
        **sizes, **heads, max_position_embeddings=longest, initializer_range=0.3,
        rope_parameters=scaling,
    )  # fmt: skip


def llama_of(rope_type):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config_of(rope_type)).eval()


def rotary_of(rope_type):
    return LlamaRotaryEmbedding(config_of(rope_type))


def case_of(name):
    (case,) = [case for case in CASES if case.name == name]
    return case


def x(dtype=torch.float32):
    return torch.zeros(1, 1, 8, dtype=dtype)


def exact(inv_freq, positions, scaling=1.0):
    """cos and sin [.., 2 P] in float64: the angles are products of 24 and 17 bits, so exact."""
    angle = positions.double().unsqueeze(-1) * inv_freq.double()
    angle = torch.cat((angle, angle), -1)
    return angle.cos() * scaling, angle.sin() * scaling


@pytest.fixture
def model():
    return small_llama(LAYERS)


@pytest.fixture
def rotary(model):
    return model.model.rotary_emb


# ---- what the tables are


def test_tables_of_every_scaling_are_exact_far_away_where_the_own_ones_are_not():
    positions = torch.arange(FAR - 3, FAR + 1)[None]
    for rope_type in SCALINGS:
        own, module = rotary_of(rope_type), rotary_of(rope_type)
        patch(module, tables=True)
        usual = own(x(), positions)
        inv_freq, scaling = own.inv_freq, own.attention_scaling  # of this length
        if rope_type == "dynamic":  # a power of a computed base: rounded in another way
            options = {"factor": 2.0, "original_max_position_embeddings": ORIGINAL}
            longest = torch.tensor(FAR + 1)
            inv_freq, _ = rope_ext.frequencies.dynamic_ntk(2 * PAIRS, length=longest, **options)
            torch.testing.assert_close(inv_freq, own.inv_freq, rtol=1e-5, atol=0)
        half_unit = HALF_UNIT if scaling == 1 else 2 * HALF_UNIT  # values of 1 and more
        with naming(rope_type):
            truth = exact(inv_freq, positions, scaling)
            for got, theirs, right in zip(module(x(), positions), usual, truth, strict=True):
                assert (got - right).abs().max() <= 1.01 * half_unit
                assert (theirs - right).abs().max() > 1000 * half_unit


def test_they_are_those_of_the_own_module_up_to_its_rounding_of_angles():
    positions = torch.arange(40)[None]
    for rope_type in SCALINGS:
        own, module = rotary_of(rope_type), rotary_of(rope_type)
        patch(module, tables=True)
        with naming(rope_type):
            for got, usual in zip(module(x(), positions), own(x(), positions), strict=True):
                torch.testing.assert_close(got, usual, rtol=0, atol=40 * 2**-24 + 2**-22)


def test_a_dynamic_module_remembers_lengths_as_its_own_does():
    for rope_type in ("dynamic", "longrope"):
        own, module = rotary_of(rope_type), rotary_of(rope_type)
        patch(module, tables=True)
        twin = None
        # grows, stays, grows, is reset by a short one, is at the boundary
        for length in (20, 100, 80, 300, 70, 30, 64, 65, 63, 64):
            with naming((rope_type, length)):
                positions = torch.stack((torch.arange(length), torch.zeros(length).long()))
                usual = own(x(), positions)
                for got in (module, twin or module):
                    for a, b in zip(got(x(), positions), usual, strict=True):
                        torch.testing.assert_close(a, b, rtol=0, atol=length * 2**-20)
            if length == 80:
                twin = copy.deepcopy(module)  # also of what it remembers


def test_tables_are_float32_whatever_the_model_is_cast_to():
    positions = torch.tensor([[0, 5, FAR]])
    for rope_type in SCALINGS:
        module = rotary_of(rope_type)
        patch(module, tables=True)
        expected = module(x(), positions)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            module.to(dtype)
            with naming((rope_type, dtype)):
                assert {buffer.dtype for buffer in module.buffers()} <= {torch.float32, torch.int64}
                for got, right in zip(module(x(dtype), positions), expected, strict=True):
                    assert got.dtype == torch.float32
                    assert torch.equal(got, right)
        got = module.double()(x(torch.float64), positions)
        assert got[0].dtype == torch.float64
        torch.testing.assert_close(got[0].float(), expected[0], rtol=0, atol=2**-24)


# Tokens with several positions, columns in other orders, complex tables, layer types.
FORMS = [
    ("qwen2_vl", "model.language_model.rotary_emb", (3, 2, 5), None),  # chunks of axes
    ("qwen3_vl", "model.language_model.rotary_emb", (3, 2, 5), None),  # axes in turn
    ("qwen3_vl", "model.language_model.rotary_emb", (2, 5), None),  # text alone
    ("qwen3_vl", "model.language_model.rotary_emb", (1, 2, 5), None),
    ("ernie4_5_vl_moe", "model.language_model.rotary_emb", (3, 2, 5), None),  # time last
    ("hunyuan_vl", "model.language_model.rotary_emb", (4, 2, 5), None),  # unequal halves
    ("neomme", "model.rotary_emb", (2, 2, 5), "sliding_attention"),
    ("gemma3", "model.rotary_emb", (2, 5), "full_attention"),
    ("gemma3", "model.rotary_emb", (2, 5), "sliding_attention"),
    ("cohere2", "model.rotary_emb", (2, 5), None),  # neighbours
    ("gpt_oss", "model.rotary_emb", (2, 5), None),  # a column a pair
    ("deepseek_v2", "model.rotary_emb", (2, 5), None),  # complex
    ("qwen2_vl (Qwen2VisionTransformerPretrainedModel)", "rotary_pos_emb", (7, 2), None),
    ("gemma4 (Gemma4VisionModel)", "encoder.rotary_emb", (2, 7, 2), None),  # an axis a half
    ("minimax_m3_vl (MiniMaxM3VLVisionModel)", "rotary_emb", (7, 3), None),
    ("sam3 (Sam3ViTModel)", "layers.0.rotary_emb", (7, 2), None),  # a dimension more
]


def test_tables_of_every_form():
    for name, module, shape, layer_type in FORMS:
        own = build(case_of(name)).get_submodule(module)
        kind = () if layer_type is None else (layer_type,)
        generator = torch.Generator().manual_seed(0)
        positions = torch.randint(0, 30, shape, generator=generator)
        usual = own(x(), positions, *kind)
        patch(own, tables=True)
        with naming((name, shape)):
            got = own(x(), positions, *kind)
            torch.testing.assert_close(got, usual, rtol=0, atol=30 * 2**-24 + 2**-22)


def test_positions_and_layer_types_that_do_not_fit_are_named():
    mrope = build(case_of("qwen2_vl")).model.language_model.rotary_emb
    gemma = build(case_of("gemma3")).model.rotary_emb
    patch(mrope, tables=True)
    patch(gemma, tables=True)
    with pytest.raises(ValueError, match=r"Qwen2VLRotaryEmbedding: .* 3 coordinates, got 2 in sha"):
        mrope(x(), torch.zeros(2, 1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"one of 'full_attention', 'sliding_attention', got 'a'"):
        gemma(x(), torch.zeros(1, 5, dtype=torch.int64), "a")


def test_three_coordinates_and_a_length_that_decides():
    """Where M-RoPE meets dynamic NTK and longrope."""
    case = case_of("qwen2_vl")
    for rope_type in ("dynamic", "longrope"):
        model = build(case)
        config = model.config.get_text_config()
        config.rope_parameters = {
            **SCALINGS[rope_type],
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
        }
        config.max_position_embeddings = LONGER if rope_type == "longrope" else ORIGINAL
        kind = type(model.model.language_model.rotary_emb)
        own, module = kind(config), kind(config)
        patch(module, tables=True)
        for length in (30, 100):
            positions = (
                torch.arange(length).expand(3, 1, -1) // torch.tensor([1, 2, 3])[:, None, None]
            )
            with naming((rope_type, length)):
                pairs = zip(module(x(), positions), own(x(), positions), strict=True)
                for got, usual in pairs:
                    torch.testing.assert_close(got, usual, rtol=0, atol=length * 2**-20)


# ---- the host does not wait


class WithoutValues(TorchDispatchMode):
    """Raises where the host needs a value of a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is needed"
        return function(*args, **(kwargs or {}))


def test_lengths_are_compared_on_the_device():
    positions = torch.arange(100)[None]
    for rope_type in SCALINGS:
        module = rotary_of(rope_type)
        if rope_type == "dynamic":
            with pytest.raises(AssertionError, match="a value"), WithoutValues():
                rotary_of(rope_type)(x(), positions)
        patch(module, tables=True)
        with WithoutValues(), naming(rope_type):
            module(x(), positions)


def test_one_graph_serves_short_and_long_sequences():
    for rope_type in ("dynamic", "longrope"):
        module = rotary_of(rope_type)
        patch(module, tables=True)
        twin, graphs = copy.deepcopy(module), []
        compiled = torch.compile(module, backend=counting(graphs), fullgraph=True, dynamic=True)
        for length in (30, 100, 40, 70):
            positions = torch.arange(length)[None]
            with naming((rope_type, length)):
                for got, expected in zip(
                    compiled(x(), positions), twin(x(), positions), strict=True
                ):
                    assert torch.equal(got, expected)
        assert len(graphs) == 1


def counting(graphs):
    def count(graph, inputs):
        graphs.append(graph)
        return graph

    return count


@pytest.mark.slow
def test_a_model_whose_frequencies_depend_on_the_length_is_one_graph():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config_of("dynamic", layers=1)).eval()
    patch(model, tables=True)
    twin, graphs = copy.deepcopy(model), []
    compiled = torch.compile(model, backend=counting(graphs), fullgraph=True, dynamic=True)
    for length in (30, 100, 40):
        tokens = torch.arange(length)[None] % 96
        with torch.no_grad():
            got = compiled(tokens, use_cache=False).logits
            assert torch.equal(got, twin(tokens, use_cache=False).logits)
    assert len(graphs) == 1


def test_modules_of_every_form_compile_into_one_graph():
    for name, module, shape, layer_type in FORMS[1::3]:
        part = build(case_of(name)).get_submodule(module)
        arguments = x(), torch.ones(shape, dtype=torch.int64), *filter(None, [layer_type])
        patch(part, tables=True)
        with naming((name, shape)):
            got = torch.compile(part, backend="eager", fullgraph=True)(*arguments)
            torch.testing.assert_close(got, part(*arguments), rtol=0, atol=0)


# ---- the frequencies of the config


def test_frequencies_are_right_after_meta_and_to_empty():
    for rope_type in SCALINGS:
        model = llama_of(rope_type)
        tokens = torch.arange(100)[None] % 96
        patch(model, tables=True)
        expected = model(tokens).logits
        for when in ("before", "after"):
            with torch.device("meta"):
                other = llama_of(rope_type)
            with naming((rope_type, when)), warnings.catch_warnings():
                warnings.simplefilter("error" if when == "before" else "ignore")
                if when == "before":
                    patch(other, tables=True)
                other.to_empty(device="cpu")
                if when == "after":
                    for buffer in other.model.rotary_emb.buffers():
                        buffer.fill_(float("nan"))  # as uninitialised memory may be
                    patch(other, tables=True)
                other.load_state_dict(model.state_dict())
                assert torch.equal(other.eval()(tokens).logits, expected)
                for buffer, value in model.model.rotary_emb.named_buffers():
                    if "max_seq_len" not in buffer:
                        assert torch.equal(other.model.rotary_emb.get_buffer(buffer), value)
            if when == "before":
                unpatch(other)
                assert torch.equal(other.model.rotary_emb.inv_freq, rotary_of(rope_type).inv_freq)


def test_other_frequencies_than_those_of_the_config_are_replaced_with_a_warning(model):
    rotary = model.model.rotary_emb
    right = rotary.inv_freq.clone()
    for cast in (torch.bfloat16, torch.float16):  # rounded, not other ones
        rotary.inv_freq.copy_(right.to(cast))
        with warnings.catch_warnings(), patched(model, tables=True):
            warnings.simplefilter("error")
            assert torch.equal(rotary.inv_freq, right)
        assert torch.equal(rotary.inv_freq, right.to(cast).float())
    rotary.inv_freq.mul_(2)
    with pytest.warns(UserWarning, match=r"module 'model\.rotary_emb' to have the inv_freq of its"):
        patch(model, tables=True)
    assert torch.equal(rotary.inv_freq, right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(model, tables=True)  # nothing is left to replace
    sines = rotary(x(), TOKENS[:1])[1]
    rotary.inv_freq.mul_(2)  # after patch it is read
    assert torch.equal(rotary(x(), TOKENS[:1])[1], exact(2 * right, TOKENS[:1])[1].float())
    assert not torch.equal(rotary(x(), TOKENS[:1])[1], sines)


def test_a_module_that_has_grown_is_patched_without_a_warning():
    module = rotary_of("dynamic")
    module(x(), torch.arange(300)[None])
    grown = module.inv_freq
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(module, tables=True)
    assert torch.equal(module.inv_freq, rotary_of("dynamic").inv_freq)
    unpatch(module)
    assert module.inv_freq is grown


# ---- what stays


def test_the_rotary_module_is_the_same_object_with_the_same_state(model):
    rotary = model.model.rotary_emb
    own, before = model(TOKENS).logits, dict(vars(rotary))
    names, keys = dict(rotary.named_buffers()), list(model.state_dict())
    patch(model)
    assert model.model.rotary_emb.inv_freq is names["inv_freq"]  # only by request
    report = patch(model, tables=True)
    assert report.tables == ("model.rotary_emb",)
    assert "exact tables: model.rotary_emb" in str(report)
    assert patch(model) == patch(model, tables=True) == report
    assert model.model.rotary_emb is rotary
    assert isinstance(rotary, LlamaRotaryEmbedding)
    assert repr(rotary) == "LlamaRotaryEmbedding()"
    assert list(model.state_dict()) == keys
    assert rotations_of_rope_ext(model, TOKENS) == LAYERS + 1  # the tables are made once
    torch.testing.assert_close(model(TOKENS).logits, own, rtol=0, atol=2**-12)
    unpatch(model)
    assert type(rotary) is LlamaRotaryEmbedding
    assert vars(rotary) == before
    assert all(rotary.get_buffer(name) is buffer for name, buffer in names.items())
    assert dict(rotary.named_buffers()).keys() == names.keys()
    assert torch.equal(model(TOKENS).logits, own)


def test_unpatch_brings_back_what_a_cast_would_have_left(model):
    twin = copy.deepcopy(model).bfloat16()
    patch(model, tables=True)
    model.bfloat16()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    unpatch(model)
    for name, buffer in twin.model.rotary_emb.named_buffers():
        assert torch.equal(model.model.rotary_emb.get_buffer(name), buffer)
    assert torch.equal(model(TOKENS).logits, twin(TOKENS).logits)


def test_blocks_of_a_part_and_of_the_whole_model(model):
    rotary = model.model.rotary_emb
    with patched(model, tables=True) as report:
        assert report.tables == ("model.rotary_emb",)
        with patched(rotary, tables=True):
            unpatch(model.model.layers)
        assert type(rotary) is not LlamaRotaryEmbedding
    assert type(rotary) is LlamaRotaryEmbedding
    patch(rotary, tables=True)
    assert rotations_of_rope_ext(model, TOKENS) == 1
    with patched(model):
        assert rotations_of_rope_ext(model, TOKENS) == LAYERS + 1
    assert rotations_of_rope_ext(model, TOKENS) == 1


def test_checkpoints_have_the_same_keys(model, tmp_path):
    for case in ("llama", "esm"):  # esm's inv_freq is in the state dict
        model = build(case_of(case))
        before = model.state_dict()
        patch(model, tables=True)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        model.load_state_dict(before)
        model.save_pretrained(tmp_path / case)
        loaded = type(model).from_pretrained(tmp_path / case)
        assert loaded.state_dict().keys() == before.keys()
        assert all(torch.equal(loaded.state_dict()[name], before[name]) for name in before)


def test_copies_are_patched_by_themselves_and_pickles_need_no_rope_ext():
    model = llama_of("dynamic")
    tokens = torch.arange(100)[None] % 96
    patch(model, tables=True)
    expected = model(tokens).logits
    twin = copy.deepcopy(model)
    assert twin.model.rotary_emb.inv_freq is not model.model.rotary_emb.inv_freq
    file = io.BytesIO()
    torch.save(model, file)
    assert b"rope_ext" not in file.getvalue()
    unpatch(model)
    assert torch.equal(twin(tokens).logits, expected)
    unpatch(twin)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (loaded, twin):
        assert vars(other.model.rotary_emb).keys() == vars(model.model.rotary_emb).keys()
        assert torch.equal(other(tokens).logits, model(tokens).logits)
    patch(loaded, tables=True)
    assert torch.equal(loaded(tokens).logits, expected)


def test_tables_for_training_with_activation_checkpoints(model):
    def gradients():
        model.zero_grad()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    patch(model, tables=True)
    model.train()
    expected = gradients()
    model.gradient_checkpointing_enable()
    got = gradients()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_generation_with_each_cache():
    for rope_type in ("default", "dynamic", "longrope"):
        model = llama_of(rope_type)
        model.generation_config.eos_token_id = None
        greedy = {"max_new_tokens": 8, "do_sample": False}
        # across the original length
        tokens = (torch.arange(ORIGINAL - 4) * 7 % 96)[None]
        own = model.generate(tokens, **greedy)
        patch(model, tables=True)
        for cache in ("dynamic", "static"):
            with naming((rope_type, cache)):
                got = model.generate(tokens, cache_implementation=cache, **greedy)
                assert torch.equal(got, own)


def test_models_in_bfloat16_run_with_tables_in_float32():
    for name in ("llama", "qwen2_vl", "gemma3", "llama4", "cohere2", "gpt_oss", "olmo2", "glm4"):
        model = build(case_of(name)).bfloat16()
        arguments = inputs(case_of(name), model)
        patch(model, tables=True)
        with naming(name):
            outputs = list(floats(model(**arguments)))
            assert {output.dtype for output in outputs} == {torch.bfloat16}
            sum(output.float().sum() for output in outputs).backward()
            assert all(output.isfinite().all() for output in outputs)


def test_hooks_of_accelerate_stay_before_and_after(model):
    hooks = pytest.importorskip("accelerate.hooks")
    rotary = model.model.rotary_emb
    own = rotary(x(), TOKENS)
    hooks.add_hook_to_module(rotary, hooks.AlignDevicesHook(execution_device="cpu"))
    patch(model, tables=True)
    assert rotations_of_rope_ext(rotary, x(), TOKENS) == 1
    unpatch(model)
    assert rotations_of_rope_ext(rotary, x(), TOKENS) == 0
    assert all(torch.equal(a, b) for a, b in zip(rotary(x(), TOKENS), own, strict=True))


# ---- what is refused

REFUSED = {
    "gptj": r"'transformer\.rotary_emb', GPTJRotaryEmbedding, which has no buffer inv_freq",
    "phimoe": "PhimoeRotaryEmbedding, whose tables are not cos and sin of position_ids times",
    "mistral_large4": "TextRotaryEmbedding, whose tables depend on the parameters alpha",
    "dinov3_vit (DINOv3ViTModel)": r"forward\(pixel_values\) does not take x and position_ids",
    "roformer": "tables=True for a model with .* got RoFormerForCausalLM, which has no such module",
}


def test_tables_that_are_not_recognized_are_refused_by_name_and_nothing_changes():
    for name, reason in REFUSED.items():
        model = build(case_of(name))
        before = {module: type(module) for module in model.modules()}
        with naming(name):
            with pytest.raises(UnrecognizedRotation, match=reason):
                patch(model, tables=True)
            assert {module: type(module) for module in model.modules()} == before
            patch(model)


class Derived(LlamaRotaryEmbedding):
    """A base of modules that no model has."""


class ScaledByLength(Derived):
    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return (cos, sin) if position_ids.max() < 100 else (2 * cos, 2 * sin)


class FrequenciesByLength(Derived):
    def forward(self, x, position_ids):
        if position_ids.max() > 100:
            self.inv_freq = self.inv_freq / 2
        return super().forward(x, position_ids)


class OppositeAngles(Derived):
    def forward(self, x, position_ids):
        return super().forward(x, -position_ids)


class OneSineMore(Derived):
    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return cos, torch.cat((sin[..., :-1], 1.01 * sin[..., -1:]), -1)


class FromTwoNumbers(Derived):
    def __init__(self, config, factor):
        super().__init__(config)


class FailsFarAway(Derived):
    def forward(self, x, position_ids):
        assert position_ids.max() < 100
        return super().forward(x, position_ids)


UNKNOWN = {
    ScaledByLength: "whose attention_scaling depends on the length",
    FrequenciesByLength: "depend on the length by the unknown rope_type 'default'",
    OppositeAngles: "whose tables are not cos and sin of",
    OneSineMore: "whose tables are not cos and sin of",
    FromTwoNumbers: "which its class does not make from its config",
    FailsFarAway: "whose forward raises AssertionError.* for a long sequence",
}


def test_modules_that_compute_something_else_are_refused(model):
    for kind, reason in UNKNOWN.items():
        module = kind(model.config, 2) if kind is FromTwoNumbers else kind(model.config)
        with naming(kind.__name__), pytest.raises(UnrecognizedRotation, match=reason):
            patch(nn.ModuleList([model, module]), tables=True)
        assert type(model.model.rotary_emb) is LlamaRotaryEmbedding
        assert type(model.model.layers[0].self_attn).__mro__[1] is nn.Module


def test_parts_of_a_model_are_patched_by_themselves():
    model = build(case_of("llama4"))
    patch(model)
    tower = nn.ModuleList([model, build(case_of("llama4 (Llama4VisionModel)"))])
    with pytest.raises(UnrecognizedRotation, match="Llama4VisionRotaryEmbedding"):
        patch(tower, tables=True)
    assert patch(tower[0], tables=True).tables == ("model.rotary_emb",)
    unpatch(tower)
