"""The figures of `python -m rope_ext plot`: their numbers, read from their axes."""

import cmath
import functools
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import rope_ext
from rope_ext import frequencies, viz
from rope_ext.__main__ import main
from rope_ext.viz import FIGURES, Rope

matplotlib = pytest.importorskip("matplotlib", reason="pip install 'rope_ext[test]'")
import mpmath  # noqa: E402

from rope_ext.viz import figures  # noqa: E402
from rope_ext.viz.figures import errors, style  # noqa: E402

F64 = torch.float64
LONG = {"rope_type": "longrope", "factor": 16.0, "original_max_position_embeddings": 2048}
CONFIGS = {
    # a base of half a million, no method
    "like Llama 3": viz.rope.LLAMA_LIKE,
    # an attention scaling that is not 1
    "yarn": {
        "head_dim": 64,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    # half of the channels rotate; other frequencies past the trained context
    "longrope, partial": {
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 32768,
        "rope_scaling": {
            **LONG,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + i for i in range(8)],
        },
    },
    # pairs that never rotate
    "proportional": {
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    },
}
# cos and sin are within 1 ulp of float32, at most 2^-24 below 1; a rotation rounds twice more.
TABLE = 2.0**-24
ROTATED = 2.0**-22
# A score is a sum over D products of two rotated numbers of about 1, so of D errors of about 2^-23.
SCORE = 2.0**-23 * 16


@functools.cache
def rope_of(name):
    return Rope.of(CONFIGS[name])


@functools.cache
def drawn(figure, name):
    return getattr(figures, figure)(rope_of(name))


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def lines(axes):
    """The lines of data, not those that mark a context, by label."""
    marks = [line for line in axes.get_lines() if line.get_label().startswith("_")]
    return {
        line.get_label(): (torch.tensor(line.get_xdata()).double(), torch.tensor(line.get_ydata()))
        for line in axes.get_lines()
        if line not in marks or len(line.get_xdata()) > 2
    }


def marked(axes, *, across):
    marks = [line for line in axes.get_lines() if line.get_label().endswith("tokens")]
    return [(mark.get_ydata() if across else mark.get_xdata())[0] for mark in marks]


# ---------------------------------------------------------------------------------- the rotation


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # trained, extended, factor, rope_type, and the last frequency, times that of default
        (CONFIGS["like Llama 3"], (8192, 65536, 8.0, "default", 1)),
        (CONFIGS["yarn"], (8192, 32768, 4.0, "yarn", 1 / 4)),
        (CONFIGS["longrope, partial"], (2048, 32768, 16.0, "longrope", 1 / 8)),  # the long factor
        (CONFIGS["proportional"], (512, 4096, 8.0, "proportional", 0)),
        (  # max_position_embeddings exceed the factor times the original length, as in Llama 3.1
            {
                "head_dim": 64,
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            (8192, 131072, 8.0, "llama3", 1 / 8),
        ),
        (  # in a sequence of the extended context, 1 + factor (4 - 1) = 4 * 4 - 3
            {
                "head_dim": 64,
                "max_position_embeddings": 512,
                "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
            },
            (512, 2048, 4.0, "dynamic", 1 / 13),
        ),
        (  # Hunyuan is trained with its alpha, which does not stretch the context
            {
                "model_type": "hunyuan_v1_dense",
                "head_dim": 64,
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
            },
            (32768, 262144, 8.0, "ntk_alpha", 1 / 1000),
        ),
        (  # alpha under its other name
            {
                "head_dim": 64,
                "max_position_embeddings": 4096,
                "rope_scaling": {"type": "ntk", "factor": 4.0},
            },
            (4096, 16384, 4.0, "ntk", 1 / 4),
        ),
    ],
)
def test_contexts_factor_and_frequencies_of_a_config(config, expected):
    rope = Rope.of(config)
    assert (rope.trained, rope.extended, rope.factor, rope.rope_type) == expected[:4]
    default, _ = frequencies.default(rope.head_dim, base=rope.base, rotary_dim=rope.rotary_dim)
    assert rope.inv_freq[-1].item() == pytest.approx(default[-1].item() * expected[4], rel=1e-6)


