"""The errors of patch(model), and the conditions for a recognized rotation."""

import types

import pytest
import torch
from rotating_models import (
    CALL,
    TOKENS,
    arguments,
    derived,
    model_with,
    names_for_copies,
    rotate_half,
    rotations_of_rope_ext,
    standard,
)
from torch import nn

transformers = pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
from support import naming, small_llama  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from rope_ext.integrations.transformers import UnrecognizedRotation, patch  # noqa: E402
from rope_ext.integrations.transformers.forms import recognize  # noqa: E402

LAYERS = 2
STANDARD = "half-split"


@pytest.fixture
def model():
    return small_llama(LAYERS)


# Rotations that no model has: one function for each file of a model.


def detached(q, k, cos, sin, unsqueeze_dim=1):
    return standard(q.detach(), k, cos, sin, unsqueeze_dim)


def another_one_for_a_single_token(q, k, cos, sin, unsqueeze_dim=1):
    q, k = standard(q, k, cos, sin, unsqueeze_dim)
    return (2 * q if q.shape[-2] == 1 else q), k


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
    return standard(q, k, cos, sin if position_ids is None else -sin, unsqueeze_dim)


def always_fails(q, k, cos, sin, unsqueeze_dim=1):
    raise NotImplementedError


def other_parameters(queries, keys, cos, sin):
    return standard(queries, keys, cos, sin)


# fmt: off
UNKNOWN = [
    k_by_another_angle, k_first, rolled_channels, slightly_larger, in_place, detached,
    another_one_for_a_single_token, with_position_ids_that_count, always_fails, other_parameters,
    rotate_half,
]
# fmt: on


def test_a_rotation_of_any_file_is_recognized_by_what_it_computes():
    module = model_with(standard).Attention()
    expected = module(*arguments())
    assert patch(module).conventions == (STANDARD,)
    for a, b in zip(module(*arguments()), expected, strict=True):
        assert torch.equal(a, b)


def test_a_rotation_that_computes_something_else_is_refused_and_nothing_changes(model):
    for rotation in UNKNOWN:
        other = model_with(rotation).Attention()
        with naming(rotation.__name__):
            refused = r"Attention\.forward .* got apply_rotary"
            with pytest.raises(UnrecognizedRotation, match=refused):
                patch(nn.ModuleList([model, other]))
            assert type(model.model.layers[0].self_attn) is modeling_llama.LlamaAttention
            assert type(other).__mro__[1] is nn.Module
    assert rotations_of_rope_ext(model, TOKENS) == 0


def test_a_model_without_a_rotation_is_refused():
    with pytest.raises(UnrecognizedRotation, match="got Linear without any"):
        patch(nn.Linear(2, 2))


def test_a_forward_of_its_own_that_rotates_is_refused_where_that_of_the_class_does_not():
    file = model_with(standard, "class Plain(nn.Module):\n    def forward(self): pass")
    module = file.Plain()
    module.forward = types.MethodType(file.Attention.forward, module)
    with pytest.raises(UnrecognizedRotation, match=r"forward of its class Plain, got one of its"):
        patch(nn.ModuleList([module, file.Attention()]))


