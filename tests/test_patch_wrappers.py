"""patch copies the loaded code with all its wrappers: decorators, other libraries.

Each wrapper here changes the results of the model, so a lost wrapper shows in the logits.
"""

import functools
import gc
import importlib
import inspect
import sys
import traceback

import pytest
import rotating_models
import torch
from rotating_models import (
    CALL,
    TOKENS,
    arguments,
    derived,
    file_of,
    model_with,
    names_for_copies,
    rotations_of_rope_ext,
    standard,
)
from torch import nn

transformers = pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
from support import naming, small_llama  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402
from transformers.models.roformer import modeling_roformer  # noqa: E402

from rope_ext.integrations.transformers import (  # noqa: E402
    UnrecognizedRotation,
    patch,
    patched,
    unpatch,
)

LAYERS = 2
LlamaAttention = modeling_llama.LlamaAttention
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    yield
    torch.compiler.reset()


class Graphs(list):
    """A backend of torch.compile that lists the number of rope_ext's rotations in each graph."""

    def __call__(self, graph, inputs):
        self.append(sum("rope" in str(node.target) for node in graph.graph.nodes))
        return graph


# ---- wrappers that other libraries add to a method


def doubling(function):
    @functools.wraps(function)
    def doubled(self, *args, **kwargs):
        return 2 * function(self, *args, **kwargs)[0], None

    return doubled


def counting(function):
    @functools.wraps(function)
    def counted(self, *args, **kwargs):
        counted.calls += 1
        return function(self, *args, **kwargs)

    counted.calls = 0
    return counted


def without_wraps(function):
    return lambda *args, **kwargs: (3 * function(*args, **kwargs)[0], None)


def in_a_global(function):
    source = "def forward(*args, **kwargs):\n    return (4 * own(*args, **kwargs)[0], None)"
    return file_of(source, own=function).forward


def with_defaults(function):
    def shifted(self, *args, shift, **kwargs):
        return function(self, *args, **kwargs)[0] + shift, None

    shifted.__kwdefaults__ = {"shift": 0.125}
    return shifted


WRAPPERS = {
    "functools.wraps": doubling,
    "an attribute of its own": counting,
    "a closure": without_wraps,
    "a global of its file": in_a_global,
    "keyword-only defaults": with_defaults,
    "three of them": lambda function: doubling(in_a_global(without_wraps(function))),
}


def test_a_wrapper_around_forward_stays(monkeypatch):
    own = LlamaAttention.forward
    for name, wrap in WRAPPERS.items():
        wrapped = wrap(own)
        monkeypatch.setattr(LlamaAttention, "forward", wrapped)
        model = small_llama(LAYERS)
        expected = model(TOKENS).logits
        before = names_for_copies()
        with naming(name):
            patch(model)
            assert torch.equal(model(TOKENS).logits, expected)
            assert rotations_of_rope_ext(model, TOKENS) == LAYERS
            assert wrap is not counting or wrapped.calls == 3 * LAYERS
            unpatch(model)
            assert LlamaAttention.forward is wrapped
            assert rotations_of_rope_ext(model, TOKENS) == 0
            assert names_for_copies() <= before


def test_a_wrapped_forward_is_compiled_to_one_graph(monkeypatch):
    graphs = Graphs()
    wrapped = doubling(in_a_global(without_wraps(LlamaAttention.forward)))
    monkeypatch.setattr(LlamaAttention, "forward", wrapped)
    model = small_llama(LAYERS)
    expected = model(TOKENS).logits
    patch(model)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    assert torch.equal(compiled(TOKENS, use_cache=False).logits, expected)
    assert graphs == [LAYERS]


def test_a_forward_that_is_compiled_stays_compiled(monkeypatch):
    own = Graphs()
    compiled = torch.compile(LlamaAttention.forward, backend=own, fullgraph=True)
    monkeypatch.setattr(LlamaAttention, "forward", compiled)
    model = small_llama(LAYERS)
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
        unpatched = len(own)
        with patched(model):
            assert torch.equal(model(TOKENS, use_cache=False).logits, expected)
    assert sum(own[:unpatched]) == 0
    assert set(own[unpatched:]) == {1}


def test_a_model_of_compiled_modules_is_patched():
    graphs = Graphs()
    model = small_llama(LAYERS)
    expected = model(TOKENS, use_cache=False).logits
    for layer in model.model.layers:
        layer.compile(backend=graphs)
    assert len(patch(model).sites) == LAYERS
    assert torch.equal(model(TOKENS, use_cache=False).logits, expected)
    assert sum(graphs) in (1, LAYERS)  # layers share their code, and its graph


class LowRank(nn.Module):
    """Replaces a projection, like PEFT's LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_modules_in_the_place_of_projections_are_used():
    model = small_llama(LAYERS)
    patch(model)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
    got = model(TOKENS).logits
    unpatch(model)
    expected = model(TOKENS).logits
    assert torch.equal(got, expected)
    patch(model)
    assert torch.equal(model(TOKENS).logits, expected)


def test_a_forward_that_a_module_has_itself_is_refused():
    for replace in (torch.compile, doubling, functools.partial):
        model = small_llama(LAYERS)
        attention = model.model.layers[1].self_attn
        attention.forward = replace(attention.forward)
        expected = r"'model\.layers\.1\.self_attn'.* of its own"
        with naming(replace), pytest.raises(UnrecognizedRotation, match=expected):
            patch(model)
        assert type(model.model.layers[0].self_attn) is LlamaAttention


def test_a_wrapper_around_the_rotation_method_stays(monkeypatch):
    owner = modeling_roformer.RoFormerSelfAttention
    name = "apply_rotary_position_embeddings"
    own = getattr(owner, name)
    config = transformers.RoFormerConfig(hidden_size=16, num_attention_heads=2)
    inputs = [torch.randn(1, 1, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)]

    @functools.wraps(own)
    def doubled(*args):
        return tuple(2 * x for x in own(*args))

    monkeypatch.setattr(owner, name, staticmethod(doubled))
    module = owner(config)
    expected = getattr(module, name)(*inputs)
    with patched(module):
        got = getattr(module, name)(*inputs)
        assert rotations_of_rope_ext(getattr(module, name), *inputs) == 1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- forms of methods

SCALED = "return self.apply_rotary_pos_emb * q, k"
MANY_NAMES = [f"self.a{i} = None" for i in range(256)]
FUNCTION = """
def turned(*args):
    return apply_rotary_pos_emb(*args)
