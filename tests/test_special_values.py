"""Values at the edges of the dtypes: subnormals, overflow, ties, signed zeros, NaN, infinity."""

import pytest
import torch
from support import (
    BITS,
    DTYPES,
    ORDERS,
    assert_same_bits,
    name_of,
    pairwise,
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_every_value_of_16_bits_is_rounded_to_nearest_even(dtype, backend):
    """With angles for which sums are ties (cos = sin = 0.5), overflow (1) and are exact (0)."""
    x = every_value(dtype).to(backend)
    for c, s in ((0.5, 0.5), (1.0, 1.0), (1.0, 0.0), (0.3, 0.9)):
        cos, sin = (torch.full((x.shape[1], P), value).to(backend) for value in (c, s))
        for order, options in ORDERS.items():
            y = rope.apply_rotary(x, cos, sin, **options)
            assert_same_bits(y, rounded_once(x, cos, sin, **options), f"{order}, {c}, {s}")


def test_ties_go_to_even(backend):
    for dtype in (torch.float16, torch.bfloat16):
        eps = torch.finfo(dtype).eps
        # 1 + eps/2 lies between 1 and 1 + eps (1 is even), 1 + 3 eps/2 between 1 + eps and
        # 1 + 2 eps.
        x = torch.zeros(1, 2, 1, D, dtype=dtype)
        x[..., 0], x[..., P] = 1, -1
        sin = torch.zeros(2, P)
        sin[0, 0], sin[1, 0] = eps / 2, 3 * eps / 2
        y = rope.apply_rotary(x.to(backend), torch.ones(2, P).to(backend), sin.to(backend)).cpu()
        assert y[0, :, 0, 0].tolist() == [1, 1 + 2 * eps], dtype


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


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_subnormals_are_kept(dtype, backend):
    """Of x, of the table, of products and of sums; with more tokens than one thread takes."""
    tokens, pairs = 800, 20
    tiny = torch.finfo(dtype).smallest_normal
    table_dtype = torch.promote_types(dtype, torch.float32)
    table_tiny = torch.finfo(table_dtype).smallest_normal
    x = random(1, tokens, 2, 2 * pairs, dtype=torch.float64)
    cos, sin = random_table(tokens, pairs, dtype=torch.float64)
    x[:, 0::4] *= tiny / 8  # subnormal x
    x[:, 1::4] *= 2 * tiny  # normal x whose products and sums are subnormal
    cos[2::4] *= table_tiny / 8  # subnormal tables
    sin[2::4] *= table_tiny / 8
    x[:, 3::4] *= tiny**0.5  # x and table are not small
    cos[3::4] *= tiny**0.5
    sin[3::4] *= tiny**0.5
    x = x.to(dtype)
    cos, sin = cos.to(table_dtype), sin.to(table_dtype)
    for order, options in ORDERS.items():
        y = rope.apply_rotary(x.to(backend), cos.to(backend), sin.to(backend), **options)
        assert_same_bits(y, rounded_once(x, cos, sin, **options), order)
    subnormal = (y.cpu() != 0) & (y.cpu().abs() < tiny)
    kinds = [kind for kind in range(4) if dtype != torch.float16 or kind != 2]  # 2: rounded to 0
    assert all(subnormal[:, kind::4].any() for kind in kinds)


def test_subnormals_are_kept_again_when_they_are_flushed_no_more(cpu_kernels):
    x, cos, sin = torch.full((1, 1, 1, D), 2.0**-140), torch.ones(1, P), torch.zeros(1, P)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        flushed = rope.apply_rotary(x, cos, sin)
    finally:
        torch.set_flush_denormal(False)
    assert not flushed.any()
    assert_same_bits(rope.apply_rotary(x, cos, sin), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_of_any_payload_stays_nan(dtype, backend):
    """Also if rounding it as a number would carry into its sign: all of its bits are set."""
    nan = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    x = torch.ones(1, S, 2, D, dtype=dtype)
    x.view(BITS[x.element_size()])[0, 0] = -1
    cos, sin = torch.ones(S, P), torch.zeros(S, P)
    cos[1], sin[2] = nan, nan
    for order, options in ORDERS.items():
        y = rope.apply_rotary(x.to(backend), cos.to(backend), sin.to(backend), **options).cpu()
        assert y[0, :3].isnan().all(), order
        assert y[0, 3].eq(1).all(), order


# Channels before the rotated ones, pairs, channels after: whole vectors, part of one, and both.
WIDTHS = [(0, P, 0), (3, 1, 0), (0, 5, 1), (2, 11, 3), (0, 41, 0)]


def channels_of_pairs(before, pairs, interleaved):
    """The two channels of each pair, [P, 2]."""
    first = torch.arange(pairs) * (2 if interleaved else 1)
    return before + torch.stack((first, first + (1 if interleaved else pairs)), -1)


@pytest.mark.parametrize(
    ("width", "order", "dtype"), pairwise(width=WIDTHS, order=ORDERS, dtype=DTYPES)
)
def test_nan_and_infinity_stay_within_their_pair(width, order, dtype, device):
    """One in every channel, token by token, in one of two heads; in both orders in memory."""
    before, pairs, after = width
    options = {"rotary_offset": before, **order}
    D = before + 2 * pairs + after
    x = random(1, 3 * D, 2, D, dtype=dtype)
    cos, sin = random_table(3 * D, pairs)
    clean = rounded_once(x, cos, sin, **options)
    hit = torch.zeros_like(x, dtype=torch.bool)  # channels of the result that are not finite
    into = channels_of_pairs(before, pairs, options.get("interleaved", False))
    out_of = options.get("interleaved_out", options.get("interleaved", False))
    channels = channels_of_pairs(before, pairs, out_of)
    reached = torch.arange(D).unsqueeze(-1).repeat(1, 2)  # from each channel of x
    reached[into] = channels.unsqueeze(1)
    token = torch.arange(3 * D)
    values = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    x[0, token, 1, token % D] = values[token // D]
    hit[0, token.unsqueeze(-1), 1, reached[token % D]] = True
    expected = rounded_once(x, cos, sin, **options)
    for arrange in (torch.clone, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        y = rope.apply_rotary(
            arrange(x.to(device)), cos.to(device), sin.to(device), **options
        ).cpu()
        assert_same_bits(y, expected)
        assert torch.equal(~y.isfinite(), hit)
        assert_same_bits(torch.where(hit, clean, y), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_in_the_table_reaches_its_pair_in_every_head(dtype, device):
    """One in every column of cos and of sin, row by row."""
    pairs = 19
    x = random(1, 2 * pairs, 3, 2 * pairs, dtype=dtype)
    cos, sin = random_table(2 * pairs, pairs)
    whole = cos.clone(), sin.clone()
    pair = torch.arange(pairs)
    cos[pair, pair] = sin[pairs + pair, pair] = float("nan")
    for order, options in ORDERS.items():
        clean = rounded_once(x, *whole, **options)
        out_of = options.get("interleaved_out", options.get("interleaved", False))
        reached = torch.zeros_like(x, dtype=torch.bool)
        for row, channels in enumerate(channels_of_pairs(0, pairs, out_of).repeat(2, 1)):
            reached[0, row, :, channels] = True
        y = rope.apply_rotary(x.to(device), cos.to(device), sin.to(device), **options).cpu()
        assert torch.equal(y.isnan(), reached), order
        assert_same_bits(torch.where(reached, clean, y), clean, order)


def test_zeros_keep_the_signs_of_the_formula(backend):
    signs = torch.tensor([0.0, -0.0, 1.0, -1.0])
    x1, x2, c, s = torch.cartesian_prod(signs, signs, signs, signs).unbind(-1)
    cos, sin = c.unsqueeze(-1).contiguous(), s.unsqueeze(-1).contiguous()
    for dtype in DTYPES:
        x = torch.stack((x1, x2), -1).view(1, -1, 1, 2).to(dtype)
        for inverse in (False, True):
            y = rope.apply_rotary(x.to(backend), cos.to(backend), sin.to(backend), inverse=inverse)
            assert_same_bits(y, rounded_once(x, cos, sin, inverse=inverse), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_channels_that_do_not_rotate_keep_their_bits(dtype, device):
    """Even NaNs with a payload, which arithmetic would change."""
    as_int = BITS[dtype.itemsize]
    before, after = 3, 5
    others = [*range(before), *range(before + D, before + D + after)]
    payload = torch.arange(before + after, dtype=as_int) + 1
    signalling = torch.tensor(float("inf"), dtype=dtype).view(as_int) + payload
    x = random(1, S, 2, before + D + after, dtype=dtype)
    x.view(as_int)[..., others] = signalling
    expected = x.view(as_int)[..., others].clone()
    x, table = x.to(device), random_table(S, P, device=device)
    y = rope.apply_rotary(x, *table, rotary_offset=before)
    assert torch.equal(y.cpu().view(as_int)[..., others], expected), "out of place"
    rope.apply_rotary_(x, *table, rotary_offset=before)
    assert torch.equal(x.cpu().view(as_int)[..., others], expected), "in place"
