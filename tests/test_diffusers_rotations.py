"""patch for diffusers, without diffusers: functions spelled as in its models, and processors.

tests/integrations/test_diffusers.py runs the models themselves.
"""

import pytest
import torch
from rotating_models import file_of, names_for_copies, rotate_half
from support import naming
from torch import nn

from rope_ext.integrations.diffusers import UnrecognizedRotation, patch, patched, unpatch
from rope_ext.integrations.diffusers.forms import may_rotate, recognize

B, S, H, D = 2, 5, 3, 8


def halves(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def neighbours(x, cos, sin):
    """One angle a pair."""
    x, y = x[..., ::2], x[..., 1::2]
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1).flatten(-2)


# The spellings in diffusers, rewritten.


def two_tables(states, cos, sin):
    return halves(states, cos[None, :, None], sin[None, :, None])


def a_pair_of_tables(x, freqs):
    cos, sin = freqs
    return halves(x.float(), cos, sin).to(x.dtype)


def even_and_odd_columns(states, freqs_cos, freqs_sin):
    return neighbours(states, freqs_cos[..., ::2], freqs_sin[..., 1::2])


def complex_numbers(x_in, freqs_cis):
    x = torch.view_as_complex(x_in.float().reshape(*x_in.shape[:-1], -1, 2))
    return torch.view_as_real(x * freqs_cis.unsqueeze(2)).flatten(3).type_as(x_in)


def matrices(x, rope):
    return (rope * x.reshape(*x.shape[:-1], -1, 1, 2).float()).sum(-1).reshape(x.shape).to(x.dtype)


def matrices_of_two(xq, xk, freqs_cis):
    return matrices(xq, freqs_cis), matrices(xk, freqs_cis)


def side_by_side(states, freqs):
    cos, sin = freqs.unsqueeze(-2).chunk(2, -1)
    return halves(states, cos, sin)


def angles_of_some_channels(x, freqs):
    width = freqs.shape[-1]
    rotated = halves(x[..., :width].float(), freqs.cos(), freqs.sin())
    return torch.cat((rotated.to(x.dtype), x[..., width:]), -1)


def angles_of_the_last_tokens(t, freqs):
    return angles_of_some_channels(t, freqs[-t.shape[-3] :].float().unsqueeze(1))


def heads_in_the_channels(x, freqs):
    cos, sin = freqs
    if x.dim() == 4 or cos.dim() != 4:
        return halves(x, torch.cat([cos] * 2, -1), torch.cat([sin] * 2, -1))
    heads = x.unflatten(-1, (cos.shape[1], -1)).transpose(1, 2)
    heads = halves(heads, torch.cat([cos] * 2, -1), torch.cat([sin] * 2, -1))
    return heads.transpose(1, 2).flatten(2)


def tokens_last(states, freqs):
    x = torch.view_as_complex(states.transpose(2, 3).float().unflatten(3, (-1, 2)))
    return torch.view_as_real(x * freqs).flatten(3).transpose(2, 3).type_as(states)


def rounded_to_bfloat16(x, rope):
    return matrices(x, rope).bfloat16()


def with_options(x, freqs_cis, use_real=True, use_real_unbind_dim=-1, sequence_dim=2):
    if not use_real:
        return complex_numbers(x, freqs_cis)
    cos, sin = (t[None, :, None] if sequence_dim == 1 else t[None, None] for t in freqs_cis)
    if use_real_unbind_dim == -2:
        return halves(x, cos, sin)
    if use_real_unbind_dim != -1:
        raise ValueError(f"use_real_unbind_dim={use_real_unbind_dim}")
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


def with_an_axis(x, cos, sin, unsqueeze_dim=1):
    return halves(x, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))


def three_axes(x, freqs_cis, positions):
    parts = zip(x.chunk(3, -1), freqs_cis, positions, strict=True)
    return torch.cat([halves(x, c[p][:, None], s[p][:, None]) for x, (c, s), p in parts], -1)


KNOWN = {
    two_tables: "half-split",
    a_pair_of_tables: "half-split",
    even_and_odd_columns: "interleaved, even and odd columns of the table",
    complex_numbers: "interleaved, one angle a pair; complex numbers",
    matrices: "interleaved, one angle a pair; matrices",
    matrices_of_two: "interleaved, one angle a pair; matrices",
    side_by_side: "half-split; side by side",
    angles_of_some_channels: "half-split; angles",
    angles_of_the_last_tokens: "half-split; angles",
    heads_in_the_channels: "half-split, one angle a pair",
    tokens_last: "interleaved, one angle a pair; complex numbers",
    rounded_to_bfloat16: "interleaved, one angle a pair; matrices",
    with_options: "interleaved or interleaved, one angle a pair; complex numbers or half-split",
    with_an_axis: "half-split",
    three_axes: "half-split; three axes",
}


@pytest.mark.parametrize("function", KNOWN, ids=lambda function: function.__name__)
def test_a_rotation_is_recognized_by_its_results(function):
    assert recognize(function).convention == KNOWN[function]


# What is no rotation, or not one for each choice of its options.


def sine_of_another_column(x, cos, sin):
    return halves(x, cos, sin.roll(1, -1))


def sine_of_the_wrong_sign(x, freqs):
    return complex_numbers(x, freqs.conj())


def matrices_transposed(x, rope):
    return matrices(x, rope.transpose(-1, -2))


def slightly_larger(x, freqs):
    return 1.001 * complex_numbers(x, freqs)


def stopped_gradient(x, freqs):
    return complex_numbers(x.detach(), freqs)


