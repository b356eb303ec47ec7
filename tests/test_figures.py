"""The figures of `python -m rope_ext plot`: their numbers, read from their axes."""

import cmath
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rope_ext
from rope_ext import frequencies, reference, viz
from rope_ext.__main__ import main
from rope_ext.viz import FIGURES, ModelRotation
from rope_ext.viz.published import CONFIGS as PUBLISHED

matplotlib = pytest.importorskip("matplotlib", reason="pip install 'rope_ext[test]'")
import mpmath  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

from rope_ext.viz import figures  # noqa: E402
from rope_ext.viz.figures import animation  # noqa: E402

HEAD = {"head_dim": 64, "max_position_embeddings": 4096}


def with_scaling(head=HEAD, **scaling):
    return {**head, "rope_scaling": scaling}


LONG = {"rope_type": "longrope", "factor": 16.0, "original_max_position_embeddings": 2048}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
LONG_HEAD = {"head_dim": 32, "partial_rotary_factor": 0.5, "max_position_embeddings": 32768}
SHORT_HEAD = {"head_dim": 16, "max_position_embeddings": 512}
CONFIGS = {
    # a base of half a million, no method
    "like Llama 3": viz.model_rotation.LLAMA_LIKE,
    # an attention scaling that is not 1
    "yarn": PUBLISHED["gpt-oss"],
    # half of the channels rotate; other frequencies past the trained context
    "longrope, partial": with_scaling(LONG_HEAD, **LONG),
    # pairs that never rotate
    "proportional": with_scaling(SHORT_HEAD, type="proportional", partial_rotary_factor=0.5),
}
# cos and sin are within 1 ulp of float32, at most 2^-24 below 1; a rotation rounds twice more.
TABLE = 2.0**-24
ROTATED = 2.0**-22
# A score is a sum over D products of two rotated numbers of about 1, so of D errors of about 2^-23.
SCORE = 2.0**-23 * 16

model_of = functools.cache(lambda name: ModelRotation.of(CONFIGS[name]))


@functools.cache
def drawn(figure, name):
    return getattr(figures, figure)(model_of(name))


def lines(axes):
    """The lines of data, not those that mark a context, by label."""
    return {
        line.get_label(): (torch.tensor(line.get_xdata()).double(), torch.tensor(line.get_ydata()))
        for line in axes.get_lines()
        if not line.get_label().endswith("tokens")
    }


def test_contexts_factor_and_frequencies_of_a_config():
    hunyuan = with_scaling(type="dynamic", alpha=1000.0, factor=1.0)
    for config, *expected, slowed_by in [
        # trained, extended, factor, rope_type, and by how much the last pair is slower
        (CONFIGS["like Llama 3"], 8192, 65536, 8.0, "default", 1),
        (CONFIGS["yarn"], 4096, 131072, 32.0, "yarn", 32),
        (CONFIGS["longrope, partial"], 2048, 32768, 16.0, "longrope", 8),  # the long factor
        (CONFIGS["proportional"], 512, 4096, 8.0, "proportional", math.inf),
        # max_position_embeddings exceed the factor times the original length
        (PUBLISHED["Llama 3.1"], 8192, 131072, 8.0, "llama3", 8),
        # in a sequence of the extended context, 1 + factor (4 - 1) = 4 * 4 - 3
        (with_scaling(rope_type="dynamic", factor=4.0), 4096, 16384, 4.0, "dynamic", 13),
        # trained with its alpha, which does not stretch the context
        ({**hunyuan, "model_type": "hunyuan_v1_dense"}, 4096, 32768, 8.0, "ntk_alpha", 1000),
        (with_scaling(type="ntk", factor=4.0), 4096, 16384, 4.0, "ntk", 4),  # alpha's other name
    ]:
        model = ModelRotation.of(config)
        assert [model.trained, model.extended, model.factor, model.rope_type] == expected
        of = {"base": model.base, "rotary_dim": model.rotary_dim}
        default, _ = frequencies.default(model.head_dim, **of)
        last = default[-1].item() / slowed_by
        assert model.inv_freq[-1].item() == pytest.approx(last, rel=1e-6), expected


