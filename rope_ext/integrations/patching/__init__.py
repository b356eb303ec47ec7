"""Replaces the rotations of loaded models of any library: what the integrations share.

The files::

models.py           patches the modules of a loaded model, and undoes it
library.py          what differs between libraries
method_copies.py    copies of the methods that rotate, with other rotations
function_copies.py  copies of functions with other globals and cells
recognition.py      finds out which rotation a function is
probes.py           numbers and sizes of the arguments that recognition.py calls functions with
pairs.py            ways to pair channels, and rotations by them
"""
