"""The operator in the rotary hook of transformers, with the real `kernels` package.

Needs releases of transformers and kernels that work together: the stage "kernels hook" of .ci/run
has them, the test extra does not.
"""

import copy
import importlib
import socket
from importlib.util import find_spec
from pathlib import Path
from types import MethodType

import pytest
import torch

from rope_ext.integrations.transformers import hooked_rotations, kernel_mapping, register_kernels
from rope_ext.integrations.transformers.kernels_hook import HOOK, RotaryPosEmb, rotation_of

if find_spec("kernels") is None or find_spec("transformers") is None:
    pytest.skip("transformers and kernels are not both installed", allow_module_level=True)

from transformers.utils.import_utils import is_kernels_available

if not is_kernels_available():
    pytest.skip("kernels is not of the version that transformers takes", allow_module_level=True)

import kernels
import transformers
from support import assert_same_bits, naming, random, random_table
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
)
from transformers.integrations import hub_kernels
from transformers.models.llama import modeling_llama

B, S, HIDDEN, HEADS, KV_HEADS, VOCABULARY = 2, 9, 64, 4, 2, 97
D = HIDDEN // HEADS
COMPILE = kernels.Mode.TORCH_COMPILE
pytestmark = pytest.mark.usefixtures("one_thread")
MODES = (kernels.Mode.INFERENCE, kernels.Mode.TRAINING)
# fmt: off
SIZES = {
    "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": D, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": VOCABULARY,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
FAMILIES = {  # with different conventions and the same hook
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES), "half-split"),
    "nanochat": (NanoChatForCausalLM, NanoChatConfig(**SIZES), "half-split, negative angle"),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig(**SIZES, **EXPERTS),
                "half-split, one angle a pair"),
}
# fmt: on

MODELS = Path(transformers.__file__).parent / "models"
HOOKED = sorted(
    f"{path.parent.name}.{path.stem}"
    for path in MODELS.glob("*/modeling_*.py")
    if f'use_kernel_forward_from_hub("{HOOK}")' in path.read_text()
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("nothing here is to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def no_mapping_is_left():
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        yield


def tiny(family):
    make, config, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = make(config).float()
    release(model)
    return model


def release(model):
    """Restores the hook's own function, whatever an earlier test has bound to it."""
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")


def tokens():
    return torch.randint(0, VOCABULARY, (B, S), generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(model):
    model.zero_grad()
    logits = model(tokens(), use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def calls_of_the_operator(function):
    with torch.profiler.profile() as profile:
        function()
    operator = "rope::apply_rotary_qk"
    return sum(event.count for event in profile.key_averages() if operator in event.key)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernelized_model_computes_and_learns_the_same(family):
    model = tiny(family)
    expected = outputs_and_gradients(model)
    assert calls_of_the_operator(lambda: model(tokens())) == 0
    register_kernels()
    kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    (rotation,) = hooked_rotations(model).values()
    assert rotation.convention == FAMILIES[family][2]
    assert calls_of_the_operator(lambda: model(tokens())) == model.config.num_hidden_layers
    # Float32, from the same rotation: the gradients' products may be summed in another order.
    logits, gradients = outputs_and_gradients(model)
    torch.testing.assert_close(logits, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected[1], rtol=1e-4, atol=1e-7)
    release(model)
    assert calls_of_the_operator(lambda: model(tokens())) == 0


def test_compiled_code_calls_the_operator_from_the_hook():
    model = tiny("llama")
    register_kernels()
    kernels.kernelize(model, mode=kernels.Mode.TRAINING | COMPILE, device="cpu")
    rotate = modeling_llama.apply_rotary_pos_emb
    arguments = (random(B, HEADS, S, D), random(B, KV_HEADS, S, D), *random_table(1, S, D))
    expected = type(rotate).forward(rotate, *arguments)
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: rotate(*args), fullgraph=True)
    for got, same in zip(compiled(*arguments), expected, strict=True):
        assert_same_bits(got, same)
    assert calls_of_the_operator(lambda: compiled(*arguments)) == 1


def test_training_under_autocast_learns_what_the_model_itself_learns():
    model = tiny("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs_and_gradients(model)
    register_kernels()
    kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = outputs_and_gradients(model)
    assert logits.dtype == expected[0].dtype
    for name, grad in gradients.items():
        similarity = torch.cosine_similarity(grad.flatten(), expected[1][name].flatten(), dim=0)
        assert similarity > 0.999, name


def test_every_hooked_function_of_transformers_keeps_its_rotation():
    for module in HOOKED:
        namespace = vars(importlib.import_module(f"transformers.models.{module}"))
        names = {name: getattr(type(x), "kernel_layer_name", None) for name, x in namespace.items()}
        hooks = [namespace[name] for name, layer in names.items() if layer == HOOK]
        with naming(module):
            assert hooks
            for hook in hooks:
                assert_keeps_its_rotation(hook)


def assert_keeps_its_rotation(hook):
    own = MethodType(type(hook).forward, hook)
    rotation = rotation_of(type(hook))
    assert rotation is not None
    table = random_table(B, S, D // 2 if rotation.pairs.columns == "a pair" else D)
    q, k = random(B, HEADS, S, D), random(B, KV_HEADS, S, D)
    for unsqueeze_dim, x, y in ((1, q, k), (2, q.transpose(1, 2), k.transpose(1, 2))):
        results = RotaryPosEmb.forward(hook, x, y, *table, unsqueeze_dim)
        for got, expected in zip(results, own(x, y, *table, unsqueeze_dim), strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("mode", [*MODES, *(mode | COMPILE for mode in MODES)], ids=str)
def test_on_cuda_it_is_taken_before_the_hubs_kernel_in_every_mode(mode, monkeypatch):
    monkeypatch.setattr("kernels.layer.repos._find_capability", lambda: 90)
    module = tiny("llama").model.layers[0].self_attn  # has no other layer that has a kernel
    register_kernels()
    hub_kernels.register_kernel_mapping_transformers()  # as set_use_kernels does, each time
    kernels.kernelize(module, mode=mode, device="cuda")
    (hook,) = module._kernel_funcs.values()
    assert hook.forward.__func__ is RotaryPosEmb.forward
    release(module)


def test_set_use_kernels_takes_it():
    model = tiny("llama").train()
    register_kernels()
    model.set_use_kernels(True)
    assert calls_of_the_operator(lambda: model(tokens())) == model.config.num_hidden_layers
    release(model)


def test_the_mapping_of_transformers_is_not_touched():
    def described():
        mapping = hub_kernels.get_kernel_mapping_transformers()
        return {name: {str(k): copy.copy(v) for k, v in of.items()} for name, of in mapping.items()}

    before = described()
    register_kernels()
    assert described() == before
    hub = before[HOOK]["cuda"]
    assert list(hub) == [kernels.Mode.INFERENCE]  # a training kernel would allow a comparison


def test_in_a_context_only_the_rotation_is_replaced():
    model = tiny("llama")
    with kernels.use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    for module in model.modules():
        if "forward" in vars(module):
            assert module.forward.__func__ is type(module).forward
    assert calls_of_the_operator(lambda: model(tokens())) == model.config.num_hidden_layers
    release(model)


def test_a_model_without_a_hook_in_reach_says_so():
    assert hooked_rotations(torch.nn.Linear(2, 2)) == {}
    (name,) = hooked_rotations(tiny("llama"))
    assert name == "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
