"""Tensors with more elements than 32 bits can count."""

import os

import pytest
import torch
from support import assert_same_bits, random, random_table, rounded_once

rope = torch.ops.rope

H, D = 512, 256
S = 2**31 // (H * D) + 3  # tokens; element 2^31 is the first of token S - 3
TOKENS = [0, 1, S // 2 - 1, S // 2, S - 5, S - 4, S - 3, S - 2, S - 1]  # 2^30, 2^31: powers of two
BYTES = 2 * S * H * D


def free_bytes():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def large():
    """x bfloat16 [1, S, H, D]: zeros except at TOKENS."""
    if free_bytes() < 1.25 * BYTES:
        pytest.skip(f"needs {1.25 * BYTES / 2**30:.1f} GiB of free memory")
    x = torch.zeros(1, S, H, D, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[:, TOKENS] = random(1, len(TOKENS), H, D, dtype=torch.bfloat16)
    return x


@pytest.mark.slow  # copies 4 GiB
def test_more_than_2_31_elements_in_place_and_in_the_gradient_to_the_table(large):
    x = large
    cos, sin = random_table(S, D)
    rows = cos[TOKENS], sin[TOKENS]
    few = x[:, TOKENS]
    options = {"rotary_dim": D}  # an angle a channel, so that no gradient is 0 where grad is x
    grads = rope.apply_rotary_table_backward(x, x, None, None, cos, None, None, **options)
    expected = rope.apply_rotary_table_backward(
        few, few, None, None, rows[0], None, None, **options
    )
    for grad, want in zip(grads, expected, strict=True):
        assert_same_bits(grad[TOKENS], want)
        assert grad.count_nonzero() == want.count_nonzero() == want.numel()
    rope.apply_rotary_(x, cos, sin, **options)
    assert_same_bits(x[:, TOKENS], rounded_once(few, *rows, **options))
