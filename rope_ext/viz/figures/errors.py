"""The errors of float32 angles."""

import mpmath
import torch
from matplotlib.figure import Figure
from torch import Tensor

from rope_ext.angles import cos_sin
from rope_ext.frequencies.bounds import LAST_POSITION
from rope_ext.viz.figures.style import mark_contexts, new_figure, styled
from rope_ext.viz.model_rotation import ModelRotation

DIGITS = 40  # 10 for the largest position, 8 for inv_freq, and over 16 for float64 results


@styled
def accuracy(model: ModelRotation) -> Figure:
    """The largest error of a pair's angle at each position, in float32: ours and the usual one.

    Ours is ``rope_ext.cos_sin``; the usual one is ``angle = position.float() * inv_freq``, then
    ``torch.cos(angle)`` and ``torch.sin(angle)``. The truth is cos and sin of position * inv_freq
    in 40 digits, for the same float32 inv_freq. The error is the angle, in radians, between
    (cos, sin) and the truth: at most pi. The usual error grows with the position, as the product is
    rounded to 24 bits: at most position * inv_freq * 2^-24 up to position 2^24, and twice that
    beyond, where the position is rounded as well.

    Source: the bound is half a unit in the last place, of the product and of the position;
    positions are four in each doubling up to 2^31 - 1.
    """
    positions = torch.tensor(positions_shown())
    truth = exact(positions, model.inv_freq)
    angle = positions.float()[:, None] * model.inv_freq  # [N, P]
    figure = new_figure("Error of angles in float32", 7.5, 5)
    axes = figure.subplots()
    for name, (cos, sin) in {
        "position.float() * inv_freq, torch.cos": (angle.cos(), angle.sin()),
        "rope_ext.cos_sin": cos_sin(model.inv_freq, positions),
    }.items():
        worst = angle_between(truth, (cos, sin)).amax(-1)  # [N]
        axes.plot(positions.numpy(), worst.numpy(), label=name)
    mark_contexts(axes, model, across=False)
    axes.set(xscale="log", yscale="log", xlabel="position (tokens)")
    axes.set_ylabel("largest error of a pair's angle (radians)")
    # between the two lines, below the names of the contexts
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.35), handlelength=4)
    return figure


def positions_shown() -> list[int]:
    """Four in each doubling; odd if possible, as positions with few bits are never rounded."""
    steps = (round(2 ** (octave + step / 4)) | 1 for octave in range(31) for step in range(4))
    return sorted({step for step in steps if step < LAST_POSITION} | {LAST_POSITION})


def exact(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of positions [N] times inv_freq [P], each float64 [N, P], rounded once."""
    (cos, _), (sin, _) = exact_parts(positions, inv_freq)
    return cos, sin


def exact_parts(positions: Tensor, inv_freq: Tensor) -> list[tuple[Tensor, Tensor]]:
    """:func:`exact` with its rounding errors: for cos and for sin the pair, float64 [N, P] each."""

    def split(value: mpmath.mpf) -> tuple[float, float]:
        nearest = float(value)
        return nearest, float(value - nearest)

    with mpmath.workdps(DIGITS):
        frequencies = [mpmath.mpf(f) for f in inv_freq.tolist()]
        rows = [[mpmath.cos_sin(p * f) for f in frequencies] for p in positions.tolist()]
        parts = [[[split(part) for part in pair] for pair in row] for row in rows]
    parts = torch.tensor(parts, dtype=torch.float64)  # [N, P, 2, 2]
    return [part.unbind(-1) for part in parts.unbind(-2)]


def angle_between(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """The angle between two (cos, sin), in radians: float64."""
    (c, s), (c2, s2) = one, (part.double() for part in other)
    return torch.atan2(s * c2 - c * s2, c * c2 + s * s2).abs()