def test_config_that_has_nothing_to_show_is_refused():
    no_rope = {**HEAD, "layer_types": ["full_attention"], "no_rope_layers": [0]}
    longer = with_scaling(type="yarn", original_max_position_embeddings=8192)
    for config, message in [
        ({"head_dim": 64}, "max_position_embeddings of at least 2, got none"),
        ({**HEAD, "max_position_embeddings": 1}, "at least 2, got 1"),
        (with_scaling(type="spiral"), "spiral"),
        (no_rope, "whose layers rotate, got full_attention"),
        ({**HEAD, "rope_parameters": {"rope_type": "axial"}}, "an axial one"),
        (longer, "those of the training, 8192, got 4096"),
        # pairs that all have one frequency
        ({**HEAD, "rope_theta": 1.0}, "rope_theta to be above 1, got 1.0"),
        # positions that cos_sin does not support
        ({**HEAD, "max_position_embeddings": 2**30}, "1073741824 times a factor of 8"),
        ({**HEAD, "head_dim": 1026}, "rotary_dim to be at most 1024"),
    ]:
        with pytest.raises(ValueError, match=message):
            ModelRotation.of(config, "full_attention" if config is no_rope else None)


@pytest.mark.parametrize("name", CONFIGS)
def test_rotation_takes_the_vector_to_cos_and_sin(name):
    model, figure = model_of(name), drawn("rotation", name)
    pairs = sorted({0, model.pairs // 8, model.pairs - 1})
    for axes, pair in zip(figure.axes, pairs, strict=True):
        turns = model.inv_freq[pair] > 0
        assert axes.get_title().startswith(f"pair {pair}: {'a turn in ' if turns else 'never'}")
        for position, (label, (x, y)) in enumerate(lines(axes).items()):
            assert (label, x[0], y[0]) == (str(position), 0, 0)
            tip = cmath.rect(model.attention_scaling, position * model.inv_freq[pair].item())
            assert complex(x[1], y[1]) == pytest.approx(tip, abs=ROTATED)


@pytest.mark.parametrize("name", ["yarn", "proportional"])
def test_tables_have_cos_and_sin_with_the_fast_pairs_at_the_top(name):
    model, figure = model_of(name), drawn("tables", name)
    angle = model.inv_freq.double()[:, None] * torch.arange(256)  # [P, L], exact to 2^-45
    for axes, function in zip(figure.axes, (torch.cos, torch.sin), strict=False):
        (image,) = axes.get_images()
        off = torch.tensor(image.get_array().data) - model.attention_scaling * function(angle)
        assert off.abs().max() <= 2 * TABLE * model.attention_scaling
        assert image.get_clim() == (-model.attention_scaling, model.attention_scaling)
        assert image.get_extent()[2:] == [model.pairs - 0.5, -0.5]  # row 0 first
        assert axes.yaxis_inverted()


@pytest.mark.parametrize("name", CONFIGS)
def test_wavelengths_are_those_of_every_method(name):
    model = model_of(name)
    (axes,) = drawn("wavelengths", name).axes
    got = {re.split(r":| \(this model", label)[0]: xy for label, xy in lines(axes).items()}
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
        torch.testing.assert_close(tokens, 2 * math.pi / inv_freq.double())  # also infinite
    marks = [line for line in axes.get_lines() if line.get_label().endswith("tokens")]
    assert [mark.get_ydata()[0] for mark in marks] == [model.trained, model.extended]


@pytest.mark.parametrize("name", ["yarn", "longrope, partial"])
def test_decay_is_the_bound_of_roformer_and_the_mean_score(name):
    model, figure = model_of(name), drawn("decay", name)
    ((distances, bound),), ((_, mean),) = (lines(axes).values() for axes in figure.axes)
    assert (distances[0], distances[-1]) == (1, model.extended)
    square = model.attention_scaling**2
    for at in range(0, len(distances), len(distances) // 7):
        turns = [cmath.exp(1j * distances[at].item() * f) for f in model.inv_freq.tolist()]
        sums = [sum(turns[: j + 1]) for j in range(model.pairs)]
        bound_here = square * sum(map(abs, sums)) / model.pairs
        assert bound[at].item() == pytest.approx(bound_here, rel=1e-9)
        assert mean[at].item() == pytest.approx(square * sums[-1].real / model.pairs, abs=1e-9)


@pytest.mark.parametrize("name", ["yarn", "longrope, partial"])
def test_scores_depend_on_the_distance_alone(name):
    """q · k / sqrt(D) in float64, q rotated by the distance alone."""
    model, figure = model_of(name), drawn("relative", name)
    q, k = torch.randn(2, model.head_dim, generator=torch.Generator().manual_seed(0))
    cos, sin = reference.cos_sin(
        model.inv_freq, torch.arange(65), attention_scaling=model.attention_scaling**2
    )
    rotated = reference.apply_rotary(
        q.double().expand(1, 65, 1, -1), cos[None], sin[None], rotary_dim=model.rotary_dim
    )
    scores = (rotated.flatten(0, 2) @ k.double() / model.head_dim**0.5).tolist()  # [65]
    left, right = map(lines, figure.axes)
    assert list(left) == [f"m = {m:,}" for m in (64, model.trained - 1, model.extended - 1)]
    for distances, got in left.values():
        assert distances.tolist() == list(range(65))
        assert got.tolist() == pytest.approx(scores, abs=SCORE)
    assert list(right) == ["0", "1", "4", "16", "64"]
    for label, (m, got) in right.items():
        assert (m[0], m[-1]) == (64, model.extended - 1)
        assert got.tolist() == pytest.approx([scores[int(label)]] * len(m), abs=SCORE)


def test_accuracy_is_the_distance_from_the_true_angle():
    """At a few positions by 60 digits, pair by pair; and the bounds everywhere."""
    model = model_of("like Llama 3")
    (axes,) = drawn("accuracy", "like Llama 3").axes
    (usual_name, (positions, usual)), (_, (_, ours)) = lines(axes).items()
    assert "torch.cos" in usual_name
    assert (positions[0], positions[-1]) == (1, 2**31 - 1)
    assert (positions % 2 == 1).all()  # even ones have fewer bits, which float32 rounds less
    for at in (0, 40, 80, len(positions) - 1):
        ids = positions[at : at + 1].long()
        angle = ids.float()[:, None] * model.inv_freq
        for got, (cos, sin) in (
            (ours, rope_ext.cos_sin(model.inv_freq, ids)),
            (usual, (angle.cos(), angle.sin())),
        ):
            parts = zip(model.inv_freq.tolist(), cos[0].tolist(), sin[0].tolist(), strict=True)
            with mpmath.workdps(60):
                off = [
                    mpmath.arg(mpmath.mpc(c, s) * mpmath.expj(-ids.item() * mpmath.mpf(f)))
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
        *pairs, below = figure.axes
        for axes in pairs:
            frequency = model.inv_freq[int(axes.get_label())].item()
            for line, at in zip(axes.get_lines(), (position, position - 3), strict=True):
                tip = complex(line.get_xdata()[1], line.get_ydata()[1])
                assert tip == pytest.approx(cmath.rect(1, at * frequency))
    assert (position, len(pairs)) == (66, 3)
    ((m, score),) = lines(below).values()
    assert m.tolist() == list(range(3, 67))
    assert score.max() - score.min() < 2 * SCORE


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [2, 4])
def test_heads_of_one_and_two_pairs_are_drawn(head_dim):
    """With the shortest possible context."""
    model = ModelRotation.of({"head_dim": head_dim, "max_position_embeddings": 2})
    for figure in FIGURES:
        getattr(figures, figure)(model).draw_without_rendering()


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
    for suffix in ("png", "svg"):
        arguments = ("rotation", "--config", tmp_path, "--format", suffix, "--out", tmp_path)
        assert run_plot(*arguments) == 0
        path = Path(capsys.readouterr().out.strip())
        assert path == tmp_path / f"rotation.{suffix}"
        with matplotlib.style.context("dark_background"):  # the caller's style has no effect
            figures.save(figures.rotation(model_of("yarn")), tmp_path / f"again.{suffix}")
        assert path.read_bytes() == (tmp_path / f"again.{suffix}").read_bytes()


def test_command_writes_the_rotation_in_motion(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(animation, "STEPS", 3)
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "rotation.gif"
    assert run_plot("--gif", "--dpi", 30, "--out", tmp_path) == 0
    assert capsys.readouterr().out.split() == [str(path)]  # no figure
    image = Image.open(path)
    assert (image.n_frames, image.size, image.info["duration"]) == (3, (240, 150), 100)
    assert run_plot("--mp4", "--out", tmp_path) == 2
    assert "--mp4: the program ffmpeg not found" in capsys.readouterr().err
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="pip install 'rope_ext[test]'")
    (tmp_path / "ffmpeg").symlink_to(ffmpeg.get_ffmpeg_exe())
    assert run_plot("--mp4", "--dpi", 30, "--out", tmp_path) == 0
    assert b"ftyp" in path.with_suffix(".mp4").read_bytes()[:12]


def test_config_is_read_by_layer_type(tmp_path, capsys):
    of_layers = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    path = tmp_path / "any.json"
    path.write_text(json.dumps({**HEAD, "rope_parameters": of_layers}))
    arguments = ("explore", "--config", str(path), "--out", str(tmp_path / "page.html"))
    assert main([*arguments, "--layer-type", "sliding_attention"]) == 0
    assert main([*arguments]) == 2
    assert "expected layer_type to be one of 'full_attention'" in capsys.readouterr().err


# Contents of --config, or a function that makes it at a path; and the reason of the error.
NOT_THERE = "--config 'meta-llama/Llama-3.1-8B': No such file. Nothing is downloaded"
NO_CONFIG = {
    "a name from a hub": (lambda path: Path("meta-llama/Llama-3.1-8B"), NOT_THERE),
    "a long name": (lambda path: path / ("x" * 5000), "File name too long"),
    "a folder without a config": (lambda path: path.parent, "config.json': No such file"),
    "a FIFO": (lambda path: os.mkfifo(path) or path, "expected a file, got a folder, a FIFO"),
    "a file that can't be read": (lambda path: Path("/proc/self/mem"), "Input/output error"),
    "a large file": (b" " * (2**24 + 1), "expected a config.json of at most 16,777,216 bytes"),
    "a binary": (b"\x7fELF\0\xff", "expected JSON, got 'utf-8' codec can't decode byte 0xff"),
    "brackets": (b"[" * 100_000, "expected JSON, got brackets nested too deeply"),
    "digits": (b'{"head_dim": 1' + b"0" * 5000 + b"}", "expected JSON, got Exceeds the limit"),
    "another type": (b"[1]", "expected a dict, got list"),
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
def test_out_that_can_not_be_written_ends_with_one_line(command, tmp_path, capsys):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    (folder / "decay.png").mkdir(parents=True)
    for out, message in ((file, "exists|Not a directory"), (folder, "expected the path of a file")):
        of = {"plot": ["decay", "--out", out], "explore": ["--out", out / "decay.png"]}
        assert main([command, *map(str, of[command])]) == 2
        assert re.match(rf"rope_ext {command}: .*({message}).*\n$", capsys.readouterr().err)


def test_neither_the_command_line_nor_the_page_imports_matplotlib(tmp_path):
    code = "import sys, rope_ext.__main__ as command; command.main(['explore'])"
    command = [sys.executable, "-c", f"{code}; assert 'matplotlib' not in sys.modules"]
    env = {**os.environ, "PYTHONPATH": str(Path(rope_ext.__file__).parents[1])}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