@pytest.mark.parametrize(
    ("config", "layer_type", "message"),
    [
        ({"head_dim": 64}, None, "max_position_embeddings of at least 2, got none"),
        ({"head_dim": 64, "max_position_embeddings": 1}, None, "at least 2, got 1"),
        ({"head_dim": 64, "max_position_embeddings": 0}, None, "max_position_embeddings"),
        ({"rope_scaling": {"type": "spiral"}, "head_dim": 64}, None, "spiral"),
        (
            {**CONFIGS["yarn"], "layer_types": ["full_attention"], "no_rope_layers": [0]},
            "full_attention",
            "whose layers rotate, got full_attention",
        ),
        (
            {**CONFIGS["yarn"], "rope_parameters": {"rope_type": "axial"}, "rope_scaling": None},
            None,
            "an axial one",
        ),
        (
            {
                "head_dim": 64,
                "max_position_embeddings": 1024,
                "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096},
            },
            None,
            "those of the training, 4096, got 1024",
        ),
        (  # pairs that all have one frequency, or increasing ones
            {"head_dim": 64, "max_position_embeddings": 64, "rope_theta": 1.0},
            None,
            "rope_theta to be above 1, got 1.0",
        ),
        # positions that cos_sin does not support
        (
            {"head_dim": 64, "max_position_embeddings": 2**30},
            None,
            "1073741824 times a factor of 8",
        ),
        (
            {"head_dim": 64, "max_position_embeddings": 10**400},
            None,
            "at most 2147483647, got an int",
        ),
        ({"head_dim": 1026, "max_position_embeddings": 64}, None, "rotary_dim to be at most 1024"),
        (
            {
                "head_dim": 64,
                "max_position_embeddings": 64,
                "rope_scaling": {"type": "linear", "factor": 1e14},
            },
            None,
            "at most 2.31 - 1 tokens, got 64 times a factor of 1e.14",
        ),
    ],
)
def test_config_that_has_nothing_to_show_is_refused(config, layer_type, message):
    with pytest.raises(ValueError, match=message):
        Rope.of(config, layer_type)


# --------------------------------------------------------------------------------------- figures


