"""Frequencies of pixels, axes and xPos, compared to rotary-embedding-torch."""

import math

import pytest
import torch
from support import assert_same_bits, random

import rope_ext
from rope_ext import frequencies, positions

rotary_embedding_torch = pytest.importorskip(
    "rotary_embedding_torch", reason="pip install 'rope_ext[test]'"
)

B, S, H, D = 2, 11, 3, 24
MAX_FREQ = 7.0


def test_frequencies_have_the_bits_of_the_library():
    for ours, options in (
        (frequencies.default(D, base=500), {"theta": 500}),
        (frequencies.pixel(D, max_freq=MAX_FREQ), {"freqs_for": "pixel", "max_freq": MAX_FREQ}),
        (frequencies.constant(D), {"freqs_for": "constant", "num_freqs": D // 2}),
        (frequencies.ntk(D, alpha=4.0), {"theta_rescale_factor": 4.0}),
    ):
        theirs = rotary_embedding_torch.RotaryEmbedding(dim=D, **options)
        assert_same_bits(ours[0], theirs.freqs.detach())


@pytest.mark.parametrize(
    ("freqs_for", "sizes"), [("pixel", (5, 6)), ("lang", (2, 5, 6))], ids=["image", "volume"]
)
def test_tokens_with_a_position_an_axis_are_rotated_as_by_the_library(freqs_for, sizes):
    axes = len(sizes)
    options = {"freqs_for": freqs_for, "max_freq": MAX_FREQ}
    theirs = rotary_embedding_torch.RotaryEmbedding(dim=D // axes, **options)
    x = random(B, H, *sizes, D)
    expected = rotary_embedding_torch.apply_rotary_emb(theirs.get_axial_freqs(*sizes), x)
    parts = []
    for size, at in zip(sizes, positions.grid(*sizes), strict=True):
        inv_freq, _ = frequencies.axial(D, axes=axes)
        if freqs_for == "pixel":
            inv_freq, _ = frequencies.pixel(D // axes, max_freq=MAX_FREQ, size=size)
            at = 2 * at - (size - 1)
        parts.append(rope_ext.cos_sin(inv_freq, at[None]))
    cos, sin = (torch.cat(tables, -1) for tables in zip(*parts, strict=True))
    got = rope_ext.apply_rotary(x.flatten(2, -2), cos, sin, interleaved=True, layout="bhsd")
    # angles of at most 3.5 pi, with two roundings of 2^-24 each; normal numbers
    atol = 2 * MAX_FREQ / 2 * math.pi * 2.0**-24 * x.abs().max().item() * 2
    torch.testing.assert_close(got.view_as(x), expected, rtol=0, atol=atol)


def test_decay_of_xpos_is_that_of_the_library():
    theirs = rotary_embedding_torch.RotaryEmbedding(dim=D, use_xpos=True, xpos_scale_base=64)
    inv_freq, log_scale = frequencies.xpos(D, scale_base=64)
    assert_same_bits(inv_freq, theirs.freqs.detach())
    from_the_middle = torch.arange(S) - S // 2
    got = torch.exp(from_the_middle[:, None] * log_scale)
    torch.testing.assert_close(got, theirs.get_scale(torch.arange(S))[:, ::2])
