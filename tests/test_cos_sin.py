"""cos and sin at any position against 60 digits, and the ways to ask for tables."""

import functools

import mpmath
import pytest
import torch
from support import DTYPES, assert_same_bits, name_of, random_positions, ulp

import rope_ext

rope = torch.ops.rope
F64, F32, F16, BF16 = DTYPES

HEAD_DIM = 128  # 64 pairs
POSITIONS = [0, 1, 4095, 131_071, 1_000_000, 10_000_000, 2**31 - 1]
BASES = [1e4, 5e5]
# Rounding twice, to float32 and then to 16 bits, would add 2^-14 ulp of float16.
TWICE = 2.0**-13
DIGITS = 60


def inv_freq_of(base, dtype=F32, head_dim=HEAD_DIM):
    if dtype == F64:
        return base ** (-torch.arange(0, head_dim, 2, dtype=F64) / head_dim)
    return rope_ext.frequencies.default(head_dim, base=base)[0].to(dtype)


@functools.cache
def exact(positions, inv_freq, scaling=1.0):
    """cos and sin of position times inv_freq, each as (nearest float64, the remainder) [S, P]."""

    def split(value):
        nearest = float(value)
        return nearest, float(value - mpmath.mpf(nearest))

    with mpmath.workdps(DIGITS):
        angles = [[mpmath.mpf(p) * mpmath.mpf(f) for f in inv_freq] for p in positions]
        return tuple(
            torch.tensor([[split(function(a) * scaling) for a in row] for row in angles], dtype=F64)
            for function in (mpmath.cos, mpmath.sin)
        )


def worst_error(got, truth, dtype):
    """The largest error in ulp of the true value."""
    nearest, rest = truth.unbind(-1)
    error = ((got.cpu().double() - nearest) - rest).abs()
    return (error / ulp(nearest, dtype)).max().item()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("inv_freq_dtype", [F32, F64], ids=name_of)
def test_float32_is_within_1_ulp_at_any_position(inv_freq_dtype, base, backend):
    inv_freq = inv_freq_of(base, inv_freq_dtype)
    truth = exact(tuple(POSITIONS), tuple(inv_freq.tolist()))
    ids = torch.tensor(POSITIONS, device=backend)
    got = rope.cos_sin(inv_freq.to(backend), ids, dtype=F32)
    for a, b in zip(got, truth, strict=True):
        assert worst_error(a, b, F32) <= 1


@pytest.mark.parametrize("base", BASES)
def test_float64_is_within_1_ulp_at_any_position(base, backend):
    inv_freq = inv_freq_of(base, F64)
    truth = exact(tuple(POSITIONS), tuple(inv_freq.tolist()))
    got = rope.cos_sin(inv_freq.to(backend), torch.tensor(POSITIONS, device=backend))
    for a, b in zip(got, truth, strict=True):
        assert a.dtype == F64
        assert worst_error(a, b, F64) <= 1


@pytest.mark.parametrize("dtype", [F16, BF16], ids=name_of)
def test_16_bits_are_rounded_once(dtype, backend):
    inv_freq = inv_freq_of(1e4)
    truth = exact(tuple(POSITIONS), tuple(inv_freq.tolist()))
    ids = torch.tensor(POSITIONS, device=backend)
    for a, b in zip(rope.cos_sin(inv_freq.to(backend), ids, dtype=dtype), truth, strict=True):
        assert a.dtype == dtype
        assert worst_error(a, b, dtype) <= 0.5 + TWICE


# Between tokens, below one and in the millions, rounded to each dtype.
FRACTIONS = [0.5, -0.3, 1e-3, 2.0**-20, 7.25, -196.6, 1234.567, 60_000.7, 1e6 + 0.1, 2.0**31 - 0.3]


@pytest.mark.parametrize("position_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", [F32, F64], ids=name_of)
def test_fractional_positions_are_within_1_ulp(dtype, position_dtype, backend):
    ids = torch.tensor(FRACTIONS, dtype=F64).to(position_dtype)
    ids = ids[ids.isfinite()]  # 65,504 is the largest float16
    inv_freq = inv_freq_of(5e5, F64, head_dim=32)
    truth = exact(tuple(ids.double().tolist()), tuple(inv_freq.tolist()))
    got = rope.cos_sin(inv_freq.to(backend), ids.to(backend), dtype=dtype)
    for a, b in zip(got, truth, strict=True):
        assert worst_error(a, b, dtype) <= 1