"""
MAKE = """
def make(apply_rotary, scale):
    class Derived(Attention):
        def forward(self, q, k, cos, sin):
            q, k = apply_rotary(q, k, cos, sin)
            return scale * q, k
    return Derived
Derived = make(apply_rotary_pos_emb, 2)
"""
TWICE = """
import functools
def twice(function):
    @functools.wraps(function)
    def called_twice(self, *args, **kwargs):
        function(self, *args, **kwargs)
        return function(self, *args, **kwargs)
    return called_twice
class Base(nn.Module):
    calls = 0
    def count(self):
        self.calls += 1
"""
METHODS = {
    "a private name": derived(
        "self.__calls = 1",
        "id(nn)  # a module is loaded just before",
        "return apply_rotary_pos_emb(q, k, cos, sin)",
    ),
    "an attribute of the rotation's name": derived("self.apply_rotary_pos_emb = 2", CALL, SCALED),
    "an attribute of that name, one of many": derived(
        *MANY_NAMES, CALL, "self.apply_rotary_pos_emb = 2", SCALED
    ),
    "functions inside": derived(
        "def turned(x):",
        "    return [apply_rotary_pos_emb(y, y, cos, sin)[0] for y in (x,)][0]",
        "return turned(q), (lambda: turned(k))()",
    ),
    "a function of its file": derived("return turned(q, k, cos, sin)", before=FUNCTION),
    "a function outside": MAKE,
    "super, and decorators": derived(
        "super().count()",
        CALL,
        "return self.calls % 2 * q, k",
        before=TWICE,
        head="def count(self): raise AssertionError\n@twice\ndef forward(self, q, k, cos, sin):",
        base="Base",
    ),
}


def test_a_method_is_copied_as_it_is():
    for name, source in METHODS.items():
        file = model_with(apply_rotary_pos_emb, source)
        module = file.Derived()
        expected = module(*arguments())
        before = vars(file).keys()
        with naming(name):
            with patched(module), pytest.MonkeyPatch.context() as context:
                context.setattr(sys.modules[__name__], "standard", None)  # it is no longer called
                got = module(*arguments())
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a, b)
            assert vars(file).keys() == before


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    return standard(q, k, cos, sin, unsqueeze_dim)


def test_a_traceback_shows_the_lines_of_the_models_own_file():
    fail = ("def fail():", "    return q / self.missing", "return fail()")
    source = derived(CALL, *fail)
    module = model_with(standard, source).Derived()
    frames = []
    for _ in range(2):
        with pytest.raises(AttributeError) as error:
            module(*arguments())
        frames.append([(f.filename, f.lineno, f.name) for f in traceback.extract_tb(error.tb)])
        patch(module)
    assert frames[0] == frames[1]
    file = "<file of a model>"
    assert frames[0][-3:-1] == [(file, 13, "forward"), (file, 12, "fail")]


def test_a_file_that_has_changed_since_it_was_imported_is_not_read(tmp_path, monkeypatch):
    source = "\n".join(
        ["import torch", "from torch import nn", inspect.getsource(rotating_models.rotate_half),
         inspect.getsource(standard), "apply_rotary_pos_emb = standard"]
    ) + derived(CALL, "return q + 0, k", base="nn.Module")  # fmt: skip
    path = tmp_path / "edited_model.py"
    path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("edited_model").Derived()
    expected = module(*arguments())
    path.write_text("# a line more\n" + source.replace("+ 0", "+ 1"))
    patch(module)
    for a, b in zip(module(*arguments()), expected, strict=True):
        assert torch.equal(a, b)


def test_the_globals_of_a_copy_last_as_long_as_its_models():
    first, second = small_llama(LAYERS), small_llama(LAYERS)
    gc.collect()
    none = names_for_copies()
    patch(first)
    one = names_for_copies() - none
    assert {file for file, _ in one} == {modeling_llama.__name__}
    patch(second)
    twin_of_second = second.model.layers[0].self_attn.__deepcopy__({})
    assert len(names_for_copies() - none - one) == len(one)  # for all layers together

    unpatch(first)
    assert not names_for_copies() & one
    assert rotations_of_rope_ext(second, TOKENS) == LAYERS
    held = second.model.layers[1].self_attn.forward
    unpatch(second)
    unpatch(twin_of_second)
    assert names_for_copies() - none  # the method that is held
    second.model.layers[1].self_attn.forward = held
    assert rotations_of_rope_ext(second, TOKENS) == 1
    del second, held
    gc.collect()
    assert names_for_copies() <= none

    model = small_llama(LAYERS)
    patch(model)
    del model
    gc.collect()
    assert names_for_copies() <= none
