"""patch(model): what it replaces, what it refuses, and that nothing else changes."""

import copy
import io
import linecache
import sys
import types

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
from support import small_llama  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import rope_ext  # noqa: E402
from rope_ext.integrations.transformers import (  # noqa: E402
    UnrecognizedRotation,
    patch,
    patched,
    recognition,
    unpatch,
)

LAYERS, VOCAB = 2, 96
# Dynamo before torch 2.12 takes no note of a module that has got a forward of its own.
NOTICES_A_PATCH = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
STANDARD = "half-split"


@pytest.fixture
def model():
    return small_llama(LAYERS)


@pytest.fixture
def tokens():
    return torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


def rotations_of_rope_ext(model, tokens):
    """How many of rope_ext's operators a forward pass calls."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(tokens)
    return sum(e.count for e in profile.key_averages() if e.key.startswith("rope::"))


# --------------------------------------------------------------------------- what a patch replaces


def test_every_layer_rotates_with_rope_ext_and_gives_the_same_logits(model, tokens):
    before = model(tokens).logits
    report = patch(model)
    assert torch.equal(model(tokens).logits, before)
    assert rotations_of_rope_ext(model, tokens) == LAYERS
    assert report.modules == tuple(f"model.layers.{i}.self_attn" for i in range(LAYERS))
    assert report.conventions == (STANDARD,)
    assert {(s.method, s.function) for s in report.sites} == {("forward", "apply_rotary_pos_emb")}
    assert "half-split: forward -> apply_rotary_pos_emb (2, " in str(report)


def test_gradients_of_all_parameters_are_the_same(model, tokens):
    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    before = gradients()
    with patched(model):
        after = gradients()
    # The rotation's backward adds its two products in another order than autograd's does, and
    # float32 sums of 80 tokens round differently: parts in 2^-23 of the largest gradient, times 40.
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=40 * 2.0**-23 * float(a.abs().max()))


def test_generation_with_a_cache_gives_the_same_tokens(model, tokens):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0  # left padding, hence positions of its own for each row
    before = model.generate(tokens, attention_mask=mask, **options)
    patch(model)
    assert torch.equal(model.generate(tokens, attention_mask=mask, **options), before)


def test_another_model_of_the_family_is_not_affected(model, tokens):
    other = copy.deepcopy(model)
    function = modeling_llama.apply_rotary_pos_emb
    patch(model)
    assert rotations_of_rope_ext(other, tokens) == 0
    assert modeling_llama.apply_rotary_pos_emb is function
    assert type(other.model.layers[0].self_attn) is modeling_llama.LlamaAttention


def test_a_part_of_a_model_can_be_patched(model, tokens):
    report = patch(model.model.layers[1])
    assert report.modules == ("self_attn",)
    assert rotations_of_rope_ext(model, tokens) == 1


def test_a_model_of_which_a_part_was_patched_is_patched_as_a_whole(model, tokens):
    patch(model.model.layers[1])
    with patched(model) as report:
        assert len(report.sites) == rotations_of_rope_ext(model, tokens) == LAYERS
    assert rotations_of_rope_ext(model, tokens) == 1


class ExactTables(nn.Module):
    """In the place of a model's rotary_emb."""

    def __init__(self, config):
        super().__init__()
        self.rotary = rope_ext.RotaryEmbedding.from_config(config)

    def forward(self, x, position_ids):
        cos, sin = self.rotary.cos_sin(position_ids)
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def test_a_model_that_holds_modules_of_rope_ext_is_patched(model, tokens):
    before = model(tokens).logits
    model.model.rotary_emb = ExactTables(model.config)
    assert len(patch(model).sites) == LAYERS
    # Its own tables round angles, of less than 40 radians, by up to 2^-19.
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=2**-12)
    assert rotations_of_rope_ext(model, tokens) == LAYERS + 1  # and the rows of its table


def test_modules_keep_the_names_and_bases_of_their_classes(model):
    patch(model)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, modeling_llama.LlamaAttention)
    assert type(attention).__name__ == "LlamaAttention"
    assert type(attention).__module__ == modeling_llama.__name__
    assert repr(attention).startswith("LlamaAttention(")


def test_what_a_patched_method_uses_is_looked_up_when_it_runs(model, tokens, monkeypatch):
    patch(model)
    calls = []

    def attention(module, q, k, v, mask, **options):
        calls.append(module)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)
    model.set_attn_implementation("eager")
    model(tokens)
    assert len(calls) == LAYERS


