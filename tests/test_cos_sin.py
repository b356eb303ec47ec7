"""cos and sin at any position against 60 digits, and the ways to ask for tables."""

import functools

import mpmath
import pytest
import torch
from support import DTYPES, assert_same_bits, name_of, naming, random_positions, ulp

import rope_ext

rope = torch.ops.rope
F64, F32, F16, BF16 = DTYPES
INTEGERS = (torch.int32, torch.int64)

HEAD_DIM = 128  # 64 pairs
POSITIONS = [0, 1, 4095, 131_071, 1_000_000, 10_000_000, 2**31 - 1]
# Between tokens, below one and in the millions, rounded to each dtype.
FRACTIONS = [0.5, -0.3, 1e-3, 2.0**-20, 7.25, -196.6, 1234.567, 60_000.7, 1e6 + 0.1, 2.0**31 - 0.3]
BASES = [1e4, 5e5]
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


def assert_within(ulps, inv_freq, positions, dtype, device, scaling=1.0):
    """Every entry, in ulp of its true value. positions: a list of integers, or a tensor."""
    ids = torch.as_tensor(positions)
    truth = exact(tuple(ids.tolist()), tuple(inv_freq.double().tolist()), scaling)
    got = rope.cos_sin(inv_freq.to(device), ids.to(device), attention_scaling=scaling, dtype=dtype)
    for name, a, of in zip(("cos", "sin"), got, truth, strict=True):
        nearest, rest = of.unbind(-1)
        error = ((a.cpu().double() - nearest) - rest).abs() / ulp(nearest, dtype)
        assert a.dtype == dtype
        assert error.max() <= ulps, f"{name}: {error.max()} ulp at entry {error.argmax()}"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("inv_freq_dtype", [F32, F64], ids=name_of)
def test_float32_is_within_1_ulp_at_any_position(inv_freq_dtype, base, device):
    assert_within(1, inv_freq_of(base, inv_freq_dtype), POSITIONS, F32, device)


@pytest.mark.parametrize("base", BASES)
def test_float64_is_within_1_ulp_at_any_position(base, device):
    assert_within(1, inv_freq_of(base, F64), POSITIONS, F64, device)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=name_of)
def test_16_bits_are_rounded_once(dtype, device):
    """The error before is far below 2^-20 ulp of 16 bits. Some cosines lie just beside a tie, on
    which float32 would put them.
    """
    assert_within(0.5 + 2.0**-20, inv_freq_of(1e4), POSITIONS, dtype, device)
    lower = torch.linspace(0.3, 0.9, 30).to(dtype)
    upper = (lower.view(torch.int16) + 1).view(dtype)
    ties = (lower.double() + upper.double()) / 2
    for beside in (-(2.0**-32), 2.0**-32):
        assert_within(0.5, (ties + beside).acos(), [1], dtype, device)


@pytest.mark.parametrize("position_dtype", DTYPES, ids=name_of)
def test_fractional_positions_are_within_1_ulp(position_dtype, device):
    ids = torch.tensor(FRACTIONS, dtype=F64).to(position_dtype)
    ids = ids[ids.isfinite()]  # 65,504 is the largest float16
    for dtype in (F32, F64):
        assert_within(1, inv_freq_of(5e5, F64, head_dim=32), ids, dtype, device)


@pytest.mark.parametrize("inv_freq_dtype", DTYPES, ids=name_of)
def test_angle_is_that_of_the_inv_freq_given(inv_freq_dtype, device):
    """The angle uses the inv_freq as given: not rounded to another dtype, not from the formula."""
    inv_freq = inv_freq_of(1e4, F64, head_dim=16).to(inv_freq_dtype)
    dtype = F64 if inv_freq_dtype == F64 else F32
    assert rope.cos_sin_cache(inv_freq.to(device), 1)[0].dtype == dtype
    assert_within(1, inv_freq, [12_345, 1_000_003], dtype, device)


# Angles close to multiples of pi/2, where the reduced angle is small and its relative error large:
# numerators of the continued fraction of pi/2, and pi itself in float64.
NEAR_MULTIPLES = {
    1.0: [11, 344, 51819, 260515, 573204, 4846147, 1068966896],
    3.141592653589793: [1, 2**31 - 1],
    1.5707963267948966: [1],
    0.7853981633974483: [3],
    0.7853981633974484: [1],
}


