"""The effect of the rotation on attention scores."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rope_ext.angles import cos_sin
from rope_ext.rotation import apply_rotary
from rope_ext.viz.figures.style import COLORS, mark_contexts, new_figure, styled
from rope_ext.viz.model_rotation import ModelRotation

MARKERS = "osD^v"


def spread(most: int, count: int, least: int = 1) -> Tensor:
    """Whole numbers from least to most, evenly spaced on a logarithmic scale: int64 [<= count]."""
    exponents = torch.linspace(0, 1, count, dtype=torch.float64)
    return (least * (most / least) ** exponents).round().long().unique()


@styled
def decay(model: ModelRotation, *, distances: Sequence[int] | None = None) -> Figure:
    """How the score of two tokens fades with their distance, in two measures.

    Above, RoFormer's upper bound: the mean over j of ``|S_j|``, where S_j is the sum of
    ``exp(1j (m - n) inv_freq)`` over the first j pairs; the score is at most that times
    ``P max |h[i + 1] - h[i]|``, where h are the products of the pairs of q and k. Below, the mean
    score for random q = k with independent channels of one variance, relative to the mean of q · q:
    the mean over pairs of ``cos((m - n) inv_freq)``, computed exactly, not from a sample. Both are
    multiplied by attention_scaling squared, and count the channels that rotate.

    Args:
        distances: m - n, in tokens. None: from 1 to the extended context.

    Source: RoFormer, arXiv 2104.09864, sections 3.3 and 3.4.3, figure 2.
    """
    ids = spread(model.extended, 500) if distances is None else torch.tensor(distances)  # [N]
    cos, sin = cos_sin(model.inv_freq.double(), ids)  # [N, P] each
    square = model.attention_scaling**2
    bound = square * torch.complex(cos, sin).cumsum(-1).abs().mean(-1)  # [N]
    mean = square * cos.mean(-1)  # [N]

    figure = new_figure("Scores fade with the distance", 7.5, 5.5)
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(ids.numpy(), bound.numpy())
    below.plot(ids.numpy(), mean.numpy())
    above.set_ylabel("upper bound:\nmean of |S$_j$|")
    below.set_ylabel("mean score of random q = k,\nrelative to q · q")
    below.set(xscale="log", xlabel="distance m - n (tokens)")
    mark_contexts(above, model, across=False)
    mark_contexts(below, model, across=False, named=False)
    return figure


@styled
def relative(model: ModelRotation) -> Figure:
    """The score of a query at position m and a key at n depends on m - n alone.

    q and k are two random vectors [D]; each is rotated to its position by ``apply_rotary`` in
    float32, and the score is ``q · k / sqrt(D)``. Left, against m - n: the curves of small and of
    large m coincide. Right, against m: a line for each m - n, and each is flat.

    Source: RoFormer, arXiv 2104.09864, equation 16.
    """
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, model.head_dim, generator=generator)
    most = min(64, model.trained - 1)  # of m - n
    figure = new_figure("A score depends on the distance alone", 10, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)

    distances = torch.arange(most + 1)
    anchors = dict.fromkeys((most, model.trained - 1, model.extended - 1))  # no duplicates
    for i, m in enumerate(anchors):
        at = scores(model, q, k, torch.full_like(distances, m), m - distances)
        # markers drawn first are larger, so that they stay visible
        left.plot(
            distances.numpy(),
            at.numpy(),
            MARKERS[i],
            color=COLORS[i],
            label=f"m = {m:,}",
            markerfacecolor="none",
            markersize=9 - 3 * i,
        )
    left.set(title="the curves coincide: the same at every m", xlabel="distance m - n (tokens)")
    left.set_ylabel("score, q · k / √D")
    left.legend(loc="best")

    everywhere = spread(model.extended - 1, 40, least=most)
    chosen = dict.fromkeys(min(distance, most) for distance in (0, 1, 4, 16, 64))
    for marker, distance in zip(MARKERS, chosen, strict=False):
        at = scores(model, q, k, everywhere, everywhere - distance)
        label = f"{distance}"
        right.plot(everywhere.numpy(), at.numpy(), marker=marker, markersize=4, label=label)
    right.set(title="flat at a fixed distance", xscale="log", xlabel="position m (tokens)")
    right.legend(title="m - n", loc="center left", bbox_to_anchor=(1, 0.5), handlelength=4)
    return figure


def scores(model: ModelRotation, q: Tensor, k: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """q · k / sqrt(D) of q [D] rotated to positions m [N] and k [D] to n [N]: [N]."""

    def rotated(x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = cos_sin(model.inv_freq, positions, attention_scaling=model.attention_scaling)
        x = x.expand(1, len(positions), 1, -1)  # [1, N, 1, D]
        return apply_rotary(x, cos[None], sin[None])[0, :, 0]  # [N, D]

    return (rotated(q, m) * rotated(k, n)).sum(-1) / model.head_dim**0.5
