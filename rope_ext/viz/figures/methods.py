"""The tokens that each pair takes for a turn, by method."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rope_ext.viz.figures.style import mark_contexts, new_figure, number_pairs, styled
from rope_ext.viz.model_rotation import ModelRotation, tokens_per_turn

SAME = 0.02  # lines this close to each other, relatively, look like one


@styled
def wavelengths(model: ModelRotation) -> Figure:
    """Tokens that each pair takes for a turn: a line for each method, with the contexts.

    A pair whose line is below a context makes a full turn within it. A pair above it has seen only
    a part of a turn, so positions past the trained context have angles that are new to the model.
    The methods differ in which pairs they slow down. The lines are those of
    ``ModelRotation.methods``: the model's own method with its config's parameters, the others with
    ``factor``; for dynamic and longrope, in a sequence of the extended context. Where lines
    coincide, the legend says so.

    Sources: those of the functions of ``rope_ext.frequencies``; the view is that of YaRN, arXiv
    2309.00071, section 3.2.
    """
    figure = new_figure("Wavelength of each pair", 7.5, 6)
    axes = figure.subplots()
    methods = model.methods()
    for name, inv_freq in methods.items():
        own = name == model.rope_type
        label = f"{name} (this model)" if own else name
        axes.plot(
            range(model.pairs),
            tokens_per_turn(inv_freq).numpy(),
            label=label + coincidence(inv_freq, methods, name),
            linewidth=2.6 if own else None,
            marker="o" if model.pairs == 1 else None,  # one point has no line
        )
    mark_contexts(axes, model, across=True)
    number_pairs(axes.xaxis)
    axes.set(yscale="log", xlabel="pair: fast at the left, slow at the right")
    axes.set_ylabel("tokens for a turn")
    title = f"method, by a factor of {model.factor:g}"
    figure.legend(loc="outside lower center", title=title, handlelength=4, alignment="left")
    return figure


def coincidence(inv_freq: Tensor, methods: dict[str, Tensor], name: str) -> str:
    """Where the line of a method is on an earlier one, in words: empty, or after a colon."""
    pairs = len(inv_freq)
    parts = []
    for other in list(methods)[: list(methods).index(name)]:
        same = torch.isclose(inv_freq, methods[other], rtol=SAME, atol=0).tolist()
        from_the_first = (*same, False).index(False)
        from_the_last = (*same[::-1], False).index(False)
        if from_the_first == pairs:
            return f": the line of {other}"
        if from_the_first > 1 and other in ("default", "linear"):
            parts.append(f"like {other} up to pair {from_the_first - 1}")
        if from_the_last > 1 and other in ("default", "linear"):
            parts.append(f"like {other} from pair {pairs - from_the_last}")
    return f": {', '.join(parts)}" if parts else ""