@pytest.mark.parametrize("position", [2.0**53, -(2.0**60), float("inf"), float("nan")])
def test_floating_position_that_is_out_of_reach_is_nan(position, backend):
    inv_freq = torch.tensor([1e-12, 0.0], dtype=F64, device=backend)
    ids = torch.tensor([position, 2.0**53 - 1], dtype=F64, device=backend)
    for table in rope.cos_sin(inv_freq, ids):
        assert table.cpu().isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("inv_freq_dtype", DTYPES, ids=name_of)
def test_angle_is_that_of_the_inv_freq_given(inv_freq_dtype, device):
    """The angle uses the inv_freq as given: not rounded to another dtype, not from the formula."""
    inv_freq = inv_freq_of(1e4, F64, head_dim=16).to(inv_freq_dtype)
    truth = exact((12_345, 1_000_003), tuple(inv_freq.double().tolist()))
    got = rope.cos_sin(inv_freq.to(device), torch.tensor([12_345, 1_000_003], device=device))
    for a, b in zip(got, truth, strict=True):
        assert a.dtype == (F64 if inv_freq_dtype == F64 else F32)
        assert worst_error(a, b, a.dtype) <= 1


# Angles close to multiples of pi/2, where the reduced angle is small and its relative error large:
# numerators of the continued fraction of pi/2, and pi itself in float64.
NEAR_MULTIPLES = [
    (11, 1.0),
    (344, 1.0),
    (51819, 1.0),
    (260515, 1.0),
    (573204, 1.0),
    (4846147, 1.0),
    (1068966896, 1.0),
    (1, 3.141592653589793),
    (2**31 - 1, 3.141592653589793),
    (1, 1.5707963267948966),
    (3, 0.7853981633974483),
    (1, 0.7853981633974484),
]


@pytest.mark.parametrize(("position", "frequency"), NEAR_MULTIPLES)
@pytest.mark.parametrize("dtype", [F32, F64], ids=name_of)
def test_angles_near_multiples_of_half_pi(dtype, position, frequency, backend):
    truth = exact((position,), (frequency,))
    got = rope.cos_sin(
        torch.tensor([frequency], dtype=F64, device=backend),
        torch.tensor([position], device=backend),
        dtype=dtype,
    )
    for a, b in zip(got, truth, strict=True):
        assert worst_error(a, b, dtype) <= 1


@pytest.mark.parametrize("scaling", [0.1, 1.0, 1.3465735902799727, 32.0])
@pytest.mark.parametrize("dtype", [F32, F64], ids=name_of)
def test_attention_scaling_is_multiplied_in_before_rounding(dtype, scaling, backend):
    """Within 1 ulp of the product (float64: and half of one more, for the product itself)."""
    inv_freq = inv_freq_of(1e4, dtype, head_dim=32)
    truth = exact((1, 77, 100_000), tuple(inv_freq.tolist()), scaling)
    ids = torch.tensor([1, 77, 100_000], device=backend)
    allowed = 1 if dtype == F32 else 2
    got = rope.cos_sin(inv_freq.to(backend), ids, attention_scaling=scaling)
    for a, b in zip(got, truth, strict=True):
        assert worst_error(a, b, dtype) <= allowed
    table = rope.cos_sin_cache(inv_freq.to(backend), 2, start=76, attention_scaling=scaling)
    for a, b in zip(table, got, strict=True):
        assert_same_bits(a[1], b[1])


