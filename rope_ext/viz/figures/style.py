"""The style of the figures: colours for colour-blind readers, and reproducible files."""

from pathlib import Path

import matplotlib.style
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from rope_ext.viz.model_rotation import ModelRotation

# Okabe and Ito, "Color Universal Design", 2008: the colours that are visible on white, and a grey.
# Each line has its own dashes, which distinguish the lines in grey.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676")
DASHES = ("-", (0, (6, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (6, 2, 1, 2, 1, 2)))
QUIET = "#595959"  # for secondary elements
DPI = 200  # dots an inch

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
    "savefig.dpi": DPI,
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


def mark_contexts(axes: Axes, model: ModelRotation, *, across: bool, named: bool = True) -> None:
    """A thin line at the trained and at the extended context, horizontal (across) or vertical.

    The names are outside of the axes, where no curve is, and on the outer sides of the lines, so
    that neither covers the other if the lines are close.
    """
    for name, tokens, outside in (
        ("trained", model.trained, {"va": "top"} if across else {"ha": "right"}),
        ("extended", model.extended, {"va": "bottom"} if across else {"ha": "left"}),
    ):
        label = f"{name} context:\n{tokens:,} tokens"
        how = {"color": QUIET, "linewidth": 0.9, "linestyle": "-", "label": f"_{label}"}
        if across:
            axes.axhline(tokens, **how)
            where = {"x": 1.01, "y": tokens, "transform": axes.get_yaxis_transform(), "ha": "left"}
        else:
            axes.axvline(tokens, **how)
            where = {"x": tokens, "y": 1.01, "transform": axes.get_xaxis_transform()}
            where |= {"va": "bottom"}
        if named:
            axes.text(s=label, color=QUIET, fontsize="small", **where, **outside)


def number_pairs(axis: Axis) -> None:
    """Ticks at whole numbers, also for few pairs."""
    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)


@styled
def save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Writes a PNG or SVG, by the suffix: without a date or a version, the same bytes each time."""
    nothing = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
    figure.savefig(path, dpi=dpi, metadata=nothing[path.suffix])