@pytest.mark.parametrize("dtype", [F32, F64], ids=name_of)
def test_angles_near_multiples_of_half_pi(dtype, device):
    for frequency, positions in NEAR_MULTIPLES.items():
        with naming(frequency):
            assert_within(1, torch.tensor([frequency], dtype=F64), positions, dtype, device)


@pytest.mark.parametrize("dtype", [F32, F64], ids=name_of)
def test_attention_scaling_is_multiplied_in_before_rounding(dtype, device):
    """Within 1 ulp of the product (float64: and half of one more, for the product itself)."""
    inv_freq = inv_freq_of(1e4, dtype, head_dim=32)
    for scaling in (0.1, 1.0, 1.3465735902799727, 32.0):
        ulps = 1 if dtype == F32 else 2
        assert_within(ulps, inv_freq, [1, 77, 100_000], dtype, device, scaling)
        row = rope.cos_sin(
            inv_freq.to(device), torch.tensor(77).to(device), attention_scaling=scaling
        )
        table = rope.cos_sin_cache(inv_freq.to(device), 2, start=76, attention_scaling=scaling)
        for a, b in zip(table, row, strict=True):
            assert_same_bits(a[1], b)


def test_position_0_is_no_rotation_and_negative_ones_turn_the_other_way(device):
    inv_freq = inv_freq_of(1e4).to(device)
    ids = torch.tensor(POSITIONS, device=device)
    (cos, sin), (cos_minus, sin_minus) = (rope.cos_sin(inv_freq, p) for p in (ids, -ids))
    assert_same_bits(cos[0], torch.ones(HEAD_DIM // 2))
    assert_same_bits(sin[0], torch.zeros(HEAD_DIM // 2))
    assert torch.equal(cos_minus.cpu(), cos.cpu())
    assert torch.equal(sin_minus.cpu(), -sin.cpu())


OUT_OF_REACH = [  # position, frequency
    (2**50, 1.0),  # the first angle that is too large
    (-(2**50), 1.0),
    (2**53 + 2, 2.0**-20),  # a position that float64 may not hold
    (-(2**63), 1.0),
    (2**63 - 1, 1e-4),
    (1, 2.0**50),
    (1, float("inf")),
    (1, float("nan")),
    (0, float("inf")),
    (2.0**53, 1e-12),
    (2.0**53, 0.0),
    (-(2.0**60), 0.0),
    (float("inf"), 0.0),
    (float("nan"), 1e-12),
]


def out_of_reach(dtype, device):
    """cos and sin at each, beside a position within reach."""
    for position, frequency in OUT_OF_REACH:
        ids_dtype = F64 if isinstance(position, float) else torch.int64
        ids = torch.tensor([position, 1], dtype=ids_dtype, device=device)
        inv_freq = torch.tensor([frequency], dtype=F64, device=device)
        yield position, frequency, rope.cos_sin(inv_freq, ids, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_angle_that_is_out_of_reach_is_nan_and_never_wrong(dtype, device):
    for position, frequency, tables in out_of_reach(dtype, device):
        other = not abs(frequency) < 2**50  # the other position is out of reach too
        with naming(f"{position} times {frequency}"):
            assert [t.cpu().isnan().tolist() for t in tables] == [[[True], [other]]] * 2


def test_largest_angle_is_right(device):
    """Just below 2^50, with positions and frequencies that float64 represents exactly."""
    assert_within(1, torch.tensor([1.0, 0.5]), [2**50 - 1], F32, device)
    floating = torch.tensor([2.0**53 - 1], dtype=F64)
    assert_within(1, torch.tensor([1e-12, 0.0], dtype=F64), floating, F64, device)


def test_vectors_have_the_bits_of_the_portable_code(vector_code):
    def tables():
        for ids in (random_positions(3, 700, rows=2**31 - 1), torch.tensor(FRACTIONS)):
            for dtype in DTYPES:
                for pairs in (64, 11, 3):
                    yield ids.dtype, dtype, rope.cos_sin(inv_freq_of(1e4)[:pairs], ids, dtype=dtype)
        for dtype in DTYPES:
            yield from out_of_reach(dtype, "cpu")

    fast = list(tables())
    rope_ext._C.set_cpu_capability("portable")
    for (*name, expected), (*_, got) in zip(fast, tables(), strict=True):
        for a, b in zip(got, expected, strict=True):
            with naming(name):
                assert_same_bits(a, b)


# ---- ways to ask for tables


SHAPES = [(), (1,), (7,), (2, 7), (3, 2, 7), (2, 1, 3, 1), (0,), (2, 0)]


@pytest.mark.parametrize("dtype", INTEGERS, ids=name_of)
def test_rows_have_the_shape_of_the_positions(dtype, device):
    inv_freq = inv_freq_of(1e4).to(device)
    tables = [t.cpu() for t in rope_ext.cos_sin_cache(inv_freq, 5000)]
    for shape in SHAPES:
        ids = random_positions(*shape, rows=5000, dtype=dtype, device=device)
        for rows, table in zip(rope_ext.cos_sin(inv_freq, ids), tables, strict=True):
            assert rows.shape == (*shape, HEAD_DIM // 2)
            assert rows.is_contiguous()
            assert_same_bits(rows, table[ids.cpu().long()])


VIEWS = {
    "transposed": lambda make: make(7, 2).t(),
    "every second": lambda make: make(4, 14)[::2, 1::2],
    "expanded": lambda make: make(1, 7).expand(3, 7),
    "offset": lambda make: make(15)[1:].view(2, 7),
    "permuted": lambda make: make(2, 7, 3).permute(2, 0, 1),
}


@pytest.mark.parametrize("dtype", INTEGERS, ids=name_of)
def test_positions_may_be_views(dtype, device):
    inv_freq = inv_freq_of(1e4).to(device)
    for name, view in VIEWS.items():
        ids = view(functools.partial(random_positions, rows=5000, dtype=dtype, device=device))
        expected = rope.cos_sin(inv_freq, ids.cpu().contiguous().to(device))
        for a, b in zip(rope.cos_sin(inv_freq, ids), expected, strict=True):
            with naming(name):
                assert_same_bits(a, b)


@pytest.mark.parametrize("start", [1, -4, 2**31 - 5])
def test_start_is_the_position_of_the_first_row(start, device):
    inv_freq = inv_freq_of(5e5).to(device)
    expected = rope.cos_sin(inv_freq, torch.arange(start, start + 9).to(device))
    for a, b in zip(rope.cos_sin_cache(inv_freq, 9, start=start), expected, strict=True):
        assert_same_bits(a, b)


def test_dtype_is_float32_unless_asked_for(device):
    inv_freq = inv_freq_of(1e4).to(device)
    for dtype in (None, *DTYPES):
        for tables in (
            rope_ext.cos_sin_cache(inv_freq, 3, dtype=dtype),
            rope_ext.cos_sin(inv_freq, torch.arange(3).to(device), dtype=dtype),
        ):
            assert [(t.dtype, t.device.type) for t in tables] == [(dtype or F32, device.type)] * 2


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


def test_any_number_of_pairs(device):
    inv_freq = inv_freq_of(1e4)
    ids = random_positions(5, rows=10**6, device=device)
    all_pairs = rope.cos_sin(inv_freq.to(device), ids)
    for pairs in (1, 2, 3, 5, 8, 11, 16, 19):
        some_pairs = rope.cos_sin(inv_freq[:pairs].to(device), ids)
        for a, b in zip(some_pairs, all_pairs, strict=True):
            with naming(f"{pairs} pairs"):
                assert_same_bits(a, b[:, :pairs])


def test_inv_freq_may_be_a_view(device):
    inv_freq = inv_freq_of(1e4).to(device)
    every_second = torch.stack((inv_freq, inv_freq + 1), -1)[:, 0]
    ids = torch.arange(3).to(device)
    for a, b in zip(rope.cos_sin(every_second, ids), rope.cos_sin(inv_freq, ids), strict=True):
        assert_same_bits(a, b)


def test_number_of_threads_does_not_change_a_bit(threads):
    tables = []
    for count in (1, 2, 3):
        threads(count)
        tables.append(torch.stack(rope.cos_sin_cache(inv_freq_of(1e4), 3001)))
    for table in tables[1:]:
        assert_same_bits(table, tables[0])


# ---- frequencies


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "base"),
    [(128, None, 1e4), (64, None, 5e5), (96, 24, 1e4), (256, 64, 10000)],
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