def test_position_0_is_exactly_no_rotation(backend):
    cos, sin = rope.cos_sin_cache(inv_freq_of(1e4).to(backend), 1)
    assert_same_bits(cos, torch.ones(1, HEAD_DIM // 2))
    assert_same_bits(sin, torch.zeros(1, HEAD_DIM // 2))


def test_negative_positions_turn_the_other_way(backend):
    inv_freq = inv_freq_of(1e4).to(backend)
    ids = torch.tensor(POSITIONS, device=backend)
    (cos, sin), (cos_minus, sin_minus) = (rope.cos_sin(inv_freq, p) for p in (ids, -ids))
    assert torch.equal(cos_minus.cpu(), cos.cpu())
    assert torch.equal(sin_minus.cpu(), -sin.cpu())


@pytest.mark.parametrize(
    ("position", "frequency"),
    [
        (2**50, 1.0),  # the first angle that is too large
        (-(2**50), 1.0),
        (2**53 + 2, 2.0**-20),  # a position that float64 may not hold
        (-(2**63), 1.0),
        (2**63 - 1, 1e-4),
        (1, 2.0**50),
        (1, float("inf")),
        (1, float("nan")),
        (0, float("inf")),
    ],
)
def test_angle_that_is_out_of_reach_is_nan_and_never_wrong(position, frequency, backend):
    inv_freq = torch.tensor([frequency, 1e-30], dtype=F64, device=backend)
    for dtype in DTYPES:
        cos, sin = rope.cos_sin(inv_freq, torch.tensor([position], device=backend), dtype=dtype)
        assert cos[0, 0].isnan()
        assert sin[0, 0].isnan()


def test_largest_angle_is_right(backend):
    """Just below 2^50, with a position and a frequency that float64 represents exactly."""
    position = 2**50 - 1
    truth = exact((position,), (1.0, 0.5))
    inv_freq = torch.tensor([1.0, 0.5], device=backend)
    got = rope.cos_sin(inv_freq, torch.tensor([position], device=backend))
    for a, b in zip(got, truth, strict=True):
        assert a.isfinite().all()
        assert worst_error(a, b, F32) <= 1


# ---- ways to ask for tables


SHAPES = [(), (1,), (7,), (2, 7), (3, 2, 7), (2, 1, 3, 1), (0,), (2, 0)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_have_the_shape_of_the_positions(shape, dtype, device):
    inv_freq = inv_freq_of(1e4).to(device)
    ids = random_positions(*shape, rows=5000, dtype=dtype, device=device)
    cos, sin = rope_ext.cos_sin(inv_freq, ids)
    table_cos, table_sin = (t.cpu() for t in rope_ext.cos_sin_cache(inv_freq, 5000))
    assert cos.shape == sin.shape == (*shape, HEAD_DIM // 2)
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert_same_bits(cos, table_cos[ids.cpu().long()])
    assert_same_bits(sin, table_sin[ids.cpu().long()])


@pytest.mark.parametrize("view", ["transposed", "every second", "expanded", "offset", "permuted"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=name_of)
def test_positions_may_be_views(dtype, view, device):
    def make(*shape):
        return random_positions(*shape, rows=5000, dtype=dtype, device=device)

    ids = {
        "transposed": lambda: make(7, 2).t(),
        "every second": lambda: make(4, 14)[::2, 1::2],
        "expanded": lambda: make(1, 7).expand(3, 7),
        "offset": lambda: make(15)[1:].view(2, 7),
        "permuted": lambda: make(2, 7, 3).permute(2, 0, 1),
    }[view]()
    inv_freq = inv_freq_of(1e4).to(device)
    expected = rope.cos_sin(inv_freq, ids.cpu().contiguous().to(device))
    for a, b in zip(rope.cos_sin(inv_freq, ids), expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("start", [1, 300, -4, 2**31 - 5])
def test_start_is_the_position_of_the_first_row(start, device):
    inv_freq = inv_freq_of(5e5).to(device)
    ids = torch.arange(start, start + 9).to(device)
    expected = rope.cos_sin(inv_freq, ids)
    for a, b in zip(rope.cos_sin_cache(inv_freq, 9, start=start), expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(
    "dtype", [None, *DTYPES], ids=lambda d: "none" if d is None else name_of(d)
)
def test_dtype_is_float32_unless_asked_for(dtype, device):
    inv_freq = inv_freq_of(1e4).to(device)
    for tables in (
        rope_ext.cos_sin_cache(inv_freq, 3, dtype=dtype),
        rope_ext.cos_sin(inv_freq, torch.arange(3).to(device), dtype=dtype),
    ):
        assert [t.dtype for t in tables] == [dtype or F32] * 2
        assert [t.device.type for t in tables] == [device.type] * 2


def test_cos_and_sin_share_no_memory(device):
    cos, sin = rope.cos_sin_cache(inv_freq_of(1e4).to(device), 3)
    kept = sin.clone()
    cos.fill_(7)
    assert_same_bits(sin, kept)


def test_no_rows_and_no_pairs(device):
    inv_freq = inv_freq_of(1e4).to(device)
    nothing = torch.empty(0, device=device)
    assert rope.cos_sin_cache(inv_freq, 0)[0].shape == (0, HEAD_DIM // 2)
    assert rope.cos_sin_cache(nothing, 3)[1].shape == (3, 0)
    assert rope.cos_sin(nothing, torch.arange(3).to(device))[0].shape == (3, 0)


@pytest.mark.parametrize("pairs", [1, 2, 3, 5, 8, 11, 16, 19])
def test_any_number_of_pairs(pairs, backend):
    inv_freq = inv_freq_of(1e4)
    ids = random_positions(5, rows=10**6, device=backend)
    all_pairs = rope.cos_sin(inv_freq.to(backend), ids)
    some_pairs = rope.cos_sin(inv_freq[:pairs].to(backend), ids)
    for a, b in zip(some_pairs, all_pairs, strict=True):
        assert_same_bits(a, b[:, :pairs])


def test_inv_freq_may_be_a_view(device):
    inv_freq = inv_freq_of(1e4).to(device)
    every_second = torch.stack((inv_freq, inv_freq + 1), -1)[:, 0]
    ids = torch.arange(3).to(device)
    for a, b in zip(rope.cos_sin(every_second, ids), rope.cos_sin(inv_freq, ids), strict=True):
        assert_same_bits(a, b)


def test_portable_and_avx2_give_the_same_bits(avx2):
    inv_freq, ids = inv_freq_of(1e4), random_positions(3, 700, rows=2**31 - 1)
    for dtype in DTYPES:
        rope_ext._C.set_cpu_capability("avx2")
        fast = rope.cos_sin(inv_freq, ids, dtype=dtype)
        rope_ext._C.set_cpu_capability("portable")
        slow = rope.cos_sin(inv_freq, ids, dtype=dtype)
        assert_same_bits(fast[0], slow[0])
        assert_same_bits(fast[1], slow[1])


def test_number_of_threads_does_not_change_a_bit(threads):
    tables = []
    for count in (1, 2, 3):
        threads(count)
        tables.append(rope.cos_sin_cache(inv_freq_of(1e4), 3001))
    for cos, sin in tables[1:]:
        assert_same_bits(cos, tables[0][0])
        assert_same_bits(sin, tables[0][1])


# ---- frequencies


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "base"),
    [(128, None, 1e4), (64, None, 5e5), (96, 24, 1e4), (80, 32, 1e6), (256, 64, 10000)],
)
def test_default_frequencies_have_the_bits_of_the_formula(head_dim, rotary_dim, base, device):
    inv_freq, scaling = rope_ext.frequencies.default(
        head_dim, base=base, rotary_dim=rotary_dim, device=device
    )
    dim = rotary_dim or head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    expected = 1.0 / (base**exponents)  # powers differ in their last bit between devices
    assert inv_freq.device.type == device.type
    assert_same_bits(inv_freq, expected)
    assert scaling == 1.0


@pytest.mark.parametrize(("rotary_dim", "base"), [(7, 1e4), (0, 1e4), (66, 1e4), (-2, 1e4)])
def test_frequencies_refuse_a_rotary_dim_out_of_bounds(rotary_dim, base):
    with pytest.raises(ValueError, match=f"rotary_dim to be even, .*head_dim 64, got {rotary_dim}"):
        rope_ext.frequencies.default(64, base=base, rotary_dim=rotary_dim)


@pytest.mark.parametrize("base", [0.0, -1e4, float("nan")])
def test_frequencies_refuse_a_base_that_is_not_positive(base):
    with pytest.raises(ValueError, match=f"expected base to be .*above 0, got {base}"):
        rope_ext.frequencies.default(64, base=base)
