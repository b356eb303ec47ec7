"""One function a figure: of a Rope, to a matplotlib Figure that is the same each time.

Of a config::

    from rope_ext.viz import Rope, figures

    figures.wavelengths(Rope.of(config)).savefig("wavelengths.png")

The files::

    style.py      colours, sizes, files that do not differ from run to run
    rotations.py  rotation, tables: what happens to a vector, and the numbers that do it
    methods.py    wavelengths: how long each pair takes for a turn, by each method
    scores.py     decay, relative: what it does to the scores of attention
    errors.py     accuracy: what float32 does to angles
"""

from rope_ext.viz.figures.errors import accuracy
from rope_ext.viz.figures.methods import wavelengths
from rope_ext.viz.figures.rotations import rotation, tables
from rope_ext.viz.figures.scores import decay, relative
from rope_ext.viz.figures.style import save

__all__ = ["accuracy", "decay", "relative", "rotation", "save", "tables", "wavelengths"]
