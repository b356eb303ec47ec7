"""The style of the figures: colours for colour-blind readers, and reproducible files."""

from pathlib import Path

import matplotlib.style
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from rope_ext.viz.rope import Rope

# Okabe and Ito, "Color Universal Design", 2008: the colours that are visible on white, and a grey.
# Each line has its own dashes, which distinguish the lines in grey.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676")
DASHES = ("-", (0, (6, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (6, 2, 1, 2, 1, 2)))
QUIET = "#595959"  # for secondary elements

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLORS, linestyle=DASHES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 10,
    "grid.alpha": 0.3,
    # one hue after the other, increasingly light: distinguishable in grey and by all readers
    "image.cmap": "cividis",
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 120,
    "svg.fonttype": "path",
    "svg.hashsalt": "rope_ext",  # ids of elements, which are random otherwise
}

# Decorates each function that draws, so that the caller's style has no effect.
styled = matplotlib.style.context(["default", STYLE])


def new_figure(title: str, width: float, height: float) -> Figure:
    """An empty figure, width and height in inches. Without pyplot, so without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize="large")
    return figure


def mark_contexts(axes: Axes, rope: Rope, *, across: bool, named: bool = True) -> None:
    """A thin line at the trained and at the extended context, horizontal (across) or vertical.

    The names are on the outer sides, so that neither covers the other if the lines are close.
    """
    halo = [withStroke(linewidth=3, foreground="white")]  # sets names off from lines
    for name, tokens, outside in (
        ("trained", rope.trained, {"va": "top"} if across else {"ha": "right"}),
        ("extended", rope.extended, {"va": "bottom"} if across else {"ha": "left"}),
    ):
        label = f"{name} context: {tokens:,} tokens"
        how = {"color": QUIET, "linewidth": 0.9, "linestyle": "-", "label": f"_{label}"}
        beside = {"color": QUIET, "fontsize": "small", "path_effects": halo, **outside}
        if across:
            axes.axhline(tokens, **how)
            where = {"x": 0.01, "y": tokens, "transform": axes.get_yaxis_transform()}
            beside |= {"ha": "left"}
        else:
            axes.axvline(tokens, **how)
            where = {"x": tokens, "y": 0.99, "transform": axes.get_xaxis_transform()}
            beside |= {"va": "top", "rotation": 90}
        if named:
            axes.text(s=label, **where, **beside)


def number_pairs(axis: Axis) -> None:
    """Ticks at whole numbers, also for few pairs."""
    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)


@styled
def save(figure: Figure, path: Path) -> None:
    """Writes a PNG or SVG, by the suffix: without a date or a version, the same bytes each time."""
    nothing = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
    figure.savefig(path, metadata=nothing[path.suffix])
