"""transformers models, rotated by rope_ext.

One model that is loaded::

    from rope_ext.integrations.transformers import patch

    model = AutoModelForCausalLM.from_pretrained(...)
    print(patch(model))

The files::

    patching.py      patch, unpatch: one loaded model
    rebuilding.py    the methods that rotate, with other rotations
    copying.py       a function with other globals and cells
    recognition.py   which rotation a model's own function is
    probes.py        what it is tried with
    rotations.py     each of these rotations as calls of the operators
    kernels_hook.py  register_kernels: every model of a process, through the package `kernels`
    families.py      the model families that this was tested on: families.json
"""

from rope_ext.integrations.transformers.kernels_hook import (
    hooked_rotations,
    kernel_mapping,
    register_kernels,
)
from rope_ext.integrations.transformers.patching import Report, Site, patch, patched, unpatch
from rope_ext.integrations.transformers.rebuilding import UnrecognizedRotation

__all__ = [
    "Report",
    "Site",
    "UnrecognizedRotation",
    "hooked_rotations",
    "kernel_mapping",
    "patch",
    "patched",
    "register_kernels",
    "unpatch",
]
