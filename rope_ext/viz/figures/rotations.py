"""Rotated vectors, and the cos and sin that rotate them."""

from collections.abc import Sequence

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from rope_ext.angles import cos_sin, cos_sin_cache
from rope_ext.rotation import apply_rotary
from rope_ext.viz.figures.style import QUIET, new_figure, number_pairs, styled
from rope_ext.viz.rope import Rope, in_words, wavelengths


@styled
def rotation(
    rope: Rope, *, positions: Sequence[int] = range(8), pairs: Sequence[int] | None = None
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
        pairs = sorted({0, rope.pairs // 8, rope.pairs - 1})
    cos, sin = cos_sin(  # [S, P]
        rope.inv_freq, torch.tensor(positions), attention_scaling=rope.attention_scaling
    )
    x = torch.zeros(1, len(positions), 1, 2 * rope.pairs)  # [1, S, 1, R]
    x[..., : rope.pairs] = 1
    first, second = apply_rotary(x, cos[None], sin[None])[0, :, 0].chunk(2, -1)  # [S, P] each

    figure = new_figure("A vector rotates by its position", 3.2 * len(pairs) + 1.4, 3.9)
    shades = matplotlib.colormaps["cividis"](torch.linspace(0, 0.9, len(positions)).numpy())
    reach = 1.15 * rope.attention_scaling
    for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        axes.add_patch(
            Circle((0, 0), rope.attention_scaling, fill=False, ls="--", lw=0.8, ec=QUIET)
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
            title=f"pair {pair}: {in_words(wavelengths(rope.inv_freq)[pair].item())}",
        )
    figure.axes[0].set_ylabel("second channel of the pair")
    figure.legend(handles=axes.get_lines(), title="position\n(tokens)", loc="outside right center")
    return figure


@styled
def tables(rope: Rope, *, positions: int = 256) -> Figure:
    """cos and sin of ``cos_sin_cache``, over position and pair.

    Stripes are narrow at the top, where pairs are fast, and wide at the bottom. Light is
    attention_scaling, dark is -attention_scaling.

    Args:
        positions: the number of positions, from 0, in tokens.

    Source: RoFormer, arXiv 2104.09864, equation 34.
    """
    scaling = rope.attention_scaling
    figure = new_figure("cos and sin of position times frequency", 10, 4.2)
    both = cos_sin_cache(rope.inv_freq, positions, attention_scaling=scaling)  # [L, P] each
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
