"""Figures of a rotation: `python -m rope_ext plot` and `python -m rope_ext explore`.

The files::

    rope.py     the rotation: that of a config, or of a model like Llama 3
    command.py  the two commands
    figures/    one function a figure, with matplotlib (pip install 'rope_ext[viz]')
    page/       an HTML page to explore a rotation
"""

from rope_ext.viz.rope import Rope

# The functions of rope_ext.viz.figures. Listed here, as importing them needs matplotlib.
FIGURES = ("rotation", "tables", "wavelengths", "decay", "relative", "accuracy")

__all__ = ["FIGURES", "Rope"]
