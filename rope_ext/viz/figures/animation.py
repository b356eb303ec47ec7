"""The rotation in motion: two tokens move on together, their pairs turn, their score stays."""

from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.animation import FFMpegWriter, PillowWriter
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from rope_ext.viz.figures.rotations import title_of
from rope_ext.viz.figures.scores import scores
from rope_ext.viz.figures.style import COLORS, DASHES, QUIET, new_figure, styled
from rope_ext.viz.model_rotation import ModelRotation

DISTANCE, STEPS = 3, 64  # tokens from the key to the query; frames, a token each
PER_SECOND = 10
DPI = 100  # a GIF has no better compression than its number of dots
WRITERS = {".gif": PillowWriter, ".mp4": FFMpegWriter}


@styled
def animate(model: ModelRotation, path: Path, dpi: int = DPI) -> None:
    """Writes the animation as a GIF or, with the program ffmpeg, as an MP4, by the suffix.

    Above, some pairs of a query at m (solid) and a key at n = m - 3 (dashed), both (1, 0) before
    the rotation; below, the score of two random vectors, which depends on m - n alone.

    Source: RoFormer, arXiv 2104.09864, figure 1 and equation 16.
    """
    figure = new_figure("", 8, 5)
    with WRITERS[path.suffix](fps=PER_SECOND).saving(figure, path, dpi) as writer:
        for _ in frames(model, figure):
            writer.grab_frame()


def frames(model: ModelRotation, figure: Figure) -> Iterator[int]:
    """Draws one position of the query after the other; yields it."""
    pairs = sorted({0, model.pairs // 8, model.pairs // 4})
    mosaic = figure.subplot_mosaic(
        [[f"{pair}" for pair in pairs], ["score"] * len(pairs)], height_ratios=(3, 1)
    )
    hands = {}
    for pair in pairs:
        axes = mosaic[f"{pair}"]
        axes.add_patch(Circle((0, 0), 1, fill=False, ls="--", lw=0.8, ec=QUIET))
        axes.set(aspect="equal", xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), xticks=[], yticks=[])
        axes.set_title(title_of(model, pair, STEPS))
        for token in (0, 1):
            how = {"color": COLORS[1 + token], "linestyle": DASHES[token], "lw": 2.5}
            hands[pair, token] = axes.plot([], [], marker="o", markevery=[1], **how)[0]
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, model.head_dim, generator=generator)
    m = torch.arange(DISTANCE, DISTANCE + STEPS)
    score = scores(model, q, k, m, m - DISTANCE)
    below = mosaic["score"]
    (line,) = below.plot([], [])
    below.set(xlim=(m[0], m[-1]), ylim=(score.mean() - 1, score.mean() + 1))
    below.set(xlabel="position m (tokens)", ylabel="score")
    for step, position in enumerate(m.tolist()):
        for (pair, token), hand in hands.items():
            angle = (position - token * DISTANCE) * model.inv_freq[pair].double()
            hand.set_data([0, angle.cos()], [0, angle.sin()])
        line.set_data(m[: step + 1].numpy(), score[: step + 1].numpy())
        figure.suptitle(f"query at m = {position} (solid), key at n = {position - DISTANCE}")
        yield position
