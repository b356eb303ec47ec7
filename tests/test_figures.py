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
from rope_ext.viz import FIGURES, ModelRotation
from rope_ext.viz.published import CONFIGS as PUBLISHED

matplotlib = pytest.importorskip("matplotlib", reason="pip install 'rope_ext[test]'")
import mpmath  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

from rope_ext.viz import figures  # noqa: E402
from rope_ext.viz.figures import animation, errors, style  # noqa: E402

HEAD = {"head_dim": 64, "max_position_embeddings": 4096}
LONG = {"rope_type": "longrope", "factor": 16.0, "original_max_position_embeddings": 2048}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
CONFIGS = {
    # a base of half a million, no method
    "like Llama 3": viz.model_rotation.LLAMA_LIKE,
    # an attention scaling that is not 1
    "yarn": PUBLISHED["gpt-oss"],
    # half of the channels rotate; other frequencies past the trained context
    "longrope, partial": {
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 32768,
        "rope_scaling": LONG,
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

model_of = functools.cache(lambda name: ModelRotation.of(CONFIGS[name]))


@functools.cache
def drawn(figure, name):
    drawing = getattr(figures, figure)(model_of(name))
    drawing.draw_without_rendering()
    return drawing


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def lines(axes):
    """The lines of data, not those that mark a context, by label."""
    return {
        line.get_label(): (torch.tensor(line.get_xdata()).double(), torch.tensor(line.get_ydata()))
        for line in axes.get_lines()
        if not line.get_label().endswith("tokens")
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
        (CONFIGS["yarn"], (4096, 131072, 32.0, "yarn", 1 / 32)),
        (CONFIGS["longrope, partial"], (2048, 32768, 16.0, "longrope", 1 / 8)),  # the long factor
        (CONFIGS["proportional"], (512, 4096, 8.0, "proportional", 0)),
        # max_position_embeddings exceed the factor times the original length
        (PUBLISHED["Llama 3.1"], (8192, 131072, 8.0, "llama3", 1 / 8)),
        # in a sequence of the extended context, 1 + factor (4 - 1) = 4 * 4 - 3
        (
            {**HEAD, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            (4096, 16384, 4.0, "dynamic", 1 / 13),
        ),
        # Hunyuan is trained with its alpha, which does not stretch the context
        (
            {
                **HEAD,
                "model_type": "hunyuan_v1_dense",
                "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
            },
            (4096, 32768, 8.0, "ntk_alpha", 1 / 1000),
        ),
        # alpha under its other name
        (
            {**HEAD, "rope_scaling": {"type": "ntk", "factor": 4.0}},
            (4096, 16384, 4.0, "ntk", 1 / 4),
        ),
    ],
)
def test_contexts_factor_and_frequencies_of_a_config(config, expected):
    model = ModelRotation.of(config)
    assert (model.trained, model.extended, model.factor, model.rope_type) == expected[:4]
    default, _ = frequencies.default(model.head_dim, base=model.base, rotary_dim=model.rotary_dim)
    assert model.inv_freq[-1].item() == pytest.approx(default[-1].item() * expected[4], rel=1e-6)


def test_config_that_has_nothing_to_show_is_refused():
    no_rope = {**HEAD, "layer_types": ["full_attention"], "no_rope_layers": [0]}
    yarn = {"type": "yarn", "original_max_position_embeddings": 8192}
    for config, layer_type, message in [
        ({"head_dim": 64}, None, "max_position_embeddings of at least 2, got none"),
        ({**HEAD, "max_position_embeddings": 1}, None, "at least 2, got 1"),
        ({**HEAD, "rope_scaling": {"type": "spiral"}}, None, "spiral"),
        (no_rope, "full_attention", "whose layers rotate, got full_attention"),
        ({**HEAD, "rope_parameters": {"rope_type": "axial"}}, None, "an axial one"),
        ({**HEAD, "rope_scaling": yarn}, None, "those of the training, 8192, got 4096"),
        # pairs that all have one frequency
        ({**HEAD, "rope_theta": 1.0}, None, "rope_theta to be above 1, got 1.0"),
        # positions that cos_sin does not support
        ({**HEAD, "max_position_embeddings": 2**30}, None, "1073741824 times a factor of 8"),
        ({**HEAD, "max_position_embeddings": 10**400}, None, "at most 2147483647, got an int"),
        ({**HEAD, "head_dim": 1026}, None, "rotary_dim to be at most 1024"),
    ]:
        with pytest.raises(ValueError, match=message):
            ModelRotation.of(config, layer_type)


# --------------------------------------------------------------------------------------- figures


def test_rotation_takes_the_vector_to_cos_and_sin(name):
    model, figure = model_of(name), drawn("rotation", name)
    pairs = sorted({0, model.pairs // 8, model.pairs - 1})
    for axes, pair in zip(figure.axes, pairs, strict=True):
        for position, (label, (x, y)) in enumerate(lines(axes).items()):
            assert label == str(position)
            tip = cmath.rect(model.attention_scaling, position * model.inv_freq[pair].item())
            assert (x[0], y[0]) == (0, 0)
            assert x[1].item() == pytest.approx(tip.real, abs=ROTATED)
            assert y[1].item() == pytest.approx(tip.imag, abs=ROTATED)
        turns = model.inv_freq[pair] > 0
        assert axes.get_title().startswith(f"pair {pair}: {'a turn in ' if turns else 'never'}")
        slow = 7 * model.inv_freq[pair] < 2 * math.pi * 0.002
        assert ("lines coincide" in axes.get_title()) == slow


@pytest.mark.parametrize("name", ["yarn", "proportional"])
def test_tables_have_cos_and_sin_with_the_fast_pairs_at_the_top(name):
    model, figure = model_of(name), drawn("tables", name)
    angle = model.inv_freq.double()[:, None] * torch.arange(256)  # [P, L], exact to 2^-45
    for axes, function in zip(figure.axes, (torch.cos, torch.sin), strict=False):
        (image,) = axes.get_images()
        off = torch.tensor(image.get_array().data) - model.attention_scaling * function(angle)
        assert off.abs().max() <= 2 * TABLE * model.attention_scaling
        assert image.get_clim() == (-model.attention_scaling, model.attention_scaling)
        _, _, bottom, top = image.get_extent()
        assert (top, bottom) == (-0.5, model.pairs - 0.5)  # row 0 first
        low, high = axes.get_ylim()
        assert low > high  # and it is drawn upwards


def test_wavelengths_are_those_of_every_method(name):
    model = model_of(name)
    (axes,) = drawn("wavelengths", name).axes
    got = {
        label.partition(":")[0].removesuffix(" (this model)"): xy
        for label, xy in lines(axes).items()
    }
    of = {"base": model.base, "rotary_dim": model.rotary_dim}
    by = {"factor": model.factor, "original_max_position_embeddings": model.trained}
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    head_dim = model.head_dim
    expected = {
        "default": frequencies.default(head_dim, **of),
        "linear": frequencies.linear(head_dim, factor=model.factor, **of),
        "ntk": frequencies.ntk(head_dim, alpha=model.factor, **of),
        "yarn": frequencies.yarn(head_dim, **by, **of),
        "llama3": frequencies.llama3(head_dim, **by, **bands, **of),
        model.rope_type: frequencies.from_config(CONFIGS[name], length=model.extended),
    }
    assert got.keys() == expected.keys()
    for method, (inv_freq, _) in expected.items():
        pair, tokens = got[method]
        assert pair.tolist() == list(range(model.pairs))
        turning = inv_freq > 0
        turns = tokens[turning] * inv_freq[turning].double() / (2 * math.pi)
        torch.testing.assert_close(turns, torch.ones_like(turns))
        assert tokens[~turning].isinf().all()
    assert any(label.startswith(f"{model.rope_type} (this model)") for label in lines(axes))
    assert marked(axes, across=True) == [model.trained, model.extended]
    assert len({str(line._dash_pattern) for line in axes.get_lines()[: len(got)]}) == len(got)


def test_wavelengths_by_formula_and_where_lines_coincide():
    """default and linear, by RoFormer's formula, without rope_ext's functions."""
    (axes,) = drawn("wavelengths", "like Llama 3").axes
    got = lines(axes)
    pair = torch.arange(64).double()
    tokens = 2 * math.pi * 500000 ** (2 * pair / 128)
    torch.testing.assert_close(got["default (this model)"][1], tokens, rtol=1e-5, atol=0)
    torch.testing.assert_close(got["linear"][1], 8 * tokens, rtol=1e-5, atol=0)
    (label,) = [label for label in got if label.startswith("llama3")]
    on_default, on_linear = map(int, re.findall(r"\d+$|\d+(?=,)", label))
    for at, line in ((slice(on_default + 1), tokens), (slice(on_linear, 64), 8 * tokens)):
        assert (got[label][1][at] / line[at] - 1).abs().max() < 0.021
    for at, line in ((on_default + 1, tokens), (on_linear - 1, 8 * tokens)):
        assert abs(got[label][1][at] / line[at] - 1) > 0.019
    same = figures.wavelengths(
        ModelRotation.of({**HEAD, "rope_scaling": {"type": "linear", "factor": 1.0}})
    )
    assert [*lines(same.axes[0])][1:3] == [
        "linear (this model): the line of default",
        "ntk: the line of default",
    ]


@pytest.mark.parametrize("name", ["yarn", "longrope, partial"])
def test_decay_is_the_bound_of_roformer_and_the_mean_score(name):
    model, figure = model_of(name), drawn("decay", name)
    above, below = figure.axes
    ((distances, bound),) = lines(above).values()
    ((again, mean),) = lines(below).values()
    assert distances.tolist() == again.tolist()
    assert (distances[0], distances[-1]) == (1, model.extended)
    square = model.attention_scaling**2
    for at in range(0, len(distances), len(distances) // 7):
        turns = [cmath.exp(1j * distances[at].item() * f) for f in model.inv_freq.tolist()]
        sums = [sum(turns[: j + 1]) for j in range(model.pairs)]
        bound_here = square * sum(map(abs, sums)) / model.pairs
        assert bound[at].item() == pytest.approx(bound_here, rel=1e-9)
        assert mean[at].item() == pytest.approx(square * sums[-1].real / model.pairs, abs=1e-9)
    assert (
        marked(above, across=False)
        == marked(below, across=False)
        == [model.trained, model.extended]
    )


def score_by_formula(model, q, k, distance):
    """q · k / sqrt(D), q rotated by the distance alone, in float64."""
    P, R = model.pairs, model.rotary_dim
    q, k = q.double(), k.double()
    angle = distance * model.inv_freq.double()
    (q1, q2), (k1, k2) = (x[:R].split(P) for x in (q, k))
    turned = (q1 * k1 + q2 * k2) * angle.cos() + (q1 * k2 - q2 * k1) * angle.sin()
    rest = (q[R:] * k[R:]).sum()
    return ((model.attention_scaling**2 * turned.sum() + rest) / model.head_dim**0.5).item()


@pytest.mark.parametrize("name", ["yarn", "longrope, partial"])
def test_scores_depend_on_the_distance_alone(name):
    model, figure = model_of(name), drawn("relative", name)
    left, right = figure.axes
    q, k = torch.randn(2, model.head_dim, generator=torch.Generator().manual_seed(0))
    at_every_m = lines(left)
    assert list(at_every_m) == [f"m = {m:,}" for m in (64, model.trained - 1, model.extended - 1)]
    for distances, got in at_every_m.values():
        assert distances.tolist() == list(range(65))
        expected = [score_by_formula(model, q, k, distance) for distance in range(65)]
        assert got.tolist() == pytest.approx(expected, abs=SCORE)
    flat = lines(right)
    assert list(flat) == ["0", "1", "4", "16", "64"]
    for label, (m, got) in flat.items():
        assert (m[0], m[-1]) == (64, model.extended - 1)
        expected = score_by_formula(model, q, k, int(label))
        assert got.tolist() == pytest.approx([expected] * len(m), abs=SCORE)


def test_accuracy_is_the_distance_from_the_true_angle():
    """At a few positions by 60 digits, pair by pair; and the bounds everywhere."""
    model = model_of("like Llama 3")
    (axes,) = drawn("accuracy", "like Llama 3").axes
    (usual_name, (positions, usual)), (ours_name, (_, ours)) = lines(axes).items()
    assert ("torch.cos" in usual_name, ours_name) == (True, "rope_ext.cos_sin")
    assert positions.tolist() == errors.positions_shown()
    assert (positions[0], positions[-1]) == (1, 2**31 - 1)
    assert (positions % 2 == 1).all()  # even ones have fewer bits, which float32 rounds less
    for at in (0, 40, 80, len(positions) - 1):
        position = int(positions[at])
        ids = torch.tensor([position])
        angle = ids.float()[:, None] * model.inv_freq
        for got, (cos, sin) in (
            (ours, rope_ext.cos_sin(model.inv_freq, ids)),
            (usual, (angle.cos(), angle.sin())),
        ):
            parts = zip(model.inv_freq.tolist(), cos[0].tolist(), sin[0].tolist(), strict=True)
            with mpmath.workdps(60):
                off = [
                    mpmath.arg(mpmath.mpc(c, s) * mpmath.expj(-position * mpmath.mpf(f)))
                    for f, c, s in parts
                ]
            assert got[at].item() == pytest.approx(float(max(map(abs, off))), rel=1e-6)
    # cos and sin are each off by at most 1 ulp, 2^-24, so the angle by at most sqrt(2) times that
    assert ours.max() <= 2**0.5 * TABLE
    assert (usual <= positions * 2.0**-24 + 2 * TABLE).all()
    assert usual[positions > 1e6].min() > 1e4 * ours.max()  # the message of the figure


def test_animation_turns_the_pairs_and_keeps_the_score():
    model, figure = model_of("yarn"), Figure()
    for position in animation.frames(model, figure):
        pairs = [axes for axes in figure.axes if axes.get_label() != "score"]
        for axes in pairs:
            frequency = model.inv_freq[int(axes.get_label())].item()
            for line, at in zip(axes.get_lines(), (position, position - 3), strict=True):
                tip = cmath.rect(1, at * frequency)
                assert [*line.get_xdata(), *line.get_ydata()] == pytest.approx(
                    [0, tip.real, 0, tip.imag]
                )
    assert (position, len(pairs)) == (66, 3)
    ((m, score),) = lines(figure.axes[-1]).values()
    assert m.tolist() == list(range(3, 67))
    assert score.max() - score.min() < 2 * SCORE


# ---------------------------------------------------------------------------------- appearance


def luminance(color):
    """Relative luminance of WCAG 2.2."""
    parts = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in matplotlib.colors.to_rgb(color)
    )
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def page_colors():
    """Those of the page, light and dark: name -> colour."""
    css = (Path(viz.__file__).parent / "page" / "page.css").read_text()
    return [
        dict(re.findall(r"--(\w+): (#\w{6});", of))
        for of in re.findall(r":root \{(.*?)\}", css, re.S)
    ]


def test_colours_stand_out():
    """4.5 to 1 is what WCAG 2.2 asks of text (1.4.3), 3 to 1 of graphics (1.4.11)."""
    figure = {
        "paper": "white",
        "card": "white",
        "quiet": style.QUIET,
        **dict(enumerate(style.COLORS)),
    }
    for colors in (figure, *page_colors()):
        for name in colors.keys() - {"paper", "card", "grid"}:
            for behind in ("paper", "card"):
                low, high = sorted(luminance(colors[of]) for of in (name, behind))
                assert (high + 0.05) / (low + 0.05) >= (4.5 if name in ("ink", "quiet") else 3), (
                    name
                )
    shades = matplotlib.colormaps[style.STYLE["image.cmap"]](torch.linspace(0, 1, 32).numpy())
    grey = [luminance(shade[:3]) for shade in shades]
    assert grey == sorted(grey)


def test_axes_say_what_they_show_in_which_unit():
    for figure in FIGURES:
        for axes in drawn(figure, "like Llama 3").axes:
            label = axes.get_xlabel()
            shared = len(axes.get_shared_x_axes().get_siblings(axes)) > 1
            colors = axes.get_label() == "<colorbar>" and axes.get_ylabel() == "cos, sin"
            assert "(tokens)" in label or "pair" in label or shared or colors, figure
        assert getattr(figures, figure).__doc__.count("Source") == 1


@pytest.mark.parametrize("head_dim", [2, 4])
def test_heads_of_one_and_two_pairs_are_drawn(head_dim):
    """With the shortest possible context. An axis of pairs has no fractions."""
    model = ModelRotation.of({"head_dim": head_dim, "max_position_embeddings": 2})
    for figure in FIGURES:
        drawing = getattr(figures, figure)(model)
        drawing.draw_without_rendering()
        axes = drawing.axes[0]
        named = [
            axis for axis in (axes.xaxis, axes.yaxis) if axis.get_label_text().startswith("pair")
        ]
        assert bool(named) == (figure in ("tables", "wavelengths"))
        assert all(tick == round(tick) for axis in named for tick in axis.get_ticklocs())
        if figure == "wavelengths":
            assert any("ntk" in line for line in lines(axes)) == (
                head_dim > 2
            )  # pairs after the first
            assert axes.get_lines()[0].get_marker() == ("o" if head_dim == 2 else "None")


@pytest.mark.parametrize("figure", ["wavelengths", "decay", "accuracy"])
@pytest.mark.parametrize("name", ["like Llama 3", "close contexts"])
def test_names_hide_neither_each_other_nor_curves(figure, name):
    close = {**HEAD, "rope_scaling": {"rope_type": "linear", "factor": 1.25}}
    drawing = (
        drawn(figure, name)
        if name in CONFIGS
        else getattr(figures, figure)(ModelRotation.of(close))
    )
    drawing.draw_without_rendering()
    axes = drawing.axes[0]
    names = [text.get_window_extent() for text in axes.texts]
    assert not names[0].shrunk(0.95, 0.95).overlaps(names[1])  # they may touch
    assert all(drawing.bbox.containsx(box.x0) and drawing.bbox.containsx(box.x1) for box in names)
    legends = [*drawing.legends, *filter(None, [axes.get_legend()])]
    boxes = names + [legend.get_window_extent() for legend in legends]
    for x, y in lines(axes).values():
        at = axes.transData.transform(torch.stack((x, y.double()), -1).numpy())
        assert not any(box.contains(*point) for point in at for box in boxes)


# ------------------------------------------------------------------------------------- the files


def run_plot(*arguments):
    return main(["plot", *map(str, arguments)])


def test_command_draws_every_figure_in_a_new_folder(tmp_path, capsys):
    assert run_plot("--out", tmp_path / "new" / "folder", "--dpi", 40) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == [f"{name}.png" for name in FIGURES]
    for path in paths:
        assert matplotlib.image.imread(path)[..., :3].std() > 0.02  # not blank


def test_command_draws_a_figure_with_the_same_bytes_each_time(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["yarn"]))
    arguments = ("rotation", "rotation", "--config", tmp_path, "--out", tmp_path)
    for suffix in ("png", "svg"):
        assert run_plot(*arguments, "--format", suffix) == 0
        (path,) = map(Path, capsys.readouterr().out.splitlines())  # once
        assert path == tmp_path / f"rotation.{suffix}"
        with matplotlib.style.context("dark_background"):  # the caller's style has no effect
            figures.save(figures.rotation(model_of("yarn")), tmp_path / f"again.{suffix}")
            assert matplotlib.rcParams["axes.facecolor"] == "black"
        assert path.read_bytes() == (tmp_path / f"again.{suffix}").read_bytes()
    assert ET.parse(path).getroot().tag.endswith("svg")
    assert Image.open(tmp_path / "rotation.png").size == (2200, 780)  # 200 dots an inch


def test_command_writes_the_rotation_in_motion(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(animation, "STEPS", 3)
    assert run_plot("--gif", "--dpi", 30, "--out", tmp_path) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "rotation.gif")]  # no figure
    image = Image.open(tmp_path / "rotation.gif")
    assert (image.n_frames, image.size, image.info["duration"]) == (3, (240, 150), 100)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_plot("--mp4", "--out", tmp_path) == 2
    assert "--mp4: the program ffmpeg not found" in capsys.readouterr().err
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="pip install 'rope_ext[test]'")
    (tmp_path / "ffmpeg").symlink_to(ffmpeg.get_ffmpeg_exe())
    assert run_plot("--mp4", "--dpi", 30, "--out", tmp_path) == 0
    assert b"ftyp" in (tmp_path / "rotation.mp4").read_bytes()[:12]


def test_config_is_read_by_layer_type(tmp_path, capsys):
    of_layers = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    config = {"head_dim": 16, "max_position_embeddings": 64, "rope_parameters": of_layers}
    path = tmp_path / "any.json"
    path.write_text(json.dumps(config))
    arguments = ("explore", "--config", str(path), "--out", str(tmp_path / "page.html"))
    assert main([*arguments, "--layer-type", "sliding_attention"]) == 0
    assert main([*arguments]) == 2
    assert "expected layer_type to be one of 'full_attention'" in capsys.readouterr().err


def sparse(path):
    with path.open("wb") as file:
        file.truncate(2**26)
    return path


# Contents of --config: the bytes, or a function that makes it at a path; and the reason of the
# error.
NO_CONFIG = {
    "a name from a hub": (
        lambda path: Path("meta-llama/Llama-3.1-8B"),
        "--config 'meta-llama/Llama-3.1-8B': No such file. Nothing is downloaded",
    ),
    "a long name": (lambda path: path / ("x" * 5000), "File name too long"),
    "lines in a name": (lambda path: path / "a\nb\x1b", r"a\nb\x1b': No such file"),
    "a folder without a config": (lambda path: path.parent, "config.json': No such file"),
    "a FIFO": (lambda path: os.mkfifo(path) or path, "expected a file, got a folder, a FIFO"),
    "a file that can't be read": (lambda path: Path("/proc/self/mem"), "Input/output error"),
    "a large file": (sparse, "expected a config.json of at most 16,777,216 bytes"),
    "an empty file": (b"", "expected JSON, got Expecting value: line 1"),
    "a binary": (b"\x7fELF\0\xff", "expected JSON, got 'utf-8' codec can't decode byte 0xff"),
    "brackets": (b"[" * 100_000, "expected JSON, got brackets nested too deeply"),
    "digits": (b'{"head_dim": 1' + b"0" * 5000 + b"}", "expected JSON, got Exceeds the limit"),
    "another type": (b"[1]", "expected a dict, got list"),
    "no length": (b'{"head_dim": 64}', "max_position_embeddings"),
    "lines in a value": (b'{"model_type": ["a\\nb"]}', r"model_type to be a string, got ['a\nb']"),
}


@pytest.mark.parametrize("name", NO_CONFIG)
def test_command_says_in_one_line_what_is_wrong_with_a_config(name, tmp_path, capfd):
    given, message = NO_CONFIG[name]
    path = tmp_path / "in" / "any.json"
    path.parent.mkdir()
    path = given(path) if callable(given) else (path.write_bytes(given), path)[1]
    for command in ("plot", "explore"):
        assert main([command, "--config", str(path), "--out", str(tmp_path / "out")]) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"rope_ext {command}: ")
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["plot", "explore"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.touch(), "exists|Not a directory"),
        (lambda path: (path / "decay.png").mkdir(parents=True), "expected the path of a file"),
        (lambda path: path.mkdir() or os.mkfifo(path / "decay.png"), "the path of a file"),
    ],
    ids=["a file for a folder", "a folder", "a FIFO"],
)
def test_out_that_can_not_be_written_ends_with_one_line(command, make, message, tmp_path, capsys):
    make(out := tmp_path / "out")
    arguments = {"plot": ["decay", "--out", str(out)], "explore": ["--out", str(out / "decay.png")]}
    assert main([command, *arguments[command]]) == 2
    assert re.match(rf"rope_ext {command}: .*({message}).*\n$", capsys.readouterr().err)


def test_unknown_figures_and_missing_packages_are_named(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_plot("spiral")
    error = capsys.readouterr().err
    assert f"expected one of {', '.join(FIGURES)}, got 'spiral'" in error
    monkeypatch.setattr(viz.command.importlib.util, "find_spec", lambda name: None)
    assert run_plot() == 2
    missing = "matplotlib, mpmath not installed: pip install 'rope_ext[viz]'"
    assert missing in capsys.readouterr().err


def test_neither_the_command_line_nor_the_page_imports_matplotlib(tmp_path):
    code = "import sys, rope_ext.__main__; rope_ext.__main__.main(['explore']); "
    code += "print('matplotlib' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(rope_ext.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.stdout.endswith("False\n"), result.stderr
