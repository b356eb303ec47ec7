"""One function a figure: from a ModelRotation to a matplotlib Figure, the same in every run.

The wavelengths of a config::

    from rope_ext.viz import ModelRotation, figures

    figures.wavelengths(ModelRotation.of(config)).savefig("wavelengths.png")

The files::

    style.py      colours, sizes, files that are the same in every run
    rotations.py  rotation, tables: rotated vectors, and the cos and sin
    methods.py    wavelengths: the tokens that each pair takes for a turn, by method
    animation.py  animate: the rotation in motion, as a GIF or MP4
    scores.py     decay, relative: the effect on attention scores
    errors.py     accuracy: the errors of float32 angles
"""

from rope_ext.viz.figures.animation import animate
from rope_ext.viz.figures.errors import accuracy
from rope_ext.viz.figures.methods import wavelengths
from rope_ext.viz.figures.rotations import rotation, tables
from rope_ext.viz.figures.scores import decay, relative
from rope_ext.viz.figures.style import save

__all__ = ["accuracy", "animate", "decay", "relative", "rotation", "save", "tables", "wavelengths"]
