"""CUDA has the bits of the CPU if the arithmetic is the same.

Rotation: two products and a sum, each rounded, no fused multiply-add. Tables: IEEE operations and
fused multiply-adds in one order, no library sine. Gradient to inv_freq: one order of sums. Only the
gradient to the table is summed in another order, as heads are spread over threads.
"""

from itertools import product

import pytest
import torch
from support import (
    DTYPES,
    ORDERS,
    assert_same_bits,
    name_of,
    pairwise,
    random,
    random_positions,
    random_table,
)

import rope_ext

pytestmark = pytest.mark.cuda

rope = torch.ops.rope
B, S, H, K, D, L = 2, 7, 5, 2, 48, 11
# name -> (rotary_dim, width of the table, options)
ROTATIONS = {
    "half-split": (48, 24, {}),
    "interleaved": (48, 24, {"interleaved": True}),
    "inverse": (48, 24, {"inverse": True}),
    "partial, 8-byte vectors": (24, 12, {}),
    "partial, single elements": (6, 3, {}),
    "last channels": (16, 8, {"rotary_offset": 32}),
    "middle, single elements": (38, 19, {"rotary_offset": 5}),
    "neighbours to halves": (48, 24, {"interleaved": True, "interleaved_out": False}),
    "halves to neighbours, last": (32, 16, {"interleaved_out": True, "rotary_offset": 16}),
    "halves to neighbours, single elements": (42, 21, {"interleaved_out": True}),
    "neighbours to halves, one angle a channel":
        (32, 32, {"rotary_offset": 8, "interleaved": True, "interleaved_out": False}),
    "halves to neighbours, one angle a channel, inverse":
        (48, 48, {"interleaved_out": True, "inverse": True}),
    "one angle a channel": (48, 48, {}),
    "one angle a channel, interleaved, inverse": (32, 32, {"interleaved": True, "inverse": True}),
}  # fmt: skip


def on_cuda(*tensors):
    return [t.cuda() if t is not None else None for t in tensors]


@pytest.mark.parametrize(
    ("rotation", "dtype", "table_dtype"),
    pairwise(rotation=ROTATIONS, dtype=DTYPES, table_dtype=DTYPES),
)
def test_rotation(rotation, dtype, table_dtype):
    rotary_dim, width, options = rotation
    options = {**options, "rotary_dim": rotary_dim}
    q, k = random(B, S, H, D, dtype=dtype), random(B, S, K, D, dtype=dtype, seed=1)
    cos, sin = random_table(L, width, dtype=table_dtype)
    ids = random_positions(B, S, rows=L)
    expected = rope.apply_rotary_qk(q, k, cos, sin, ids, **options)
    got = rope.apply_rotary_qk(*on_cuda(q, k, cos, sin, ids), **options)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("start", [0, 131071, 2**31 - 40])
def test_tables(start):
    inv_freq, _ = rope_ext.frequencies.default(64, base=500000.0)
    for dtype, scaling in product(DTYPES, (1.0, 1.25)):
        options = {"start": start, "attention_scaling": scaling, "dtype": dtype}
        expected = rope.cos_sin_cache(inv_freq, 40, **options)
        got = rope.cos_sin_cache(inv_freq.cuda(), 40, **options)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 700])
def test_gradient_to_inv_freq(tokens):
    inv_freq, _ = rope_ext.frequencies.default(32)
    grads = random(tokens, 16), random(tokens, 16, seed=1)
    expected = rope.cos_sin_backward(*grads, inv_freq, start=1000)
    got = rope.cos_sin_backward(*on_cuda(*grads, inv_freq), start=1000)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("axes", [False, True], ids=["one axis", "axes"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, *DTYPES], ids=name_of)
def test_rows_and_gradient_to_inv_freq_of_any_positions(dtype, axes):
    inv_freq, _ = rope_ext.frequencies.default(600)
    lead = (3,) if axes else ()
    if dtype.is_floating_point:
        ids = (100 * random(*lead, 2, 70)).to(dtype)
    else:
        ids = random_positions(*lead, 2, 70, rows=2**31 - 1, dtype=dtype)
    of_pairs = torch.arange(300) % 3 if axes else None
    for table_dtype in DTYPES:
        expected = rope.cos_sin(inv_freq, ids, of_pairs, dtype=table_dtype)
        got = rope.cos_sin(*on_cuda(inv_freq, ids, of_pairs), dtype=table_dtype)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)
    grads = random(2, 70, 300), random(2, 70, 300, seed=1)
    expected = rope.cos_sin_backward(*grads, inv_freq, ids, of_pairs)
    assert_same_bits(rope.cos_sin_backward(*on_cuda(*grads, inv_freq, ids, of_pairs)), expected)


@pytest.mark.parametrize(
    ("dtype", "order", "offset"), pairwise(dtype=DTYPES, order=ORDERS, offset=[0, 3, 8])
)
def test_gradient_to_the_table_within_the_rounding_of_its_sums(dtype, order, offset):
    """n products summed in any order are within n 2^-24 of the sum of their sizes (2^-53 in
    float64): Higham, Accuracy and Stability of Numerical Algorithms, 4.2. Two orders: twice that.
    """
    q, grad = random(B, S, H, D, dtype=dtype), random(B, S, H, D, dtype=dtype, seed=1)
    cos, _ = random_table(S, (D - offset) // 4 * 2, dtype=torch.float64)
    options = {"rotary_offset": offset, **order}
    expected = rope.apply_rotary_table_backward(grad, q, None, None, cos, **options)
    got = rope.apply_rotary_table_backward(*on_cuda(grad, q, None, None, cos), **options)
    products = 2 * B * H
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    sizes = (grad.double().abs().amax() * q.double().abs().amax() * products).item()
    for a, b in zip(got, expected, strict=True):
        assert (a.cpu() - b).abs().max().item() <= 2 * products * unit * sizes
