"""Rotated vectors, and the cos and sin that rotate them."""

import math
from collections.abc import Sequence

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from rope_ext.angles import cos_sin, cos_sin_cache
from rope_ext.rotation import apply_rotary
from rope_ext.viz.figures.style import QUIET, new_figure, number_pairs, styled
from rope_ext.viz.model_rotation import ModelRotation, tokens_per_turn

UNSEEN = 0.002  # of a turn: closer lines look like one


@styled
def rotation(
    model: ModelRotation, *, positions: Sequence[int] = range(8), pairs: Sequence[int] | None = None
) -> Figure:
    """The vector (1, 0) in some pairs of channels, rotated to some positions.

    A panel a pair: for each position, a line from the origin to the vector that ``apply_rotary``
    returns, dark to light. The dashed circle has the radius attention_scaling. Fast pairs are those
    with a low index.

    Args:
        positions: in tokens.
        pairs: by index. None: the first, the one after an eighth of them, and the last.

    Source: RoFormer, arXiv 2104.09864, figure 1 and equation 13.
    """
    if pairs is None:
        pairs = sorted({0, model.pairs // 8, model.pairs - 1})
    cos, sin = cos_sin(  # [S, P]
        model.inv_freq, torch.tensor(positions), attention_scaling=model.attention_scaling
    )
    x = torch.zeros(1, len(positions), 1, 2 * model.pairs)  # [1, S, 1, R]
    x[..., : model.pairs] = 1
    first, second = apply_rotary(x, cos[None], sin[None])[0, :, 0].chunk(2, -1)  # [S, P] each

    figure = new_figure("A vector rotates by its position", 3.2 * len(pairs) + 1.4, 3.9)
    shades = matplotlib.colormaps["cividis"](torch.linspace(0, 0.9, len(positions)).numpy())
    reach = 1.15 * model.attention_scaling
    for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        axes.add_patch(
            Circle((0, 0), model.attention_scaling, fill=False, ls="--", lw=0.8, ec=QUIET)
        )
        tips = zip(positions, shades, first[:, pair], second[:, pair], strict=True)
        for position, shade, right, up in tips:
            label = f"{position:,}"
            axes.plot([0, right], [0, up], "-o", color=shade, markevery=[1], label=label)
        axes.set(
            aspect="equal",
            xlim=(-reach, reach),
            ylim=(-reach, reach),
            xlabel="first channel of the pair",
            title=title_of(model, pair, max(positions) - min(positions)),
        )
    figure.axes[0].set_ylabel("second channel of the pair")
    figure.legend(handles=axes.get_lines(), title="position\n(tokens)", loc="outside right center")
    return figure


def title_of(model: ModelRotation, pair: int, distance: int) -> str:
    """What is seen of a pair whose positions are up to `distance` tokens apart."""
    tokens = tokens_per_turn(model.inv_freq)[pair].item()
    if math.isinf(tokens):
        return f"pair {pair}: never turns; the lines coincide"
    turn = f"pair {pair}: a turn in {tokens:{',.0f' if tokens >= 100 else '.3g'}} tokens"
    return f"{turn};\nhere the lines coincide" if distance / tokens < UNSEEN else turn


@styled
def tables(model: ModelRotation, *, positions: int = 256) -> Figure:
    """cos and sin of ``cos_sin_cache``, over position and pair.

    Stripes are narrow at the top, where pairs are fast, and wide at the bottom. Light is
    attention_scaling, dark is -attention_scaling.

    Args:
        positions: the number of positions, from 0, in tokens.

    Source: RoFormer, arXiv 2104.09864, equation 34.
    """
    scaling = model.attention_scaling
    figure = new_figure("cos and sin of position times frequency", 10, 4.2)
    both = cos_sin_cache(model.inv_freq, positions, attention_scaling=scaling)  # [L, P] each
    for axes, name, table in zip(
        figure.subplots(1, 2, sharey=True), ("cos", "sin"), both, strict=True
    ):
        image = axes.imshow(table.t().numpy(), aspect="auto", vmin=-scaling, vmax=scaling)
        axes.set(title=name, xlabel="position (tokens)")
        axes.grid(visible=False)
    number_pairs(figure.axes[0].yaxis)
    figure.axes[0].set_ylabel("pair: fast at the top, slow at the bottom")
    figure.colorbar(image, ax=figure.axes, label="cos, sin")
    return figure
