"""Frequencies: the formulas of the papers, dtype and device, and errors."""

import inspect
import math
import re

import pytest
import torch
from support import assert_same_bits, error_of, random

import rope_ext
from rope_ext import frequencies

ORIGINAL = "original_max_position_embeddings"
YARN = {"factor": 4.0, ORIGINAL: 4096}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, ORIGINAL: 4096, "factor": 4.0}
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, ORIGINAL: 8192}
# Every method, with what it needs for heads of 16.
METHODS = {
    "partial": {"rotary_pct": 0.5},
    "proportional": {"partial_rotary_factor": 0.5},
    "linear": {"factor": 4.0},
    "ntk": {"alpha": 4.0},
    "ntk_alpha": {"alpha": 4.0},
    "dynamic_ntk": YARN,
    "yarn": YARN,
    "longrope": LONGROPE,
    "llama3": LLAMA3,
    **{name: {} for name in ("default", "axial", "pixel", "constant", "xpos")},
}
# Options of a method besides those above. The bounds of a number are checked by one function,
# whose errors `default` shows.
REFUSALS = {
    "default": [
        ({"rotary_dim": 7}, "rotary_dim to be even, at least 2 .* got 7"),
        ({"rotary_dim": 18}, "at most head_dim 16, got 18"),
        ({"base": 0}, "base to be above 0, got 0"),
        ({"base": math.nan}, "base to be a finite number above 0, got nan"),
        ({"base": "1e4"}, "base to be a finite number above 0, got '1e4'"),
        ({"base": 1e300}, r"base to be of a size from 1e-15 to 1e\+15, got 1e\+300"),
        ({"base": 10**400}, "base to be of a size .* got an integer of 1329 bits"),
    ],
    "partial": [
        ({"rotary_pct": 0.0}, "rotary_pct to be above 0 and at most 1, got 0.0"),
        ({"rotary_pct": 0.2}, "rotary_dim to be even, .* got 3"),
    ],
    "proportional": [
        ({"partial_rotary_factor": 1.5}, "at least 0 and at most 1, got 1.5"),
        ({"factor": 0.5}, "factor to be at least 1, got 0.5"),
    ],
    "linear": [
        ({"factor": 0.9}, "factor to be at least 1, got 0.9"),
    ],
    "ntk": [
        ({"alpha": 0.5}, "alpha to be at least 1, got 0.5"),
        ({"alpha": None}, "alpha, or factor as another name, got neither"),
        ({"factor": 8.0}, "factor to be alpha, 4, got 8.0"),
        ({"rotary_dim": 2}, "rotary_dim to be even, at least 4 .* got 2"),
        ({"alpha": 1e15, "base": 1e15, "rotary_dim": 4}, "stretched base, .* got 1.*e.45"),
    ],
    "ntk_alpha": [({"alpha": float("inf")}, "alpha to be a finite number")],
    "dynamic_ntk": [
        ({ORIGINAL: 0}, "an integer of at least 1"),
        ({"factor": 2**31}, "factor to be at least 1 and at most .* got 2147483648"),
        ({"length": -1}, "length to be an integer of at least 0 .* got -1"),
        ({"length": torch.ones(())}, "length .* got torch.float32"),
    ],
    "yarn": [
        ({"factor": 0.9}, "factor to be at least 1, got 0.9"),
        ({"factor": None}, "factor, or max_position_embeddings .* got neither"),
        ({ORIGINAL: 4096.0}, "an integer .* got 4096.0"),
        ({ORIGINAL: None}, "or factor, low and high, got neither"),
        ({"truncate": "false"}, "truncate to be a bool, got 'false'"),
        ({"base": 1.0}, "base to be above 1, got 1.0"),
        ({"beta_fast": 0.5}, "beta_fast to be at least beta_slow 1, got 0.5"),
        ({"beta_slow": 0}, "beta_slow to be above 0, got 0"),
        ({"attention_factor": -1.0}, "attention_factor to be above 0, got -1.0"),
        ({"mscale": -1.0}, "mscale to be at least 0, got -1.0"),
        ({"low": 1.0}, "high to be a finite number at least 1, got None"),
        ({"low": 2.0, "high": 1.5}, "high to be at least 2, got 1.5"),
        ({"low": 1, "high": 2, "beta_fast": 32}, "either low and high or beta_fast and b"),
    ],
    "longrope": [
        ({"long_factor": [1.0] * 9}, "long_factor to have 8 numbers, .* got 9"),
        ({"long_factor": [1.0] * 7 + [0]}, r"long_factor\[7\] to be above 0, got 0"),
        ({"long_factor": 2.0}, "long_factor to be a list of 8 numbers, got 2.0"),
        ({"factor": None}, "factor or attention_factor, .* got neither"),
        ({"short_mscale": 1.0}, "short_mscale and long_mscale together"),
    ],
    "llama3": [
        ({"high_freq_factor": 1.0}, "high_freq_factor to be above 1, got 1.0"),
        ({"low_freq_factor": 0.0}, "low_freq_factor to be above 0, got 0.0"),
    ],
    "axial": [
        ({"axes": 0}, "axes to be an integer of at least 1"),
        ({"axes": 9}, "head_dim to be even, at least 18 .* got 16"),
        ({"axes": 3, "alternating": True}, "head_dim to be a multiple of 6, .* got 16"),
    ],
    "pixel": [
        ({"max_freq": 1}, "max_freq to be at least 2, got 1"),
        ({"size": 1}, "size to be an integer of at least 2"),
    ],
    "constant": [({"value": math.nan}, "value to be a finite number")],
    "xpos": [({"scale_base": 0}, "scale_base to be above 0, got 0")],
}
REFUSED_SCALINGS = [
    ({"rope_type": "yarnn"}, "rope_type to be one of default, .* got 'yarnn'"),
    ({"rope_type": "yarn", "factor": 4.0}, "to have original_max_position_embeddings, got fac"),
    ({"rope_type": "linear", "fator": 4.0}, r"keys of rope_type 'linear' .* got \['fator'\]"),
    ({"rope_type": "default", "factor": 4.0}, r"to be among none, got \['factor'\]"),
]