RETURN_CALL = "return apply_rotary_pos_emb(q, k, cos, sin)"
FUNCTION = f"import functools\ndef turned(q, k, cos, sin):\n    {RETURN_CALL}"
MANY_NAMES = [f"self.a{i} = None" for i in range(256)]
CALLED = """
class Called:
    def __init__(self, function):
        self.function = function
    def __call__(self, *args):
        return self.function(None, *args)
"""
ITSELF = """
def turned(q, k, cos, sin):
    return apply_rotary_pos_emb(q, k, cos, sin) if q.dim() else turned(q, k, cos, sin)
"""
HIDDEN_ROTATIONS = {
    "a base": derived("return super().forward(q, k, cos, sin)"),
    "a base that is called by its name": derived("return Attention.forward(self, q, k, cos, sin)"),
    "a method with an argument filled in": derived(
        RETURN_CALL, head="def turned(self, q, k, cos, sin):", before="import functools"
    )
    + "\n    forward = functools.partialmethod(turned, sin=None)",
    "a function with an argument filled in": derived(
        "return filled(q, k, cos)",
        before=f"{FUNCTION}\nfilled = functools.partial(turned, sin=None)",
    ),
    "a method in an object that is called": derived(RETURN_CALL, before=CALLED)
    + "\n    forward = Called(forward)",
    "a wrapper that finds the method elsewhere": derived(
        "return methods[0](self, *args)",
        before="import functools\nmethods = [Attention.forward]",
        head="@functools.wraps(Attention.forward)\ndef forward(self, *args):",
    ),
    "an attribute of that name among too many": derived(
        "self.apply_rotary_pos_emb = None", CALL, *MANY_NAMES, "return q, k"
    ),
    "a method of the class": derived(
        RETURN_CALL, head="@classmethod\ndef turned(cls, q, k, cos, sin):"
    ),
    "an import that fails": derived("from of_no_file import apply_rotary_pos_emb", RETURN_CALL),
    "a function inside that depends on more than its arguments": derived(
        "def rotate(q, k):",
        "    return apply_rotary_pos_emb(q, k, cos, sin)",
        "return rotate(q, k)",
    ),
    "a property": derived(
        "return apply_rotary_pos_emb(*self.arguments)", head="@property\ndef turned(self):"
    ),
    "a function that the module keeps": derived(
        "super().__init__()", "self.rotate = apply_rotary_pos_emb", head="def __init__(self):"
    ),
    "a function that calls itself": derived(CALL, "return turned(q, k, cos, sin)", before=ITSELF),
    "a function in the namespace of another file": derived(
        CALL,
        "return llama.modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)",
        before="from transformers.models import llama",
    ),
}


def test_a_rotation_that_can_not_be_reached_is_refused_and_not_left_behind():
    for name, source in HIDDEN_ROTATIONS.items():
        file = model_with(standard, source)
        both = nn.ModuleList([file.Attention(), file.Derived()])
        before = dict(vars(file))
        with naming(name):
            with pytest.raises(UnrecognizedRotation, match="nothing has been changed"):
                patch(both)
            assert type(both[0]) is file.Attention
            assert vars(file) == before


def test_a_module_that_can_not_be_changed_leaves_the_others_as_they_were(model):
    unchangeable = derived(
        'if name == "__class__":',
        '    raise TypeError("not this one")',
        "super().__setattr__(name, value)",
        head="def __setattr__(self, name, value):",
    )
    other = model_with(standard, unchangeable).Derived()
    before = names_for_copies()
    with pytest.raises(TypeError, match="not this one"):
        patch(nn.ModuleList([model, other]))
    assert type(model.model.layers[0].self_attn) is modeling_llama.LlamaAttention
    assert names_for_copies() <= before
    assert rotations_of_rope_ext(model, TOKENS) == 0


def test_names_that_only_contain_such_a_word_are_no_rotations():
    body = "return apply_rotary_pos_emb(read_property(q), k, cos, sin)"
    source = derived(body, before="def read_property(x): return x")
    assert len(patch(model_with(standard, source).Derived()).sites) == 1


def test_a_layer_of_the_kernels_package_is_recognized_by_its_own_forward():
    class Func(nn.Module):
        def forward(self, q, k, cos, sin, unsqueeze_dim=1):
            return standard(q, k, cos, sin, unsqueeze_dim)

    layer = Func()
    layer.forward = types.MethodType(lambda self, *args: None, layer)  # a kernel replaced it
    assert recognize(layer).convention == STANDARD


def test_the_result_has_the_dtype_of_q_whatever_the_tables_have():
    module = model_with(standard).Attention()
    q, k, cos, sin = arguments()
    patch(module)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        for result in module(q.to(dtype), k.to(dtype), cos, sin):
            assert result.dtype == dtype
