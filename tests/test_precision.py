"""benchmarks/precision.py: its truth is right, and errors of known size are measured right."""

import csv
import math
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="pip install 'rope_ext[test]'")
pytest.importorskip("mpmath", reason="pip install 'rope_ext[test]'")
pytest.importorskip("tqdm", reason="pip install 'rope_ext[test]'")
pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import mpmath
import precision
from verify import WrongResult

import rope_ext
from rope_ext import reference
from rope_ext.viz.figures.errors import angle_between, exact_parts

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
POSITIONS = torch.tensor([0, 1, 3, 4095, 131_071, 1_000_003, 2**28 - 1])
INV_FREQ, _ = rope_ext.frequencies.default(16, base=5e5)
FLOAT32 = 2.0**-25  # half a unit in the last place below 1
ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "precision.md", ROOT / "benchmarks" / "results" / "precision.md"


@pytest.fixture
def truth():
    return exact_parts(POSITIONS, INV_FREQ)


def angles():
    """Angles as fractions, and so exact: [N][P]."""
    return [[p * Fraction(f) for f in INV_FREQ.tolist()] for p in POSITIONS.tolist()]


# ---- the truth


def test_truth_is_that_of_the_c_library_where_float64_holds_the_angle(truth):
    """The product of 28 and 24 bits is exact, and libm reduces it by a thousand bits of pi."""
    for function, (near, _) in zip((math.cos, math.sin), truth, strict=True):
        theirs = [[function(float(angle)) for angle in row] for row in angles()]
        assert all(Fraction(float(angle)) == angle for row in angles() for angle in row)
        assert (near - torch.tensor(theirs, dtype=F64)).abs().max() <= 2.0**-53
    # with what rounding to float64 leaves, cos^2 + sin^2 = 1
    parts = ([Fraction(x) for x in t.flatten().tolist()] for of in truth for t in of)
    for cos, cos_rest, sin, sin_rest in zip(*parts, strict=True):
        assert abs((cos + cos_rest) ** 2 + (sin + sin_rest) ** 2 - 1) < Fraction(1, 10**30)
        assert abs(cos_rest) <= math.ulp(float(cos)) / 2


# ---- tables


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_neighbour_of_the_nearest_number_is_off_by_one_unit(dtype, truth):
    cos, sin = (near.to(dtype, copy=True) for near, _ in truth)
    before = precision.table_ulps((cos, sin), truth, dtype)
    assert before.max() <= 0.5
    cos[4, 1] = cos[4, 1].nextafter(torch.tensor(2.0, dtype=dtype))
    after = precision.table_ulps((cos, sin), truth, dtype)
    was, now = before[0, 4, 1].item(), after[0, 4, 1].item()
    assert 1 in (pytest.approx(now - was), pytest.approx(now + was))  # past the truth, or across it
    after[0, 4, 1] = was
    assert torch.equal(before, after)


OURS = rope_ext.cos_sin
WRONG_TABLES = {
    "of the next token": lambda f, p: rope_ext.cos_sin(f, p + 1),
    "of another base": lambda f, p: rope_ext.cos_sin(f**1.01, p),
    "sin and cos": lambda f, p: rope_ext.cos_sin(f, p)[::-1],
    "the other way": lambda f, p: rope_ext.cos_sin(f, -p),
    "rounded to bfloat16": lambda f, p: rope_ext.cos_sin(f, p, dtype=BF16),
    "of rounded angles": precision.usual,
    "one number": lambda f, p: [t + 1e-6 * (p[:, None] == 4095) * (f == f[5]) for t in OURS(f, p)],
    "NaN": lambda f, p: [t * float("nan") for t in OURS(f, p)],
}


def test_a_wrong_table_is_found_to_be_wrong(truth, monkeypatch):
    def largest(table):
        return precision.largest_and_high(precision.table_errors(table, truth))[0]

    assert largest(OURS(INV_FREQ, POSITIONS)) < 1.01 * FLOAT32
    for name, wrong in WRONG_TABLES.items():
        assert not largest(wrong(INV_FREQ, POSITIONS)) < 30 * FLOAT32, name
    # the same in the rows of a report
    monkeypatch.setitem(precision.TABLES, precision.OURS, WRONG_TABLES["one number"])
    rows = list(precision.measured(1e4, 4096, 2))
    (row,) = (r for r in rows if (r.quantity, r.way) == ("ulp", precision.OURS))
    assert not row.largest < 1


def test_usual_angles_are_off_by_the_rounding_of_their_product(truth):
    """An angle below 2^n by at most 2^(n - 25): 2^-5 of 2^20, and 2^-7 of 0.19 of it."""
    (cos, _), (sin, _) = truth
    got = angle_between((cos, sin), precision.usual(INV_FREQ, POSITIONS))
    for n, (position, row) in enumerate(zip(POSITIONS.tolist(), angles(), strict=True)):
        if position < 2**24:  # float32 holds the position
            for pair, angle in enumerate(row):
                rounded = Fraction(torch.tensor(float(angle)).item())
                assert got[n, pair].item() == pytest.approx(float(abs(rounded - angle)), abs=2**-23)
    assert 2.0**-9 < got[5].max() <= 2.0**-7