def assert_equal(got, expected):
    assert_same_bits(got[0], expected[0])
    assert got[1] == expected[1]


def test_yarn_takes_the_ramp_as_numbers_of_pairs():
    """The pairs that follow from beta_fast and beta_slow; and others, by the formula in float64."""
    low, high = (64 * math.log(4096 / (2 * math.pi * turns)) / math.log(1e4) for turns in (32, 1))
    of_turns = {"factor": 16.0, ORIGINAL: 4096}
    for truncate, ramp in ((False, (low, high)), (True, (math.floor(low), math.ceil(high)))):
        expected = frequencies.yarn(128, truncate=truncate, **of_turns)
        assert_equal(frequencies.yarn(128, factor=16.0, low=ramp[0], high=ramp[1]), expected)
    pairs = torch.arange(64, dtype=torch.float64)
    plain = 1e4 ** (-pairs / 64)
    for low, high in ((2.5, 7.25), (-3.0, 70.0), (5, 5)):  # the last one is a step
        options = {"low": low, "high": high, "attention_factor": 1.25}
        inv_freq, attention_scaling = frequencies.yarn(128, factor=16.0, **options)
        ramp = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
        expected = plain / 16 * ramp + plain * (1 - ramp)
        torch.testing.assert_close(inv_freq.double(), expected, rtol=2.0**-19, atol=0)
        assert attention_scaling == 1.25


def test_ntk_has_factor_as_another_name_of_alpha():
    expected = frequencies.ntk(64, alpha=4.0)
    assert_equal(frequencies.ntk(64, factor=4, alpha=4.0), expected)
    for scaling in ({"type": "ntk", "factor": 4.0}, {"rope_type": "ntk", "alpha": 4.0}):
        assert_equal(frequencies.from_scaling(64, scaling), expected)
        config = {"head_dim": 64, "rope_scaling": scaling}
        assert_equal(frequencies.from_config(config), expected)


def test_a_call_without_tokens_has_the_frequencies_of_a_short_sequence():
    for rope_type, options in (("longrope", LONGROPE), ("dynamic", YARN)):
        scaling = {"rope_type": rope_type, **options}
        expected = frequencies.from_scaling(16, scaling, length=1)
        assert_equal(frequencies.from_scaling(16, scaling, length=0), expected)


