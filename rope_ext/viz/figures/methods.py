"""The tokens that each pair takes for a turn, by method."""

from matplotlib.figure import Figure

from rope_ext.viz import rope as of_rope
from rope_ext.viz.figures.style import mark_contexts, new_figure, number_pairs, styled
from rope_ext.viz.rope import Rope


@styled
def wavelengths(rope: Rope) -> Figure:
    """Tokens that each pair takes for a turn: a line for each method, with the contexts.

    A pair whose line is below a context makes a full turn within it. A pair above it has seen only
    a part of a turn, so positions past the trained context have angles that are new to the model.
    The methods differ in which pairs they slow down. The lines are those of ``Rope.methods``: the
    model's own method with its config's parameters, the others with `Rope.factor`; for dynamic and
    longrope, in a sequence of the extended context.

    Sources: those of the functions of ``rope_ext.frequencies``; the view is that of YaRN, arXiv
    2309.00071, section 3.2.
    """
    figure = new_figure("Wavelength of each pair", 7.5, 5)
    axes = figure.subplots()
    for name, inv_freq in rope.methods().items():
        own = name == rope.rope_type
        axes.plot(
            range(rope.pairs),
            of_rope.wavelengths(inv_freq).numpy(),
            label=f"{name} (this model)" if own else name,
            linewidth=2.6 if own else None,
            marker="o" if rope.pairs == 1 else None,  # one point has no line
        )
    mark_contexts(axes, rope, across=True)
    number_pairs(axes.xaxis)
    axes.set(yscale="log", xlabel="pair: fast at the left, slow at the right")
    axes.set_ylabel("tokens for a turn")
    axes.legend(loc="lower right", title=f"method, by a factor of {rope.factor:g}", handlelength=4)
    return figure