def in_place(x, freqs):
    return x.copy_(complex_numbers(x, freqs))


def another_one_by_an_option(x, freqs, use_real=False):
    return slightly_larger(x, freqs) if use_real else complex_numbers(x, freqs)


def another_one_in_bfloat16(x, freqs):
    return complex_numbers(x, freqs if x.dtype == torch.float32 else freqs.conj())


def with_an_option_of_another_kind(x, freqs, kind="complex"):
    return complex_numbers(x, freqs)


UNKNOWN = [
    sine_of_another_column,
    sine_of_the_wrong_sign,
    matrices_transposed,
    slightly_larger,
    stopped_gradient,
    in_place,
    another_one_by_an_option,
    another_one_in_bfloat16,
    with_an_option_of_another_kind,
    rotate_half,
]


def test_what_computes_something_else_is_not_recognized():
    for function in UNKNOWN:
        with naming(function.__name__):
            assert recognize(function) is None
            with pytest.raises(UnrecognizedRotation, match="got apply_rotary_emb"):
                patch(attention(function))


def rows(*shape):
    angle = torch.linspace(0, 3, torch.Size(shape).numel()).view(shape)
    return angle.cos(), angle.sin()


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_options_choose_the_rotation():
    rotation = recognize(with_options).replacement
    x, tables = random(B, S, H, D), rows(S, D)
    for options in (
        {"sequence_dim": 1},
        {"use_real_unbind_dim": -2, "sequence_dim": 1},
        {"freqs_cis": tables, "sequence_dim": 1},
    ):
        arguments = (x,) if "freqs_cis" in options else (x, tables)
        assert torch.equal(rotation(*arguments, **options), with_options(*arguments, **options))
    assert torch.equal(rotation(x, tables, True, -2, 1), with_options(x, tables, True, -2, 1))
    with pytest.raises(ValueError, match="use_real_unbind_dim=7"):
        rotation(x, tables, use_real_unbind_dim=7)


def test_tables_that_do_not_fit_raise_and_name_both_shapes():
    rotation = recognize(a_pair_of_tables).replacement
    for x, table in (((B, S, H, D), (S + 1, 1, D)), ((D,), (D,)), ((1, B, S, H, D), (S, 1, D))):
        with pytest.raises(ValueError, match=r"got \[.*\] and \["):
            rotation(random(*x), rows(*table))


# Where functions stand: a global of the file, an import in the method, within the method.

PROCESSORS = {
    "a global": """
class Processor:
    def __call__(self, attn, x, *tables):
        return attn.scale * apply_rotary_emb(x, *tables)
""",
    "an import": """
class Processor:
    def __call__(self, attn, x, *tables):
        from {file} import apply_rotary_emb
        return attn.scale * apply_rotary_emb(x, *tables)
""",
    "an inner function": """
class Processor:
    def __call__(self, attn, x, *tables):
        def apply_rotary_emb(x, freqs):
            x_out = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(x_out * freqs.unsqueeze(2)).flatten(3).type_as(x)
        return attn.scale * apply_rotary_emb(x, *tables)
""",
}
ATTENTION = """
class Attention(nn.Module):
    scale = 2
    def __init__(self):
        super().__init__()
        self.processor = Processor()
    def forward(self, *args):
        return self.processor(self, *args)
"""


def attention(rotation, where="a global"):
    """A module with a processor that calls the rotation."""
    other = file_of("", apply_rotary_emb=rotation)
    source = PROCESSORS[where].replace("{file}", other.__name__) + ATTENTION
    return file_of(source, apply_rotary_emb=rotation, torch=torch).Attention()


def complex_rows():
    return torch.complex(*rows(1, S, D // 2))


def calls_of(module, *args):
    with torch.profiler.profile() as profile:
        module(*args)
    return sum(e.count for e in profile.key_averages() if e.key == "rope::apply_rotary")


@pytest.mark.parametrize("where", PROCESSORS)
def test_a_processor_is_patched_wherever_its_rotation_stands(where):
    module, arguments = attention(complex_numbers, where), (random(B, S, H, D), complex_rows())
    own, kind, names = module(*arguments), type(module.processor), names_for_copies()
    report = patch(module)
    assert [(s.module, s.method) for s in report.sites] == [("processor", "__call__")]
    assert calls_of(module, *arguments) == 1
    assert torch.allclose(module(*arguments), own, rtol=0, atol=1e-6)
    assert isinstance(module.processor, kind)
    unpatch(module)
    assert type(module.processor) is kind
    assert calls_of(module, *arguments) == 0
    assert torch.equal(module(*arguments), own)
    assert names_for_copies() <= names


def test_a_processor_of_two_modules_is_patched_once():
    both = nn.ModuleList([attention(complex_numbers), attention(complex_numbers)])
    both[1].processor = both[0].processor
    with patched(both) as report:
        assert len(report.sites) == 1
        for module in both:
            assert calls_of(module, random(B, S, H, D), complex_rows()) == 1


def test_the_models_of_a_pipeline_are_those_of_diffusers():
    module, other = attention(complex_numbers), attention(complex_numbers)
    type(module).__module__ = "diffusers.models"
    pipeline = type("Pipeline", (), {"components": {"transformer": module, "encoder": other}})()
    assert patch(pipeline).modules == ("transformer.processor",)


def test_functions_that_make_tables_are_not_asked():
    def get_1d_rotary_pos_embed(dim, pos, theta=10000.0): ...

    assert not may_rotate(get_1d_rotary_pos_embed)
    assert may_rotate(rotate_half)