def test_the_usual_way_is_held_against_transformers(monkeypatch):
    inv_freq, _ = rope_ext.frequencies.default(precision.HEAD_DIM)
    precision.check_usual(inv_freq, 1e4, POSITIONS)
    monkeypatch.setattr(precision, "usual", lambda f, p, dtype: OURS(f.float(), p, dtype=dtype))
    with pytest.raises(WrongResult, match=r"^cos of transformers differs: cast to torch.float32"):
        precision.check_usual(inv_freq, 1e4, POSITIONS)


def test_frequencies_are_held_against_the_formula():
    """One rounding leaves at most 2^-24 of an angle; inv_freq is a quotient of a rounded power."""
    inv_freq, _ = rope_ext.frequencies.default(precision.HEAD_DIM)
    position = 1_000_003
    rounded, both = precision.frequency_errors(inv_freq, 1e4, torch.tensor([position])).values()
    with mpmath.workdps(40):
        formula = [mpmath.mpf(10_000) ** (-mpmath.mpf(pair) / 64) for pair in range(64)]
        off = [position * (f - g) for f, g in zip(inv_freq.tolist(), formula, strict=True)]
    expected = torch.tensor([[abs(float(angle)) for angle in off]], dtype=F64)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=2.0**-51 * position)
    assert both.max() <= rounded.max() + 2.0**-5


# ---- rotations and scores


def turned_by(more):
    """A rotation by an additional angle, in float64."""

    def rotate(x, inv_freq, positions):
        angle = positions[:, None].double() * inv_freq.double() + more
        return reference.apply_rotary(x.double(), angle.cos(), angle.sin())

    return rotate


def test_the_error_of_a_rotation_is_the_angle_that_it_is_off_by():
    positions = torch.arange(100, 108)
    x = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(0)).to(BF16)
    table = tuple(near for near, _ in exact_parts(positions, INV_FREQ))
    for more in (0.0, 1e-3, 0.5):
        errors = precision.rotation_errors(turned_by(more), x, INV_FREQ, positions, table)
        assert errors.shape == (8, 3, 8)
        chord = torch.full_like(errors, 2 * math.sin(more / 2))
        torch.testing.assert_close(errors, chord, rtol=1e-9, atol=1e-12)


def test_the_error_of_a_score_is_what_it_depends_on_beside_the_distance():
    first, distance = torch.tensor([0, 5, 1000]), torch.tensor([1, 20, 64])
    q = k = torch.tensor([1.0, 0.0]).expand(3, 1, 2)  # one head of one pair
    inv_freq = torch.tensor([0.25])
    angle = 0.25 * distance[:, None].double()
    truth = angle.cos(), angle.sin()

    def errors(rotate):
        return precision.score_errors(rotate, q, k, inv_freq, first, distance, truth)

    # a constant added to both positions changes nothing
    assert errors(turned_by(0.5)).max() < 1e-12
    # another frequency: cos(d f') against cos(d f), over sqrt(2)

    def faster(x, inv_freq, positions):
        return turned_by(0)(x, 1.1 * inv_freq.double(), positions)

    expected = [abs(math.cos(0.275 * d) - math.cos(0.25 * d)) / 2**0.5 for d in (1, 20, 64)]
    assert errors(faster).flatten().tolist() == pytest.approx(expected)


# ---- measurement and report


@pytest.mark.slow
def test_a_run_reports_the_same_every_time(tmp_path, monkeypatch, capsys, threads):
    threads(1)
    monkeypatch.setattr(precision, "BASES", (500_000.0,))
    monkeypatch.setattr(precision, "CONTEXTS", (1 << 20,))
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        monkeypatch.setattr(sys, "argv", ["precision", "--quick", f"--out={folder}"])
        precision.main()
        written = (folder / "precision.md").read_text()
        assert written.split("\n\n", 1)[1].strip() in capsys.readouterr().out
    for name in ("precision.csv", "precision.png"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    with (one / "precision.csv").open(newline="") as file:
        of = {(row["quantity"], row["way"]): float(row["largest"]) for row in csv.DictReader(file)}
    assert of["table", "rope_ext"] < 1.01 * FLOAT32 * 1.01
    assert 0.005 < of["table", "usual"] <= 2.0**-5
    assert of["score", "rope_ext, float32"] < 1e-5 < of["score", "transformers, float32"]


# ---- the page


def test_the_page_has_the_figures_of_the_results():
    results, page = RESULTS.read_text().splitlines(), PAGE.read_text()
    rows = [line for line in page.splitlines() if line.startswith("| 500,000 |")]
    assert len(rows) >= 15
    assert set(rows) <= set(results)
    with RESULTS.with_suffix(".csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["context"] == str(1 << 20)]
    rows = [row for row in rows if row["quantity"] in ("table", "frequency")]
    of = {(row["base"], row["way"]): f"{float(row['largest']):.2g}" for row in rows}
    inv_freq, both = precision.frequency_errors(torch.ones(64), 1e4, POSITIONS)
    text = " ".join(page.split())
    one, other = ((of[base, inv_freq], of[base, both]) for base in ("500000", "10000"))
    assert f"by up to {one[0]} radians at a million tokens" in text
    assert f"of the product by up to {one[1]} (base 10,000: {other[0]} and {other[1]})" in text
