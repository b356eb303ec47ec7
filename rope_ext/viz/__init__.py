"""Figures of a rotation: `python -m rope_ext plot` and `python -m rope_ext explore`.

The files::

    model_rotation.py  what is shown: the rotation of a config, or of a model like Llama 3
    published.py       the rotations of well-known models, to pick from
    command.py         the two commands
    figures/           one function a figure, with matplotlib (pip install 'rope_ext[viz]')
    page/              an HTML page to explore a rotation
"""

from rope_ext.viz.model_rotation import ModelRotation

# The functions of rope_ext.viz.figures. Listed here, as importing them needs matplotlib.
FIGURES = ("rotation", "tables", "wavelengths", "decay", "relative", "accuracy")

__all__ = ["FIGURES", "ModelRotation"]