def test_a_traceback_shows_the_lines_of_the_models_own_file(model):
    patch(model)
    code = model.model.layers[0].self_attn.forward.__func__.__wrapped__.__code__
    own = modeling_llama.LlamaAttention.forward.__wrapped__.__code__
    assert (code.co_filename, code.co_firstlineno) == (own.co_filename, own.co_firstlineno)


def test_patched_twice_is_patched_once(model, tokens):
    assert patch(model) == patch(model)
    unpatch(model)
    assert rotations_of_rope_ext(model, tokens) == 0


def test_compiles_into_one_graph(model, tokens):
    expected = model(tokens).logits.detach()
    patch(model)
    graphs = []

    def count(graph, inputs):
        graphs.append(sum("rope" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(tokens, use_cache=False).logits, expected)
    assert graphs == [LAYERS]


def test_a_model_that_was_compiled_earlier_compiles_again(model, tokens):
    graphs = []

    def count(graph, inputs):
        graphs.append(sum("rope" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    with torch.no_grad():
        own = compiled(tokens, use_cache=False).logits
        with patched(model):
            if not NOTICES_A_PATCH:
                torch.compiler.reset()
            assert torch.equal(compiled(tokens, use_cache=False).logits, own)
        assert torch.equal(compiled(tokens, use_cache=False).logits, own)
    assert graphs == [0, LAYERS]


# ------------------------------------------------------------------------------------------- undone


def test_unpatch_brings_back_the_models_own_functions(model, tokens):
    before = dict(vars(model.model.layers[0].self_attn))
    patch(model)
    unpatch(model)
    assert vars(model.model.layers[0].self_attn) == before
    assert rotations_of_rope_ext(model, tokens) == 0


def test_the_context_manager_undoes_its_patch_even_after_an_error(model, tokens):
    def fail_inside():
        with patched(model) as report:
            assert len(report.sites) == rotations_of_rope_ext(model, tokens) == LAYERS
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert rotations_of_rope_ext(model, tokens) == 0


def test_the_context_manager_leaves_a_model_patched_that_was(model, tokens):
    patch(model)
    with patched(model):
        pass
    assert rotations_of_rope_ext(model, tokens) == LAYERS


def test_unpatch_of_a_model_that_is_not_patched_does_nothing(model, tokens):
    unpatch(model)
    assert rotations_of_rope_ext(model, tokens) == 0


def test_a_copy_of_a_patched_model_is_patched_by_itself(model, tokens):
    patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.q_proj.weight.zero_()
    assert not torch.equal(twin(tokens).logits, model(tokens).logits)
    unpatch(model)
    assert rotations_of_rope_ext(twin, tokens) == LAYERS
    unpatch(twin)
    assert rotations_of_rope_ext(twin, tokens) == 0


@pytest.mark.parametrize("of", [copy.copy, nn.Module._replicate_for_data_parallel])
def test_a_shallow_copy_uses_its_own_weights(of, model, tokens):
    patch(model)
    attention = model.model.layers[0].self_attn
    assert of(attention).forward.__self__ is not attention


def test_a_patched_model_is_saved_as_one_that_needs_no_rope_ext(model, tokens):
    patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"rope_ext" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert rotations_of_rope_ext(loaded, tokens) == 0
    patch(loaded)
    assert rotations_of_rope_ext(loaded, tokens) == LAYERS


@pytest.mark.parametrize("first", ["hook", "patch"])
def test_hooks_of_accelerate_stay_before_and_after_a_patch(first, model, tokens):
    hooks = pytest.importorskip("accelerate.hooks")

    class CountCalls(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    attention = model.model.layers[0].self_attn
    hook = CountCalls()
    if first == "patch":
        patch(model)
    hooks.add_hook_to_module(attention, hook)
    assert len(patch(model).sites) == LAYERS
    assert rotations_of_rope_ext(model, tokens) == LAYERS
    assert hook.calls == 1
    unpatch(model)
    assert rotations_of_rope_ext(model, tokens) == 0
    assert hook.calls == 2
    hooks.remove_hook_from_module(attention)  # leaves the forward that it had kept on the module
    patch(model)
    assert rotations_of_rope_ext(model, tokens) == LAYERS
    unpatch(model)
    assert rotations_of_rope_ext(model, tokens) == 0


# --------------------------------------------------------------------------------- what is refused

# Rotations as models write them, and such as no model has: one function a file of a model.


def detached(q, k, cos, sin, unsqueeze_dim=1):
    return standard(q.detach(), k, cos, sin, unsqueeze_dim)


def another_one_for_a_single_token(q, k, cos, sin, unsqueeze_dim=1):
    q, k = standard(q, k, cos, sin, unsqueeze_dim)
    return (2 * q if q.shape[-2] == 1 else q), k


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def standard(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def k_by_another_angle(q, k, cos, sin, unsqueeze_dim=1):
    q, _ = standard(q, k, cos, sin, unsqueeze_dim)
    return q, standard(k, k, cos, 2 * sin, unsqueeze_dim)[1]


def k_first(q, k, cos, sin, unsqueeze_dim=1):
    return standard(k, q, cos, sin, unsqueeze_dim)


def rolled_channels(q, k, cos, sin, unsqueeze_dim=1):
    q, k = standard(q, k, cos, sin, unsqueeze_dim)
    return q.roll(1, -1), k.roll(1, -1)


def slightly_larger(q, k, cos, sin, unsqueeze_dim=1):
    q, k = standard(q, k, cos, sin, unsqueeze_dim)
    return 1.001 * q, k


def in_place(q, k, cos, sin, unsqueeze_dim=1):
    for x, rotated in zip((q, k), standard(q, k, cos, sin, unsqueeze_dim), strict=True):
        x.copy_(rotated)
    return q, k


def with_position_ids_that_count(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    if position_ids is not None:
        sin = -sin
    return standard(q, k, cos, sin, unsqueeze_dim)


def always_fails(q, k, cos, sin, unsqueeze_dim=1):
    raise NotImplementedError


def other_parameters(queries, keys, cos, sin):
    return standard(queries, keys, cos, sin)


UNKNOWN = [
    k_by_another_angle,
    k_first,
    rolled_channels,
    slightly_larger,
    in_place,
    detached,
    another_one_for_a_single_token,
    with_position_ids_that_count,
    always_fails,
    other_parameters,
    rotate_half,
]


def model_with(rotation, extra=""):
    """A module of a file of its own that calls `rotation` as apply_rotary_pos_emb."""
    source = f"""
from torch import nn
class Attention(nn.Module):
    scale = 1
    def forward(self, q, k, cos, sin, **kwargs):
        return apply_rotary_pos_emb(q, k, cos, sin)
{extra}
"""
    name = f"rotating_by_{rotation.__name__}"
    file = types.ModuleType(name)
    file.__file__ = f"<{name}>"
    # where inspect looks for source, as it does for notebooks
    linecache.cache[file.__file__] = (len(source), None, source.splitlines(True), file.__file__)
    sys.modules[name] = file
    file.apply_rotary_pos_emb = rotation
    exec(compile(source, file.__file__, "exec"), file.__dict__)
    return file


def arguments():
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_a_rotation_of_any_file_is_recognized_by_what_it_computes():
    module = model_with(standard).Attention()
    expected = module(*arguments())
    assert patch(module).conventions == (STANDARD,)
    for a, b in zip(module(*arguments()), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rotation", UNKNOWN, ids=lambda f: f.__name__)
def test_a_rotation_that_computes_something_else_is_refused_and_nothing_changes(
    rotation, model, tokens
):
    other = model_with(rotation).Attention()
    both = nn.ModuleList([model, other])
    with pytest.raises(UnrecognizedRotation, match=r"Attention\.forward .* got apply_rotary_pos_"):
        patch(both)
    assert rotations_of_rope_ext(model, tokens) == 0
    assert type(other).__mro__[1] is nn.Module


def test_a_model_without_a_rotation_is_refused():
    with pytest.raises(UnrecognizedRotation, match="got Linear without any"):
        patch(nn.Linear(2, 2))


def test_a_module_with_a_forward_of_its_own_is_refused(model, tokens):
    attention = model.model.layers[1].self_attn
    attention.forward = lambda *args, **kwargs: modeling_llama.LlamaAttention.forward(
        attention, *args, **kwargs
    )
    with pytest.raises(UnrecognizedRotation, match=r"'model\.layers\.1\.self_attn'.* of its own"):
        patch(model)
    assert rotations_of_rope_ext(model, tokens) == 0


def test_a_method_that_calls_the_rotating_method_of_its_base_is_refused():
    derived = """
class Derived(Attention):
    def forward(self, q, k, cos, sin):
        return super().forward(q, k, cos, sin)
"""
    with pytest.raises(UnrecognizedRotation, match=r"Derived\.forward to rotate itself"):
        patch(model_with(standard, derived).Derived())


HIDDEN_ROTATIONS = {
    "a private name": """
class Derived(Attention):
    def forward(self, q, k, cos, sin):
        self.__calls = 1
        return apply_rotary_pos_emb(q, k, cos, sin)
""",
    "a decorator without wraps": """
def quietly(function):
    return lambda *args: function(*args)
class Derived(Attention):
    @quietly
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)
""",
    "a method of the class": """
class Derived(Attention):
    @classmethod
    def turned(cls, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)
""",
    "an import inside": """
class Derived(Attention):
    def forward(self, q, k, cos, sin):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
        return apply_rotary_pos_emb(q, k, cos, sin)
""",
    "a property": """
class Derived(Attention):
    @property
    def turned(self):
        return apply_rotary_pos_emb(*self.arguments)
""",
    "a function that the module keeps": """
class Derived(Attention):
    def __init__(self):
        super().__init__()
        self.rotate = apply_rotary_pos_emb
""",
    "a function of the file in between": """
def turned(q, k, cos, sin):
    return apply_rotary_pos_emb(q, k, cos, sin) if q.dim() else turned(q, k, cos, sin)
class Derived(Attention):
    def forward(self, q, k, cos, sin):
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return turned(q, k, cos, sin)
""",
    "a function in the namespace of another file": """
from transformers.models import llama
class Derived(Attention):
    def forward(self, q, k, cos, sin):
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return llama.modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
""",
    "a base that is called by its name": """
class Derived(Attention):
    def forward(self, q, k, cos, sin):
        return Attention.forward(self, q, k, cos, sin)
""",
}


@pytest.mark.parametrize("source", HIDDEN_ROTATIONS.values(), ids=HIDDEN_ROTATIONS)
def test_a_rotation_that_can_not_be_reached_is_refused_and_not_left_behind(source):
    file = model_with(standard, source)
    both = nn.ModuleList([file.Attention(), file.Derived()])
    with pytest.raises(UnrecognizedRotation, match="nothing has been changed"):
        patch(both)
    assert type(both[0]) is file.Attention


def test_a_module_that_can_not_be_changed_leaves_the_others_as_they_were(model, tokens):
    unchangeable = """
class Derived(Attention):
    def __setattr__(self, name, value):
        if name == "__class__":
            raise TypeError("not this one")
        super().__setattr__(name, value)
"""
    other = model_with(standard, unchangeable).Derived()
    with pytest.raises(TypeError, match="not this one"):
        patch(nn.ModuleList([model, other]))
    assert type(model.model.layers[0].self_attn) is modeling_llama.LlamaAttention
    assert rotations_of_rope_ext(model, tokens) == 0


def test_names_that_only_contain_such_a_word_are_no_rotations():
    source = """
def read_property(x):
    return x
class Derived(Attention):
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(read_property(q), k, cos, sin)
"""
    assert len(patch(model_with(standard, source).Derived()).sites) == 1


def test_a_method_with_super_and_decorators_is_rebuilt_with_both():
    derived = """
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
class Derived(Base):
    def count(self):
        raise AssertionError
    @twice
    def forward(self, q, k, cos, sin):
        super().count()
        return apply_rotary_pos_emb(q, k, cos, sin)
"""
    module = model_with(standard, derived).Derived()
    expected = module(*arguments())
    patch(module)
    for a, b in zip(module(*arguments()), expected, strict=True):
        assert torch.equal(a, b)
    assert module.calls == 4


def test_a_layer_of_the_kernels_package_is_recognized_by_its_own_forward():
    class Func(nn.Module):
        def forward(self, q, k, cos, sin, unsqueeze_dim=1):
            return standard(q, k, cos, sin, unsqueeze_dim)

    layer = Func()
    layer.forward = types.MethodType(lambda self, *args: None, layer)  # a kernel took its place
    rotation = recognition.recognize(layer)
    assert rotation is not None
    assert rotation.convention == STANDARD


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_result_has_the_dtype_of_q_whatever_the_tables_have(dtype):
    module = model_with(standard).Attention()
    q, k, cos, sin = arguments()
    patch(module)
    for result in module(q.to(dtype), k.to(dtype), cos, sin):
        assert result.dtype == dtype
