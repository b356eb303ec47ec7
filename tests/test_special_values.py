"""Values at the edges of the dtypes: subnormals, overflow, ties, signed zeros, NaN, infinity."""

import pytest
import torch
from support import (
    DTYPES,
    ORDERS,
    assert_same_bits,
    name_of,
    random,
    random_table,
    rounded_once,
)

rope = torch.ops.rope

D, P = 32, 16
S = 4


def every_value(dtype):
    """Every finite value of a 16-bit dtype, subnormals and both zeros included, [1, T, 1, D]."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return torch.where(values.isfinite(), values, torch.zeros((), dtype=dtype)).view(1, -1, 1, D)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_every_value_of_16_bits_is_rounded_to_nearest_even(dtype, order, backend):
    """With angles at which sums are ties (cos = sin = 0.5), overflow (1) and are exact (0)."""
    x = every_value(dtype).to(backend)
    tokens = x.shape[1]
    angles = torch.tensor([[0.5, 0.5], [1.0, 1.0], [1.0, 0.0], [0.3, 0.9]])
    for c, s in angles.tolist():
        cos = torch.full((tokens, P), c).to(backend)
        sin = torch.full((tokens, P), s).to(backend)
        y = rope.apply_rotary(x, cos, sin, **ORDERS[order])
        assert_same_bits(y, rounded_once(x, cos, sin, **ORDERS[order]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_ties_go_to_even(dtype, backend):
    eps = torch.finfo(dtype).eps
    # 1 + eps/2 lies between 1 and 1 + eps (1 is even), 1 + 3 eps/2 between 1 + eps and 1 + 2 eps.
    x = torch.zeros(1, 2, 1, D, dtype=dtype)
    x[..., 0], x[..., P] = 1, -1
    sin = torch.zeros(2, P)
    sin[0, 0], sin[1, 0] = eps / 2, 3 * eps / 2
    y = rope.apply_rotary(x.to(backend), torch.ones(2, P).to(backend), sin.to(backend)).cpu()
    assert y[0, :, 0, 0].tolist() == [1, 1 + 2 * eps]


def test_float16_overflows_to_infinity_and_keeps_subnormals(backend):
    x = torch.zeros(1, 3, 1, D, dtype=torch.float16)
    x[0, 0, 0, 0], x[0, 0, 0, P] = 65504, -65504
    x[0, 1, 0, 0] = 2**-24  # the smallest subnormal
    x[0, 2, 0, 0] = 2**-23
    cos = torch.tensor([1.0, 1.0, 0.5]).view(3, 1).expand(3, P).contiguous()
    sin = torch.tensor([1.0, 0.0, 0.0]).view(3, 1).expand(3, P).contiguous()
    y = rope.apply_rotary(x.to(backend), cos.to(backend), sin.to(backend)).cpu()
    assert y[0, 0, 0, 0] == float("inf")
    assert y[0, 0, 0, P] == 0
    assert y[0, 1, 0, 0] == 2**-24
    assert y[0, 2, 0, 0] == 2**-24


def test_float32_subnormals_are_kept(backend):
    x = torch.zeros(1, 1, 1, D)
    x[..., :P] = torch.arange(1, P + 1) * 2.0**-149
    cos, sin = torch.ones(1, P).to(backend), torch.zeros(1, P).to(backend)
    assert_same_bits(rope.apply_rotary(x.to(backend), cos, sin), x)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_of_any_payload_stays_nan(dtype, order, backend):
    """Also where rounding it as a number would carry into its sign: all of its bits are set."""
    nan = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    x = torch.ones(1, S, 2, D, dtype=dtype)
    x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])[0, 0] = -1
    cos, sin = torch.ones(S, P), torch.zeros(S, P)
    cos[1], sin[2] = nan, nan
    y = rope.apply_rotary(x.to(backend), cos.to(backend), sin.to(backend), **ORDERS[order]).cpu()
    assert y[0, :3].isnan().all()
    assert y[0, 3].eq(1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_and_infinity_stay_within_their_pair(dtype, interleaved, value, backend):
    x = random(1, S, 2, D + 3, dtype=dtype)
    cos, sin = random_table(S, P)
    clean = rounded_once(x, cos, sin, interleaved=interleaved)
    x[0, 1, 0, 5] = value
    y = rope.apply_rotary(
        x.to(backend), cos.to(backend), sin.to(backend), interleaved=interleaved
    ).cpu()
    assert_same_bits(y, rounded_once(x, cos, sin, interleaved=interleaved))
    pair = (4, 5) if interleaved else (5, 5 + P)
    assert not y[0, 1, 0, pair].isfinite().any()
    y[0, 1, 0, pair] = clean[0, 1, 0, pair]
    assert_same_bits(y, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_in_the_table_reaches_its_pair_in_every_head(dtype, backend):
    x = random(1, S, 3, D, dtype=dtype)
    cos, sin = random_table(S, P)
    clean = rounded_once(x, cos, sin)
    cos[2, 7] = float("nan")
    y = rope.apply_rotary(x.to(backend), cos.to(backend), sin.to(backend)).cpu()
    wrong = torch.zeros_like(y, dtype=torch.bool)
    wrong[0, 2, :, [7, 7 + P]] = True
    assert torch.equal(y.isnan(), wrong)
    assert_same_bits(torch.where(wrong, clean, y), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_zeros_keep_the_signs_of_the_formula(dtype, backend):
    signs = torch.tensor([0.0, -0.0, 1.0, -1.0])
    x1, x2, c, s = torch.cartesian_prod(signs, signs, signs, signs).unbind(-1)
    x = torch.stack((x1, x2), -1).view(1, -1, 1, 2).to(dtype)
    cos, sin = c.unsqueeze(-1).contiguous(), s.unsqueeze(-1).contiguous()
    for inverse in (False, True):
        y = rope.apply_rotary(x.to(backend), cos.to(backend), sin.to(backend), inverse=inverse)
        assert_same_bits(y, rounded_once(x, cos, sin, inverse=inverse))


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_channels_that_do_not_rotate_keep_their_bits(dtype, inplace, backend):
    """Even NaNs with a payload, which arithmetic would make quiet."""
    as_int = {8: torch.int64, 4: torch.int32, 2: torch.int16}[torch.finfo(dtype).bits // 8]
    before, after = 3, 5
    others = [*range(before), *range(before + D, before + D + after)]
    payload = torch.arange(before + after, dtype=as_int) + 1
    signalling = torch.tensor(float("inf"), dtype=dtype).view(as_int) + payload
    x = random(1, S, 2, before + D + after, dtype=dtype)
    x.view(as_int)[..., others] = signalling
    expected = x.view(as_int)[..., others].clone()
    x = x.to(backend)
    cos, sin = random_table(S, P, device=backend)
    if inplace:
        rope.apply_rotary_(x, cos, sin, rotary_offset=before)
        y = x
    else:
        y = rope.apply_rotary(x, cos, sin, rotary_offset=before)
    assert torch.equal(y.cpu().view(as_int)[..., others], expected)