def test_rotation_takes_the_vector_to_cos_and_sin(name):
    rope, figure = rope_of(name), drawn("rotation", name)
    pairs = sorted({0, rope.pairs // 8, rope.pairs - 1})
    for axes, pair in zip(figure.axes, pairs, strict=True):
        of_position = lines(axes)
        assert list(of_position) == [str(position) for position in range(8)]
        for label, (x, y) in of_position.items():
            angle = int(label) * rope.inv_freq[pair].item()
            tip = cmath.rect(rope.attention_scaling, angle)
            assert (x[0], y[0]) == (0, 0)
            assert x[1].item() == pytest.approx(tip.real, abs=ROTATED)
            assert y[1].item() == pytest.approx(tip.imag, abs=ROTATED)
        turns = rope.inv_freq[pair] > 0
        assert axes.get_title().startswith(f"pair {pair}: {'a turn in ' if turns else 'never'}")


def test_tables_have_cos_and_sin_with_the_fast_pairs_at_the_top(name):
    rope, figure = rope_of(name), drawn("tables", name)
    angle = rope.inv_freq.double()[:, None] * torch.arange(256)  # [P, L], exact to 2^-45
    for axes, function in zip(figure.axes, (torch.cos, torch.sin), strict=False):
        (image,) = axes.get_images()
        got = torch.tensor(image.get_array().data)
        expected = rope.attention_scaling * function(angle)
        error = (got - expected).abs().max()
        assert error <= 2 * TABLE * rope.attention_scaling
        assert image.get_clim() == (-rope.attention_scaling, rope.attention_scaling)
        _, _, bottom, top = image.get_extent()
        assert (top, bottom) == (-0.5, rope.pairs - 0.5)  # row 0 first
        low, high = axes.get_ylim()
        assert low > high  # and it is drawn upwards


def test_wavelengths_are_those_of_every_method(name):
    rope = rope_of(name)
    (axes,) = drawn("wavelengths", name).axes
    got = {label.removesuffix(" (this model)"): xy for label, xy in lines(axes).items()}
    own, _ = frequencies.from_config(CONFIGS[name], length=rope.extended)
    of = {"base": rope.base, "rotary_dim": rope.rotary_dim}
    original = {"original_max_position_embeddings": rope.trained}
    expected = {
        "default": frequencies.default(rope.head_dim, **of),
        "linear": frequencies.linear(rope.head_dim, factor=rope.factor, **of),
        "ntk": frequencies.ntk(rope.head_dim, alpha=rope.factor, **of),
        "yarn": frequencies.yarn(rope.head_dim, factor=rope.factor, **original, **of),
        "llama3": frequencies.llama3(
            rope.head_dim,
            factor=rope.factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            **original,
            **of,
        ),
    }
    expected = {method: inv_freq for method, (inv_freq, _) in expected.items()}
    expected[rope.rope_type] = own
    assert got.keys() == expected.keys()
    for method, inv_freq in expected.items():
        pair, tokens = got[method]
        assert pair.tolist() == list(range(rope.pairs))
        turning = inv_freq > 0
        torch.testing.assert_close(
            tokens[turning] * inv_freq[turning].double() / (2 * math.pi),
            torch.ones_like(tokens[turning]),
        )
        assert tokens[~turning].isinf().all()
    assert f"{rope.rope_type} (this model)" in lines(axes)
    assert marked(axes, across=True) == [rope.trained, rope.extended]
    assert axes.get_yscale() == "log"


def test_wavelength_of_a_pair_by_formula():
    """default and linear, by RoFormer's formula, without rope_ext's functions."""
    (axes,) = drawn("wavelengths", "like Llama 3").axes
    got = lines(axes)
    for pair in (0, 1, 31, 63):
        tokens = 2 * math.pi * 500000 ** (2 * pair / 128)
        assert got["default (this model)"][1][pair].item() == pytest.approx(tokens, rel=1e-5)
        assert got["linear"][1][pair].item() == pytest.approx(8 * tokens, rel=1e-5)


def test_decay_is_the_bound_of_roformer_and_the_mean_score(name):
    rope, figure = rope_of(name), drawn("decay", name)
    above, below = figure.axes
    ((distances, bound),) = lines(above).values()
    ((again, mean),) = lines(below).values()
    assert distances.tolist() == again.tolist()
    assert (distances[0], distances[-1]) == (1, rope.extended)
    square = rope.attention_scaling**2
    for at in range(0, len(distances), len(distances) // 7):
        turns = [cmath.exp(1j * distances[at].item() * f) for f in rope.inv_freq.tolist()]
        sums = [sum(turns[: j + 1]) for j in range(rope.pairs)]
        bound_here = square * sum(map(abs, sums)) / rope.pairs
        assert bound[at].item() == pytest.approx(bound_here, rel=1e-9)
        assert mean[at].item() == pytest.approx(square * sums[-1].real / rope.pairs, abs=1e-9)
    for axes in figure.axes:
        assert marked(axes, across=False) == [rope.trained, rope.extended]


def test_mean_score_is_that_of_random_vectors():
    """As the axis says: q = k with independent channels, compared to a sample."""
    ((distances, mean),) = lines(drawn("decay", "like Llama 3").axes[1]).values()
    at = 100
    cos, sin = rope_ext.cos_sin(rope_of("like Llama 3").inv_freq, distances[at : at + 1].long())
    q = torch.randn(1, 1, 20000, 128, generator=torch.Generator().manual_seed(1))
    samples = (q * rope_ext.apply_rotary(q, cos[None], sin[None])).sum(-1) / 128
    five_errors = 5 * samples.std().item() / 20000**0.5
    assert samples.mean().item() == pytest.approx(mean[at].item(), abs=five_errors)


def score_by_formula(rope, q, k, distance):
    """q · k / sqrt(D), q rotated by the distance alone, in float64."""
    P, R = rope.pairs, rope.rotary_dim
    q, k = q.double(), k.double()
    angle = distance * rope.inv_freq.double()
    (q1, q2), (k1, k2) = (x[:R].split(P) for x in (q, k))
    turned = (q1 * k1 + q2 * k2) * angle.cos() + (q1 * k2 - q2 * k1) * angle.sin()
    rest = (q[R:] * k[R:]).sum()
    return ((rope.attention_scaling**2 * turned.sum() + rest) / rope.head_dim**0.5).item()


def test_scores_depend_on_the_distance_alone(name):
    rope, figure = rope_of(name), drawn("relative", name)
    left, right = figure.axes
    q, k = torch.randn(2, rope.head_dim, generator=torch.Generator().manual_seed(0))
    at_every_m = lines(left)
    assert list(at_every_m) == [f"m = {m:,}" for m in (64, rope.trained - 1, rope.extended - 1)]
    for distances, got in at_every_m.values():
        assert distances.tolist() == list(range(65))
        expected = [score_by_formula(rope, q, k, distance) for distance in range(65)]
        assert got.tolist() == pytest.approx(expected, abs=SCORE)
    flat = lines(right)
    assert list(flat) == ["0", "1", "4", "16", "64"]
    for label, (m, got) in flat.items():
        assert (m[0], m[-1]) == (64, rope.extended - 1)
        expected = score_by_formula(rope, q, k, int(label))
        assert got.tolist() == pytest.approx([expected] * len(m), abs=SCORE)
    assert len({round(got[0].item(), 3) for _, got in flat.values()}) == 5


def test_accuracy_is_the_distance_from_the_true_angle():
    """At a few positions by 60 digits, pair by pair; and the bounds everywhere."""
    rope, name = rope_of("like Llama 3"), "like Llama 3"
    (axes,) = drawn("accuracy", name).axes
    (usual_name, (positions, usual)), (ours_name, (again, ours)) = lines(axes).items()
    assert "torch.cos" in usual_name
    assert ours_name == "rope_ext.cos_sin"
    assert positions.tolist() == again.tolist()
    assert (positions[0], positions[-1]) == (1, 2**31 - 1)
    for at in (0, 40, 80, len(positions) - 1):
        position = int(positions[at])
        ids = torch.tensor([position])
        angle = ids.float()[:, None] * rope.inv_freq
        for got, (cos, sin) in (
            (ours, rope_ext.cos_sin(rope.inv_freq, ids)),
            (usual, (angle.cos(), angle.sin())),
        ):
            with mpmath.workdps(60):
                off = [
                    mpmath.arg(mpmath.mpc(c, s) * mpmath.expj(-position * mpmath.mpf(f)))
                    for f, c, s in zip(
                        rope.inv_freq.tolist(), cos[0].tolist(), sin[0].tolist(), strict=True
                    )
                ]
            worst = float(max(map(abs, off)))
            assert got[at].item() == pytest.approx(worst, rel=1e-6)
    # cos and sin are each off by at most 1 ulp, 2^-24, so the angle by at most sqrt(2) times that
    assert ours.max() <= 2**0.5 * TABLE
    assert (usual <= positions * 2.0**-24 + 2 * TABLE).all()
    assert usual[positions > 1e6].min() > 1e4 * ours.max()  # the message of the figure


def test_positions_of_the_accuracy_are_odd():
    """Even positions have fewer bits, which float32 rounds less."""
    positions = errors.positions_shown()
    assert all(position % 2 for position in positions)
    assert len(positions) > 100


# ---------------------------------------------------------------------------------- appearance


@pytest.mark.parametrize("figure", FIGURES)
def test_axes_say_what_they_show_in_which_unit(figure):
    for axes in drawn(figure, "like Llama 3").axes:
        if axes.get_label() == "<colorbar>":
            assert axes.get_ylabel() == "cos, sin"
            continue
        shared = len(axes.get_shared_x_axes().get_siblings(axes)) > 1
        label = axes.get_xlabel()
        assert "(tokens)" in label or "pair" in label or (shared and not label)
    assert any(axes.get_ylabel() for axes in drawn(figure, "like Llama 3").axes)
    assert getattr(figures, figure).__doc__.count("Source") == 1


def luminance(color):
    """Relative luminance of WCAG 2.2."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in matplotlib.colors.to_rgb(color)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("color", [*style.COLORS, style.QUIET])
def test_lines_stand_out_from_white(color):
    """3 to 1 is what WCAG 2.2 asks of graphics (1.4.11), 4.5 to 1 of text (1.4.3)."""
    contrast = 1.05 / (luminance(color) + 0.05)
    assert contrast >= (4.5 if color == style.QUIET else 3)


@pytest.mark.parametrize("head_dim", [2, 4])
@pytest.mark.parametrize("figure", FIGURES)
def test_heads_of_one_and_two_pairs_are_drawn(figure, head_dim):
    """With the shortest possible context. An axis of pairs has no fractions."""
    rope = Rope.of({"head_dim": head_dim, "max_position_embeddings": 2})
    drawing = getattr(figures, figure)(rope)
    drawing.draw_without_rendering()
    pairs = [
        tick
        for axis in (drawing.axes[0].xaxis, drawing.axes[0].yaxis)
        if axis.get_label_text().startswith("pair")
        for tick in axis.get_ticklocs()
    ]
    assert all(tick == round(tick) for tick in pairs)
    assert bool(pairs) == (figure in ("tables", "wavelengths"))
    if figure == "wavelengths":
        methods = [line.removesuffix(" (this model)") for line in lines(drawing.axes[0])]
        assert ("ntk" in methods) == (head_dim > 2)  # it changes only pairs after the first
        seen = [line.get_marker() for line in drawing.axes[0].get_lines()[:4]]
        assert set(seen) == {"o" if head_dim == 2 else "None"}  # one point is no line


@pytest.mark.parametrize("factor", [1.0, 1.25])
@pytest.mark.parametrize("figure", ["wavelengths", "decay", "accuracy"])
def test_names_of_the_contexts_do_not_hide_each_other(figure, factor):
    scaling = {"rope_type": "linear", "factor": factor}
    config = {"head_dim": 64, "max_position_embeddings": 4096, "rope_scaling": scaling}
    drawing = getattr(figures, figure)(Rope.of(config))
    drawing.draw_without_rendering()
    trained, extended = (text.get_window_extent() for text in drawing.axes[0].texts)
    assert not trained.shrunk(0.95, 0.95).overlaps(extended)  # they may touch
    assert drawing.bbox.containsx(extended.x1)


@pytest.mark.parametrize("name", ["like Llama 3", "yarn", "longrope, partial"])
def test_legend_of_the_accuracy_is_beside_lines_and_names(name):
    drawing = drawn("accuracy", name)
    drawing.draw_without_rendering()
    (axes,) = drawing.axes
    legend = axes.get_legend().get_window_extent()
    assert not any(legend.overlaps(text.get_window_extent()) for text in axes.texts)
    for x, y in lines(axes).values():
        at = axes.transData.transform(torch.stack((x, y.double()), -1).numpy())
        assert not any(legend.contains(*point) for point in at)


@pytest.mark.parametrize("name", ["longrope, partial"])
def test_lines_differ_in_grey(name):
    (axes,) = drawn("wavelengths", name).axes
    methods = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert len(methods) == 6
    assert len({str(line._dash_pattern) for line in methods}) == 6


def test_shades_grow_lighter_all_along():
    shades = matplotlib.colormaps[style.STYLE["image.cmap"]](torch.linspace(0, 1, 32).numpy())
    grey = [luminance(shade[:3]) for shade in shades]
    assert grey == sorted(grey)


# ------------------------------------------------------------------------------------- the files


def test_files_are_the_same_whatever_style_the_caller_has(tmp_path):
    first, second = (tmp_path / f"{number}.png" for number in (1, 2))
    figures.save(figures.rotation(rope_of("yarn")), first)
    with matplotlib.style.context("dark_background"):
        figures.save(figures.rotation(rope_of("yarn")), second)
        assert matplotlib.rcParams["axes.facecolor"] == "black"  # the caller's is left alone
    assert first.read_bytes() == second.read_bytes()


def run_plot(*arguments):
    return main(["plot", *map(str, arguments)])


def test_command_draws_every_figure_as_png(tmp_path, capsys):
    assert run_plot("--out", tmp_path / "new" / "folder") == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == [f"{name}.png" for name in FIGURES]
    for path in paths:
        image = matplotlib.image.imread(path)
        assert image.shape[1] >= 900  # pixels across
        assert image[..., :3].std() > 0.02  # not blank


def test_command_draws_a_figure_of_a_config_as_svg_with_the_same_bytes_each_time(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["yarn"]))
    arguments = ("--config", tmp_path, "--format", "svg", "--out", tmp_path)
    assert run_plot("wavelengths", "wavelengths", *arguments) == 0  # once
    (path,) = map(Path, capsys.readouterr().out.splitlines())
    assert path == tmp_path / "wavelengths.svg"
    assert ET.parse(path).getroot().tag.endswith("svg")
    again = tmp_path / "again.svg"
    figures.save(drawn("wavelengths", "yarn"), again)
    assert path.read_bytes() == again.read_bytes()


def test_config_is_read_by_layer_type(tmp_path, capsys):
    of_layers = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    config = {"head_dim": 16, "max_position_embeddings": 64, "rope_parameters": of_layers}
    path = tmp_path / "any.json"
    path.write_text(json.dumps(config))
    arguments = ("rotation", "--config", path, "--out", tmp_path)
    assert run_plot(*arguments, "--layer-type", "sliding_attention") == 0
    assert run_plot(*arguments) == 2
    assert "expected layer_type to be one of 'full_attention'" in capsys.readouterr().err


def folder(path):
    (path / "config.json").mkdir(parents=True)
    return path


def sparse(path):
    with path.open("wb") as file:
        file.truncate(2**26)
    return path


# Contents of --config: the bytes, or a function that makes it at a path; and the reason of the
# error.
NO_CONFIG = {
    "nothing": (
        lambda path: path,
        "No such file. Nothing is downloaded: give the path of a config",
    ),
    "a name from a hub": (
        lambda path: Path("meta-llama/Llama-3.1-8B"),
        "--config 'meta-llama/Llama-3.1-8B': No such file. Nothing is downloaded",
    ),
    "a long name": (lambda path: path / ("x" * 5000), "File name too long"),
    "lines in a name": (lambda path: path / "a\nb\x1b", r"a\nb\x1b': No such file"),
    "a folder without a config": (lambda path: path.parent, "config.json': No such file"),
    "a folder as config": (folder, "expected a file, got a folder, a FIFO or a device"),
    "a FIFO": (lambda path: os.mkfifo(path) or path, "expected a file, got a folder, a FIFO"),
    "a device": (lambda path: Path("/dev/zero"), "expected a file, got a folder, a FIFO"),
    "a file that can't be read": (lambda path: Path("/proc/self/mem"), "Input/output error"),
    "a large file": (sparse, "expected a config.json of at most 16,777,216 bytes"),
    "an empty file": (b"", "expected JSON, got Expecting value: line 1"),
    "half a file": (b"{", "expected JSON"),
    "a binary": (b"\x7fELF\0\xff", "expected JSON, got 'utf-8' codec can't decode byte 0xff"),
    "brackets": (b"[" * 100_000, "expected JSON, got brackets nested too deeply"),
    "braces": (b'{"text_config":' * 100_000, "expected JSON, got brackets nested too deeply"),
    "digits": (b'{"head_dim": 1' + b"0" * 5000 + b"}", "expected JSON, got Exceeds the limit"),
    "another type": (b"[1]", "expected a dict, got list"),
    "no length": (b'{"head_dim": 64}', "max_position_embeddings"),
    "an odd head": (b'{"head_dim": 63, "max_position_embeddings": 64}', "even"),
    "lines in a value": (b'{"model_type": ["a\\nb"]}', r"model_type to be a string, got ['a\nb']"),
}


@pytest.mark.parametrize("name", NO_CONFIG)
@pytest.mark.parametrize("command", ["plot", "explore"])
def test_command_says_in_one_line_what_is_wrong_with_a_config(command, name, tmp_path, capfd):
    given, message = NO_CONFIG[name]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "any.json"
    if isinstance(given, bytes):
        path.write_bytes(given)
    else:
        path = given(path)
    out = tmp_path / "out"
    assert main([command, "--config", str(path), "--out", str(out)]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"rope_ext {command}: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_config_without_permission_to_read_it_is_refused(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.touch(mode=0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything
    try:
        status = main(["explore", "--config", str(path), "--out", "/nowhere/page.html"])
    finally:
        os.seteuid(user)
    assert status == 2
    error = capsys.readouterr().err
    assert re.match(r"rope_ext explore: .*Permission denied: '.*config\.json'\n$", error)


@pytest.mark.parametrize("command", ["plot", "explore"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.touch(), "exists|Not a directory"),
        (
            lambda path: (path / "wavelengths.png").mkdir(parents=True),
            "expected the path of a file",
        ),
        (lambda path: path.mkdir() or os.mkfifo(path / "wavelengths.png"), "the path of a file"),
        (
            lambda path: path.parent.rmdir() or path.parent.symlink_to("/proc/none"),
            r"\[Errno \d+\]",
        ),
    ],
    ids=["a file for a folder", "a folder", "a FIFO", "no folder"],
)
def test_out_that_can_not_be_written_ends_with_one_line(command, make, message, tmp_path, capsys):
    out = tmp_path / "parent" / "out"
    out.parent.mkdir()
    make(out)
    arguments = ["plot", "wavelengths", "--out", str(out)]
    if command == "explore":
        arguments = ["explore", "--out", str(out / "wavelengths.png")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.match(rf"rope_ext {command}: .*({message}).*\n$", error)


def test_unknown_figure_is_refused_with_the_names_of_all(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_plot("spiral")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"expected one of {', '.join(FIGURES)}, got 'spiral'" in error
    assert error.count("\n") == 1


def test_missing_matplotlib_is_named(monkeypatch, capsys):
    monkeypatch.setattr(viz.command.importlib.util, "find_spec", lambda name: None)
    assert run_plot() == 2
    assert (
        "matplotlib, mpmath not installed: pip install 'rope_ext[viz]'" in capsys.readouterr().err
    )


def test_neither_the_command_line_nor_the_page_imports_matplotlib(tmp_path):
    code = """
import sys, rope_ext.__main__
assert rope_ext.__main__.main(["explore"]) == 0
print("matplotlib" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout.splitlines()[-1] == "False", result.stderr