def test_xpos_tables_rotate_and_decay_with_the_distance():
    """The score of q at m and k at n is RoPE's times z ** ((m - n) / scale_base), for each pair."""
    inv_freq, log_scale = frequencies.xpos(16, scale_base=8.0)
    z = (torch.arange(0, 16, 2) / 16 + 0.4) / 1.4  # arXiv 2212.10554, with gamma = 0.4
    torch.testing.assert_close(log_scale.double(), z.double().log() / 8, rtol=1e-6, atol=0)
    assert_same_bits(inv_freq, frequencies.default(16)[0])
    q, k = random(2, 1, 9, 1, 16, dtype=torch.float64)
    position_ids = torch.arange(9)[None] - 4
    cos, sin = rope_ext.cos_sin(inv_freq.double(), position_ids)

    def scores(scale):  # [S, S, P]
        a = rope_ext.apply_rotary(q, cos * scale, sin * scale)[0, :, 0].unsqueeze(1)
        b = rope_ext.apply_rotary(k, cos / scale, sin / scale)[0, :, 0]
        return torch.stack((a * b).chunk(2, -1)).sum(0)

    got = scores(torch.exp(position_ids.unsqueeze(-1) * log_scale.double()))
    distance = position_ids[0].unsqueeze(1) - position_ids[0]
    decay = torch.exp(distance.unsqueeze(-1) * log_scale.double())
    torch.testing.assert_close(got, scores(torch.ones(1)) * decay, rtol=1e-12, atol=1e-12)


def test_axial_shares_the_channels_of_a_head_among_the_axes():
    for head_dim, axes, pairs in ((64, 2, 16), (64, 3, 10), (80, 1, 40)):
        inv_freq, _ = frequencies.axial(head_dim, axes=axes, base=100.0)
        assert_same_bits(inv_freq, frequencies.default(2 * pairs, base=100.0)[0])


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


def test_frequencies_have_the_bits_of_rotary_embedding_torch():
    theirs = pytest.importorskip("rotary_embedding_torch", reason="pip install 'rope_ext[test]'")
    for (inv_freq, _), options in (
        (frequencies.default(24, base=500), {"theta": 500}),
        (frequencies.pixel(24, max_freq=7.0), {"freqs_for": "pixel", "max_freq": 7.0}),
        (frequencies.constant(24), {"freqs_for": "constant", "num_freqs": 12}),
        (frequencies.ntk(24, alpha=4.0), {"theta_rescale_factor": 4.0}),
    ):
        assert_same_bits(inv_freq, theirs.RotaryEmbedding(dim=24, **options).freqs.detach())


def test_frequencies_are_float32_whatever_the_default_dtype(device):
    for method, options in METHODS.items():
        function = getattr(frequencies, method)
        expected = function(16, **options)[0]
        torch.set_default_dtype(torch.bfloat16)
        try:
            got = function(16, device=device, **options)[0]
        finally:
            torch.set_default_dtype(torch.float32)
        assert (got.dtype, got.device.type) == (torch.float32, device.type), method
        # on CUDA another pow: a few units in the last place
        rtol = 0 if device.type == "cpu" else 2.0**-20
        torch.testing.assert_close(got.cpu(), expected, rtol=rtol, atol=0)


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
    on_meta, _ = frequencies.dynamic_ntk(16, length=length.to("meta"), **YARN)
    assert on_meta.is_meta


def test_every_parameter_of_a_method_is_documented_and_its_source_named():
    for function in (getattr(frequencies, method) for method in METHODS):
        for name in inspect.signature(function).parameters:
            line = re.compile(rf"^        (\w+, )*{name}(, \w+)*: ", re.MULTILINE)
            assert line.search(function.__doc__), (function, name)
        assert "Source: " in function.__doc__, function


@pytest.mark.parametrize("method", METHODS)
def test_invalid_parameters_raise_and_are_named(method):
    function = getattr(frequencies, method)
    for options, message in REFUSALS.get(method, ()):
        got = error_of(function, 16, **{**METHODS[method], **options})
        assert re.match(rf"frequencies\.{method}: expected .*{message}", got), options
    got = error_of(function, 15, **METHODS[method])  # an odd head
    assert re.match(rf"frequencies\.{method}: expected .*, got \d+", got)


def test_an_invalid_scaling_raises_and_is_named():
    for scaling, message in REFUSED_SCALINGS:
        got = error_of(frequencies.from_scaling, 16, scaling)
        assert re.match(rf"frequencies\.from_scaling: expected .*{message}", got), scaling
